"""A device that fails, and numbers that are not finite: a sentence, what was generated, and a server that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tempo_mlx import ask, generate, load, score, stream
from tempo_mlx.cli.main import main
from tempo_mlx.errors import ComputeError, DeviceError, NumbersError, TempoError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.model.failures import told_failures
from tempo_mlx.model.forward import Forward
from tempo_mlx.model.transformer import Transformer
from tempo_mlx.server.errors import translate
from tests.twins import twin

METAL = "[metal::malloc] Attempting to allocate 9663676416 bytes which is greater than the maximum allowed buffer size."
SETTINGS: dict[str, dict[str, Any]] = {
    "superposed": {"threshold": 0.02},
    "plain": {"decoder": "plain"},
    "branches": {"branches": 3},
    "beam": {"decoder": "beam"},
    "diverse beam": {"decoder": "diverse-beam"},
    "sample": {"decoder": "sample"},
    "mcts": {"decoder": "mcts", "mcts_simulations": 3, "mcts_depth": 2},
}


class Failing:
    """A model that computes some passes, and then does what `then` makes of one."""

    def __init__(self, loaded: LoadedModel, passes: int, then: Callable[[Forward], Forward]) -> None:
        self.model, self.passes, self.then = loaded.model, passes, then
        self.architecture, self.info = loaded.model.architecture, loaded.model.info
        self.new_cache, self.embeddings = loaded.model.new_cache, loaded.model.embeddings

    @told_failures()
    def forward(self, *args: Any, **options: Any) -> Forward:
        self.passes -= 1
        found = self.model.forward(*args, **options)
        return found if self.passes >= 0 else self.then(found)


def not_finite(found: Forward) -> Forward:
    return found if found.logits is None else replace(found, logits=np.full_like(found.logits, np.nan))


def out_of_memory(found: Forward) -> Forward:
    raise RuntimeError(METAL)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(str(twin("llama")), device="cpu", dtype="float32")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    ("then", "error", "words"),
    [(not_finite, NumbersError, "--dtype bfloat16"), (out_of_memory, DeviceError, "--kv-bits 8")],
)
def test_every_decoder_keeps_what_it_has(
    loaded: LoadedModel, settings: dict[str, Any], then: Any, error: type[TempoError], words: str
) -> None:
    options = {"max_tokens": 6, "min_steps": 6, **settings}
    for passes in (0, 4):
        failing = replace(loaded, model=Failing(loaded, passes, then))
        decoding = stream(failing, "ab cd", **options)
        steps = list(decoding)
        assert isinstance(decoding.failure, error)
        assert words in str(decoding.failure)
        run = decoding.run()
        assert len(run.steps) == len(steps) == len(decoding.steps)
        assert run.finish_reason == "cancelled"
        assert bool(run.text) == bool(passes and steps)
        with pytest.raises(error):
            generate(replace(loaded, model=Failing(loaded, passes, then)), "ab cd", **options)
    assert steps or settings.get("decoder") == "mcts"


@pytest.mark.parametrize("command", ["generate", "ask"])
@pytest.mark.parametrize("passes", [0, 4])
def test_the_command_line_keeps_what_it_has(
    passes: int, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    through, left = Transformer.through, [passes]

    def failing(self: Transformer, *args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError(METAL)
        return through(self, *args, **options)

    monkeypatch.setattr(Transformer, "through", failing)
    asked = [command, "-m", str(twin("llama")), "--max-tokens", "6", "--min-steps", "6", "ab cd"]
    assert main(asked) == 1
    shown = capsys.readouterr()
    assert bool(shown.out.strip()) == bool(passes)
    assert "--kv-bits 8" in shown.err and "Traceback" not in shown.err


def test_answers_are_not_given_in_place_of_a_failure(loaded: LoadedModel) -> None:
    for passes in (0, 4):
        with pytest.raises(NumbersError):
            ask(replace(loaded, model=Failing(loaded, passes, not_finite)), "ab cd", max_tokens=6)


def test_a_score_is_no_number(loaded: LoadedModel) -> None:
    with pytest.raises(NumbersError):
        score(replace(loaded, model=Failing(loaded, 1, not_finite)), "ab", [" cd"])
    with pytest.raises(DeviceError):
        score(replace(loaded, model=Failing(loaded, 0, out_of_memory)), "ab", [" cd"])


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (RuntimeError(METAL), "no memory left"),
        (MemoryError(), "no memory left"),
        (RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error"), "doctor"),
    ],
)
def test_what_a_tensor_library_raises_ends_in_a_sentence(raised: Exception, words: str) -> None:
    with pytest.raises(DeviceError, match=words) as caught, told_failures():
        raise raised
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    with pytest.raises(NotImplementedError), told_failures():
        raise NotImplementedError


def test_it_is_not_the_clients_fault() -> None:
    assert translate(DeviceError("x")).status == 503
    assert translate(NumbersError("x")).status == 500
    assert issubclass(NumbersError, ComputeError)


def test_a_model_that_overflows_float16(tmp_path: Any) -> None:
    """Real numbers, not planted ones."""
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "wide"
    shutil.copytree(twin("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 0 + 60000
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(NumbersError, match="--dtype bfloat16"):
        generate(load(str(folder), device="cpu", dtype="float16"), "ab cd", max_tokens=2)
    assert generate(load(str(folder), device="cpu", dtype="bfloat16"), "ab cd", max_tokens=2).steps


@pytest.mark.parametrize(("then", "status"), [(out_of_memory, 503), (not_finite, 500)])
def test_the_server_goes_on(loaded: LoadedModel, then: Any, status: int) -> None:
    """With a request, and with a session, whose failed step leaves nothing behind."""
    pytest.importorskip("fastapi")
    from tempo_mlx.resolution import resolve
    from tempo_mlx.server.jobs import Jobs
    from tempo_mlx.server.protocol import Event, Problem, Submit
    from tempo_mlx.server.settings import ServerConfig
    from tempo_mlx.server.worker import Worker

    class Wire:
        def poll(self, patience: float) -> bool:
            return False

        def send(self, message: Any) -> None:
            self.last = message

    model = Failing(loaded, 3, then)
    worker = Worker(wire := Wire(), Jobs(replace(loaded, model=model), ServerConfig()))  # type: ignore[arg-type]

    def asked(kind: Any, **payload: Any) -> Any:
        worker.handle(Submit("it", kind, payload))
        while "it" in worker.jobs:
            worker.round()
        return wire.last

    config, mine = (
        resolve({"max_tokens": 6, "min_steps": 6, "threshold": 0.02}),
        {"session": "s", "owner": None},
    )
    failed = asked("generate", prompt="ab cd", config=config)
    assert isinstance(failed, Problem) and failed.status == status
    model.passes = 3
    question = {"messages": None, "choices": None, "by": "text", "answer_regex": None}
    searched = resolve({"decoder": "enumerate", "max_tokens": 6, "min_steps": 6})
    failed = asked("ask", prompt="ab cd", config=searched, **question)
    assert isinstance(failed, Problem) and failed.status == status
    model.passes = 2
    failed = asked("session", action="create", prompt="ab cd", config=config, run=None, steps=4, **mine)
    assert isinstance(failed, Problem) and failed.status == status
    model.passes = 100
    assert isinstance(asked("session", action="continue", steps=2, **mine), Event)
    state = asked("session", action="continue", steps=0, **mine)
    assert isinstance(asked("generate", prompt="ab cd", config=config), Event)
    plain = generate(replace(loaded, model=model), "ab cd", config).to_dict()["steps"]
    run = json.loads(state.data)["run"]["steps"]
    assert len(run) > 2
    for ours, theirs in zip(run, plain, strict=False):  # as if nothing had been
        for name in ("id", "slot", "probability", "parents"):
            assert [each[name] for each in ours["tokens"]] == [each[name] for each in theirs["tokens"]]
