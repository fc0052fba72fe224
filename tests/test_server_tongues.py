"""The clients of Anthropic and of Ollama against the server: the same engine in their words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")
pytest.importorskip("llguidance")

from tempo_mlx.server import responses
from tempo_mlx.server.protocol import Event
from tests.serving import Served, serving, with_context
from tests.test_server_tools import TEMPLATE
from tests.twins import twin

MODEL = "twin"
USER = {"role": "user", "content": "Hello"}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Bonn"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = with_context(twin("llama"), 4096, tmp_path_factory.mktemp("models"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with serving(model, "--model-alias", MODEL) as served:
        yield served


def said(server: Served, messages: list[Any], **more: Any) -> dict[str, Any]:
    """By OpenAI's route."""
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, **more}
    answer: dict[str, Any] = server.post("/v1/chat/completions", body).json()
    return answer


@pytest.fixture(scope="module")
def anthropic(server: Served) -> Any:
    package = pytest.importorskip("anthropic")
    return package.Anthropic(base_url=server.url, api_key="none needed", max_retries=0)


@pytest.fixture(scope="module")
def ollama(server: Served) -> Any:
    return pytest.importorskip("ollama").Client(host=server.url)


ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "extra_body": {"temperature": 0}}


def test_a_message_of_anthropics(anthropic: Any, server: Served) -> None:
    answer = anthropic.messages.create(**ASK, system="Be brief.", messages=[USER])
    expected = said(server, [{"role": "system", "content": "Be brief."}, USER])
    assert [block.text for block in answer.content] == [expected["choices"][0]["message"]["content"]]
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.input_tokens == expected["usage"]["prompt_tokens"]
    again = [USER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "more"}]
    assert anthropic.messages.create(**ASK, messages=again).content[0].text


@pytest.mark.parametrize("streams", [False, True])
def test_a_stop_sequence_of_anthropics(streams: bool, anthropic: Any) -> None:
    whole = anthropic.messages.create(**{**ASK, "max_tokens": 20}, messages=[USER]).content[0].text
    last = whole[len(whole) // 2]
    body = {**ASK, "max_tokens": 20, "messages": [USER], "stop_sequences": ["never said", last]}
    if streams:
        with anthropic.messages.stream(**body) as stream:
            answer = stream.get_final_message()
    else:
        answer = anthropic.messages.create(**body)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", last)
    assert "".join(block.text for block in answer.content) == whole[: whole.index(last)]


def test_a_stream_of_anthropics(anthropic: Any, server: Served) -> None:
    whole = anthropic.messages.create(**ASK, messages=[USER])
    with anthropic.messages.stream(**ASK, messages=[USER]) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 2
    assert "".join(pieces) == final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)


@pytest.mark.parametrize("streams", [False, True])
def test_a_tool_of_anthropics(streams: bool, anthropic: Any) -> None:
    tools = [{"name": "weather", "description": "It rains.", "input_schema": CITY}]
    body = {**ASK, "max_tokens": 60, "tools": tools, "messages": [USER], "tool_choice": {"type": "any"}}
    if streams:
        with anthropic.messages.stream(**body) as stream:
            answer = stream.get_final_message()
    else:
        answer = anthropic.messages.create(**body)
    assert answer.stop_reason == "tool_use"
    (call,) = answer.content
    assert (call.type, call.name) == ("tool_use", "weather")
    assert call.input["city"] in ("Oslo", "Bonn")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    told = [USER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    body = {**ASK, "tools": tools, "messages": told}
    assert anthropic.messages.create(**body).usage.input_tokens > answer.usage.input_tokens


def test_a_format_of_anthropics(anthropic: Any) -> None:
    form = {"format": {"type": "json_schema", "schema": CITY}}
    answer = anthropic.messages.create(**{**ASK, "max_tokens": 60}, messages=[USER], output_config=form)
    assert json.loads(answer.content[0].text)["city"] in ("Oslo", "Bonn")


def test_errors_reach_anthropics_client(anthropic: Any) -> None:
    package = pytest.importorskip("anthropic")
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}
    with pytest.raises(package.BadRequestError, match="leave out images"):
        anthropic.messages.create(**ASK, messages=[{"role": "user", "content": [picture]}])
    with pytest.raises(package.NotFoundError) as raised:
        anthropic.messages.create(**{**ASK, "model": "claude"}, messages=[USER])
    assert raised.value.body["type"] == "error"
    assert raised.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(package.BadRequestError):
        anthropic.messages.create(**{**ASK, "extra_body": {"temperature": -1}}, messages=[USER])


OPTIONS = {"num_predict": 8, "temperature": 0, "num_ctx": 2048}


def test_a_chat_of_ollamas(ollama: Any, server: Served) -> None:
    answer = ollama.chat(model=f"{MODEL}:latest", messages=[USER], options=OPTIONS)
    expected = said(server, [USER])
    assert answer.message.content == expected["choices"][0]["message"]["content"]
    assert (answer.done, answer.done_reason, answer.eval_count) == (True, "length", 8)
    assert answer.prompt_eval_count == expected["usage"]["prompt_tokens"]
    lines = list(ollama.chat(model=MODEL, messages=[USER], options=OPTIONS, stream=True))
    assert len(lines) > 3
    assert "".join(line.message.content for line in lines) == answer.message.content
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    again = [USER, answer.message, {"role": "user", "content": "more"}]
    assert ollama.chat(model=MODEL, messages=again, options=OPTIONS).message.content


def test_generate_of_ollamas(ollama: Any, server: Served) -> None:
    answer = ollama.generate(model=MODEL, prompt="Hello", options=OPTIONS)
    assert answer.response == said(server, [USER])["choices"][0]["message"]["content"]
    raw = ollama.generate(model=MODEL, prompt="Hello", raw=True, options=OPTIONS)
    body = {"prompt": "Hello", "max_tokens": 8, "temperature": 0}
    assert raw.response == server.post("/v1/completions", body).json()["choices"][0]["text"]
    lines = list(ollama.generate(model=MODEL, prompt="Hello", raw=True, options=OPTIONS, stream=True))
    assert "".join(line.response for line in lines) == raw.response
    assert ollama.generate(model=MODEL, prompt="").done_reason == "load"


def test_formats_and_tools_of_ollamas(ollama: Any) -> None:
    long = {**OPTIONS, "num_predict": 60}
    answer = ollama.chat(model=MODEL, messages=[USER], format=CITY, options=long)
    assert json.loads(answer.message.content)["city"] in ("Oslo", "Bonn")
    tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
    used = [ollama.chat(model=MODEL, messages=[USER], tools=tools, options=OPTIONS) for tools in ([tool], [])]
    assert used[0].prompt_eval_count > used[1].prompt_eval_count
    call = {
        "name": {"const": "weather"},
        "arguments": CITY,
    }  # it has no tool_choice; so the text is made a call
    form = {"type": "object", "properties": call, "required": list(call), "additionalProperties": False}
    answer = ollama.chat(model=MODEL, messages=[USER], tools=[tool], format=form, options=long)
    (called,) = answer.message.tool_calls
    assert (called.function.name, called.function.arguments["city"] in ("Oslo", "Bonn")) == ("weather", True)


def test_log_probabilities_of_ollamas(ollama: Any, server: Served) -> None:
    ask = {"model": MODEL, "options": OPTIONS, "logprobs": True, "top_logprobs": 3}
    expected = said(server, [USER], logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    lines = ollama.chat(**ask, messages=[USER], stream=True)
    streamed = [each for line in lines for each in line.logprobs or ()]
    raw = ollama.generate(**ask, prompt="Hello", raw=True).logprobs
    for told in (ollama.chat(**ask, messages=[USER]).logprobs, streamed):
        assert [each.token for each in told] == [each["token"] for each in expected]
        assert [each.logprob for each in told] == pytest.approx(
            [each["logprob"] for each in expected], abs=1e-5
        )
        assert all(len(each.top_logprobs) == 3 for each in told)
    assert len(raw) == 8


def test_what_ollamas_clients_ask_about_the_model(ollama: Any, server: Served) -> None:
    assert [model.model for model in ollama.list().models] == [MODEL]
    assert [(model.model, model.size > 1e7) for model in ollama.ps().models] == [(MODEL, True)]
    assert "completion" in ollama.show(MODEL).capabilities
    assert server.get("/api/version").json()["version"]
    package = pytest.importorskip("ollama")
    with pytest.raises(package.ResponseError) as raised:
        ollama.chat(model="llama3", messages=[USER])
    assert raised.value.error == "This server serves the model twin only."
    told = server.post("/api/chat", {"model": "llama3", "messages": [USER]}).json()
    assert (told["error"], told["code"], told["param"]) == (raised.value.error, "model_not_found", "model")


@pytest.fixture(scope="module")
def openai(server: Served) -> Any:
    package = pytest.importorskip("openai")
    return package.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0)


def test_a_response_of_openais(openai: Any, server: Served) -> None:
    ask: dict[str, Any] = {
        "model": MODEL,
        "max_output_tokens": 8,
        "temperature": 0,
        "instructions": "Be brief.",
    }
    answer = openai.responses.create(**ask, input="Hello")
    expected = said(server, [{"role": "system", "content": "Be brief."}, USER])
    assert answer.output_text == expected["choices"][0]["message"]["content"]
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.input_tokens == expected["usage"]["prompt_tokens"]
    with openai.responses.stream(**ask, input=[USER]) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.incomplete"
    assert kinds.count("response.output_text.delta") > 2
    again = [USER, *answer.output, {"role": "user", "content": "more"}]
    assert openai.responses.create(**ask, input=again).output_text


@pytest.mark.parametrize("streams", [False, True])
def test_a_function_of_a_response(streams: bool, openai: Any) -> None:
    tool = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
    ask: dict[str, Any] = {"model": MODEL, "temperature": 0, "tools": [tool], "tool_choice": "required"}
    if streams:
        with openai.responses.stream(**ask, input="Hello", max_output_tokens=60) as stream:
            answer = stream.get_final_response()
    else:
        answer = openai.responses.create(**ask, input="Hello", max_output_tokens=60)
    (call,) = answer.output
    assert (call.type, call.name) == ("function_call", "weather")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Bonn")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    told = [{"role": "user", "content": "Hello"}, call, result]
    body = {**ask, "tool_choice": "auto", "input": told, "max_output_tokens": 8}
    assert openai.responses.create(**body).usage.input_tokens > answer.usage.input_tokens


def test_what_a_response_cannot_be_is_refused(server: Served) -> None:
    for more in ({"previous_response_id": "resp_1"}, {"tools": [{"type": "web_search"}]}):
        answer = server.post("/v1/responses", {"input": "Hello", **more})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(more)))


def test_a_blank_before_a_call_is_a_message_of_its_own() -> None:
    """What was begun in a stream is ended in it, and no two items have one place."""
    asked: Any = SimpleNamespace(id="1", model=MODEL, engine=None, config=SimpleNamespace(seed=0))
    call = {"id": "c", "name": "weather", "arguments": "{}"}
    for text, calls, expected in (
        ("\n", [call], ["message", "function_call"]),
        ("", [call], ["function_call"]),
        ("", [], ["message"]),
    ):
        events = responses.Events(asked, cast(Any, None))
        ended = {"text": text, "calls": calls, "finish_reason": "stop"}
        end = {
            "choices": [ended],
            "rest": {"text": ""},
            "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        }
        told = [
            Event("1", "delta", json.dumps({"text": text})),
            Event("1", "end", json.dumps(end), last=True),
        ]
        said = [json.loads(chunk.split(b"data: ")[1]) for event in told for chunk in events.written(event)]
        for kind in ("added", "done"):
            items = [each for each in said if each["type"] == f"response.output_item.{kind}"]
            assert [(each["output_index"], each["item"]["type"]) for each in items] == list(
                enumerate(expected)
            )
        assert [item["type"] for item in said[-1]["response"]["output"]] == expected
