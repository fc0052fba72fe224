"""Functions and decoders of the caller's own: they decide, and the run's file says so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tempo_mlx
from tempo_mlx.cli.main import main
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.decoder import DecoderSpec, Setup
from tempo_mlx.decode.functions import described
from tempo_mlx.decode.mcts import Rollout
from tempo_mlx.decode.pruning import PruneContext, Pruned
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.decode.tempo import Tempo
from tempo_mlx.decode.tree import Choice, Frontier, Tree
from tempo_mlx.errors import ConfigError, RunFileError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify
from tempo_mlx.sessions.imports import read_run
from tempo_mlx.settings import settings_of
from tests.twins import twin

DOCS = Path(__file__).parents[1] / "docs"
PROMPT = "the sand and the"
LENGTH: dict[str, Any] = {"max_tokens": 8, "min_steps": 8}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tempo_mlx.load(str(twin("llama")))


def two_best(probabilities: Any, step: int) -> Any:
    return np.argsort(-probabilities)[:2]


def falling(step: int) -> float:
    return 0.5 / (step + 1)


def everything(context: PruneContext) -> Any:
    for view in context.sets:
        yield from view.under(view.posterior, 2.0, "everything")


def shortest(rollout: Rollout) -> float:
    return -float(len(rollout.token_ids))


FUNCTIONS: dict[str, Any] = {
    "select": two_best, "schedule": falling, "prune": everything, "value": shortest,
}  # fmt: skip


def test_a_selection_rule_decides_and_is_named(model: LoadedModel) -> None:
    run = tempo_mlx.generate(model, PROMPT, select=two_best, **LENGTH)
    assert [len(step.tokens) for step in run.steps] == [2] * 8
    assert all(step.threshold is None for step in run.steps)
    assert run.custom is not None and run.custom["select"].name == "two_best"
    replaced = ("selection", "threshold", "min_p", "top_p", "top_k")
    assert [name for name, value in run.config.items() if name in replaced and value is not None] == []
    assert Run.from_json(run.to_json()) == run
    assert verify(run, model).ok


def test_a_selection_rule_is_capped_and_recorded_best_first(model: LoadedModel) -> None:
    run = tempo_mlx.generate(
        model, PROMPT, select=lambda p, step: np.argsort(p)[-5:], max_parallel_tokens=3, **LENGTH
    )
    best = tempo_mlx.generate(model, PROMPT, selection="top-k", top_k=3, **LENGTH)
    assert [[t.id for t in step.tokens] for step in run.steps] == [
        [t.id for t in step.tokens] for step in best.steps
    ]


@pytest.mark.parametrize("decoder", ["mcts", "sample"])
def test_search_and_samples_choose_among_what_it_selects(model: LoadedModel, decoder: str) -> None:
    """Of one token a step there is no choice: every text is the greedy one."""
    count: dict[str, Any] = {"beam_width": 3} if decoder == "sample" else {"mcts_simulations": 4}
    run = tempo_mlx.generate(
        model, PROMPT, decoder=decoder, select=lambda p, step: [int(p.argmax())], **count, **LENGTH
    )
    greedy = tempo_mlx.generate(model, PROMPT, decoder="plain", temperature=0, **LENGTH)
    assert {path.token_ids for path in run.paths} == {tuple(t.id for t in greedy.best_path())}
    assert all(step.threshold is None for step in run.steps)


@pytest.mark.parametrize("ids", [[], [3, 3], [-1], [10_000]])
def test_a_selection_that_is_no_set_is_refused(model: LoadedModel, ids: list[int]) -> None:
    with pytest.raises(ConfigError, match="select function"):
        tempo_mlx.generate(model, PROMPT, select=lambda p, step: ids)


def test_an_excluded_token_cannot_be_selected(model: LoadedModel) -> None:
    eos = next(iter(model.tokenizer.eos_ids))
    with pytest.raises(ConfigError, match="probability 0"):
        tempo_mlx.generate(model, PROMPT, select=lambda p, step: [eos], **LENGTH)


def test_a_schedule_moves_the_threshold_and_no_file_says_otherwise(model: LoadedModel) -> None:
    run = tempo_mlx.generate(model, PROMPT, schedule=falling, **LENGTH)
    assert [step.threshold for step in run.steps] == [falling(step) for step in range(8)]
    for step in run.steps:
        assert all(token.probability >= falling(step.step) for token in step.tokens[1:])
    assert run.config["threshold"] is None
    assert run.custom is not None and run.custom["schedule"].name == "falling"
    with pytest.raises(ConfigError):
        GenerateConfig(**run.config)


@pytest.mark.parametrize("name", ["threshold", "rules"])
def test_what_decides_cannot_be_replaced_under_way(model: LoadedModel, name: str) -> None:
    decoding = tempo_mlx.stream(model, PROMPT, **LENGTH)
    next(decoding)
    with pytest.raises(AttributeError):
        setattr(decoding.decoder, name, falling)


def test_a_pruning_function_is_named(model: LoadedModel) -> None:
    run = tempo_mlx.generate(model, PROMPT, prune=everything, threshold=0.02, **LENGTH)
    assert any(token.removed_after is not None for step in run.steps for token in step.tokens)
    assert run.custom is not None and list(run.custom) == ["prune"]
    assert run.config["pruning_signal"] is None and run.config["threshold"] == 0.02


class Fallen:
    """A member goes whose posterior is under half of what it was a step before."""

    def __init__(self) -> None:
        self.before: dict[int, float] = {}

    def __call__(self, context: PruneContext) -> Iterator[Pruned]:
        for view in context.sets:
            slots = view.slots.tolist()
            halves = [self.before.get(slot, 0.0) / 2 for slot in slots]
            yield from view.under(view.posterior, halves, "fallen")
            self.before.update(zip(slots, view.posterior.tolist(), strict=True))


def test_a_pruning_rule_may_remember_and_hold_each_member_against_its_own_past(model: LoadedModel) -> None:
    run = tempo_mlx.generate(model, PROMPT, prune=Fallen(), threshold=0.02, max_parallel_tokens=4, **LENGTH)
    whys = [token.removed_why for step in run.steps for token in step.tokens if token.removed_why]
    assert len({why.threshold for why in whys}) > 1
    assert all(why.signal == "fallen" and why.score < why.threshold <= 0.5 for why in whys)
    assert run.custom is not None and run.custom["prune"].name.endswith("Fallen")
    assert verify(run, model).ok


def test_a_text_that_a_rule_gives_no_child_is_dropped(model: LoadedModel) -> None:
    class OneOfTwo:
        width, threshold = 2, None

        def __call__(self, frontier: Frontier) -> Choice:
            row = max(range(len(frontier.nodes)), key=lambda row: frontier.nodes[row].log_prob)
            tokens = np.argsort(-frontier.log_probs[row])[:2].tolist()
            return Choice([frontier.child(row, token) for token in tokens])

    own = replace(DECODERS["tree"], start=lambda setup: Tree(setup, OneOfTwo()))
    run = tempo_mlx.generate(model, PROMPT, decoder=own, branches=2, **LENGTH)
    dropped = [t.removed_why for step in run.steps[:-2] for t in step.tokens if t.removed_why]
    assert len(dropped) == len(run.steps[:-2]) and {why.signal for why in dropped} == {"dropped"}
    assert verify(run, model).ok


def test_a_value_function_is_named(model: LoadedModel) -> None:
    run = tempo_mlx.generate(model, PROMPT, decoder="mcts", mcts_simulations=2, max_tokens=2, value=shortest)
    assert run.custom is not None and run.custom["value"].sha256 == described(shortest)[1]


def test_without_functions_the_file_names_none(model: LoadedModel) -> None:
    run = tempo_mlx.generate(model, PROMPT, **LENGTH)
    assert run.custom is None and "custom" not in run.to_dict()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_function_is_used_or_refused(model: LoadedModel, name: str, decoder: str) -> None:
    given: dict[str, Any] = {"decoder": decoder, name: FUNCTIONS[name], "max_tokens": 2}
    if name in DECODERS[decoder].functions:
        run = tempo_mlx.generate(model, PROMPT, **given)
        assert run.custom is not None and list(run.custom) == [name]
    else:
        with pytest.raises(ConfigError, match=f"{name} function has no effect with the {decoder} decoder"):
            tempo_mlx.stream(model, PROMPT, **given)


@pytest.mark.parametrize(
    "settings",
    [{"select": two_best}, {"selection": "top-k"}, {"final_threshold": 0.5}],
)
def test_what_contradicts_a_schedule_is_refused(model: LoadedModel, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="schedule function"):
        tempo_mlx.generate(model, PROMPT, schedule=falling, **settings)


def test_what_needs_the_functions_says_so(
    model: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tempo_mlx.generate(model, PROMPT, select=two_best, **LENGTH)
    with pytest.raises(RunFileError, match="select two_best"):
        read_run(run.to_dict(), model.model)
    run.save(tmp_path / "run.json")
    command = ["verify", str(tmp_path / "run.json"), "--model", str(twin("llama"))]
    assert main([*command, "--rerun"]) == 1
    assert "select two_best" in " ".join(capsys.readouterr().err.split())
    assert main(command) == 0


def test_a_function_is_known_by_its_source(tmp_path: Path) -> None:
    assert described(partial(two_best, step=1)) == described(two_best)
    assert described(two_best)[1] != described(falling)[1]
    assert described(Setup)[0] == "Setup" and described(Setup)[1]
    assert described(eval("lambda p, step: [1]"))[1] is None


# Decoders


def test_the_table_and_the_settings_name_the_same_decoders() -> None:
    assert list(settings_of(GenerateConfig)["decoder"].choices) == list(DECODERS)
    for spec in DECODERS.values():
        if spec.texts is not None:
            assert spec.name in (settings_of(GenerateConfig)[spec.texts].row.decoders or ())


def test_a_decoder_of_ones_own_is_named(model: LoadedModel) -> None:
    def wide(setup: Setup) -> Tempo:
        inner = DECODERS["superposed"].start(replace(setup, config=replace(setup.config, threshold=0.0)))
        assert isinstance(inner, Tempo)
        return inner

    own: DecoderSpec = replace(DECODERS["superposed"], start=wide)
    run = tempo_mlx.generate(model, PROMPT, decoder=own, max_parallel_tokens=3, **LENGTH)
    assert all(len(step.tokens) == 3 for step in run.steps)
    assert run.decoder == "superposed" and run.custom is not None
    assert run.custom["decoder"].name.endswith("wide") and run.custom["decoder"].sha256
    for decoder in (own, "superposed"):
        with pytest.raises(ConfigError, match="plain"):
            tempo_mlx.stream(model, PROMPT, GenerateConfig(decoder="plain"), decoder=decoder)
    with pytest.raises(ConfigError, match="max_tokens"):
        tempo_mlx.stream(model, PROMPT, GenerateConfig(), max_tokens=3)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / "extend.md").read_text("utf-8"), re.S)


def test_the_decoder_of_the_docs_runs(tmp_path: Path) -> None:
    (tmp_path / "hesitant.py").write_text(blocks()[2])
    command = [sys.executable, "hesitant.py", str(twin("llama"))]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    lines = shown.splitlines()
    assert lines[-1] == "exact"
    assert re.search(r"'hesitant', sha256='[0-9a-f]{64}'", lines[-2])
    assert len(lines) == 4 + 2


def test_the_pruning_rule_of_the_docs_prunes(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lagging.py", str(twin("llama"))])
    exec(compile(blocks()[1], "extend.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert "went" in lines[2] and lines[-1] == "exact"


def test_the_family_of_the_docs_is_the_one_in_the_code() -> None:
    page = (DOCS / "extend.md").read_text("utf-8").split("## A family")[1]
    (row,) = re.findall(r"(?:^    .*\n)+", page, re.M)
    assert row in (DOCS.parent / "tempo_mlx" / "architecture" / "dense.py").read_text("utf-8")


def test_the_selection_rule_of_the_docs_selects(model: LoadedModel) -> None:
    names: dict[str, Any] = {}
    source = blocks()[0].replace('"smollm2-135m"', repr(str(twin("llama"))))
    exec(compile(source, "extend.md", "exec"), names)
    run: Run = names["run"]
    assert json.loads(run.to_json())["custom"]["select"]["name"] == "by_entropy"
    assert max(len(step.tokens) for step in run.steps) > 1
