"""One server, several models: listed, loaded when a request names them, unloaded where their memory is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

from tempo_mlx.errors import ConfigError, ModelError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.server.app import create_app
from tempo_mlx.server.ollama import seconds_of
from tempo_mlx.server.settings import ServerConfig
from tempo_mlx.weights.memory import Limit
from tests.serving import Served, events, serving, with_context
from tests.twins import twin

PROMPT: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 6}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(twin("llama"), "--model", str(twin("qwen2"))) as served:
        yield served


def known(server: Served) -> dict[str, Any]:
    """What the list of models says of each."""
    return {card["id"]: card["tempo"] for card in server.get("/v1/models").json()["data"]}


def unload(server: Served, model: str) -> None:
    assert server.post("/api/generate", {"model": model, "keep_alive": 0}).json()["done_reason"] == "unload"
    assert known(server)[model]["state"] == "unloaded"


def text(server: Served, model: str | None) -> str:
    answer = server.post("/generate", {**PROMPT, "model": model})
    assert answer.status_code == 200, answer.text
    run = answer.json()
    assert run["model"]["id"] == (model or "llama")
    said: str = run["final_text"]
    return said


def test_a_model_is_loaded_when_a_request_names_it(server: Served) -> None:
    before = known(server)
    assert [(name, each["default"]) for name, each in before.items()] == [("llama", True), ("qwen2", False)]
    assert (before["llama"]["state"], before["llama"]["family"]) == ("ready", "llama")
    unloaded = {"state": "unloaded", "family": "qwen2", "context_length": 256, "memory_bytes": None}
    assert before["qwen2"].items() >= unloaded.items()
    assert {card["name"] for card in server.get("/api/tags").json()["models"]} == {"llama", "qwen2"}

    assert text(server, "qwen2") != text(server, None) == text(server, "llama")
    after = known(server)["qwen2"]
    assert (after["state"], after["family"], after["context_length"], after["chat"]) == (
        "ready",
        "qwen2",
        256,
        True,
    )
    assert after["memory_bytes"] > 1e7
    assert {card["name"] for card in server.get("/api/ps").json()["models"]} == {"llama", "qwen2"}


@pytest.mark.parametrize("path", ["/v1/completions", "/generate", "/api/generate", "/sessions"])
def test_an_unknown_name_is_told_those_there_are(path: str, server: Served) -> None:
    answer = server.post(path, {"model": "gpt-4", "prompt": "a"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    message = error if path == "/api/generate" else error["message"]  # as Ollama's clients read it
    assert message == "This server serves the models llama, qwen2."


def test_every_tongue_reaches_every_model(server: Served) -> None:
    body = {
        "model": "qwen2",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 4,
        "temperature": 0,
    }
    said = server.post("/v1/chat/completions", body).json()
    assert said["model"] == "qwen2"
    words = said["choices"][0]["message"]["content"]
    assert server.post("/v1/messages", body).json()["content"][0]["text"] == words
    options = {"temperature": 0, "num_predict": 4}
    ollama = {"model": "qwen2:latest", "messages": body["messages"], "stream": False, "options": options}
    assert server.post("/api/chat", ollama).json()["message"]["content"] == words
    asked = server.post("/ask", {"model": "qwen2", "prompt": "Hi", "leaves": 2, "max_tokens": 2})
    assert asked.json()["run"]["model"]["id"] == "qwen2"


def test_sessions_belong_to_their_model(server: Served) -> None:
    made = {
        model: server.post("/sessions", {**PROMPT, "model": model, "steps": 2}).json()
        for model in ("llama", "qwen2")
    }
    for model, session in made.items():
        grown = server.post(f"/sessions/{session['id']}/continue", {"steps": 1}).json()
        assert (grown["run"]["model"]["id"], len(grown["run"]["steps"])) == (model, 3)
    listed = {session["id"] for session in server.get("/sessions").json()["sessions"]}
    assert listed >= {session["id"] for session in made.values()}
    again = server.post("/sessions", {"run": made["qwen2"]["run"]})  # the run says which model it is of
    assert again.status_code == 201, again.text
    other = server.post("/sessions", {"run": made["qwen2"]["run"], "model": "llama"})
    assert other.json()["error"]["code"] == "invalid_run"

    unload(server, "qwen2")
    assert server.get(f"/sessions/{made['qwen2']['id']}").json()["error"]["code"] == "session_lost"
    assert server.get(f"/sessions/{made['llama']['id']}").status_code == 200
    assert known(server)["qwen2"]["state"] == "unloaded"


def test_where_the_first_is_unloaded_it_is_loaded_again(server: Served) -> None:
    expected = text(server, None)
    unload(server, "llama")
    assert server.health()["status"] == "ok"
    found = server.post("/api/chat", {"model": "llama", "messages": []}).json()
    assert (found["done_reason"], found["message"]["content"]) == ("load", "")
    assert known(server)["llama"]["state"] == "ready"
    unload(server, "llama")
    assert text(server, None) == expected


@pytest.mark.parametrize("always", [-1, "-1m", "-1"])
def test_a_model_may_stay_loaded_for_ever(always: Any, server: Served) -> None:
    asked = server.post("/api/generate", {"model": "llama", "keep_alive": always})
    assert (asked.status_code, asked.json().get("done_reason")) == (200, "load"), asked.text
    wrong = server.post(
        "/api/generate", None, content=b'{"keep_alive": NaN}', headers={"Content-Type": "application/json"}
    )
    assert wrong.status_code == 422


def test_the_least_recently_used_model_makes_room(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A worker is larger than the memory allowed, so that no second one fits beside it."""
    home = tmp_path_factory.mktemp("models")
    long, other = with_context(twin("llama"), 8192, home), twin("qwen2")
    flags = ("--model", str(other), "--max-memory-gb", "0.05", "--keep-alive", "1")
    with serving(long, *flags) as server:
        endless = {"prompt": "Once", "max_tokens": 4000, "min_steps": 4000}
        with server.client() as client, client.stream("POST", "/generate/stream", json=endless) as answer:
            told = events(answer.iter_lines())  # dropping it would close the connection
            next(told)
            refused = server.post("/generate", {**PROMPT, "model": "qwen2"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "memory")
            assert "in use" in refused.json()["error"]["message"]
            assert str(other) not in refused.text
        server.wait_until(lambda health: health["running"] == 0)
        text(server, "qwen2")
        assert known(server)[long.name]["state"] == "unloaded"
        server.wait_until(
            lambda health: health["models"]["qwen2"] == "unloaded"
        )  # after the second of --keep-alive


def test_what_others_hold_is_left_out_of_a_limit() -> None:
    asked = Limit(10e9, "allowed by --max-memory-gb", asked=True)
    assert asked.beside(4_000_000_000).nbytes == 6e9
    assert "less what the models already loaded take" in asked.beside(1).words
    free = Limit(10e9, "of memory that are free", free=True)
    assert free.beside(4_000_000_000) is free
    assert asked.beside(0) is asked


def test_models_must_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [LoadConfig(model="/a/model.gguf"), LoadConfig(model="/b/model.gguf")]
    with pytest.raises(ConfigError, match=r"model\.gguf"):
        create_app(two, ServerConfig())
    with pytest.raises(ConfigError, match="one name for 2 models"):
        create_app(two, ServerConfig(model_alias="mine"))
    with pytest.raises(ModelError, match="There is no model 'qwen9'"):
        create_app([LoadConfig(), LoadConfig(model="qwen9")], ServerConfig())
    monkeypatch.setenv("MLX_RANK", "0")
    with pytest.raises(ConfigError, match="--model once"):
        create_app([LoadConfig(model="a"), LoadConfig(model="b")], ServerConfig())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (300, 300),
        ("300", 300),
        ("5m", 300),
        ("1h30m", 5400),
        ("500ms", 0.5),
        ("-1m", float("inf")),
        (-1, float("inf")),
    ],
)
def test_durations_as_ollama_writes_them(text: Any, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5x", "m", "..s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="5m"):
        seconds_of(text)
