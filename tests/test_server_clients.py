"""What clients of /v1 send beside what is documented: taken as they mean it, or refused with a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")
pytest.importorskip("openai")

import openai

from tempo_mlx.server.openai_bodies import ChatBody
from tests.serving import Served, serving
from tests.twins import twin

MODEL = "twin"
USER = [{"role": "user", "content": "Hello"}]
BASE: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(twin("llama"), "--model-alias", MODEL, "--max-tokens-limit", "20") as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0)


@pytest.fixture(scope="module")
def usual(server: Served) -> str:
    return content(server, {})


def content(server: Served, more: dict[str, Any]) -> str:
    answer = server.post("/v1/chat/completions", {**BASE, **more})
    assert answer.status_code == 200, answer.text
    said: str = answer.json()["choices"][0]["message"]["content"]
    return said


@pytest.mark.parametrize(
    "more",
    [
        {"metadata": {"a": 1}, "user": "u", "store": True, "service_tier": "auto", "prompt_cache_key": "k"},
        {
            "parallel_tool_calls": True,
            "tools": [],
            "functions": [],
            "tool_choice": "none",
            "verbosity": "low",
        },
        {"keep_alive": "5m", "options": {}, "num_ctx": 2048, "cache_prompt": True, "chat_id": "a"},
        {
            "top_k": 0,
            "min_p": 0,
            "typical": 1,
            "tfs": 1,
            "mirostat_mode": 0,
            "repeat_penalty": 1.0,
            "seed": -1,
        },
        {
            "n": None,
            "stop": None,
            "seed": None,
            "top_p": None,
            "tempo": None,
            "logprobs": None,
            "tools": None,
        },
        {
            "n": 1,
            "stop": [""],
            "stream_options": {"include_usage": True},
            "top_logprobs": 0,
            "logit_bias": {},
        },
        {"temperature": "0", "stream": "false", "max_tokens": 4.0, "model": None, "reasoning_effort": "low"},
        {"response_format": {"type": "text"}, "stop": [f"never said {n}" for n in range(20)]},
    ],
    ids=["labels", "tools", "servers", "samplers", "null", "empty", "spelling", "long"],
)
def test_what_asks_for_nothing_changes_nothing(more: dict[str, Any], server: Served, usual: str) -> None:
    assert content(server, more) == usual


def test_lengths_are_clipped(server: Served) -> None:
    """The limit is 20."""
    counts = []
    for length in (-1, 4096, 10**9, 20):
        body = {"prompt": "Hello", "max_tokens": length, "temperature": 0}
        counts.append(server.post("/v1/completions", body).json()["usage"]["completion_tokens"])
    assert counts[0] == counts[1] == counts[2] == counts[3] > 4


def test_unknown_fields_are_logged_once(server: Served) -> None:
    for _ in range(2):
        content(server, {"frobnicate": 1, "messages": [{**USER[0], "opts": {"visible": True}}]})
    assert server.log.count('field="frobnicate"') == 1
    assert server.log.count('field="messages.opts"') == 1


def test_our_own_endpoint_stays_strict(server: Served) -> None:
    answer = server.post("/generate", {"prompt": "a", "frobnicate": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "frobnicate")


def test_an_answer_goes_back_into_the_conversation(client: Any) -> None:
    """The loop of the openai package's own documentation."""
    said = client.chat.completions.create(**BASE).choices[0].message
    again = [*USER, said, {"role": "user", "content": "more"}]
    assert client.chat.completions.create(**{**BASE, "messages": again}).choices[0].message.content
    whole = {"annotations": None, "audio": None, "function_call": None, "tool_calls": None, "id": "1"}
    spoken = {
        "role": "assistant",
        "content": said.content,
        "refusal": None,
        "reasoning_content": "hm",
        **whole,
    }
    again[1] = spoken
    assert client.chat.completions.create(**{**BASE, "messages": again}).choices[0].message.content


def test_a_message_as_templates_know_it() -> None:
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    parts = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "b"},
    ]
    body = ChatBody.model_validate(
        {
            "messages": [
                {"role": "developer", "content": "x", "name": "me"},
                {"role": "user", "content": parts},
                {"role": "assistant", "content": None, "tool_calls": [called], "reasoning_content": "hm"},
                {"role": "tool", "tool_call_id": "1", "content": "ok"},
            ]
        }
    )
    system, user, assistant, tool = (message.for_template() for message in body.messages)
    assert system == {"role": "system", "content": "x"}
    assert user == {"role": "user", "content": "ab"}
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert (assistant["content"], assistant["reasoning_content"]) == ("", "hm")
    assert (tool["role"], tool["tool_call_id"]) == ("tool", "1")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)  # fmt: skip
def test_what_would_change_the_text_is_refused(more: dict[str, Any], param: str, server: Served) -> None:
    """The twin's template knows no tools."""
    answer = server.post("/v1/chat/completions", {**BASE, **more})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["message"].endswith(".")


def test_a_seed_is_drawn_and_reported(server: Served) -> None:
    body = {**BASE, "temperature": 1, "max_tokens": 12}
    drawn = [server.post("/v1/chat/completions", body).json() for _ in range(3)]
    texts = [answer["choices"][0]["message"]["content"] for answer in drawn]
    assert len(set(texts)) > 1
    for answer, text in zip(drawn, texts, strict=True):
        seed = answer["tempo"]["seed"]
        assert answer["system_fingerprint"].endswith(f"-seed-{seed}")
        assert content(server, {**body, "seed": seed}) == text
