"""Early exit over HTTP: a model with a calibration, one without, and what does not go together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

from tempo_mlx.report.run import Run
from tests.exits import loaded_with_exits
from tests.serving import Served, named, serving, stream
from tests.twins import twin


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        loaded_with_exits("llama", {1: 0.3, 3: 0.5}, home / "tempo-mlx", patch)
    with serving(twin("llama"), env={"XDG_CACHE_HOME": str(home)}) as served:
        yield served


BODY = {"prompt": "The and in", "max_tokens": 20, "min_steps": 20, "early_exit": True}


def test_a_run_leaves_early_and_says_so(server: Served) -> None:
    answer = server.post("/generate", BODY)
    assert answer.status_code == 200, answer.text
    run = Run.from_json(json.dumps(answer.json()))
    assert run.early_exit is not None and run.early_exit["mean_layers"] < 4
    steps = named(stream(server, "/generate/stream", BODY), "step")
    assert [step["exit_layer"] for step in steps] == [step.exit_layer for step in run.steps]
    lossless = server.post("/generate", {**BODY, "lossless": True}).json()
    full = server.post("/generate", {**BODY, "early_exit": False}).json()
    assert lossless["final_text"] == full["final_text"]


def test_what_does_not_go_together_is_refused(server: Served) -> None:
    session = server.post("/sessions", {**BODY, "steps": 2})
    assert session.status_code == 422 and "leave out early_exit" in session.text
    model = server.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "a", "logprobs": 2, "max_tokens": 4, "tempo": {"early_exit": True}}
    scored = server.post("/v1/completions", body)
    assert scored.status_code == 400 and "log-probabilities" in scored.text
    layers = server.post("/generate", {**BODY, "exit_layers": [9]})
    assert layers.status_code == 422 and "0 to 3" in layers.text


def test_a_model_without_a_calibration_is_refused(tmp_path: Path) -> None:
    with serving(twin("llama"), env={"XDG_CACHE_HOME": str(tmp_path)}) as served:
        answer = served.post("/generate", BODY)
        assert answer.status_code == 400 and "no calibration for early exit" in answer.text
        assert served.post("/generate", {**BODY, "early_exit": False}).status_code == 200
