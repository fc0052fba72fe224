"""A session runs what a prompt shares with the last one only once, and gives the same runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tempo_mlx
from tempo_mlx.decode.prefill import never, prefill
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.run import Run
from tests import twins

SETTINGS: dict[str, Any] = {"max_tokens": 6, "min_steps": 6}
IDS = np.random.default_rng(0).integers(250, size=60).tolist()
LONGER, OTHER = [*IDS, 7, 8, 9], [*IDS[:40], 1, 2]


class Counting:
    """A model that counts the rows it is given."""

    def __init__(self, model: Any) -> None:
        self.model, self.architecture, self.info = model, model.architecture, model.info
        self.new_cache, self.embeddings = model.new_cache, model.embeddings
        self.rows = 0

    def forward(self, tokens: Any, *arguments: Any, **rest: Any) -> Any:
        self.rows += len(tokens)
        return self.model.forward(tokens, *arguments, **rest)


def load(name: str = "llama", **settings: Any) -> LoadedModel:
    loaded = tempo_mlx.load(str(twins.twin(name)), **settings)
    return LoadedModel(Counting(loaded.model), loaded.tokenizer, LoadConfig())


def prompt_rows(session: tempo_mlx.Session, prompt: Any, **settings: Any) -> tuple[int, Run]:
    """Rows until the first step is there, and the run."""
    model: Any = session.loaded.model
    before, decoding = model.rows, session.stream(prompt, **SETTINGS, **settings)
    next(decoding)
    rows = model.rows - before
    for _ in decoding:
        pass
    return rows, decoding.run()


def same(one: Run, other: Run) -> None:
    assert one.prompt == other.prompt and one.text == other.text
    for a, b in zip(one.steps, other.steps, strict=True):
        assert [t.id for t in a.tokens] == [t.id for t in b.tokens]
        np.testing.assert_allclose(
            [t.probability for t in a.tokens], [t.probability for t in b.tokens], atol=1e-5
        )


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_retroactive_pruning": True, "posterior_threshold": 0.3}, {"decoder": "plain"}, {"branches": 3},
     {"decoder": "mcts", "mcts_simulations": 3}],
)  # fmt: skip
def test_a_shared_beginning_is_run_once(settings: dict[str, Any], backend: str) -> None:
    loaded = load(backend=backend)
    session = tempo_mlx.Session(loaded)
    for prompt, new in ((IDS, 60), (IDS, 1), (LONGER, 3), (OTHER, 2), (IDS, 20), ([5, 6], 2)):
        rows, run = prompt_rows(session, prompt, **settings)
        alone, expected = prompt_rows(tempo_mlx.Session(loaded), prompt, **settings)
        assert rows - new == alone - len(
            prompt
        )  # what is not the prompt's: rows a search runs before it decides
        same(run, expected)
        same(run, tempo_mlx.generate(loaded, prompt, **SETTINGS, **settings))


def test_texts_and_generate() -> None:
    session = tempo_mlx.Session(load())
    model: Any = session.loaded.model
    text = "the sand and the"
    first = session.generate(text, **SETTINGS)
    rows = model.rows
    second = session.generate(text, **SETTINGS)
    same(first, second)
    assert rows - (model.rows - rows) == len(first.prompt.token_ids) - 1
    assert first.prompt.text == second.prompt.text == text


def test_a_cache_that_is_given_is_gone_on_from() -> None:
    loaded = load()
    cache = loaded.model.new_cache()
    prefill(loaded.model, IDS[:-1], cache, never)
    decoding = tempo_mlx.Session(loaded).stream(IDS, cache=cache, **SETTINGS)
    assert decoding.cache is cache
    same(decoding.complete(), tempo_mlx.generate(loaded, IDS, **SETTINGS))


def test_streams_begun_earlier_go_on_undisturbed() -> None:
    loaded = load()
    session = tempo_mlx.Session(loaded)
    first = session.stream(IDS, **SETTINGS)
    next(first)
    second = session.stream(LONGER, **SETTINGS)
    for _ in second:
        pass
    for _ in first:
        pass
    same(first.run(), tempo_mlx.generate(loaded, IDS, **SETTINGS))
    same(second.run(), tempo_mlx.generate(loaded, LONGER, **SETTINGS))


def test_an_interrupted_prompt_is_continued_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempo_mlx.decode.prefill.CHUNK", 64)
    loaded = load()
    session = tempo_mlx.Session(loaded)
    prompt = np.random.default_rng(1).integers(250, size=200).tolist()
    answers = iter([None, None, None, "cancelled"])  # before the first step, and before each chunk
    assert list(session.stream(prompt, interrupted=lambda: next(answers), **SETTINGS)) == []
    rows, run = prompt_rows(session, prompt)
    assert rows == 200 - 2 * 64
    same(run, tempo_mlx.generate(loaded, prompt, **SETTINGS))


@pytest.mark.parametrize("name", ["llama-dynamic", "phi4"])
def test_where_angles_follow_the_length_nothing_is_taken_over(name: str) -> None:
    """Rows of a short text have other angles than the same rows of a long one."""
    loaded = load(name)
    session = tempo_mlx.Session(loaded)
    short, long = IDS[:12], IDS[:25]
    assert [prompt_rows(session, prompt)[0] for prompt in (short, long)] == [12, 13]
    if name == "phi4":  # its context is longer than what its first frequencies were made for
        rows, run = prompt_rows(session, IDS)
        assert rows == 60
        same(run, tempo_mlx.generate(loaded, IDS, **SETTINGS))
        assert prompt_rows(session, short)[0] == 12
