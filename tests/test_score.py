"""Scores of many continuations in one tree pass, against transformers on each text alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tempo_mlx
from tempo_mlx import api
from tempo_mlx.api import generate
from tempo_mlx.decode import score as module
from tempo_mlx.decode.score import depths, in_groups, make_trie, score, score_sequences
from tempo_mlx.errors import PromptError
from tempo_mlx.lattice import ancestor_bias
from tests.trees import loaded, prompt, teacher


def test_the_trie_shares_beginnings_and_leaves_out_last_tokens() -> None:
    tokens, parents, rows = make_trie(9, [[1, 2, 3], [1, 2, 4], [1, 5], [7], [], [1, 2, 3]])
    assert tokens.tolist() == [9, 1, 2]
    assert parents.tolist() == [-1, 0, 1]
    assert [row.tolist() for row in rows] == [[0, 1, 2], [0, 1, 2], [0, 1], [0], [], [0, 1, 2]]
    assert depths(parents).tolist() == [0, 1, 2]


def test_the_bias_of_a_tree_shows_ancestors_only() -> None:
    bias = ancestor_bias([-1, 0, 0, 1, 2, 3], 4)
    seen = [sorted(np.flatnonzero(row == 0).tolist()) for row in bias]
    assert seen == [[0, 2], [0, 1, 3], [0, 2, 4], [0, 1, 3, 5]]
    assert set(np.unique(bias)) == {0.0, -np.inf}


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_scores_are_those_of_each_text_alone(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = loaded(name, backend).model, prompt(0, 9)
    random = np.random.default_rng(1)
    stem = random.integers(0, 300, 20).tolist()
    sequences = [
        [*stem[: int(cut)], *random.integers(0, 300, 4).tolist()] for cut in random.integers(0, 20, 12)
    ]
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * model.architecture.vocab_size)  # several chunks
    found = score_sequences(model, ids, [*sequences, [], ids[:1]])
    assert [len(each) for each in found] == [*map(len, sequences), 0, 1]
    for sequence, each in zip(sequences, found, strict=False):
        assert each == pytest.approx(teacher(name, ids, sequence), abs=1e-4)


def test_a_prompt_of_one_token_and_no_continuations() -> None:
    model = loaded().model
    assert score_sequences(model, [5], []) == []
    assert score_sequences(model, [5], [[6, 7]])[0] == pytest.approx(teacher("llama", [5], [6, 7]), abs=1e-4)


def test_a_cache_with_other_rows_is_left_as_it_was() -> None:
    model, ids = loaded().model, prompt(2)
    cache = model.new_cache()
    model.forward([*ids, 1, 2, 3], range(9), None, cache, logits="none")
    found = score_sequences(model, ids, [[4, 5], [4, 6]], cache)
    assert len(cache) == 9
    assert found[1] == pytest.approx(teacher("llama", ids, [4, 6]), abs=1e-4)


def test_the_number_of_rows_is_that_of_the_shared_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = loaded().model, prompt(3)
    rows = 0
    forward = model.forward

    def counting(tokens, *rest, **named):  # type: ignore[no-untyped-def]
        nonlocal rows
        rows += len(tokens)
        return forward(tokens, *rest, **named)

    monkeypatch.setattr(model, "forward", counting)
    score_sequences(model, ids, [[1, 2, 3, token] for token in range(50)])
    assert rows == len(ids) + 3


def test_long_texts_do_not_run_over_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many long texts each row would see, and mask, the rows of all others."""
    model, ids = loaded("llama").model, prompt(0, 9)
    texts = np.random.default_rng(2).integers(0, 300, (7, 20)).tolist()
    together = score_sequences(model, ids, texts)
    slots: list[int] = []
    forward = type(model).forward

    def counted(self: Any, tokens: Any, positions: Any, bias: Any, cache: Any, **options: Any) -> Any:
        out = forward(self, tokens, positions, bias, cache, **options)
        slots.append(len(cache))
        return out

    monkeypatch.setattr(type(model), "forward", counted)
    monkeypatch.setattr(module, "TREE", 45)
    cache = model.new_cache()
    model.forward(ids, np.arange(9), None, cache)
    slots.clear()
    found = score_sequences(model, ids, texts, cache)
    assert slots == [9 + 2 * 19] * 3 + [9 + 19] and len(cache) == 9
    for one, other in zip(together, found, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)
    assert [list(group) for group in in_groups([[1] * 50, [2], [3] * 44, [4]], 45)] == [
        [[1] * 50], [[2], [3] * 44], [[4]]
    ]  # fmt: skip


def test_texts_are_scored_as_they_would_be_generated() -> None:
    run = generate(loaded(), "The sky and the", branches=3, threshold=0.02, max_tokens=8)
    scores = score(loaded(), run.prompt.token_ids, [path.token_ids for path in run.paths])
    for path, each in zip(run.paths, scores, strict=True):
        assert each.log_prob == pytest.approx(path.logprob, abs=1e-3)
        assert each.mean_log_prob == pytest.approx(path.logprob / len(path.token_ids), abs=1e-4)
        assert each.text == path.text


def test_a_text_is_tokenized_with_its_prompt_where_that_changes_nothing_before_it() -> None:
    tokenizer = loaded().tokenizer
    (joined,) = score(loaded(), "an", [" the"])
    assert list(joined.token_ids) == tokenizer.encode("an the")[len(tokenizer.encode("an")) :]
    (apart,) = score(loaded(), "t", ["he"])  # together they are one token, "the"
    assert list(apart.token_ids) == tokenizer.encode("he", add_special=False)


def test_score_is_part_of_the_public_names() -> None:
    assert tempo_mlx.score is api.score


def test_what_cannot_be_scored_is_refused_in_one_sentence() -> None:
    limit = loaded().model.architecture.max_position_embeddings
    with pytest.raises(PromptError, match="context"):
        score(loaded(), [1, 2], [[3] * limit])
    with pytest.raises(PromptError, match="vocabulary"):
        score(loaded(), [1, 2], [[100_000]])
    with pytest.raises(PromptError, match="empty"):
        score(loaded(), [], [[1]])
