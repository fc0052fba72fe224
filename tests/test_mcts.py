"""Tree search: greedy without simulations, books that balance, and the answer a value function asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tempo_mlx.api import generate, stream
from tempo_mlx.cli.main import main
from tempo_mlx.decode.mcts import Mcts, Rollout, SearchNode, subtree
from tempo_mlx.errors import ConfigError
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify
from tests.trees import loaded, prompt, teacher

SETTINGS: dict[str, Any] = {"decoder": "mcts", "threshold": 0.02, "mcts_depth": 3, "max_tokens": 8}


def search(seed: int = 0, **settings: Any) -> Mcts:
    """A finished search."""
    decoding = stream(loaded(often=True), prompt(seed), **{**SETTINGS, **settings})
    for _ in decoding:
        pass
    assert isinstance(decoding.decoder, Mcts)
    return decoding.decoder


def test_without_simulations_it_is_greedy_decoding() -> None:
    for seed in range(4):
        plain = generate(loaded(often=True), prompt(seed), decoder="plain", temperature=0, max_tokens=12)
        run = generate(
            loaded(often=True), prompt(seed), **{**SETTINGS, "max_tokens": 12, "mcts_simulations": 0}
        )
        assert [step.tokens[0].id for step in run.steps] == [step.tokens[0].id for step in plain.steps]
        assert run.final_text == plain.final_text
        assert run.finish_reason == plain.finish_reason


def test_visits_and_values_add_up_at_every_node_and_step() -> None:
    decoding = stream(loaded(often=True), prompt(1), **SETTINGS, mcts_simulations=23)
    total = 0
    for step in decoding:
        decoder = decoding.decoder
        assert isinstance(decoder, Mcts)
        nodes = decoder.searches[-1]
        others = sum(int(item.why.split()[0]) for item in step.rejected)
        chosen = next(node for node in nodes if node["parent"] is None and node["id"] == step.tokens[0].id)
        assert chosen["visits"] == max(node["visits"] for node in nodes if node["parent"] is None)
        assert chosen["visits"] + others == sum(node["visits"] for node in nodes if node["parent"] is None)
        for index, node in enumerate(nodes):
            below = sum(child["visits"] for child in nodes if child["parent"] == index)
            assert node["visits"] == below + 1 or not below  # a text that ended counts each visit
        for node in subtree(decoder.root):
            assert node.pending == 0
            children = node.children or []
            if node.visits and children:
                assert node.visits - sum(child.visits for child in children) == 1  # its own rollout
            if node.visits:
                assert decoder.low <= node.value <= decoder.high <= 0.0
        total += 23
    assert isinstance(decoding.decoder, Mcts)
    assert decoding.decoder.simulations == total


def test_the_value_of_a_node_is_the_mean_log_probability_from_it_on() -> None:
    """One simulation: every number can be computed by transformers."""
    ids = prompt(2)
    decoder = search(2, mcts_simulations=1, max_tokens=1, mcts_depth=4)
    child = max(decoder.searches[0], key=lambda node: node["visits"])
    text = [child["id"]]
    for _ in range(4):
        text.append(
            int(np.argmax(decoder.model.forward([*ids, *text], range(len(ids) + len(text)), None,
                                                decoder.model.new_cache(), logits="last").logits))
        )  # fmt: skip
    assert child["visits"] == 1
    assert child["value"] == pytest.approx(np.mean(teacher("llama", ids, text)), abs=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"threshold": 0.005, "max_parallel_tokens": 5}, {"temperature": 1.4}]
)
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_the_text_is_exact_and_the_cache_holds_live_nodes_only(
    backend: str, settings: dict[str, Any]
) -> None:
    model, ids = loaded(backend=backend, often=True), prompt(3)
    decoding = stream(model, ids, **{**SETTINGS, **settings}, mcts_simulations=17)
    for _ in decoding:
        decoder = decoding.decoder
        assert isinstance(decoder, Mcts)
        alive = [node for node in subtree(decoder.root) if node.row is not None]
        run_root = bool(decoder.root.children)
        assert len(decoder.cache) == len(ids) + len(decoder.text) - (not run_root) + len(alive) - 1
        assert len(decoder.parents) == len(alive) - 1
    run = decoding.run()
    path = run.paths[0]
    assert path.logprob == pytest.approx(
        sum(teacher("llama", ids, path.token_ids)), abs=1e-4 * len(path.token_ids)
    )
    assert verify(run, model).max_difference < 1e-4
    assert Run.from_json(run.to_json()) == run
    assert run.tree is not None and run.tree["simulations"] == decoding.decoder.simulations  # type: ignore[union-attr]
    assert run.tree["steps"][0]["nodes"][0]["text"] == model.tokenizer.token_text(
        run.tree["steps"][0]["nodes"][0]["id"]
    )


def test_a_node_reached_again_through_the_kept_tree_is_scored_as_from_scratch() -> None:
    """Rows kept through two compactions still say what a fresh forward pass says."""
    decoding = stream(loaded(), prompt(4), **SETTINGS, mcts_simulations=40)
    for _ in range(5):
        next(decoding)
    decoder = decoding.decoder
    assert isinstance(decoder, Mcts)
    checked = 0
    for node in subtree(decoder.root):
        if node is not decoder.root and node.visits:
            above = [node]
            while above[-1].parent is not None:
                above.append(above[-1].parent)
            text = [*(n.token for n in decoder.text), *(n.token for n in reversed(above[:-1]))]
            assert node.log_prob == pytest.approx(teacher("llama", prompt(4), text)[-1], abs=1e-4)
            checked += 1
    assert checked > 10


def test_a_planted_value_is_found_where_greedy_decoding_does_not_go() -> None:
    ids = prompt(5)
    greedy = [
        step.tokens[0].id
        for step in generate(loaded(), ids, decoder="plain", temperature=0, max_tokens=3).steps
    ]
    probe = stream(loaded(), ids, **{**SETTINGS, "threshold": 0.01, "mcts_simulations": 60, "max_tokens": 1})
    next(probe)
    assert isinstance(probe.decoder, Mcts)
    nodes = probe.decoder.searches[0]
    deep = [n for n in nodes if n["parent"] is not None and nodes[n["parent"]]["parent"] is None]
    worst = min(deep, key=lambda n: nodes[n["parent"]]["prior"])
    planted = [nodes[worst["parent"]]["id"], worst["id"]]
    assert planted != greedy[:2]

    def value(rollout: Rollout) -> float:
        return float(list(rollout.token_ids[:2]) == planted) + 0.5 * float(rollout.token_ids[0] == planted[0])

    decoding = stream(
        loaded(), ids, **{**SETTINGS, "threshold": 0.01, "max_tokens": 2}, mcts_simulations=200, value=value
    )
    assert [step.tokens[0].id for step in decoding] == planted


def test_a_value_function_sees_the_text_and_must_return_a_number() -> None:
    seen: list[Rollout] = []

    def value(rollout: Rollout) -> float:
        seen.append(rollout)
        return 0.0

    ids = prompt(6)
    for _ in stream(loaded(often=True), ids, **SETTINGS, mcts_simulations=6, value=value):
        pass
    eos = loaded(often=True).tokenizer.eos_ids
    assert {rollout.committed for rollout in seen} == set(range(max(r.committed for r in seen) + 1))
    for rollout in seen:
        assert rollout.log_probs == pytest.approx(teacher("llama", ids, rollout.token_ids), abs=1e-3)
        assert rollout.finished == (rollout.token_ids[-1] in eos)
    broken = stream(loaded(), ids, **SETTINGS, value=lambda _: float("nan"))
    with pytest.raises(ConfigError, match="finite"):
        next(broken)
    with pytest.raises(ConfigError, match="mcts"):
        stream(loaded(), ids, branches=2, value=value)


def test_a_child_is_chosen_by_its_worth_and_by_what_is_left_to_explore() -> None:
    """PUCT by hand: a value scaled to the tree's, and c * prior * sqrt(tries + 1) / (1 + visits + pending)."""
    found = search(mcts_c_puct=1.5)
    found.low, found.high = -4.0, -2.0
    parent = SearchNode(1, -1.0, 0.5, 0.5, 1, visits=2, value_sum=-6.0)
    fresh = SearchNode(2, -1.0, 0.5, 0.25, 2, parent)
    known = SearchNode(3, -1.0, 0.5, 0.5, 2, parent, visits=1, value_sum=-2.0, pending=1)
    assert found.score(parent, fresh, 0) == pytest.approx(0.5 + 1.5 * 0.25)
    assert found.score(parent, known, 8) == pytest.approx(1.0 + 1.5 * 0.5 * 3 / 3)


def test_settings_change_the_search() -> None:
    def tree(**settings: Any) -> Any:
        decoder = search(0, **settings)
        return decoder.searches, decoder.forwards

    base = tree()
    assert tree() == base  # nothing random
    for change in (
        {"mcts_c_puct": 5.0},
        {"mcts_depth": 1},
        {"mcts_simulations": 20},
        {"max_parallel_tokens": 2},
    ):
        assert tree(**change) != base


def test_interruption_and_limits_end_a_search_between_forward_passes() -> None:
    calls = 0

    def after_five() -> str | None:
        nonlocal calls
        calls += 1
        return "cancelled" if calls > 5 else None

    decoding = stream(loaded(), prompt(1), **SETTINGS, mcts_simulations=100_000, interrupted=after_five)
    assert list(decoding) == []
    assert decoding.run().finish_reason == "cancelled"
    decoding = stream(loaded(), prompt(1), **SETTINGS, mcts_simulations=1000, max_cache_tokens=60)
    sizes = [len(decoding.decoder.cache) for _ in decoding]  # type: ignore[union-attr]
    assert sizes and max(sizes) <= 60


def test_a_saved_search_is_drawn_as_trees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = generate(loaded(), prompt(1), **SETTINGS, mcts_simulations=15)
    assert run.tree is not None
    run.save(tmp_path / "run.json")
    assert main(["show", str(tmp_path / "run.json"), "--tree"]) == 0
    drawn = capsys.readouterr().out
    assert f"simulations {run.tree['simulations']}" in drawn
    assert drawn.count("chosen") == drawn.count("step ") == len(run.steps)
    shown = sum(len(step["nodes"]) for step in run.tree["steps"])
    assert 0.5 * shown < drawn.count("prior") <= shown
    generate(loaded(), prompt(1), branches=2, max_tokens=2).save(tmp_path / "run.json")
    assert main(["show", str(tmp_path / "run.json"), "--tree"]) == 2
    assert "searched no tree" in capsys.readouterr().err


def test_the_search_stays_inside_the_context() -> None:
    model = loaded()
    limit = model.model.architecture.max_position_embeddings
    ids = prompt(0, limit - 4)
    decoding = stream(model, ids, **{**SETTINGS, "max_tokens": 50, "mcts_depth": 10}, mcts_simulations=12)
    assert len(list(decoding)) == 4
    assert decoding.finish_reason == "length"


@pytest.mark.parametrize(
    ("rule", "start", "bound"),
    [
        ("threshold", 0.02, lambda p: p[-1]),
        ("min-p", 0.15, lambda p: p[-1] / p[0]),
        ("top-p", 0.2, lambda p: sum(p[:-1])),
    ],
)
@pytest.mark.parametrize("rounded", [-1e-6, 1e-6])
def test_verify_holds_a_prior_to_its_rule_where_the_last_bits_decide_it(
    rule: str, start: float, bound: Callable[[list[float]], float], rounded: float
) -> None:
    """A bound that the least of some siblings just reaches, or just misses: their number is open, their shares not."""
    model, name = loaded(often=True), rule.replace("-", "_")
    settings = {
        "decoder": "mcts",
        "selection": rule,
        "mcts_simulations": 30,
        "mcts_depth": 2,
        "max_tokens": 3,
    }
    settings |= {"min_steps": 3}
    step = generate(model, prompt(3), **settings, **{name: start}).steps[1]
    found = sorted((item.probability for item in (*step.tokens, *step.rejected)), reverse=True)
    run = generate(model, prompt(3), **settings, **{name: bound(found) + rounded})
    assert 1 < len(run.steps[1].rejected) + 1 in (len(found), len(found) - 1)
    assert verify(run, model).ok
    value = json.loads(run.to_json())
    nodes = value["tree"]["steps"][0]["nodes"]
    chosen = next(index for index, node in enumerate(nodes) if node["id"] == run.steps[0].tokens[0].id)
    siblings = [node for node in nodes if node["parent"] == chosen]
    assert len(siblings) > 1
    siblings[0]["prior"] *= 1.01
    assert not verify(Run.from_json(json.dumps(value)), model).ok


def test_a_search_under_a_penalty_is_what_it_says() -> None:
    """What a penalty makes of a row follows from the tokens before it, which a search's own rows are below."""
    settings: dict[str, Any] = {"mcts_simulations": 6, "mcts_depth": 2, "threshold": 0.02}
    run = generate(
        loaded(), "The sky and the", decoder="mcts", max_tokens=4, repetition_penalty=1.5, **settings
    )
    assert verify(run, loaded()).ok
