"""What a server must get over: values nested without end, work that nobody waits for, limits that are gone around."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

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
