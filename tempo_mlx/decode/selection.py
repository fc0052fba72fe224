"""Which tokens of a distribution form the next parallel set."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

SELECTION_RULES = ("threshold", "min-p", "top-p", "top-k")


def select(
    probabilities: NDArray[np.floating],
    *,
    rule: str = "threshold",
    value: float = 0.1,
    max_width: int = 8,
    excluded: Collection[int] = (),
) -> Ints:
    """Ids of the kept tokens, best first; of equally probable tokens the lower id comes first.

    probabilities: (V,). `value` means, by rule:

    - `threshold`: keep every token with probability >= value;
    - `min-p`: keep those with probability >= value x the best eligible one's (arXiv 2407.01082);
    - `top-p`: keep the fewest best tokens whose probabilities sum to at least value (arXiv 1904.09751);
    - `top-k`: keep the value best.

    All are capped at max_width. The best eligible token is always kept; a token of probability 0 never beside it.
    `excluded` ids (EOS before the minimum length) are not eligible, and nothing is renormalised for them.
    """
    if rule not in SELECTION_RULES:
        raise ValueError(f"selection is one of {', '.join(SELECTION_RULES)}, not {rule!r}")
    if excluded:
        probabilities = probabilities.copy()
        probabilities[list(excluded)] = -1.0
    best = int(probabilities.argmax())  # the first of equals
    top = float(probabilities[best])
    width = min(max_width, int(value)) if rule == "top-k" else max_width
    if width <= 1:
        return np.array([best])
    floor = {"threshold": value, "min-p": value * top}.get(rule, 0.0)
    if rule == "top-p" and probabilities[probabilities >= 1e-4].sum(dtype=np.float64) >= value:
        floor = 1e-4  # nothing below is needed, and to sort the whole vocabulary takes long
    kept = _best(probabilities, width, max(floor, float(np.finfo(np.float32).tiny)))
    if rule == "top-p":
        before = np.cumsum(probabilities[kept], dtype=np.float64) - probabilities[kept]
        kept = kept[before < value]
    return kept if len(kept) else np.array([best])


def _best(probabilities: NDArray[np.floating], count: int, floor: float) -> Ints:
    """The `count` most probable ids with probability >= floor > 0, best first, ties by id."""
    # At most 1/f tokens reach probability f, so a first look at f = 1e-4 spares sorting the vocabulary.
    candidates = np.flatnonzero(probabilities >= max(floor, 1e-4))
    if len(candidates) < count and floor < 1e-4:
        candidates = np.flatnonzero(probabilities >= floor)
    if len(candidates) > 4 * count:
        cut = np.partition(probabilities[candidates], len(candidates) - count)[len(candidates) - count]
        candidates = candidates[probabilities[candidates] >= cut]
    order = np.lexsort((candidates, -probabilities[candidates]))
    return candidates[order[:count]]
