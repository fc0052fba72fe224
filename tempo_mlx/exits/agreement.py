"""How often an exit agrees with the whole model: confidence bounds from choices that were checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tempo_mlx.arrays import Bools, Float32s, Floats, Ints

CONFIDENCE = 0.95
LEAST = 30  # samples below which no bound is given
POINTS = 100  # of a curve

Place = tuple[int, int]  # layer and width of an exit


@dataclass(frozen=True)
class Outcome:
    """What an exit would have chosen. margins (N,): best logit less second best; right (N,): the model's choice?"""

    margins: Float32s
    right: Bools


def promised(right: Bools, texts: Ints) -> float:
    """A lower bound on the agreement to expect on new texts: Clopper-Pearson, one-sided at CONFIDENCE. Choices within
    one text are correlated, so the sample size is first divided by the design effect.
    """
    worth = len(right) / design_effect(right, texts)
    return lower_bound(right.mean() * worth, worth)


def together(
    places: Sequence[Place], least: Mapping[Place, float], outcomes: Mapping[Place, Outcome], texts: Ints
) -> float:
    """The agreement bound of several exits in sequence, each seeing only what the earlier ones let through."""
    open_still = np.ones(len(texts), bool)
    right = np.zeros(len(texts), bool)
    for place in places:
        leaves = open_still & (outcomes[place].margins >= least[place])
        right |= leaves & outcomes[place].right
        open_still &= ~leaves
    left = ~open_still
    return promised(right[left], texts[left]) if left.any() else 1.0


def curve(outcome: Outcome, texts: Ints) -> Floats:
    """(n, 3): falling margins, the agreement bound of the choices with at least that margin, and their count."""
    order = np.argsort(-outcome.margins, kind="stable")
    places = np.unique(np.linspace(min(LEAST, len(order)), len(order), POINTS).astype(int))
    points = []
    for place in places[places >= LEAST].tolist():
        chosen = order[:place]
        bound = promised(outcome.right[chosen], texts[chosen])
        points.append((float(outcome.margins[order[place - 1]]), bound, place))
    return np.array(points).reshape(-1, 3)


def design_effect(right: Bools, texts: Ints) -> float:
    """How much more a proportion varies over clustered samples (whole texts) than over independent ones; at least 1."""
    share = right.mean()
    if share in (0.0, 1.0):
        return 1.0
    _, index, sizes = np.unique(texts, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return float(len(right))
    errors = np.bincount(index, weights=right) - share * sizes
    variance = (errors**2).sum() * len(sizes) / (len(sizes) - 1)
    return max(1.0, float(variance / (len(right) * share * (1 - share))))


def lower_bound(successes: float, trials: float, confidence: float = CONFIDENCE) -> float:
    """The one-sided Clopper-Pearson lower bound of a success probability."""
    count = int(trials)
    hits = min(math.floor(successes + 1e-9), count)
    if hits <= 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        too_many = at_most(count - hits, count, 1 - middle) < 1 - confidence
        low, high = (middle, high) if too_many else (low, middle)
    return low


def at_most(hits: int, trials: int, probability: float) -> float:
    """The binomial probability of `hits` or fewer."""
    k = np.arange(hits + 1)
    ways = np.cumsum(np.log(np.where(k, (trials - k + 1) / np.maximum(k, 1), 1)))  # logarithms
    return float(np.exp(ways + k * np.log(probability) + (trials - k) * np.log1p(-probability)).sum())
