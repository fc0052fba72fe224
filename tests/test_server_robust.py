"""What a server must get over: values nested without end, work that nobody waits for, limits that are gone around."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

import tempo_mlx
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.prefill import never
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.server.app import create_app
from tempo_mlx.server.engine import REMEMBERED_SESSIONS, Engine, Ticket
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.metrics import Metrics
from tempo_mlx.server.openai import Chunks, Shape
from tempo_mlx.server.protocol import Event
from tempo_mlx.server.session_routes import keeper
from tempo_mlx.server.sessions import Sessions
from tempo_mlx.server.settings import Pace, ServerConfig
from tests.patience import patient
from tests.serving import Served, serving, with_context
from tests.test_server_tools import TEMPLATE
from tests.twins import twin

USER = {"role": "user", "content": "Hello"}
CHAT: dict[str, Any] = {"messages": [USER], "max_tokens": 2, "temperature": 0}
FLAGS = (
    "--max-tokens-limit",
    "200",
    "--max-rows-limit",
    "4",
    "--max-prompt-tokens",
    "60",
    "--session-ttl",
    "1.5",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = with_context(twin("llama"), 4096, tmp_path_factory.mktemp("models"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with serving(model, "--model-alias", "twin", *FLAGS) as served:
        yield served


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("levels", [300, 600, 900, 5000])
def test_what_is_nested_deeply_is_the_requests_own_trouble(levels: int, server: Served) -> None:
    """It must not end the thread that writes to the worker, which would answer nobody from then on."""
    call = f'{{"function": {{"name": "f", "arguments": {{"city": {nested(levels)}}}}}}}'
    text = call.replace(f'{{"city": {nested(levels)}}}', f'"{nested(levels)}"')
    tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {{"x": {nested(levels)}}}}}}}'
    bodies = [
        ("/v1/chat/completions", f'{{"max_tokens": 2, "messages": [{{"role": "assistant", "tool_calls": [{call}]}}]}}'),
        ("/v1/chat/completions", f'{{"max_tokens": 2, "messages": [{{"role": "assistant", "tool_calls": [{text}]}}]}}'),
        ("/v1/chat/completions", f'{{"max_tokens": 2, "messages": [{{"role": "user"}}], "tools": [{tool}]}}'),
        ("/sessions", f'{{"run": {{"x": {nested(levels)}}}}}'),
        ("/phrases", f'{{"run": {{"x": {nested(levels)}}}}}'),
    ]  # fmt: skip
    for path, body in bodies:
        answer = server.post(path, None, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 422), answer.text
        assert server.post("/v1/chat/completions", CHAT).status_code == 200


@pytest.mark.parametrize("name", ["begun", "self", "settings", "messages"])
def test_a_variable_of_the_template_may_have_any_name(name: str, server: Served) -> None:
    answer = server.post("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {name: "x"}})
    assert answer.status_code == (400 if name == "messages" else 200), answer.text


def test_answers_that_are_weighed_can_be_cancelled(server: Served) -> None:
    """Nor do others wait for them: a worker that is silent for long is taken for dead."""
    choices = [f"{index} " + "the cat sat on the mat and " * 20 for index in range(300)]
    headers, body = {"X-Request-ID": "weighed-long"}, {"prompt": "Which?", "choices": choices}
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(server.post, "/ask", body, headers=headers)
        server.wait_until(lambda health: health["running"] == 1)
        assert server.post("/v1/chat/completions", CHAT).status_code == 200
        assert httpx.delete(f"{server.url}/requests/weighed-long").status_code == 200
        answer = asked.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cancelled")
    assert server.health()["worker"]["restarts"] == 0


def test_an_imported_run_is_within_the_limits(server: Served) -> None:
    made = server.post("/sessions", {"prompt": "Once", "steps": 2, "max_parallel_tokens": 3}).json()["run"]
    assert server.post("/sessions", {"run": made}).status_code == 201
    wide = {**made, "config": {**made["config"], "max_parallel_tokens": 64}}
    error = server.post("/sessions", {"run": wide}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "max_parallel_tokens")


def test_a_new_session_takes_no_more_steps_than_any_other(server: Served) -> None:
    error = server.post("/sessions", {"prompt": "Once", "steps": 201}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "steps")


def test_a_session_is_in_use_as_long_as_it_is_continued() -> None:
    """Its time begins when it was last used, not when that began."""
    loaded = tempo_mlx.load(str(twin("llama")))
    sessions = Sessions(loaded, ServerConfig(session_ttl=0.5))
    config = GenerateConfig(max_tokens=20, min_steps=20, threshold=0.03)
    ask = {
        "owner": None,
        "session": "mine",
        "run": None,
        "prompt": "Once upon a time",
        "config": config,
        "steps": 4,
    }
    told = []
    for output in sessions.perform({"action": "create", **ask}, "id", never):
        told.append(output)
        time.sleep(0.2)
    sessions.expire()
    assert told[-1] is not None and told[-1].data["expires_at"] > time.time()
    assert len(sessions) == 1
    brief = Sessions(loaded, ServerConfig(max_prompt_tokens=2))
    with pytest.raises(ApiError, match="longer than 2 tokens"):
        list(brief.perform({"action": "create", **ask, "run": told[-1].data["run"]}, "id", never))


def test_a_stream_whose_events_say_nothing_shows_signs_of_life() -> None:
    """They may come faster than anybody waits for one."""
    event = Event("1", "delta", json.dumps({"reasoning": "", "text": "", "tokens": []}))

    class Silent:
        pace = Pace(heartbeat=0.05)

        async def events(self, ticket: Ticket, pause: Any) -> AsyncIterator[Event]:
            for _ in range(10):
                await asyncio.sleep(0.01)
                yield event

    async def chunks() -> list[bytes]:
        shape, ticket = Shape("1", "twin", True, 0, 0), Ticket("1", "completion", {}, None, 0.0)
        ticket.state = "running"
        return [chunk async for chunk in Chunks(cast(Any, Silent()), ticket, shape, 2, False)._chunks()]

    assert b": heartbeat\n\n" in asyncio.run(chunks())


def test_a_model_that_cannot_be_loaded_leaves_no_thread_behind() -> None:
    """A request for it tries again, every time."""

    def writers() -> int:
        return sum(thread.name == "to worker" for thread in threading.enumerate())

    async def ask() -> None:
        engine = Engine(LoadConfig(model="/no/such/model"), ServerConfig(), Metrics(), Pace())
        await engine.start(load=False)
        before = writers()
        with pytest.raises(ApiError):
            await engine.awake()
        until = time.monotonic() + patient(3)
        while writers() > before and time.monotonic() < until:
            await asyncio.sleep(0.05)
        assert writers() == before
        await engine.stop()

    asyncio.run(ask())


def test_a_session_that_is_used_is_not_forgotten_for_newer_ones() -> None:
    """With several models it would be looked for at another, and its loss could not be told."""
    app = create_app([LoadConfig()], ServerConfig())
    request, engine = cast(Any, SimpleNamespace(app=app)), app.state.context.models.default
    engine.remember_session("mine")
    for number in range(2 * REMEMBERED_SESSIONS):
        engine.remember_session(f"session-{number}")
        assert keeper(request, "mine") is engine
    assert "mine" in engine.sessions and len(engine.sessions) == REMEMBERED_SESSIONS
    assert "session-0" not in engine.sessions
