"""A superposed run set back to a step, or taken over from its records, is the run it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import tempo_mlx
from tempo_mlx.api import encode_prompt
from tempo_mlx.decode.step import Step
from tempo_mlx.decode.tempo import Tempo
from tempo_mlx.errors import ArgumentError, ConflictError, NotInRunError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.verify import verify
from tempo_mlx.resolution import resolve
from tempo_mlx.sessions.editable import EditableRun
from tempo_mlx.task import Task
from tests.twins import twin

CASES: dict[str, dict[str, Any]] = {
    "lineage": {"threshold": 0.03},
    "posterior": {"threshold": 0.03, "posterior_threshold": 0.2, "pruning_signal": "posterior"},
    "own-positions": {"threshold": 0.04, "custom_rope": False},
    "screened": {"threshold": 0.03, "pruning_strategy": "coherence", "coherence_threshold": 0.9},
    "plain": {"decoder": "plain", "temperature": 0.7},
}  # fmt: skip
STEPS = 8


@pytest.fixture(scope="module", params=["llama", "qwen3_5", "lfm2", "granite4-h"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    """Layers with slots, and each kind of those with states."""
    return tempo_mlx.load(str(twin(request.param)), dtype="float32")


def begin(model: LoadedModel, steps: int = STEPS, **settings: Any) -> EditableRun:
    config = resolve({"min_steps": 50, **settings})
    prompt = encode_prompt(model, "Once upon a time", config)
    run = EditableRun(Task(model, prompt, config), 500, lambda: None)
    for _ in run.extend(steps, lambda: None) if steps else ():
        pass
    return run


def same(one: Step, other: Step) -> None:
    assert [token.id for token in one.tokens] == [token.id for token in other.tokens]
    assert [token.probability for token in one.tokens] == pytest.approx(
        [token.probability for token in other.tokens], abs=1e-6
    )


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@pytest.mark.parametrize("step", [0, 1, 5, STEPS - 1])
def test_at_a_step_the_same_set_is_chosen_from_the_same_rows(
    model: LoadedModel, settings: dict[str, Any], step: int
) -> None:
    whole = begin(model, **settings).tempo
    back = whole.at(step)
    assert len(back.steps) == step and not back.waiting
    assert all(t.removed_after is None or t.removed_after < step for s in back.steps for t in s.tokens)
    probabilities = back.combine()
    ids = [token.id for token in whole.steps[step].tokens]
    assert [float(probabilities[token]) for token in ids] == pytest.approx(
        [token.probability for token in whole.steps[step].tokens], abs=1e-6
    )
    assert len(whole.steps) == STEPS  # the run itself stays where it is


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_what_was_taken_over_goes_on_as_the_run_did(model: LoadedModel, settings: dict[str, Any]) -> None:
    whole = begin(model, STEPS, **settings)
    records = copy.deepcopy(whole.tempo.steps)
    again = begin(model, 0, **settings)
    assert sum(1 for _ in again.take_over(records, lambda: None)) == STEPS
    assert again.tempo.lattice.slots.tolist() == whole.tempo.lattice.slots.tolist()
    assert sorted(again.tempo.members) == sorted(whole.tempo.members)
    for one, other in zip(whole.extend(4, lambda: None), again.extend(4, lambda: None), strict=True):
        same(one, other)
    assert verify(again.run(), model).ok


@pytest.mark.parametrize("which", [0, -1])
def test_a_probed_set_that_is_run_again_shows_its_attention(model: LoadedModel, which: int) -> None:
    """What `screen` has seen in a run, a reader who went back must see: else the file says that nobody looked."""
    run = begin(model, **CASES["screened"])
    whole = run.run()
    probed = [s.step for s in whole.steps[1:-1] if sum(t.slot is not None for t in s.tokens) > 1][which]
    run.branch(probed + 1, whole.steps[probed + 1].tokens[0].id)
    seen = [t.attention for s in run.run().steps[:probed] for t in s.tokens]
    assert any(attention is not None for attention in seen)
    assert verify(run.run(), model).ok


def test_a_taken_over_set_that_removed_something_has_been_run(model: LoadedModel) -> None:
    """Its rows are not run twice; those of a last set that removed nothing are left to be run."""
    seen = set()
    for steps in range(1, STEPS + 1):
        tempo = begin(model, steps, **CASES["posterior"]).tempo
        removing = bool(tempo.prune(tempo.run()))
        again = begin(model, 0, **CASES["posterior"])
        for _ in again.take_over(copy.deepcopy(tempo.steps), lambda: None):
            pass
        assert bool(again.tempo.waiting) != removing
        assert sorted(again.tempo.members) == sorted(tempo.members)
        seen.add(removing)
    assert seen == {True, False}


def test_a_pinned_member_is_spared(model: LoadedModel) -> None:
    whole = begin(model, **CASES["posterior"]).tempo
    slot, after = next(
        (t.slot, t.removed_after) for s in whole.steps for t in s.tokens if t.removed_after is not None
    )
    for pinned in (True, False):
        run = begin(model, after + 1, **CASES["posterior"])
        run.pin(slot, True)
        assert run.describe()["pinned"] == [slot]
        with pytest.raises(ConflictError, match="pinned"):
            run.remove(slot)
        if not pinned:
            run.step_back()
        for _ in run.extend(1, lambda: None):
            pass
        assert (slot in run.tempo.members) == pinned


def test_what_cannot_be_done_says_whose_fault_it_is(model: LoadedModel) -> None:
    run = begin(model, 2)
    for act, kind, argument in (
        (lambda: run.branch(9, 1), NotInRunError, "step"),
        (lambda: run.branch(0, 10_000), ArgumentError, "token_id"),
        (lambda: run.remove(999), NotInRunError, "slot"),
        (lambda: run.members(-1), NotInRunError, "step"),
        (lambda: begin(model, decoder="tree"), ArgumentError, "decoder"),
        (run.step_forward, ConflictError, None),
    ):
        with pytest.raises(kind) as error:  # type: ignore[var-annotated]
            act()
        assert error.value.argument == argument


def test_the_same_decoder_stands_behind_both(model: LoadedModel) -> None:
    run = begin(model, **CASES["lineage"])
    assert isinstance(run.tempo, Tempo)
    alone = tempo_mlx.generate(
        model, "Once upon a time", max_tokens=STEPS, min_steps=STEPS, **CASES["lineage"]
    )
    assert [[t.id for t in s.tokens] for s in run.run().steps] == [
        [t.id for t in s.tokens] for s in alone.steps
    ]
    assert run.run().final_text == alone.final_text and run.run().text == alone.text


def test_whatever_was_done_by_hand_the_run_is_what_it_says(model: LoadedModel) -> None:
    """Members removed, another token chosen, what is next looked at, undone, redone, rows forgotten to make room: a
    dense pass finds the same."""
    run = begin(model, 4, threshold=0.02)

    def go_on(steps: int) -> None:
        for _ in run.extend(steps, lambda: None):
            pass
        result = verify(run.run(), model)
        assert result.ok, result.findings

    wide = [step for step in run.tempo.steps[:-1] if sum(t.slot is not None for t in step.tokens) > 1]
    for step in wide[-2:]:
        run.remove(next(t.slot for t in step.tokens if t.slot is not None))
    go_on(2)
    assert sum(t.removed_after is not None for s in run.run().steps for t in s.tokens) == len(wide[-2:]) > 0
    run.members(len(run.tempo.steps) - 1)
    go_on(1)
    run.branch(2, run.tempo.steps[2].tokens[-1].id)
    go_on(3)
    run.step_back()
    run.step_back()
    go_on(2)
    run.arena.limit = len(run.arena.cache) + 16
    for _ in range(4):  # more rows than there is room for, if none were forgotten
        go_on(2)
        run.step_back()
    go_on(2)
    holding = [s.tempo.cache for s in (run.state, *run.undo, *run.redo) if s.tempo.cache.states is not None]
    assert sum(any(m.held for m in view.states.memories.values()) for view in holding) <= 2
