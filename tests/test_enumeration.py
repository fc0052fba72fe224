"""Enumeration: every text with its exact probability, in the one right order, and nothing of all there is lost."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pytest

from tempo_mlx.api import generate, stream
from tempo_mlx.cli.main import main
from tempo_mlx.decode.enumeration import Enumeration
from tempo_mlx.errors import ConfigError, RunFileError
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify
from tempo_mlx.resolution import resolve
from tests.small import LENGTH, PROMPT, Ids, after, all_texts, ended, log_prob, small
from tests.trees import loaded, prompt, teacher

EVERYTHING: dict[str, Any] = {"threshold": 0.0, "leaves": 100_000}


def enumerate_(vocabulary: int, **settings: Any) -> Run:
    return generate(small(vocabulary), PROMPT, decoder="enumerate", max_tokens=LENGTH, **settings)


def texts(run: Run) -> list[Ids]:
    return [path.token_ids for path in run.paths]


def best_first(vocabulary: int, threshold: float, order: str = "mass") -> list[Ids]:
    """The paper's order, with the probabilities of transformers: of all deviations the most probable, then greedily.
    By doubt: of all deviations that of which P(token) / P(best), multiplied along its text, is greatest."""
    known = after(vocabulary)
    heap: list[tuple[float, Ids]] = []
    leaves: list[Ids] = []
    text: Ids = ()
    while True:
        while not ended(vocabulary, text):
            log_probs = known[text]
            best = max(range(vocabulary), key=lambda token, of=log_probs: of[token])
            for token, value in enumerate(log_probs):
                if token != best and math.exp(value) >= threshold:
                    new = (*text, token)
                    lost = sum(max(known[new[:at]]) - known[new[:at]][new[at]] for at in range(len(new)))
                    weight = log_prob(vocabulary, new) if order == "mass" else -lost
                    heapq.heappush(heap, (-weight, new))
            text = (*text, best)
        leaves.append(text)
        if not heap:
            return leaves
        text = heapq.heappop(heap)[1]


@pytest.mark.parametrize("vocabulary", [8, 12])
def test_all_texts_are_found_and_together_are_certain(vocabulary: int) -> None:
    run = enumerate_(vocabulary, **EVERYTHING)
    expected = all_texts(vocabulary)
    assert len(run.paths) == len(expected) and run.finish_reason == "stop"
    assert sorted(texts(run)) == sorted(expected)
    for path in run.paths:
        assert math.exp(path.logprob) == pytest.approx(expected[path.token_ids], abs=1e-6)
    tree = run.tree or {}
    assert tree["found"] == pytest.approx(1.0, abs=1e-9)
    assert tree["open"] == 0.0 and tree["truncated"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("vocabulary", [8, 12])
@pytest.mark.parametrize("threshold", [0.02, 0.1])
@pytest.mark.parametrize("leaves", [1, 7, 40])
def test_found_open_and_truncated_are_all_there_is(vocabulary: int, threshold: float, leaves: int) -> None:
    run = enumerate_(vocabulary, threshold=threshold, leaves=leaves)
    tree = run.tree or {}
    assert tree["found"] + tree["open"] + tree["truncated"] == pytest.approx(1.0, abs=1e-9)
    assert tree["found"] == pytest.approx(sum(math.exp(path.logprob) for path in run.paths), abs=1e-12)
    expected = all_texts(vocabulary)
    assert tree["found"] == pytest.approx(sum(expected[text] for text in texts(run)), abs=1e-6)
    kept = {tuple(text) for text in best_first(vocabulary, threshold)}
    assert tree["found"] + tree["open"] >= sum(expected[text] for text in kept) - 1e-6
    assert verify(run, small(vocabulary)).ok


@pytest.mark.parametrize("vocabulary", [8, 12])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("order", ["mass", "doubt"])
def test_the_order_is_that_of_a_best_first_search(vocabulary: int, rows: int, order: str) -> None:
    expected = best_first(vocabulary, 0.03, order)
    assert expected[:9] != best_first(vocabulary, 0.03, "doubt" if order == "mass" else "mass")[:9]
    settings: dict[str, Any] = {"threshold": 0.03, "rows": rows, "leaf_order": order}
    whole = enumerate_(vocabulary, leaves=100_000, **settings)
    assert sorted(texts(whole)) == sorted(expected)
    assert texts(whole)[:200] == expected[:200]  # of thousands some weigh the same but for the last bits
    some = enumerate_(vocabulary, leaves=9, **settings)
    assert texts(some) == expected[:9]
    assert verify(some, small(vocabulary)).ok


def test_following_several_at_once_takes_fewer_passes_and_changes_nothing_else() -> None:
    runs = [
        generate(
            loaded(often=True),
            prompt(seed),
            leaves=10,
            rows=rows,
            threshold=0.02,
            max_tokens=20,
            merge_length=4,
        )
        for seed in range(2)
        for rows in (1, 8)
    ]
    for one, eight in zip(runs[::2], runs[1::2], strict=True):
        assert texts(one) == texts(eight)
        a, b = one.tree or {}, eight.tree or {}
        for name in ("found", "open", "truncated", "merged", "unsure"):
            assert a[name] == pytest.approx(b[name], abs=1e-6)
        assert b["passes"] <= a["passes"] / 2 and b["rows"] >= a["rows"]
        shape = [[(token.id, token.branch) for token in step.tokens] for step in one.steps]
        assert shape == [[(token.id, token.branch) for token in step.tokens] for step in eight.steps]


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5", "falcon_h1"])
def test_every_text_has_its_own_exact_log_probability(name: str) -> None:
    ids = prompt(1, 9)
    model = loaded(name, often=True)
    run = generate(model, ids, leaves=6, threshold=0.001, max_tokens=12)
    assert len(run.paths) > 1
    for path in run.paths:
        assert path.logprob == pytest.approx(
            sum(teacher(name, ids, path.token_ids)), abs=1e-4 * len(path.token_ids)
        )
    assert verify(run, model).ok
    assert Run.from_json(run.to_json()) == run


def test_the_first_text_is_greedy_decodings() -> None:
    for seed in range(2):
        plain = generate(loaded(often=True), prompt(seed), decoder="plain", temperature=0, max_tokens=20)
        run = generate(loaded(often=True), prompt(seed), leaves=3, max_tokens=20)
        assert run.paths[0].token_ids == tuple(step.tokens[0].id for step in plain.steps)
        assert run.final_text == plain.final_text


def test_limits_of_texts_probability_and_passes() -> None:
    whole = enumerate_(8, **EVERYTHING)
    sums = list(accumulate(math.exp(path.logprob) for path in whole.paths))
    count = next(at for at, mass in enumerate(sums, 1) if mass >= 0.5)
    half = enumerate_(8, threshold=0.0, leaves=100_000, coverage=0.5)
    assert len(half.paths) == count and half.finish_reason == "stop"
    short = enumerate_(8, threshold=0.0, leaves=100_000, max_passes=6, rows=4)
    assert (short.tree or {})["passes"] == 6 and short.finish_reason == "length"
    assert 0 < len(short.paths) < len(whole.paths)
    for run in (half, short):
        assert verify(run, small(8)).ok


def test_a_run_that_is_stopped_keeps_what_has_ended() -> None:
    model = loaded(often=True)
    for passes in (1, 3, 6, 9):
        decoding = stream(model, prompt(5), leaves=12, rows=4, threshold=0.02, max_tokens=12)
        for _ in range(passes):
            next(decoding)
        decoding.cancel()
        run = decoding.complete()
        assert run.finish_reason == "cancelled" and run.paths
        assert sum(
            (run.tree or {})[name] for name in ("found", "open", "truncated", "merged")
        ) == pytest.approx(1.0)
        found = verify(run, model)
        assert found.ok, found.findings


def test_a_text_that_comes_to_repeat_another_ends() -> None:
    def repeated(merge_length: int, seed: int) -> Run:
        settings: dict[str, Any] = {"leaves": 12, "threshold": 0.02, "max_tokens": 14}
        return generate(loaded(), prompt(seed), merge_length=merge_length, **settings)

    merged = 0.0
    for seed in range(3):
        never, soon = repeated(0, seed), repeated(2, seed)
        assert (never.tree or {})["merged"] == 0.0
        merged += (soon.tree or {})["merged"]
        found = verify(soon, loaded())
        assert found.ok, found.findings
    assert merged > 0.0


def test_the_cache_stays_small_and_what_left_it_is_run_again() -> None:
    model, settings = loaded(), {"leaves": 12, "threshold": 0.01, "max_tokens": 16, "merge_length": 0}
    free = generate(model, prompt(2), **settings)
    decoding = stream(model, prompt(2), max_cache_tokens=30, **settings)
    most = 0
    for _ in decoding:
        assert isinstance(decoding.decoder, Enumeration)
        most = max(most, len(decoding.decoder.cache))
    tight = decoding.run()
    assert texts(tight) == texts(free) and tight.finish_reason == "stop"
    assert most == (tight.tree or {})["most_slots"] <= 30 < (free.tree or {})["most_slots"]
    assert (tight.tree or {})["rows"] > (free.tree or {})["rows"]
    full = generate(model, prompt(2), max_cache_tokens=10, **settings)
    assert full.finish_reason == "memory"


def test_rows_leave_the_cache_once_no_wanted_text_needs_them() -> None:
    run = generate(loaded(), prompt(2), leaves=12, threshold=0.01, max_tokens=24, merge_length=0, rows=1)
    tree = run.tree or {}
    assert tree["most_slots"] < 0.7 * tree["rows"]


def test_branching_only_where_the_next_token_is_uncertain() -> None:
    open_, gated = (enumerate_(12, threshold=0.06, leaves=100, branch_entropy=gate) for gate in (0.0, 1.9))
    assert texts(gated) != texts(open_)
    known = after(12)
    for text in texts(gated):
        for at, token in enumerate(text):
            values = known[text[:at]]
            entropy = -sum(value * math.exp(value) for value in values)
            assert token == values.index(max(values)) or entropy >= 1.9 - 1e-5
    assert verify(gated, small(12)).ok


@pytest.mark.parametrize("rows", [1, 8])
def test_texts_less_sure_than_the_first_are_given_up(rows: int) -> None:
    window, settings = 3, {"threshold": 0.04, "max_tokens": 10, "merge_length": 0, "rows": rows}
    model, ids = loaded(often=True), prompt(1)

    def least(text: Ids, end: int) -> float:
        """The least mean of so many neighbours of a text's tokens up to `end`, by transformers."""
        sums = [0.0, *accumulate(teacher("llama", ids, text))]
        means = [(b - a) / window for a, b in zip(sums, sums[window : end + 1], strict=False)]
        return min(means, default=math.inf)

    free = generate(model, ids, leaves=30, **settings)
    run = generate(model, ids, leaves=30, warmup=2, confidence_window=window, **settings)
    assert texts(run)[:2] == texts(free)[:2] and texts(run) != texts(free)
    floor = min(least(text, len(text)) for text in texts(run)[:2])
    wanted = [text for text in texts(free) if text in texts(free)[:2] or least(text, len(text) - 1) >= floor]
    assert texts(run)[: len(wanted)] == wanted
    assert all(least(text, len(text) - 1) >= floor for text in texts(run))
    masses = [(run.tree or {})[name] for name in ("found", "open", "truncated", "merged", "unsure")]
    assert sum(masses) == pytest.approx(1.0, abs=1e-9) and masses[-1] > 0.0
    assert verify(run, model).ok


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a leaf more probable": lambda run: run["paths"][2].update(logprob=run["paths"][2]["logprob"] + 0.05),
    "a leaf left out": lambda run: run["paths"].pop(1),
    "two leaves exchanged": lambda run: run["paths"].insert(1, run["paths"].pop(2)),
    "more found": lambda run: run["tree"].update(found=run["tree"]["found"] + 0.01),
    "more found at the cost of what is open": lambda run: run["tree"].update(
        found=run["tree"]["found"] + 0.01, open=run["tree"]["open"] - 0.01
    ),
    "less truncated": lambda run: run["tree"].update(
        truncated=run["tree"]["truncated"] - 0.05, open=run["tree"]["open"] + 0.05
    ),
    "something merged": lambda run: run["tree"].update(merged=0.01, open=run["tree"]["open"] - 0.01),
    "something unsure": lambda run: run["tree"].update(unsure=0.01, open=run["tree"]["open"] - 0.01),
    "texts that were unsure": lambda run: run["config"].update(warmup=1, confidence_window=1),
    "no passes": lambda run: run["tree"].update(passes=0),
    "a mass that is none": lambda run: run["tree"].update(open=None),
    "one more thing in tree": lambda run: run["tree"].update(certain=True),
    "another number of leaves": lambda run: run["config"].update(leaves=7),
    "fewer leaves wanted than given": lambda run: run["config"].update(leaves=4),
    "another threshold": lambda run: run["config"].update(threshold=0.1) or [
        step.update(threshold=0.1) for step in run["steps"]
    ],
    "a coverage reached before": lambda run: run["config"].update(coverage=0.01),
    "stopped by nothing": lambda run: run.update(finish_reason="length"),
    "a gate that was closed": lambda run: run["config"].update(branch_entropy=1.9),
    "a token more probable": lambda run: run["steps"][1]["tokens"][0].update(
        probability=run["steps"][1]["tokens"][0]["probability"] + 0.01
    ),
    "a token that is not kept": lambda run: run["steps"][-1]["tokens"][-1].update(id=0),
    "another branch": lambda run: run["steps"][2]["tokens"][0].update(branch=3),
    "branches exchanged": lambda run: [
        token.update(branch={1: 2, 2: 1}.get(token["branch"], token["branch"]))
        for step in run["steps"]
        for token in step["tokens"]
    ],
    "an end that goes on": lambda run: run["config"].update(max_tokens=6),
    "another order": lambda run: run["config"].update(leaf_order="doubt"),
    "texts that were merged": lambda run: run["config"].update(merge_length=1),
}  # fmt: skip


@pytest.mark.parametrize("what", FORGERIES)
def test_verify_finds_a_forgery(what: str) -> None:
    run = enumerate_(12, threshold=0.02, leaves=6)
    assert verify(run, small(12)).ok
    forged = json.loads(run.to_json())
    FORGERIES[what](forged)
    try:
        found = verify(Run.from_json(json.dumps(forged)), small(12))
    except RunFileError:
        return
    assert not found.ok


def test_decoded_again_it_takes_the_same_passes(tmp_path: Path) -> None:
    """Which are not the steps of its file. To its end; to a number of passes; and one that was stopped."""
    settings: dict[str, Any] = {"leaves": 8, "rows": 1, "max_tokens": 4, "threshold": 0.01}
    stopped = stream(loaded(), prompt(1), **settings)
    for _ in islice(stopped, 7):
        pass
    runs = generate(loaded(), prompt(1), **settings), generate(loaded(), prompt(1), max_passes=6, **settings)
    for number, run in enumerate((*runs, stopped.run())):
        assert len(run.steps) == 4 < (run.tree or {})["passes"]
        run.save(tmp_path / f"{number}.json")
        assert main(["verify", str(tmp_path / f"{number}.json"), "--rerun"]) == 0


def test_a_leaf_that_is_not_the_best_left_is_found() -> None:
    """The run of a greater number, cut to the leaves that a worse search would have found."""
    honest = enumerate_(12, threshold=0.02, leaves=6)
    worse = enumerate_(12, threshold=0.02, leaves=7)
    value = json.loads(worse.to_json())
    branch = 5  # the sixth text is passed over for the seventh
    value["steps"] = [
        {**step, "tokens": [t for t in step["tokens"] if t["branch"] != branch]} for step in value["steps"]
    ]
    value["steps"] = [step for step in value["steps"] if step["tokens"]]
    slot, slots = len(PROMPT), {}
    for step in value["steps"]:
        going = [token for token in reversed(step["tokens"]) if token["slot"] is not None]
        for token in going:
            slots[token["slot"]] = token["slot"] = slot
            slot += 1
        mass = sum(token["probability"] for token in going)
        for token in step["tokens"]:
            token["branch"] -= token["branch"] > branch
            token["parents"] = [[slots[p], a, b] for p, a, b in token["parents"]]
            if token["slot"] is not None:
                token["weight"] = token["probability"] / mass
    del value["paths"][branch]
    value["config"]["leaves"] = 6
    value["tree"]["open"] += value["tree"]["found"]
    value["tree"]["found"] = sum(math.exp(path["logprob"]) for path in value["paths"])
    value["tree"]["open"] -= value["tree"]["found"]
    found = verify(Run.from_json(json.dumps(value)), small(12))
    assert any("passed over" in sentence for sentence in found.findings), found.findings
    assert verify(honest, small(12)).ok


def test_settings_that_belong_to_it() -> None:
    config = resolve({"leaves": 4})
    assert (config.decoder, config.merge_length) == ("enumerate", 10)
    assert resolve({"decoder": "tree"}).merge_length == 3
    with pytest.raises(ConfigError, match="temperature and leaves are for different decoders"):
        resolve({"leaves": 4, "temperature": 0.5})
    with pytest.raises(ConfigError, match="coverage and branches are for different decoders"):
        resolve({"branches": 4, "coverage": 0.5})


def test_truncation_and_grammars_take_mass_away() -> None:
    run = enumerate_(12, threshold=0.0, leaves=100_000, top_p=0.6)
    tree = run.tree or {}
    assert tree["open"] == 0.0 and 0.1 < tree["truncated"] < 0.9
    assert tree["found"] + tree["truncated"] == pytest.approx(1.0, abs=1e-9)
    expected = all_texts(12)
    for path in run.paths:
        assert math.exp(path.logprob) == pytest.approx(expected[path.token_ids], abs=1e-6)
    assert verify(run, small(12)).ok
    model = loaded()
    chosen = generate(model, prompt(1), leaves=9, threshold=0.0, choices=("in", "on", "and"))
    assert {path.text for path in chosen.paths} >= {"in", "on", "and"}
    assert verify(chosen, model).ok


def test_texts_that_say_the_same_are_one_of_those_wanted() -> None:
    """A stop string cuts what differs: such leaves count with their mass, and not as texts."""
    model = loaded(often=True)
    for seed in range(3):
        run = generate(
            model, prompt(seed), leaves=4, threshold=0.01, max_tokens=10, stop=("a", "e", "o", "s", "1")
        )
        if len(run.paths) > 4:
            break
    said = [path.text.strip() for path in run.paths]
    assert len(set(said)) == 4 and said[-1] not in said[:-1]
    assert (run.tree or {})["found"] == pytest.approx(sum(math.exp(path.logprob) for path in run.paths))
    assert verify(run, model).ok
