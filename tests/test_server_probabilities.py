"""What /v1 tells of probabilities beside the text: of prompts, of texts begun, of branches and phrases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

import tempo_mlx
from tempo_mlx.loading import LoadedModel
from tempo_mlx.server.openai import spelled
from tempo_mlx.weights.infilling import infilling_ends, infilling_prompt
from tempo_mlx.weights.tokenizer import Tokenizer
from tests.serving import Served, serving, with_context
from tests.twins import twin

MODEL = "twin"
USER = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_context(twin("llama"), 4096, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    with serving(model, "--model-alias", MODEL) as served:
        yield served


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return tempo_mlx.load(str(model))


def complete(server: Served, **body: Any) -> list[dict[str, Any]]:
    answer = server.post("/v1/completions", {"model": MODEL, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def streamed_by(server: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = server.post("/v1/completions", {**body, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [choice for chunk in chunks for choice in chunk["choices"]]


@pytest.mark.parametrize("length", [0, 1])
def test_log_likelihoods_as_lm_eval_asks_for_them(length: int, server: Served, loaded: LoadedModel) -> None:
    """Its request, and its reading of the answer: context and continuation are one prompt of token ids."""
    texts = [
        f" the {word} sat on {number} mats" for number, word in enumerate(["cat", "dog", "man", "sun"] * 13)
    ]
    context = loaded.tokenizer.encode("In the house")
    pairs = [(context, loaded.tokenizer.encode(text, add_special=False)) for text in texts]
    choices = complete(
        server, prompt=[[*a, *b] for a, b in pairs], max_tokens=length, logprobs=1, seed=1234, echo=True
    )
    scores = tempo_mlx.score(loaded, context, [ids for _, ids in pairs])
    for (before, ids), choice, expected in zip(pairs, choices, scores, strict=True):
        end = len(before) + len(ids)
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(told["top_logprobs"]) == len(told["text_offset"]) >= end
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        own = told["token_logprobs"][len(before) : end]
        assert own == pytest.approx(expected.log_probs, abs=1e-4)
        for token, top, log_prob in zip(
            told["tokens"][len(before) : end], told["top_logprobs"][len(before) : end], own, strict=True
        ):
            (best,) = top
            assert top[best] >= log_prob - 1e-6
            assert (best == token) == (abs(top[best] - log_prob) < 1e-6)


def test_an_echo_is_the_prompt_and_then_what_follows_it(server: Served, loaded: LoadedModel) -> None:
    (alone,) = complete(server, prompt="Hello there", max_tokens=6, logprobs=2)
    (echoed,) = complete(server, prompt="Hello there", max_tokens=6, logprobs=2, echo=True)
    ids = loaded.tokenizer.encode("Hello there")
    assert echoed["text"] == "Hello there" + alone["text"]
    assert echoed["logprobs"]["tokens"][len(ids) :] == alone["logprobs"]["tokens"]
    assert echoed["logprobs"]["token_logprobs"][len(ids) :] == pytest.approx(
        alone["logprobs"]["token_logprobs"], abs=1e-5
    )
    assert echoed["logprobs"]["tokens"][: len(ids)] == [
        spelled(list(loaded.tokenizer.token_bytes(token))) for token in ids
    ]
    branches = complete(server, prompt="Hello there", max_tokens=3, n=2, echo=True)
    assert all(choice["text"].startswith("Hello there") for choice in branches)


def test_an_echo_streams(server: Served) -> None:
    body = {"prompt": "Hello there", "max_tokens": 4, "echo": True, "logprobs": 1, "temperature": 0}
    (whole,) = complete(server, **body)
    pieces = streamed_by(server, body)
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    told = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
    for name in ("tokens", "text_offset"):
        assert [each for part in told for each in part[name]] == whole["logprobs"][name]


def test_an_answer_begun_is_continued(server: Served, loaded: LoadedModel) -> None:
    said = {"role": "assistant", "content": "Well, hello"}
    body = {"messages": [USER, said], "max_tokens": 6, "temperature": 0}
    answer = server.post("/v1/chat/completions", body).json()
    text, ids = loaded.tokenizer.encode_chat([USER])
    more = tempo_mlx.generate(
        loaded,
        [*ids, *loaded.tokenizer.encode("Well, hello", add_special=False)],
        decoder="plain",
        temperature=0,
        max_tokens=6,
    )
    assert answer["choices"][0]["message"]["content"] == more.final_text
    assert loaded.tokenizer.encode_chat([USER], "Well, hello")[0] == text + "Well, hello"


def test_best_of_gives_the_most_probable_of_more_branches(server: Served) -> None:
    four = complete(server, prompt="Hello", max_tokens=5, n=4)
    assert complete(server, prompt="Hello", max_tokens=5, best_of=4) == four[:1]
    assert [c["text"] for c in complete(server, prompt="Hello", max_tokens=5, n=2, best_of=4)] == [
        c["text"] for c in four[:2]
    ]


def test_superposed_answers_bring_their_phrases(server: Served, loaded: LoadedModel) -> None:
    (choice,) = complete(
        server, prompt="Hello there", max_tokens=12, temperature=1, tempo={"threshold": 0.04}
    )
    phrases = choice["tempo"]["phrases"]
    assert "".join(phrase["text"] for phrase in phrases) == choice["text"]
    forks = [phrase for phrase in phrases if phrase["alternatives"]]
    assert forks
    assert all(
        0 < other["share"] <= phrase["share"] for phrase in forks for other in phrase["alternatives"][:1]
    )
    (plain,) = complete(server, prompt="Hello there", max_tokens=4)
    assert "tempo" not in plain


@pytest.mark.parametrize(
    "more", [{"tempo": {"threshold": 0.04}}, {"n": 3}, {}], ids=["sets", "branches", "plain"]
)
def test_the_lattice_comes_where_it_is_asked_for(more: dict[str, Any], server: Served) -> None:
    body = {"prompt": "Hello there", "max_tokens": 8, "temperature": 1, "seed": 1, "lattice": True, **more}
    first, *others = complete(server, **body)
    run = tempo_mlx.Run.from_json(json.dumps(first["tempo"]["run"]))
    assert (run.texts[0].text if "n" in more else run.final_text) == first["text"]
    assert not any("tempo" in other for other in others)
    last = [choice for choice in streamed_by(server, body) if "run" in choice.get("tempo", {})]
    assert [choice["tempo"]["run"]["steps"] for choice in last] == [first["tempo"]["run"]["steps"]]


def test_a_model_that_fills_in_is_shown_both_ends(loaded: LoadedModel) -> None:
    backend = type(loaded.tokenizer.backend).from_str(loaded.tokenizer.backend.to_str())
    marks = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"]
    backend.add_special_tokens(marks)
    tokenizer = Tokenizer(backend, vocab_size=backend.get_vocab_size())
    ids = infilling_prompt(tokenizer, "a = ", "\nprint(a)")
    assert ids is not None
    assert tokenizer.decode(ids) == "<|fim_prefix|>a = <|fim_suffix|>\nprint(a)<|fim_middle|>"
    assert "<|file_sep|>" in infilling_ends(tokenizer)
    assert infilling_prompt(loaded.tokenizer, "a", "b") is None
