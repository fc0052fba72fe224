"""Tools: told to the model by its own chat template, and its calls read in the words it was taught."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")
pytest.importorskip("openai")
pytest.importorskip("llguidance")

import openai

from tempo_mlx.server.tool_calls import Withheld, calls_in, forced_grammar, style_of
from tests.serving import serving, with_context
from tests.twins import twin

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Bonn"]}, "days": {"type": "integer"}},
}
TOOLS = {"weather": SCHEMA, "time": {}}
OSLO = {"city": "Oslo", "days": 3}
WRITTEN = json.dumps(OSLO)

# What the template holds, what the model says, what of it is text.
SAID = {
    "hermes": ("<tool_call>", f'Let me see.<tool_call>\n{{"name": "weather", "arguments": {WRITTEN}}}\n</tool_call>',
               "Let me see."),
    "qwen3-coder": (
        "<tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>", "",
    ),
    "qwen bare": ("<tool_call>", f'{{"name": "weather", "arguments": {WRITTEN}}}', ""),
    "llama": ("<|python_tag|>", f'{{"name": "weather", "parameters": {WRITTEN}}}', ""),
    "llama tagged": ("<|python_tag|>", f'<|python_tag|>{{"name": "weather", "parameters": {WRITTEN}}}', ""),
    "mistral": ("[TOOL_CALLS]", f'Yes. [TOOL_CALLS][{{"name": "weather", "arguments": {WRITTEN}}}]', "Yes. "),
    "mistral 3": ("[TOOL_CALLS]", f"[TOOL_CALLS]weather[ARGS]{WRITTEN}", ""),
    "functiongemma": (
        "<start_function_call>",
        "<start_function_call>call:weather{city:<escape>Oslo<escape>,days:3}<end_function_call>", "",
    ),
    "gemma 4": ("<|tool_call>", 'Hm<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>', "Hm"),
    "harmony": (
        "<|channel|>",
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json<|message|>{WRITTEN}", "<|channel|>analysis<|message|>Hm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_calls_are_read_in_every_style(name: str) -> None:
    template, said, text = SAID[name]
    style = style_of([template])
    rest, calls = calls_in(said, style, TOOLS)
    assert rest == text
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [("weather", OSLO)]
    for size in (1, 3, 1000):
        withheld = Withheld(style)
        assert "".join(withheld.add(said[at : at + size]) for at in range(0, len(said), size)) == text


def test_several_calls() -> None:
    call = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    _, calls = calls_in(call + "\n" + call, style_of(["<tool_call>"]), TOOLS)
    assert [call["name"] for call in calls] == ["time", "time"]
    assert len({call["id"] for call in calls}) == 2
    _, calls = calls_in(
        '[TOOL_CALLS]time[ARGS]{}[TOOL_CALLS]weather[ARGS]{"days": 1}', style_of(["[TOOL_CALLS]"]), TOOLS
    )
    assert [(call["name"], call["arguments"]) for call in calls] == [
        ("time", "{}"),
        ("weather", '{"days": 1}'),
    ]


@pytest.mark.parametrize(
    "said", ["plain text", '{"name": "unknown", "arguments": {}}', "<tool_call>no JSON", "{}", ""]
)
def test_what_is_no_call_stays_text(said: str) -> None:
    assert calls_in(said, style_of(["<tool_call>"]), TOOLS) == (said, [])


def test_a_text_is_kept_where_a_schema_says_text() -> None:
    said = (
        "<tool_call><function=weather><parameter=city>12</parameter><parameter=days>12</parameter></function>"
    )
    _, (call,) = calls_in(said, style_of(["<tool_call>"]), TOOLS)
    assert json.loads(call["arguments"]) == {"city": "12", "days": 12}


def test_only_calls_of_plain_json_can_be_forced() -> None:
    assert forced_grammar(style_of(["<|channel|>"]), TOOLS) is None
    assert '"parameters"' in (forced_grammar(style_of(["<|python_tag|>"]), TOOLS) or "")


TEMPLATE = (
    "{% if tools %}Tools, called as in <tool_call>: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}\n{% endfor %}assistant: "
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = with_context(twin("llama"), 4096, tmp_path_factory.mktemp("models"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with serving(model, "--model-alias", "twin") as served:
        yield openai.OpenAI(base_url=f"{served.url}/v1", api_key="none needed", max_retries=0)


ASK: dict[str, Any] = {
    "model": "twin",
    "messages": [{"role": "user", "content": "Weather?"}],
    "max_tokens": 60,
    "temperature": 0,
    "tools": [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in TOOLS.items()
    ],
}
NAMED = {"type": "function", "function": {"name": "weather"}}
STRICT = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Bonn"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_a_forced_call_and_its_result(client: Any) -> None:
    asked = {**ASK, "tools": [STRICT], "tool_choice": NAMED}
    choice = client.chat.completions.create(**asked).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Bonn")
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    told = client.chat.completions.create(**{**ASK, "messages": [*ASK["messages"], choice.message, result]})
    assert told.usage.prompt_tokens > 0


def test_a_call_streams(client: Any) -> None:
    asked = {**ASK, "tools": [STRICT], "tool_choice": "required"}
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (call.index, call.function.name) == (0, "weather")
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Bonn")
    assert not any(delta.content for delta in deltas)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_tools_are_told_to_the_model_unless_none_may_be_called(client: Any) -> None:
    used = [
        client.chat.completions.create(**{**ASK, "max_tokens": 1, "tool_choice": choice}).usage.prompt_tokens
        for choice in ("auto", "none")
    ]
    assert used[0] > used[1]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "nope"}}])
def test_a_choice_without_its_tool_is_refused(choice: Any, client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        client.chat.completions.create(**{**ASK, "tools": [], "tool_choice": choice})
    assert failure.value.param == "tool_choice"
