"""The official OpenAI client against the server: completions, chat, streams, n, log-probabilities, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")
pytest.importorskip("openai")

import openai

import tempo_mlx
from tempo_mlx.decode.combine import log_probabilities
from tempo_mlx.loading import LoadedModel
from tempo_mlx.server.openai import spelled
from tests.serving import Served, serving, with_context
from tests.twins import twin

MODEL = "twin"
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_context(twin("llama"), 4096, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    with serving(model, "--model-alias", MODEL) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0)


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return tempo_mlx.load(str(model))


def greedy(loaded: LoadedModel, prompt: str, count: int) -> tuple[str, list[int], list[float]]:
    """Plain decoding with the model alone: text, ids, log-probabilities."""
    tokenizer, cache = loaded.tokenizer, loaded.model.new_cache()
    ids, chosen, scores = list(tokenizer.encode(prompt)), [], []
    while len(chosen) < count:
        new = ids[len(cache) :]
        out = loaded.model.forward(new, np.arange(len(cache), len(ids)), None, cache, logits="last")
        assert out.logits is not None
        row = log_probabilities(out.logits)[0]
        token = int(row.argmax())
        if token in tokenizer.eos_ids:
            break
        ids.append(token)
        chosen.append(token)
        scores.append(float(row[token]))
    return tokenizer.decode(chosen), chosen, scores


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "tempo-mlx"
    with pytest.raises(openai.NotFoundError) as failure:
        client.completions.create(model="/etc/passwd", prompt="a")
    assert failure.value.code == "model_not_found"


def test_a_completion_is_ordinary_decoding(client: Any, loaded: LoadedModel) -> None:
    text, ids, _ = greedy(loaded, "Hello there", 12)
    answer = client.completions.create(model=MODEL, prompt="Hello there", max_tokens=12, temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens == len(loaded.tokenizer.encode("Hello there"))
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_prompt_may_be_tokens_or_several(client: Any, loaded: LoadedModel) -> None:
    ids = list(loaded.tokenizer.encode("Hello there"))
    text, _, _ = greedy(loaded, "Hello there", 6)
    by_ids = client.completions.create(model=MODEL, prompt=ids, max_tokens=6, temperature=0)
    assert by_ids.choices[0].text == text
    both = client.completions.create(model=MODEL, prompt=["Bye", "Hello there"], max_tokens=6, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[1].text == text


def test_sampling_follows_the_seed(client: Any) -> None:
    def sample(seed: int) -> str:
        text: str = (
            client.completions.create(model=MODEL, prompt="Hello", max_tokens=20, seed=seed).choices[0].text
        )
        return text

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 1.3, "seed": 5},
        {"tempo": {"threshold": 0.04}},
        {"tempo": {"threshold": 0.03, "use_retroactive_pruning": True, "posterior_threshold": 0.3,
                   "pruning_window": 2}},
        {"tempo": {"threshold": 0.03, "complete_removal_mode": "remove_position", "attention_threshold": 0.3,
                   "relative_attention": False}},
        {"n": 3},
        {"n": 2, "tempo": {"decoder": "beam"}},
        {"top_p": 0.5, "frequency_penalty": 1.5, "logit_bias": {"260": 3}},
    ],
    ids=["greedy", "sampled", "superposed", "pruned", "removed", "branches", "beams", "controlled"],
)  # fmt: skip
def test_a_stream_is_the_answer_in_pieces(client: Any, settings: dict[str, Any]) -> None:
    tempo = {"extra_body": {"tempo": settings["tempo"]}} if "tempo" in settings else {}
    rest = {key: value for key, value in settings.items() if key != "tempo"}
    body = {
        "model": MODEL,
        "prompt": "Once upon",
        "max_tokens": 30,
        "logprobs": 3,
        "seed": 5,
        **rest,
        **tempo,
    }
    if settings.get("tempo") == {"decoder": "beam"}:
        del body["logprobs"]
    whole = client.completions.create(**body)
    pieces: dict[int, str] = {}
    tokens: dict[int, list[str]] = {}
    ended, chunks = {}, 0
    for chunk in client.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            chunks += 1
            pieces[choice.index] = pieces.get(choice.index, "") + choice.text
            if choice.logprobs:
                tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
            if choice.finish_reason:
                ended[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert [pieces[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert [ended[choice.index] for choice in whole.choices] == [
        choice.finish_reason for choice in whole.choices
    ]
    assert usage == whole.usage
    if "logprobs" in body:
        assert [tokens[c.index] for c in whole.choices] == [c.logprobs.tokens for c in whole.choices]
    if len(whole.choices) == 1 and not tempo:
        assert chunks > 20, "it came while it grew"


SCHEMA = {
    "type": "object", "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize("n", [1, 2])
def test_answers_keep_to_a_grammar(client: Any, n: int) -> None:
    pytest.importorskip("llguidance")
    format = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
    body = {"model": MODEL, "messages": USER, "max_tokens": 60, "n": n}
    answer = client.chat.completions.create(**body, response_format=format, presence_penalty=0.5)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content)
        assert set(value) == {"a", "b"} and value["a"] in ("x", "yy") and isinstance(value["b"], bool)
    answer = client.chat.completions.create(**body, extra_body={"choices": ["yes", "no"]}, logprobs=True)
    assert {choice.message.content for choice in answer.choices} <= {"yes", "no"}
    assert all(math.isfinite(t.logprob) for t in answer.choices[0].logprobs.content)
    answer = client.chat.completions.create(**body, extra_body={"regex": "[0-9]{3}"})
    assert all(choice.message.content.isdigit() for choice in answer.choices)
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        client.chat.completions.create(**body, response_format={"type": "json_schema"})


def test_chat(client: Any) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=10, temperature=0)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=USER, max_tokens=10, temperature=0, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == whole.choices[0].message.content
    )
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_variables_of_the_template_are_passed_on(client: Any) -> None:
    """The twin's template knows add_generation_prompt, whose three tokens (and more) are then left out."""
    ask = {"model": MODEL, "messages": USER, "max_tokens": 3}
    plain = client.chat.completions.create(**ask, reasoning_effort="high")
    more = {"chat_template_kwargs": {"add_generation_prompt": False}}
    bare = client.chat.completions.create(**ask, extra_body=more)
    assert bare.usage.prompt_tokens < plain.usage.prompt_tokens


def test_n_gives_distinct_branches(client: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=8, temperature=0, n=5, logprobs=True
    )
    texts = [tuple(item.token for item in choice.logprobs.content) for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(5))
    assert len(set(texts)) == 5
    streamed = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=8, temperature=0, n=5, stream=True
    )
    assert {choice.index for chunk in streamed for choice in chunk.choices} == set(range(5))


def test_each_branch_says_why_it_ended(client: Any, loaded: LoadedModel) -> None:
    """Under a high temperature some branches reach an end of text, and the others the limit."""
    body = {
        "model": MODEL,
        "prompt": "Hello",
        "max_tokens": 60,
        "n": 16,
        "logprobs": 1,
        "seed": 3,
        "temperature": 2,
    }
    choices = client.completions.create(**body).choices
    reasons = [choice.finish_reason for choice in choices]
    assert set(reasons) == {"stop", "length"}
    for choice in choices:
        assert (choice.finish_reason == "length") == (len(choice.logprobs.tokens) == 60)
    stop = max((choice.text for choice in choices), key=len).replace("\0", "")[4:6]
    stopped = client.completions.create(**body, stop=stop).choices
    assert any(choice.finish_reason == "stop" for choice in stopped)


def test_logprobs_are_the_models(client: Any, loaded: LoadedModel) -> None:
    _, ids, scores = greedy(loaded, "Hello there", 8)
    answer = client.completions.create(
        model=MODEL, prompt="Hello there", max_tokens=8, temperature=0, logprobs=5
    )
    found = answer.choices[0].logprobs
    assert found.token_logprobs == pytest.approx(scores, abs=1e-5)
    assert found.tokens == [spelled(list(loaded.tokenizer.token_bytes(token))) for token in ids]
    for token, score, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert 1 <= len(top) <= 5
        assert max(top.values()) == pytest.approx(score, abs=1e-6)
        assert token in top
    assert found.text_offset[0] == 0


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"stream": True}])
def test_the_bytes_of_the_tokens_are_those_of_the_text(client: Any, more: dict[str, Any]) -> None:
    """The twin says bytes at random, of which few are whole characters."""
    for seed in range(4):
        body = {
            "model": MODEL,
            "messages": USER,
            "max_tokens": 24,
            "seed": seed,
            "logprobs": True,
            "top_logprobs": 2,
        }
        answer = client.chat.completions.create(**body, **more)
        chunks = list(answer) if more.get("stream") else [answer]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        for index in {choice.index for choice in choices}:
            own = [choice for choice in choices if choice.index == index]
            scored = [token for choice in own if choice.logprobs for token in choice.logprobs.content]
            parts = [choice.delta if more.get("stream") else choice.message for choice in own]
            text = "".join(part.content or "" for part in parts)
            said = bytes(byte for token in scored for byte in token.bytes)
            # How many marks the half character at the end of a text gets is the decoder's business.
            assert said.decode("utf-8", "replace").rstrip("\ufffd") == text.rstrip("\ufffd")
            for each in (other for token in scored for other in (token, *token.top_logprobs)):
                assert each.token == spelled(each.bytes)


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_offsets_are_where_the_tokens_stand(client: Any, more: dict[str, Any]) -> None:
    whole = 0
    for seed in range(4):
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 24, "seed": seed, "logprobs": 1}
        answer = client.completions.create(**body, **more)
        choices = [choice for chunk in (answer if more else [answer]) for choice in chunk.choices]
        text = "".join(choice.text for choice in choices)
        found = [choice.logprobs for choice in choices if choice.logprobs]
        tokens, offsets = (
            [x for each in found for x in getattr(each, name)] for name in ("tokens", "text_offset")
        )
        assert offsets == sorted(offsets)
        for token, offset in zip(tokens, offsets, strict=True):
            if not token.startswith("bytes:"):
                whole += 1
                assert text[offset : offset + len(token)] == token
    assert whole > 20


def test_a_part_of_a_character_is_spelled_as_bytes() -> None:
    assert [spelled(list(part)) for part in (b"ab", "é".encode(), b"", b"\xf0\x9f", b"\x98\x80")] == [
        "ab", "é", "", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80",
    ]  # fmt: skip


def test_chat_logprobs_of_branches_are_exact(client: Any, loaded: LoadedModel) -> None:
    """Every branch's log-probabilities, summed, are those of scoring its tokens alone."""
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=6, temperature=0, n=3, logprobs=True, top_logprobs=2
    )
    run = tempo_mlx.generate(
        loaded,
        "Hello",
        chat=True,
        branches=3,
        branch_choice="best",
        threshold=0.0,
        max_tokens=6,
        temperature=0,
    )
    for choice, path in zip(answer.choices, run.paths, strict=True):
        content = choice.logprobs.content
        assert all(len(item.top_logprobs) == 2 and item.bytes is not None for item in content)
        ended = path.token_ids[-1] in loaded.tokenizer.eos_ids
        assert len(content) == len(path.token_ids) - ended
        if not ended:
            assert sum(item.logprob for item in content) == pytest.approx(path.logprob, abs=1e-4)


def test_stop_is_never_sent(client: Any, loaded: LoadedModel) -> None:
    text, _, _ = greedy(loaded, "Hello there", 30)
    stop = next(text[i : i + 2] for i in range(8, len(text)) if "\0" not in text[i : i + 2])
    body = {"model": MODEL, "prompt": "Hello there", "max_tokens": 30, "temperature": 0, "stop": [stop]}
    answer = client.completions.create(**body)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(stop)]
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**body, stream=True)]
    assert "".join(pieces) == answer.choices[0].text


def test_tempo_settings(client: Any, loaded: LoadedModel) -> None:
    tempo = {"threshold": 0.04, "use_retroactive_pruning": True, "posterior_threshold": 0.2}
    answer = client.completions.create(
        model=MODEL, prompt="Hello there", max_tokens=12, extra_body={"tempo": tempo}
    )
    run = tempo_mlx.generate(loaded, "Hello there", max_tokens=12, **tempo)
    assert answer.choices[0].text == run.final_text
    assert any(len(step.tokens) > 1 for step in run.steps)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"extra_body": {"regex": "("}}, "regex"),
        ({"extra_body": {"regex": "a", "choices": ["b"]}}, "regex"),
        ({"presence_penalty": 1, "extra_body": {"tempo": {"decoder": "superposed"}}}, "presence_penalty"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"suffix": "}"}, "suffix"),
        ({"extra_body": {"tempo": {"threshold": 7}}}, "tempo.threshold"),
        ({"extra_body": {"tempo": {"nope": 7}}}, "tempo.nope"),
        ({"extra_body": {"mirostat_mode": 2}}, "mirostat_mode"),
        ({"extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"top_p": 0.5, "extra_body": {"tempo": {"top_p": 0.4}}}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2, "extra_body": {"tempo": {"decoder": "superposed"}}}, "n"),
        ({"n": 3, "extra_body": {"tempo": {"branches": 2}}}, "n"),
        ({"logprobs": 3, "extra_body": {"tempo": {"decoder": "beam"}}}, "logprobs"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: Any, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        client.completions.create(model=MODEL, prompt="a", **body)
    assert failure.value.param == param
    assert failure.value.type == "invalid_request_error"


def test_too_long_a_prompt(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        client.completions.create(model=MODEL, prompt="word " * 5000)
    assert failure.value.code == "context_length_exceeded"


def test_parts_and_roles(client: Any) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    same = [
        client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=5, temperature=0
        ).usage.prompt_tokens
        for messages in (
            [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}],
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        )
    ]
    assert same[0] == same[1]
    assert math.isfinite(same[0])
