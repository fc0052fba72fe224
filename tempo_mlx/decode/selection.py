"""Which tokens of a distribution form the next parallel set."""

from __future__ import annotations

from collections.abc import Callable, Collection
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.config import SELECTIONS, GenerateConfig
from tempo_mlx.decode.functions import Functions, Select
from tempo_mlx.decode.schedules import Schedule, constant
from tempo_mlx.errors import ConfigError
from tempo_mlx.settings import shown
from tempo_mlx.token_ids import listed

# probabilities (V,), step, excluded ids -> ids, best first
Selector = Callable[[Float32s, int, Collection[int]], Ints]

SELECTION_RULES = ("threshold", *SELECTIONS)


def make_selector(
    config: GenerateConfig,
    max_width: int,
    threshold: Schedule | None = None,
    functions: Functions | None = None,
) -> Selector:
    """What the settings, or a function of the caller's own, select: at most `max_width` tokens.

    threshold: the schedule where it moves.
    """
    own = None if functions is None else functions.select
    value = threshold or constant(config.threshold)
    if config.selection in SELECTIONS:
        value = constant(getattr(config, SELECTIONS[config.selection][0]))

    def selector(probabilities: Float32s, step: int, excluded: Collection[int]) -> Ints:
        if own is not None:
            return chosen_by(own, probabilities, step, excluded)[:max_width]
        return select(
            probabilities, rule=config.selection, value=value(step), max_width=max_width, excluded=excluded
        )

    return selector


def chosen_by(
    function: Select,
    probabilities: Float32s,
    step: int,
    excluded: Collection[int],
) -> Ints:
    """What a function of the caller's own selects, best first. Raises ConfigError where that cannot be a set."""
    eligible = probabilities.copy()
    eligible[list(excluded)] = 0.0
    found = function(eligible, step)
    tokens = listed(found)
    if tokens is None or not all(isinstance(token, Integral) for token in tokens):
        raise ConfigError(
            f"The select function returned {shown(found if tokens is None else tokens)} at step {step}; it must return "
            "token ids, best first."
        )
    ids = np.array(tokens, np.int64)
    if not len(ids) or len(set(ids.tolist())) < len(ids) or not (0 <= ids.min() <= ids.max() < len(eligible)):
        raise ConfigError(
            f"The select function returned {ids.tolist()} at step {step}; it must return one or more different tokens."
        )
    if not (eligible[ids] > 0.0).all():
        raise ConfigError(
            f"The select function returned a token of probability 0 at step {step}; leave it out."
        )
    return ids[np.lexsort((ids, -eligible[ids]))]


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


def draw(mass: NDArray[np.floating], place: float) -> int:
    """The index at `place`, 0..1, of the cumulated mass (n,), which need not sum to 1."""
    cumulative = np.cumsum(mass, dtype=np.float64)
    return int(np.searchsorted(cumulative, place * cumulative[-1], side="right"))


def entropy(probabilities: NDArray[np.floating]) -> float:
    """Of a distribution (V,), in nats."""
    seen = probabilities[probabilities > 0.0]
    return float(-(seen * np.log(seen)).sum(dtype=np.float64))


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
