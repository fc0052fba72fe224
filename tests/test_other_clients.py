"""Clients that `make test-clients` installs, in environments of their own: what they get is what the server says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")
pytest.importorskip("llguidance")

from tests.clients.speakers import CITY, MODEL, MORE, TOOL, USER
from tests.serving import Served, serving, with_context
from tests.test_server_tools import TEMPLATE
from tests.twins import twin

SPEAKERS = Path(__file__).parent / "clients" / "speakers.py"
BRIEF: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = with_context(twin("llama"), 4096, tmp_path_factory.mktemp("models"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with serving(model, "--model-alias", MODEL) as served:
        yield served


def python_with(package: str) -> str:
    """A Python that has it; skips where none does."""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    for python in (Path(sys.executable), *Path(sys.prefix).glob("clients/*/bin/python")):
        if subprocess.run([python, "-c", look], check=False).returncode == 0:
            return str(python)
    pytest.skip(f"{package} is not installed; make test-clients installs it")


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**os.environ, **env}, text=True, encoding="utf-8", capture_output=True, check=False, timeout=300
    )  # fmt: skip


def printed(text: str) -> str:
    """As a pipe that is read as text gives it."""
    return text.replace("\r", "\n") + "\n"


def said(server: Served, *messages: Any, **more: Any) -> Any:
    """The choices of OpenAI's route, as anybody may ask for them."""
    answer = server.post("/v1/chat/completions", {**BRIEF, "messages": messages, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


@pytest.mark.parametrize(
    ("name", "package"),
    [("litellm", "litellm"), ("langchain", "langchain_openai"), ("llama-index", "llama_index")],
)
def test_a_client_gets_what_the_server_says(name: str, package: str, server: Served) -> None:
    python = python_with(package)
    told = run(python, str(SPEAKERS), name, server.url, LITELLM_LOCAL_MODEL_COST_MAP="True")
    assert told.returncode == 0, told.stderr
    got = json.loads(told.stdout)

    (choice,) = said(server, USER, logprobs=True, top_logprobs=3)
    text = choice["message"]["content"]
    assert got["chat"] == text
    assert "".join(got["stream"]) == text
    assert len([piece for piece in got["stream"] if piece]) > 2
    (again,) = said(server, USER, {"role": "assistant", "content": text}, MORE)
    assert got["history"] == again["message"]["content"]
    if "several" in got:
        several = said(server, USER, n=5, temperature=1, seed=1)
        assert got["several"] == [each["message"]["content"] for each in several]
    scores = [token["logprob"] for token in choice["logprobs"]["content"]]
    assert [score for score, _ in got["logprobs"]] == pytest.approx(scores, abs=1e-5)
    assert {count for _, count in got["logprobs"]} == {3}
    assert json.loads(got["schema"])["city"] in ("Oslo", "Bonn")
    tool, arguments = got["tool"]
    assert (tool, arguments["city"] in ("Oslo", "Bonn")) == ("weather", True)
    call = {"id": "1", "type": "function", "function": {"name": tool, "arguments": json.dumps(arguments)}}
    result = {"role": "tool", "tool_call_id": "1", "content": "rain"}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    (after,) = said(server, USER, called, result, tools=[TOOL])
    assert (got["after the tool"] or "") == after["message"]["content"]


def test_the_llm_command(server: Served, tmp_path: Path) -> None:
    """Simon Willison's: it streams what it prints, keeps conversations, runs tools, and has no n."""
    python = python_with("llm")
    own = f'model_name: {MODEL}\n  api_base: "{server.url}/v1"'
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  {own}\n  supports_tools: true\n  supports_schema: true\n"
        f"- model_id: text\n  {own}\n  completion: true\n"
    )

    def llm(*words: str, length: int = 8, model: str = "ours") -> subprocess.CompletedProcess[str]:
        options = ("-o", "temperature", "0", "-o", "max_tokens", str(length))
        return run(python, "-m", "llm", "-m", model, *options, *words, LLM_USER_PATH=str(tmp_path))

    (choice,) = said(server, USER)
    text = choice["message"]["content"]
    assert llm("Hello").stdout == printed(text)
    (again,) = said(server, USER, {"role": "assistant", "content": text}, MORE)
    assert llm("-c", "more").stdout == printed(again["message"]["content"])
    assert json.loads(llm("--schema", json.dumps(CITY), "Hello", length=60).stdout)["city"] in (
        "Oslo",
        "Bonn",
    )

    llm("-o", "logprobs", "3", "Hello", model="text")
    logged = run(python, "-m", "llm", "logs", "-n", "1", "--json", LLM_USER_PATH=str(tmp_path))
    scores = json.loads(logged.stdout)[0]["response_json"]["logprobs"]
    assert len(scores) == 8
    assert all(1 < len(each["top_logprobs"][0]) <= 3 for each in scores)

    # tool_choice is not among its options; the schema is that of a call
    call = {"name": {"const": "weather"}, "arguments": CITY}
    schema = {"type": "object", "properties": call, "required": list(call), "additionalProperties": False}
    weather = 'def weather(city: str) -> str:\n    "It rains."\n    return f"rain in {city}"'
    tools = ("--functions", weather, "--td", "--chain-limit", "2")
    used = llm(*tools, "--schema", json.dumps(schema), "Hello", length=60)
    assert "Tool call: weather({'city': " in used.stderr
    assert "  rain in " in used.stderr
