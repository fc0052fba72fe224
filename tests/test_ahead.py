"""Passes begun ahead on a device that chooses itself: the same runs, from a kilobyte a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tempo_mlx import generate, load, stream
from tempo_mlx.api import Stream
from tempo_mlx.decode import registry
from tempo_mlx.decode.tempo import Tempo
from tempo_mlx.errors import ComputeError, NumbersError
from tempo_mlx.mlx import mx
from tempo_mlx.model import device
from tempo_mlx.model.choosing import OnDevice, chosen
from tempo_mlx.model.forward import Choice
from tempo_mlx.model.transformer import Transformer
from tempo_mlx.report.records import RunPrompt
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify
from tempo_mlx.resolution import resolve
from tempo_mlx.task import Task
from tests import twins
from tests.test_threads import in_new_thread

PROMPT = "the sand and the sea"
RUNS: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.03},
    "warm, late end": {"threshold": 0.03, "temperature": 1.7, "min_steps": 9},
    "min-p": {"selection": "min-p", "min_p": 0.1},
    "top-p": {"selection": "top-p", "top_p": 0.6},
    "top-k": {"selection": "top-k", "top_k": 3},
    "posterior": {"threshold": 0.02, "pruning_signal": "posterior", "posterior_threshold": 0.2},
    "attention": {"threshold": 0.02, "attention_threshold": 0.02},
    "greedy": {"temperature": 0.0},
    "greedy, attention": {"temperature": 0.0, "attention_threshold": 0.02},
    "plain": {"decoder": "plain", "temperature": 0.0},
    "plain, sampled": {"decoder": "plain", "temperature": 0.8, "seed": 3, "min_steps": 12},
    "weighted": {"threshold": 0.03, "attend": "weighted", "custom_rope": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    return load(str(twins.twin("llama")))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)


class Logged(OnDevice):
    """What chooses, and what it was told to do, and what it then gave."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model)
        self.log: list[str] = []
        self.given: list[Any] = []

    def begin(self, *given: Any, **more: Any) -> Any:
        self.log.append("begin")
        return Told(
            super().begin(*(each.inner if isinstance(each, Told) else each for each in given), **more), self
        )


class Told:
    def __init__(self, inner: Any, told: Logged) -> None:
        self.inner, self.told = inner, told

    def read(self) -> Any:
        self.told.log.append("read")
        self.told.given.append(self.inner.read())
        return self.told.given[-1]


def decoding(loaded: Any, chooser: OnDevice | None, **settings: Any) -> Tempo:
    """To its end."""
    config = resolve({"max_tokens": 12, **settings})
    task = Task(loaded, RunPrompt(PROMPT, tuple(loaded.tokenizer.encode(PROMPT))), config)
    spec = registry.DECODERS[config.decoder]
    made: list[Any] = []

    def start(setup: Any) -> Any:
        made.append(spec.start(replace(setup, chooser=chooser)))
        return made[0]

    for _ in Stream(replace(task, own=replace(spec, start=start))):
        pass
    decoder: Tempo = made[0]
    return decoder


def seeing_all(loaded: Any, settings: Mapping[str, Any]) -> Run:
    """A run whose distributions somebody looks at, so that they are whole."""
    config = resolve({"max_tokens": 20, **settings})
    task = Task(
        loaded, RunPrompt(PROMPT, tuple(loaded.tokenizer.encode(PROMPT))), config, observer=lambda rows: None
    )
    return Stream(task).complete()


def numbers_in(record: Any) -> Iterator[tuple[Any, bool]]:
    """Every value of a run, and whether it is one that rounds."""
    if isinstance(record, dict):
        for key in sorted(record):
            yield key, False
            yield from numbers_in(record[key])
    elif isinstance(record, list | tuple):
        yield len(record), False
        for each in record:
            yield from numbers_in(each)
    else:
        yield record, isinstance(record, float)


def assert_same(found: Run, expected: Run, tolerance: float = 2e-5) -> None:
    for (a, rounds), (b, _) in zip(numbers_in(of(found)), numbers_in(of(expected)), strict=True):
        assert a == pytest.approx(b, abs=tolerance) if rounds else a == b


def of(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.to_dict().items() if name != "timing"}


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_those_of_whole_distributions(llama: Any, name: str, on_gpu: None) -> None:
    found = generate(llama, PROMPT, **{"max_tokens": 20, **RUNS[name]})
    assert_same(found, seeing_all(llama, RUNS[name]))
    assert verify(found, llama).ok


@pytest.mark.parametrize("family", ["qwen3_next", "gemma3", "gpt_oss"])
def test_of_layers_with_states_or_windows_too(family: str, on_gpu: None) -> None:
    model = load(str(twins.twin(family)))
    for name in ("threshold", "plain, sampled"):
        assert_same(
            generate(model, PROMPT, **{"max_tokens": 20, **RUNS[name]}), seeing_all(model, RUNS[name])
        )


def test_of_one_text_the_next_pass_is_begun_before_the_last_is_read(llama: Any) -> None:
    told = Logged(llama.model)
    decoding(llama, told, decoder="plain", temperature=0.0, min_steps=5, max_tokens=5)
    assert told.log == ["begin", "begin", "read", "begin", "read", "begin", "read", "read"]


def test_of_sets_a_pass_is_begun_before_the_step_is_handed_out(llama: Any) -> None:
    told = Logged(llama.model)
    state = decoding(llama, told, threshold=0.03, max_tokens=5)
    assert told.log == ["begin", "read"] * 4 and not state.ahead.queued  # none after the last set
    assert state.slots == len(state.cache)


def test_about_a_kilobyte_comes_back(llama: Any) -> None:
    told = Logged(llama.model)
    decoding(llama, told, threshold=0.005, max_parallel_tokens=8)
    sizes = [found.tokens.nbytes + found.log_probs.nbytes + found.normal.nbytes for found in told.given]
    assert max(len(found.log_probs) for found in told.given) == 8 and max(sizes) <= 1024


ALL: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": ["5=1"]}, "penalty": {"repetition_penalty": 1.2}, "truncation": {"typical_p": 0.9},
    "grammar": {"regex": "[a-z ]+"}, "combine": {"combine": "mean"}, "screening": {"pruning_strategy": "diversity"},
    "plain, truncated": {"decoder": "plain", "temperature": 0.8, "min_p": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_whatever_looks_at_whole_distributions_gets_them(llama: Any, name: str) -> None:
    told = Logged(llama.model)
    state = decoding(llama, told, **ALL[name])
    assert state.ahead is None and not told.log
    assert state.log_probs.shape[1] == llama.model.architecture.vocab_size


def test_so_does_a_function_of_the_callers_own(llama: Any, on_gpu: None) -> None:
    widths = []

    def select(probabilities: Any, step: int) -> Sequence[int]:
        widths.append(len(probabilities))
        return [int(probabilities.argmax())]

    generate(llama, PROMPT, select=select, max_tokens=4)
    assert set(widths) == {llama.model.architecture.vocab_size}


def test_on_a_cpu_nothing_is_begun_ahead(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    assert llama.chooser is None
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    assert llama.chooser is not None


def test_the_slots_told_are_those_without_rows_run_ahead(llama: Any, on_gpu: None) -> None:
    under_way = stream(llama, PROMPT, threshold=0.03, max_tokens=9, attention_threshold=0.02)
    prompt = len(under_way.prompt.token_ids)
    for step in under_way:
        decoder = under_way.decoder
        assert isinstance(decoder, Tempo)
        alive = [
            m for s in decoder.steps[:-1] for m in s.tokens if m.slot is not None and m.removed_after is None
        ]
        assert decoder.slots == prompt + len(alive)
        assert len(decoder.cache) - decoder.slots == (len(step.tokens) if step.step < 8 else 0)


def test_the_caches_limit_holds_for_rows_run_ahead(llama: Any) -> None:
    told = Logged(llama.model)
    prompt = len(llama.tokenizer.encode(PROMPT))
    state = decoding(llama, told, decoder="plain", temperature=0.0, max_cache_tokens=prompt + 3, min_steps=12)
    assert len(state.steps) == 4 and len(state.cache) == prompt + 3 and told.log.count("begin") == 3


@pytest.mark.parametrize("name", ["threshold", "plain"])
def test_a_pass_may_be_read_in_another_thread(llama: Any, name: str, on_gpu: None) -> None:
    settings = {"max_tokens": 6, **RUNS[name]}
    under_way = stream(llama, PROMPT, **settings)
    while in_new_thread(lambda: next(under_way, None)) is not None:
        pass
    assert_same(under_way.run(), generate(llama, PROMPT, **settings))


def test_a_copy_goes_its_own_way(llama: Any) -> None:
    config = resolve({"decoder": "plain", "temperature": 0.0, "max_tokens": 12})
    task = Task(llama, RunPrompt(PROMPT, tuple(llama.tokenizer.encode(PROMPT))), config)
    start = task.spec.start

    def with_chooser(setup: Any) -> Any:
        return start(replace(setup, chooser=OnDevice(llama.model)))

    state: Any = replace(task, own=replace(task.spec, start=with_chooser)).start(llama.model, lambda: None)
    for _ in range(3):
        state.advance()
    other = state.copy()
    assert [state.advance().tokens[0].id for _ in range(5)] == [
        other.advance().tokens[0].id for _ in range(5)
    ]


def test_numbers_that_are_not_finite_are_noticed(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(OnDevice):
        def begin(self, *given: Any, **more: Any) -> Any:
            pass_ = super().begin(*given, **more)
            return replace(pass_, normal=pass_.normal * mx.nan)

    under = decoding(llama, Broken(llama.model), threshold=0.03)
    assert len(under.steps) == 1
    bad = mx.array([[0.0, float("nan"), 1.0]])
    assert not np.isfinite(np.array(chosen(bad, Choice(np.ones(1), 1.0, 1))[2])).any()
    assert issubclass(NumbersError, ComputeError)


def test_of_equals_the_lower_ids_are_there() -> None:
    logits = np.zeros((2, 50), np.float32)
    logits[:, 30:35] = 3.0
    tokens, *_ = chosen(mx.array(logits), Choice(np.array([0.3, 0.7]), 1.0, 2))
    assert {30, 31, 32, 33, 34} <= set(np.array(tokens).tolist())
    one, _, _ = chosen(mx.array(logits[:1]), Choice(np.ones(1), 1.0, 1))
    assert np.array(one).tolist() == [30]


def test_a_drawn_token_is_where_the_mass_says() -> None:
    logits = np.log(np.array([[0.5, 1e-38, 0.25, 0.25]], np.float32))
    places = {0.0: 0, 0.49: 0, 0.51: 2, 0.74: 2, 0.76: 3, 1.0: 3}
    for place, expected in places.items():
        token, _, _ = chosen(mx.array(logits), Choice(np.ones(1), 1.0, 1, place=place))
        assert np.array(token).tolist() == [expected]
    token, _, _ = chosen(mx.array(logits), Choice(np.ones(1), 1.0, 1, excluded=(0,), place=0.4))
    assert np.array(token).tolist() == [2]


def test_the_best_of_what_is_left_is_found_however_improbable() -> None:
    logits = np.full((2, 50), -300.0, np.float32)
    logits[:, 0], logits[:, 7] = 0.0, -200.0
    token, log_probs, _ = chosen(mx.array(logits), Choice(np.array([0.3, 0.7]), 1.0, 1, excluded=(0,)))
    assert np.array(token).tolist() == [7]
    np.testing.assert_allclose(np.array(log_probs), -200.0, atol=1e-4)
