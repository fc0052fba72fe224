"""How different texts are, and how they repeat themselves. Texts are token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

Texts = Sequence[Sequence[int]]


def ngrams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(text[start:] for start in range(n)), strict=False))


def distinct(texts: Texts, n: int) -> float:
    """Different n-grams over all n-grams of all texts (arXiv 1510.03055). Depends on the length: fix it."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / max(len(grams), 1)


def repetition(texts: Texts, n: int = 3) -> float:
    """Share of the n-grams of a text that occurred in it before, mean over texts."""
    return float(np.mean([1 - distinct([text], n) for text in texts]))


def unique(texts: Texts) -> int:
    return len({tuple(text) for text in texts})


def edit_distance(texts: Texts) -> float:
    """Mean over pairs of the Levenshtein distance of the tokens, over the longer one's length; 0 for one text."""
    from rapidfuzz.distance import Levenshtein

    pairs = list(combinations(map(list, texts), 2))
    return float(np.mean([Levenshtein.normalized_distance(a, b) for a, b in pairs])) if pairs else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4 of each text against all others (arXiv 1802.01886), sacrebleu with its own tokenizer, 0..100."""
    from sacrebleu.metrics import BLEU

    if len(texts) == 1:
        return 100.0
    bleu = BLEU(effective_order=True)
    others = [[*texts[:i], *texts[i + 1 :]] for i in range(len(texts))]
    return float(np.mean([bleu.sentence_score(*pair).score for pair in zip(texts, others, strict=True)]))


def vendi(texts: Texts) -> float:
    """The Vendi score (arXiv 2210.02410), how many texts there seem to be: 1 .. n.

    exp of the entropy of the eigenvalues of K / n; the kernel K is the cosine of the counts of 1- and 2-grams.
    """
    counts = [Counter(ngrams(text, 1) + ngrams(text, 2)) for text in texts]
    column = {gram: place for place, gram in enumerate({gram for count in counts for gram in count})}
    vectors = np.zeros((len(texts), len(column)))
    for row, count in zip(vectors, counts, strict=True):
        row[[column[gram] for gram in count]] = list(count.values())
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(vectors @ vectors.T / len(texts))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def diversity(texts: Texts, words: Sequence[str], wanted: int, *, whole: bool = False) -> dict[str, float]:
    """All of them for the texts of one prompt; `words`: the same texts, readable.

    A decoder that gave fewer texts than `wanted` is taken to have given its first one again. Texts are cut to the
    shortest, unless they count as a `whole`: where one of them ends at once, a cut would leave nothing to measure.
    """
    length = None if whole else min(map(len, texts))
    missing = wanted - len(texts)
    cut = [text[:length] for text in [*texts, *texts[:1] * missing]]
    words = [*words, *words[:1] * missing]
    return {
        **{f"distinct_{n}": distinct(cut, n) for n in (1, 2, 3)},
        "self_bleu": self_bleu(words),
        "edit": edit_distance(cut),
        "vendi": vendi(cut),
        "repetition": repetition(cut),
        "unique": float(unique(cut)),
    }
