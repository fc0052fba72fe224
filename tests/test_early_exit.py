"""Early exit: what leaves is caught up exactly, what is lossless is full decoding, and the audit tells the truth."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tempo_mlx.api import Stream, stream
from tempo_mlx.cli.main import main
from tempo_mlx.decode.decoder import Setup
from tempo_mlx.decode.registry import DECODERS as REGISTRY
from tempo_mlx.exits import early_exit
from tempo_mlx.exits import plan as exit_plan
from tempo_mlx.exits.agreement import at_most
from tempo_mlx.exits.ahead import EXIT, LEARNING, LOOKUP, PAUSE, RELEARNING, Lookup, Payoff
from tempo_mlx.exits.cache import MOST_DRAFTED, MOST_WAITING, Drafted, WaitingRows
from tempo_mlx.exits.calibration import Calibration, Exit, key_of, place_of
from tempo_mlx.exits.early_exit import Account, EarlyExit
from tempo_mlx.exits.plan import ExitPlan, Found, OpenExit, make_plan
from tempo_mlx.mlx import mx
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify
from tempo_mlx.resolution import resolve
from tests import twins
from tests.exits import ALWAYS, foresee, loaded_with_exits

PROMPT = "The and in then the"
MARGINS = {1: 0.15, 2: 0.1, 3: 0.5}
DECODERS: dict[str, dict[str, Any]] = {
    "plain": {"decoder": "plain", "temperature": 0},
    "superposed": {"threshold": 0.02},
    "compacted": {"threshold": 0.02, "use_retroactive_pruning": True, "posterior_threshold": 0.3},
    "branches": {"branches": 4},
    "sampled": {"decoder": "plain", "temperature": 1.0},
    "best": {"threshold": 0.02, "attend": "best"},
}


def decoded(loaded: Any, tokens: int = 40, **settings: Any) -> Stream:
    decoding = stream(loaded, PROMPT, max_tokens=tokens, **{"min_steps": tokens, **settings})
    for _ in decoding:
        pass
    return decoding


def sets(decoding: Stream) -> list[list[int]]:
    return [[token.id for token in step.tokens] for step in decoding.steps]


@pytest.fixture
def never_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exits of a random model keep no promise; here they stay open all the same."""
    monkeypatch.setattr(exit_plan, "SURE", 0.0)


# The plan


def planned(loaded: Any, exits: Sequence[Exit], **settings: Any) -> ExitPlan:
    key = key_of(loaded.model.info)
    Calibration(key, tuple(exits), np.arange(9, dtype=np.int32)).save(place_of(key))
    return make_plan(loaded.model, resolve({"early_exit": True, **settings}))[1]


def test_exits_open_where_they_pay_at_the_margin_that_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_with_exits("llama", {}, tmp_path, monkeypatch)
    points = np.array([[0.875, 0.996, 100_000], [0.5, 0.991, 200_000]])
    exits = [
        Exit(1, 4, points, pays={0.95: 0.7, 0.99: 0.5}),
        Exit(2, 4, points, drafts={0.95: 0.6}),
        Exit(2, 8, points, pays={0.98: 0.8}),
        Exit(3, 4, points),
    ]

    def opened(**settings: Any) -> tuple[list[tuple[int, float, int]], OpenExit | None]:
        plan = planned(loaded, exits, **settings)
        x = mx.zeros((1, 64))
        return [(item.layer, item.least, len(item.read(x).tokens)) for item in plan.exits], plan.drafts

    found, drafts = opened()
    assert found == [(1, 0.7, 4)], "raised, for all exits to keep it together"
    assert drafts is not None and (drafts.layer, drafts.least, drafts.target) == (2, 0.6, 0.95)
    assert opened(exit_target_agreement=0.96) == ([(2, 0.8, 8)], None), "the next stricter one that is known"
    assert opened(exit_target_agreement=0.995) == ([(1, 0.875, 4)], None), (
        "stricter than any: by its own curve"
    )
    found, drafts = opened(exit_layers=(1, 2, 3))
    assert found == [(1, 0.5, 4), (2, 0.5, 4)], (
        "of two widths the narrower one; one that never pays stays shut"
    )
    assert drafts is not None and drafts.layer == 2
    plan = planned(loaded, exits, raw_confidence=True, exit_layers=(2, 1), confidence_thresholds=(0.8, 0.7))
    assert [(item.layer, item.least) for item in plan.exits] == [(1, 0.7), (2, 0.8)]
    assert plan.drafts is plan.exits[1]
    for grammar in ({"regex": "a+"}, {"choices": ("a", "b")}):  # which forbids what an exit is sure of
        assert opened(**grammar) == ([], None)
        assert opened(**grammar, lossless=True)[1] is not None, "which only drafts"


def test_an_exit_may_choose_what_the_text_said_before_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt whose beginning is in the cache only the rest is run."""
    loaded = loaded_with_exits("llama", {}, tmp_path, monkeypatch)
    plan = planned(loaded, [Exit(1, 4, np.array([[0.5, 0.999, 10_000]]), pays={0.95: 0.5})])
    exits = EarlyExit(loaded.model, plan, context=[200])
    assert plan.exits[0].read(mx.zeros((1, 64))).tokens.tolist() == [0, 1, 2, 3, 200]
    exits.forward([100, 101], [0, 1], None, exits.new_cache(), logits="last")
    assert plan.exits[0].read(mx.zeros((1, 64))).tokens.tolist() == [0, 1, 2, 3, 100, 101, 200]


# Exact catch-up


class Mirrored:
    """A cache of an early-exit model beside one of the full model that is told the same."""

    def __init__(self, early: Any, full: Any) -> None:
        self.early, self.full = early, full

    def __len__(self) -> int:
        return len(self.early)

    def keep(self, indices: Any) -> None:
        self.early.keep(indices)
        self.full.keep(indices)

    def truncate(self, length: int) -> None:
        self.early.truncate(length)
        self.full.truncate(length)

    def settle(self, length: int) -> None:
        self.early.settle(length)
        self.full.settle(length)


class Mirror:
    """An early-exit model that runs every pass through the full model too, for its cache."""

    def __init__(self, exits: EarlyExit) -> None:
        self.exits, self.architecture, self.info = exits, exits.architecture, exits.info
        self.most_waiting = 0

    def new_cache(self) -> Mirrored:
        return Mirrored(self.exits.new_cache(), self.exits.model.new_cache())

    def forward(self, tokens: Any, positions: Any, bias: Any, cache: Mirrored, **rest: Any) -> Any:
        self.exits.model.forward(tokens, positions, bias, cache.full, logits="none")
        found = self.exits.forward(tokens, positions, bias, cache.early, **rest)
        self.most_waiting = max(self.most_waiting, len(cache.early.waiting))
        assert len(cache.early) == len(cache.full)
        return found


def contents(cache: Any) -> np.ndarray:
    """(2, layers, K, S, D)."""
    buffers = (cache._keys, cache._values)
    return np.array(
        [[np.array(layer[0][:, : len(cache)]) for layer in buffer.values()] for buffer in buffers]
    )


def mirrored(loaded: Any, settings: dict[str, Any], steps: int = 40) -> tuple[Any, Mirror]:
    config = resolve({**settings, "early_exit": True})
    ids = loaded.tokenizer.encode(PROMPT)
    mirror = Mirror(EarlyExit(*make_plan(loaded.model, config), ids))
    run: Any = REGISTRY[config.decoder].start(Setup(mirror, ids, config))
    for _ in range(steps):
        run.advance()
    return run, mirror


@pytest.mark.usefixtures("never_closing")
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
@pytest.mark.parametrize("decoder", ["plain", "superposed", "compacted", "branches"])
def test_after_catching_up_every_layers_cache_is_the_full_models(
    name: str, decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_with_exits(name, MARGINS, tmp_path, monkeypatch)
    run, mirror = mirrored(loaded, {**DECODERS[decoder], "exit_lookup": False})
    assert sum(item.left for item in mirror.exits.plan.exits if item.layer < 3) > 5, "too little left to test"
    assert 1 < mirror.most_waiting <= MOST_WAITING + 1
    mirror.exits.finish(run.cache.early)
    assert np.abs(contents(run.cache.early.inner) - contents(run.cache.full)).max() < 1e-4


@pytest.mark.usefixtures("never_closing")
def test_rows_leave_together_when_the_least_sure_of_them_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A margin between those of two rows: both go on. At or below the lesser: both leave."""
    loaded = loaded_with_exits("llama", {1: ALWAYS}, tmp_path, monkeypatch)
    config = resolve({"early_exit": True, "exit_lookup": False})
    exits = EarlyExit(*make_plan(loaded.model, config))
    (item,) = (item for item in exits.plan.exits if item.layer == 1)
    bias = np.where(np.eye(2), 0, -np.inf).astype(np.float32)
    found = []
    look = exits.look
    monkeypatch.setattr(exits, "look", lambda item, x: found.append(look(item, x)) or found[-1])
    pairs = 0
    for first in range(20, 40):
        exits.forward([first, first + 60], [0, 0], bias, exits.new_cache())
        low, high = sorted(found[-1].confidence.tolist())
        if high - low < 0.05:
            continue
        pairs += 1
        for least, leaves in ((low, True), ((low + high) / 2, False), (high + 0.01, False)):
            item.least, before = least, item.left
            out = exits.forward([first, first + 60], [0, 0], bias, exits.new_cache())
            assert (item.left > before) == leaves == (out.left_at is not None)
        item.least = ALWAYS
    assert pairs > 5


@pytest.mark.usefixtures("never_closing")
def test_slots_may_go_while_rows_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a slot that waiting rows see, of one they do not, and of waiting rows themselves."""
    loaded = loaded_with_exits("llama", {1: ALWAYS}, tmp_path, monkeypatch)
    config = resolve({"early_exit": True})
    mirror = Mirror(EarlyExit(*make_plan(loaded.model, config)))
    cache = mirror.new_cache()

    def run(rows: int, hidden: tuple[int, ...] = ()) -> None:
        bias = np.zeros((rows, len(cache) + rows), np.float32)
        bias[:, len(cache) :] = np.where(np.eye(rows), 0, -np.inf)
        bias[:, list(hidden)] = -np.inf
        mirror.forward(range(10, 10 + rows), [len(cache)] * rows, bias, cache)

    mirror.forward(range(8), range(8), None, cache, logits="last")
    run(1, hidden=(3,))
    run(2, hidden=(3, 5))
    cache.keep(np.array([0, 1, 2, 4, 5, 6, 7, 8, 9, 10]))
    assert [len(rows.positions) for rows in cache.early.waiting] == [1, 2]  # none saw slot 3
    run(3)
    cache.truncate(len(cache) - 3)
    assert len(cache.early.waiting) == 2
    cache.truncate(len(cache) - 1)  # half of a set
    assert not cache.early.waiting
    run(1)
    run(1, hidden=(2,))
    cache.keep(np.delete(np.arange(len(cache)), 2))  # the first of them saw it
    assert not cache.early.waiting
    run(2)
    mirror.exits.finish(cache.early)
    assert not cache.early.waiting
    assert np.abs(contents(cache.early.inner) - contents(cache.full)).max() < 1e-4


def test_what_was_run_ahead_goes_when_something_else_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_with_exits("llama", {}, tmp_path, monkeypatch)
    monkeypatch.setattr(Lookup, "guess", lambda self: [7, 8])
    mirror = Mirror(EarlyExit(*make_plan(loaded.model, resolve({"early_exit": True}))))
    cache = mirror.new_cache()

    def run(tokens: Sequence[int], logits: str = "all") -> None:
        bias = None if logits == "none" else np.zeros((len(tokens), len(cache) + len(tokens)), np.float32)
        mirror.forward(tokens, range(len(cache), len(cache) + len(tokens)), bias, cache, logits=logits)

    run(range(10, 18), logits="none")
    for other in (
        lambda: cache.truncate(len(cache) - 1),
        lambda: cache.keep(np.arange(1, len(cache))),
        lambda: run([3, 4], logits="none"),
        lambda: run([9, 9]),
        lambda: mirror.exits.finish(cache.early),
    ):
        run([5])
        assert len(cache.early.drafted) == 2 and len(cache.early) == len(cache.full)
        other()
        assert not cache.early.drafted
        assert len(cache.early.inner) == len(cache.early) == len(cache.full)
    assert np.abs(contents(cache.early.inner) - contents(cache.full)).max() < 1e-4


def test_a_row_run_ahead_answers_to_no_other_pass() -> None:
    bias = np.array([[0.0, -np.inf, 0.0]], np.float32)
    drafted = Drafted(7, WaitingRows(None, np.array([2]), bias), np.zeros((1, 9), np.float32))
    assert drafted.is_of([7], [2], bias) and drafted.is_of([7], [2], bias + np.float32(1e-7))
    assert not drafted.is_of([8], [2], bias)
    assert not drafted.is_of([7], [3], bias)
    assert not drafted.is_of([7, 7], [2, 2], np.repeat(bias, 2, axis=0))
    assert not drafted.is_of([7], [2], bias[:, :2])
    assert not drafted.is_of([7], [2], bias - np.float32(0.1))
    assert not drafted.is_of([7], [2], None)
    everything = Drafted(7, WaitingRows(None, np.array([2]), 0 * bias[:, ::2]), drafted.logits)
    assert everything.is_of([7], [2], None) and not everything.is_of([7, 7], [2, 2], None)


@pytest.mark.usefixtures("never_closing")
def test_propagated_keys_are_those_of_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers below the exit are exact, those above are not, and nothing waits."""
    loaded = loaded_with_exits("llama", {1: ALWAYS}, tmp_path, monkeypatch)
    run, mirror = mirrored(loaded, {**DECODERS["superposed"], "exit_kv": "propagate"})
    assert mirror.most_waiting == 0
    first = len(loaded.tokenizer.encode(PROMPT))
    difference = np.abs(contents(run.cache.early.inner) - contents(run.cache.full))
    assert difference[:, :1].max() < 1e-4  # the first layer sees tokens alone
    assert difference[:, 2:, :, first:].max() > 1e-2


# Lossless


@pytest.mark.parametrize("decoder", DECODERS)
def test_lossless_is_full_decoding(decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Payoff, "allows", lambda self, source: True)
    loaded = loaded_with_exits("llama", {2: ALWAYS}, tmp_path, monkeypatch)
    full = decoded(loaded, **DECODERS[decoder])
    ours = decoded(loaded, early_exit=True, lossless=True, **DECODERS[decoder])
    assert sets(ours) == sets(full)
    for step, wanted in zip(ours.steps, full.steps, strict=True):
        for token, other in zip(step.tokens, wanted.tokens, strict=True):
            assert token.probability == pytest.approx(other.probability, abs=1e-5)
        assert step.exit_layer is None and step.removed == wanted.removed
    if decoder in ("plain", "sampled"):
        timing = ours.run().timing
        assert (
            timing["early_exit_drafted"] > timing["early_exit_accepted"] > 0
        )  # some were right, some dropped


def test_a_text_may_end_inside_a_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Payoff, "allows", lambda self, source: True)
    loaded = loaded_with_exits("llama", {2: ALWAYS}, tmp_path, monkeypatch)
    for stop_at in range(2, 12):
        full = decoded(loaded, decoder="plain", temperature=0)
        last = full.steps[stop_at].tokens[0].id
        monkeypatch.setattr(loaded.tokenizer, "eos_ids", frozenset({last}))
        settings = {"decoder": "plain", "temperature": 0, "min_steps": 0}
        ours = decoded(loaded, early_exit=True, lossless=True, **settings)
        assert sets(ours) == sets(decoded(loaded, **settings))
        assert ours.run().finish_reason == "stop"
        monkeypatch.setattr(loaded.tokenizer, "eos_ids", frozenset())


def test_running_ahead_that_does_not_pay_pauses_after_a_steps_worth_of_loss() -> None:
    payoff, ahead = Payoff(), []
    for step in range(LEARNING + 4 + PAUSE + 1):
        payoff.step()
        source = LOOKUP if payoff.allows(LOOKUP) else None
        ahead += [step] if source else []
        payoff.took(1.3 if source else 1.0, source)
    # 4 x 0.3 is more than the one step that may be lost
    assert ahead == [*range(LEARNING, LEARNING + 4), LEARNING + 4 + PAUSE]


def test_running_ahead_that_pays_goes_on_and_steps_are_timed_anew() -> None:
    payoff, in_full = Payoff(), []
    for step in range(100):
        payoff.step()
        source = EXIT if payoff.allows(EXIT) else None
        in_full += [] if source else [step]
        payoff.took(1.3 if source else 1.0, source)
        payoff.yielded(source)
    assert in_full == [*range(LEARNING), *range(LEARNING - 1 + RELEARNING, 100, RELEARNING)]
    payoff.step()
    payoff.took(9.0, LOOKUP)
    payoff.step()
    assert payoff.allows(EXIT) and not payoff.allows(LOOKUP), "each is held to its own account"


# Guesses from the text itself


def test_as_many_tokens_are_guessed_as_read_alike() -> None:
    assert Lookup([1, 2, 3, 4]).guess() == []
    assert Lookup([1, 2, 3, 4, 1, 2]).guess() == [3, 4]
    assert Lookup([9, 1, 2, 3, 4, 5, 8, 1, 2, 6, 7, 1, 2]).guess() == [6, 7], "of equals the latest"
    assert Lookup([9, 1, 2, 3, 4, 5, 8, 1, 2, 6, 7, 9, 1, 2]).guess() == [3, 4, 5], (
        "the longest before the latest"
    )
    text = Lookup([*range(20), 30])
    text.add(range(19))
    assert text.guess() == [19, 30, 0, 1, 2, 3, 4]
    assert Lookup([5] * 4).guess() == [5]


@pytest.mark.parametrize(
    ("confidence", "rows"),
    [
        ([0.9, 0.8, 0.1], 2),  # the second's guess is wrong, so that nobody asks for the third
        ([0.9, 0.4, 0.9], 0),
        ([0.4, 0.9, 0.9], 0),
    ],
)
def test_an_exit_answers_for_the_rows_asked_for_or_for_none(confidence: list[float], rows: int) -> None:
    logits = np.eye(9, dtype=np.float32)[[7, 5, 1]]
    found = Found(logits, np.arange(9), np.array(confidence, np.float32))
    assert early_exit.answered(found, [7, 4], 0.5) == rows


def narrow(decoder: str) -> dict[str, Any]:
    """A decoder's settings with sets of one member mostly, after which guesses are possible."""
    return {**DECODERS[decoder], **({"threshold": 0.05} if "threshold" in DECODERS[decoder] else {})}


def test_guesses_come_from_the_likeliest_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_with_exits("llama", {3: ALWAYS}, tmp_path, monkeypatch)
    heard: list[int] = []

    class Hearing(Lookup):
        def add(self, tokens: Any) -> None:
            heard.extend(tokens)

    monkeypatch.setattr(early_exit, "Lookup", Hearing)
    run = decoded(loaded, early_exit=True, **DECODERS["superposed"]).run()
    assert any(len(step.tokens) > 1 for step in run.steps)
    assert heard == [*run.prompt.token_ids, *(step.tokens[0].id for step in run.steps[:-1])]


@pytest.mark.usefixtures("never_closing")
def test_what_an_exit_is_not_sure_of_it_does_not_answer_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_with_exits("llama", {3: 0.05}, tmp_path, monkeypatch)
    foresee(monkeypatch, loaded.model)
    run = decoded(loaded, early_exit=True, **DECODERS["plain"]).run()
    ids = [*run.prompt.token_ids, *(step.tokens[0].id for step in run.steps[:-1])]
    logits = loaded.model.forward(ids, range(len(ids)), None, loaded.model.new_cache()).logits
    best = np.sort(logits[run.prompt_length :], axis=1)
    sure = best[:, -1] - best[:, -2] >= 0.05 - 1e-4
    left = np.array([step.exit_layer == 3 for step in run.steps[1:]])
    assert run.early_exit is not None and run.early_exit["accepted"] > 5
    assert left.any() and not sure.all() and not (left & ~sure).any()


@pytest.mark.usefixtures("never_closing")
@pytest.mark.parametrize("layer", [None, 3])
@pytest.mark.parametrize("decoder", ["plain", "superposed", "compacted", "best"])
def test_what_is_run_ahead_changes_nothing(
    decoder: str, layer: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choices are the full model's, with no exit and with one at the last layer that knows the whole vocabulary."""
    monkeypatch.setattr(early_exit, "AUDITED_EVERY", 1)
    loaded = loaded_with_exits("llama", {layer: ALWAYS} if layer else {}, tmp_path, monkeypatch)
    settings = narrow(decoder)
    full = decoded(loaded, **settings)
    foresee(monkeypatch, loaded.model)
    ours = decoded(loaded, early_exit=True, **settings)
    assert sets(ours) == sets(full)
    run = ours.run()
    assert run.early_exit is not None
    account: Any = ours.exits.account  # type: ignore[union-attr]
    assert run.early_exit["drafted"] == 3 * account.ahead > run.early_exit["accepted"] > 5
    assert account.ahead_seconds > 0
    assert run.early_exit["passes"] == len(run.steps) - 1
    assert [step.exit_layer for step in run.steps[1:]] == [layer] * (len(run.steps) - 1)
    rows = sum(len(step.tokens) for step in run.steps[:-1])
    for item in run.early_exit["exits"]:
        assert item["left"] == item["audited"] == item["agreed"] == rows, "handed out or not"
    without = decoded(loaded, early_exit=True, exit_lookup=False, **settings).run()
    assert without.early_exit is not None and without.early_exit["drafted"] == 0


@pytest.mark.usefixtures("never_closing")
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_the_cache_is_exact_after_running_ahead_while_rows_wait(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_with_exits(name, MARGINS, tmp_path, monkeypatch)
    foresee(monkeypatch, loaded.model, of=3)
    run, mirror = mirrored(loaded, DECODERS["plain"])
    account = mirror.exits.account
    assert account.drafted > account.accepted > 5 and mirror.most_waiting > 1
    mirror.exits.finish(run.cache.early)
    assert np.abs(contents(run.cache.early.inner) - contents(run.cache.full)).max() < 1e-4


@pytest.mark.parametrize("decoder", DECODERS)
def test_lossless_is_full_decoding_whoever_runs_ahead(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guesses from the text, and with what the exit drafts where there is none."""
    monkeypatch.setattr(Payoff, "allows", lambda self, source: True)
    loaded = loaded_with_exits("llama", {2: ALWAYS}, tmp_path, monkeypatch)
    settings = narrow(decoder)
    full = decoded(loaded, **settings)
    foresee(monkeypatch, loaded.model, of=3)
    ours = decoded(loaded, early_exit=True, lossless=True, **settings)
    assert sets(ours) == sets(full)
    if decoder != "branches":
        assert ours.run().timing["early_exit_accepted"] > 1


@pytest.mark.parametrize("allowed", [(), (LOOKUP,), (EXIT,), (LOOKUP, EXIT)])
@pytest.mark.parametrize("decoder", ["plain", "superposed"])
def test_only_who_pays_runs_ahead_and_each_is_told_what_it_took_and_gave(
    decoder: str, allowed: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: list[str | None] = []
    gave: list[str | None] = []
    monkeypatch.setattr(Payoff, "allows", lambda self, source: source in allowed)
    monkeypatch.setattr(Payoff, "took", lambda self, seconds, source: took.append(source))
    monkeypatch.setattr(Payoff, "yielded", lambda self, source: gave.append(source))
    loaded = loaded_with_exits("llama", {2: ALWAYS}, tmp_path, monkeypatch)
    foresee(monkeypatch, loaded.model, of=3)
    run = decoded(loaded, early_exit=True, lossless=True, **narrow(decoder)).run()
    alone = sum(len(step.tokens) == 1 for step in run.steps[:-1])
    assert len(took) + len(gave) == alone and len(gave) == run.timing["early_exit_accepted"]
    assert set(took) == ({None} if EXIT not in allowed else set()) | set(allowed)
    assert set(gave) == set(allowed)
    if LOOKUP in allowed:
        assert took != sorted(took, key=str), "whoever ran ahead, not whoever did so last"


def test_an_exit_drafts_from_its_own_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the last layer drafts is what is then chosen."""
    monkeypatch.setattr(Payoff, "allows", lambda self, source: source == EXIT)
    loaded = loaded_with_exits("llama", {3: ALWAYS}, tmp_path, monkeypatch)
    timing = decoded(loaded, early_exit=True, lossless=True, **DECODERS["plain"]).run().timing
    assert timing["early_exit_drafted"] - timing["early_exit_accepted"] < MOST_DRAFTED


# The audit


def test_an_exit_that_breaks_its_promise_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_with_exits("llama", {1: ALWAYS}, tmp_path, monkeypatch)
    run = decoded(loaded, tokens=120, early_exit=True, **DECODERS["plain"]).run()
    assert run.early_exit is not None
    (item,) = run.early_exit["exits"]
    assert item["closed"] and item["left"] < 60 and item["agreed"] < 0.95 * item["audited"]
    assert all(step.exit_layer is None for step in run.steps[-40:])


@pytest.mark.usefixtures("never_closing")
def test_the_audit_is_what_the_full_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agreement, counted anew from the texts by a model that knows nothing of exits."""
    monkeypatch.setattr(early_exit, "AUDITED_EVERY", 1)
    loaded = loaded_with_exits("llama", MARGINS, tmp_path, monkeypatch)
    run = decoded(loaded, early_exit=True, **DECODERS["plain"]).run()
    ids = [*run.prompt.token_ids, *(step.tokens[0].id for step in run.steps)]
    logits = loaded.model.forward(ids[:-1], range(len(ids) - 1), None, loaded.model.new_cache()).logits
    best = logits[run.prompt_length - 1 :].argmax(axis=1)
    early = [n for n, step in enumerate(run.steps) if step.exit_layer is not None]
    agreed = sum(int(best[n] == run.steps[n].tokens[0].id) for n in early)
    assert run.early_exit is not None
    assert sum(item["audited"] for item in run.early_exit["exits"]) == len(early) > 10
    assert sum(item["left"] for item in run.early_exit["exits"]) == len(early)
    assert run.early_exit["agreement"] == pytest.approx(agreed / len(early))
    depths = [4 if step.exit_layer is None else step.exit_layer + 1 for step in run.steps[1:]]
    assert run.early_exit["mean_layers"] == pytest.approx(np.mean(depths))
    assert set(run.timing) >= {f"early_exit_saved_by_{part}" for part in ("layers", "head", "lookup")}
    assert Run.from_json(run.to_json()) == run
    found = verify(run, loaded)
    assert found.early == len(early) and found.agreement < 1
    assert (
        len(found.findings) == 1 and "not compatible with the target" in found.findings[0]
    )  # as the audit says


@pytest.mark.usefixtures("never_closing")
def test_the_first_16_that_leave_are_audited_and_then_every_fourth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_with_exits("llama", {3: ALWAYS}, tmp_path, monkeypatch)
    for tokens, audited in ((15, 14), (17, 16), (18, 17), (21, 17), (22, 18)):
        run = decoded(loaded, tokens=tokens, early_exit=True, exit_lookup=False, **DECODERS["plain"]).run()
        assert run.early_exit is not None
        (item,) = run.early_exit["exits"]
        assert (item["left"], item["audited"]) == (tokens - 1, audited)
        assert "early_exit_saved_by_head" in run.timing, "what the whole head takes is known from the audit"


def test_what_was_saved_is_told_from_what_the_parts_took() -> None:
    account = Account(10)
    assert account.timing() == {}
    account.ran(6, True, 6.0)  # leaves
    account.took("look", 0.5)
    account.passed(6)
    account.ran(6, True, 6.0)  # goes on, with the one before
    account.ran(4, False, 5.0)
    account.took("head", 3.0)
    account.took("audit", 0.25)
    account.passed(10)
    saved = account.timing()
    assert saved["early_exit_saved_by_layers"] == pytest.approx((20 - 17) / 26)
    assert saved["early_exit_saved_by_head"] == pytest.approx((6 - 3 - 0.75) / 26)
    assert saved["early_exit_saved_by_lookup"] == 0
    with account.running_ahead():
        account.ran(10, False, 12.0)
        account.took("look", 1.0)
        account.took("head", 4.0)
    account.passed(10)
    account.passed(10)
    account.accepted += 1
    again = account.timing()
    assert again["early_exit_saved_by_lookup"] == pytest.approx((26 - 17) / 52)
    for part in ("layers", "head"):  # seconds as before, of twice the time
        assert again[f"early_exit_saved_by_{part}"] == pytest.approx(saved[f"early_exit_saved_by_{part}"] / 2)


def test_a_binomial_tail() -> None:
    assert at_most(3, 3, 0.5) == pytest.approx(1.0)
    assert at_most(0, 4, 0.5) == pytest.approx(1 / 16)
    assert at_most(17, 20, 0.95) == pytest.approx(0.0755, abs=1e-4)  # scipy.stats.binom.cdf(17, 20, 0.95)


def test_what_is_not_on_the_shortlist_can_be_chosen_if_the_text_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_with_exits("llama", {1: ALWAYS}, tmp_path, monkeypatch, shortlist=range(5))
    prompt = loaded.tokenizer.encode(PROMPT)
    steps = decoded(loaded, tokens=60, early_exit=True, **DECODERS["plain"]).steps
    seen = {*range(5), *prompt}
    for step in steps:
        if step.exit_layer is not None:
            assert step.tokens[0].id in seen
        seen.add(step.tokens[0].id)
    assert any(step.exit_layer is not None and step.tokens[0].id not in range(5) for step in steps)


# The command line


def test_compare_shows_full_lossy_and_lossless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded_with_exits("llama", {1: ALWAYS}, tmp_path, monkeypatch)
    model = ["--model", str(twins.twin("llama")), "--max-tokens", "30"]
    assert (
        main(
            ["generate", PROMPT, *model, "--early-exit", "--compare", "--default-mode", "--temperature", "0"]
        )
        == 0
    )
    out = capsys.readouterr().out
    texts = {name: re.search(rf"^{name}: (.*)$", out, re.M) for name in ("full", "lossy", "lossless")}
    assert all(texts.values()), out
    assert texts["full"][1] == texts["lossless"][1] != texts["lossy"][1]  # type: ignore[index]
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[-3:]}
    assert rows["lossless"][2] == rows["full"][2] == "100%" != rows["lossy"][2]
    assert float(rows["lossy"][-1]) < 4 == float(rows["full"][-1])
    assert main(["generate", PROMPT, *model, "--compare"]) == 2
    assert "add --early-exit" in capsys.readouterr().err


def test_verify_holds_a_run_that_left_early_to_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Leaving at the last layer agrees always; at an early one of a random model, hardly ever."""
    file = tmp_path / "run.json"
    command = ["verify", str(file), "--model", str(twins.twin("llama"))]
    cases = (
        (3, False, 0, "Left early, where agreement is promised"),
        (1, False, 1, "NOT exact"),
        (1, True, 0, "Exact"),
    )
    for layer, lossless, code, verdict in cases:
        loaded = loaded_with_exits("llama", {layer: ALWAYS}, tmp_path, monkeypatch)
        decoded(loaded, early_exit=True, lossless=lossless, **DECODERS["plain"]).run().save(file)
        assert main(command) == code
        said = capsys.readouterr().out
        assert re.search(rf"^{verdict}.*% of the best tokens agree", said, re.M), said
        assert ("not compatible with the target of 0.95" in said) == bool(code)
        assert main([*command, "--rerun"]) == 0


def test_the_originals_demonstration_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded_with_exits("llama", MARGINS, tmp_path, monkeypatch)
    script = Path(__file__).parent.parent / "scripts" / "early_exit_demo.py"
    flags = ["--model", str(twins.twin("llama")), "--prompt", PROMPT, "--max-tokens", "8"]
    originals = ["--exit-layers", "1,2", "--confidence-thresholds", "0.7,0.8"]
    for more in ([], originals, [*originals, "--raw-confidence"], ["--compare"]):
        monkeypatch.setattr(sys, "argv", [str(script), *flags, *more])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        assert end.value.code == 0, capsys.readouterr().err
    assert "lossless:" in capsys.readouterr().out
