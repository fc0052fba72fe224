"""How the logits rows of a parallel set become one next-token distribution, and the edges to its tokens.

Rows are in slot order: the last row belongs to the most probable member. V-sized arrays stay float32; the edges,
a few numbers per step, are float64.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import ArrayLike

from tempo_mlx.arrays import Float32s, Floats
from tempo_mlx.errors import NumbersError

COMBINE_RULES = ("mix", "last", "mean", "product", "max")
COLDEST = 1e-34  # below, probabilities are those of argmax anyway, and logits / temperature would overflow


def log_probabilities(logits: Float32s, temperature: float = 1.0) -> Float32s:
    """Log-softmax of logits (k, V) / temperature along V. Temperature 0 (argmax) is recorded as if it were 1.

    Raises NumbersError where a row holds NaN or infinity, of which nothing could be chosen. All decoders, scores and
    proofs come by here.
    """
    best = require_finite(logits)
    result: Float32s = logits - best
    if (scale := scale_of(temperature)) != 1.0:
        with np.errstate(over="ignore"):  # logits beyond any model's: everything but the best becomes -inf
            result *= np.float32(scale)
    result -= np.log(np.exp(result).sum(axis=1, keepdims=True))
    return result


def scale_of(temperature: float) -> float:
    """What logits are multiplied by."""
    return 1.0 if temperature in (0.0, 1.0) else 1.0 / max(temperature, COLDEST)


def require_finite(logits: Float32s) -> Float32s:
    """The largest of each row (k, 1). Raises NumbersError where it is none."""
    best: Float32s = logits.max(axis=1, keepdims=True)
    if not np.isfinite(best).all():
        raise NumbersError(
            "The model's numbers are not finite: in float16 it needs more range, so load it with --dtype bfloat16, or "
            "float32; in those its weights are damaged, so fetch them again."
        )
    return best


def combine(log_probs: Float32s, weights: ArrayLike, rule: str = "mix") -> Float32s:
    """The next distribution (V,) from the rows' log-probabilities (k, V) and forward weights (k,), sum 1.

    `mix`: sum_i w(i) P(v|i), the only rule under which a lineage is a posterior. For study: `last` (the row of
    the highest slot), `mean` (unweighted), `product` (softmax of the mean log-probability), `max` (the maximum
    over rows, renormalised).
    """
    if rule not in COMBINE_RULES:
        raise ValueError(f"combine is one of {', '.join(COMBINE_RULES)}, not {rule!r}")
    result: Float32s
    if len(log_probs) == 1 or rule == "last":
        result = np.exp(log_probs[-1])
    elif rule == "mix":
        result = np.asarray(weights, np.float32) @ np.exp(log_probs)
    elif rule == "mean":
        result = np.exp(log_probs).mean(axis=0)
    else:
        pooled = log_probs.mean(axis=0) if rule == "product" else log_probs.max(axis=0)
        if np.isneginf(pooled).all():  # truncation left the rows nothing in common
            return combine(log_probs, weights)
        result = np.exp(pooled - pooled.max())
        result /= result.sum()
    return result


def combine_without(
    log_probs: Float32s, weights: ArrayLike, rule: str, excluded: Collection[int]
) -> Float32s:
    """`combine` with the excluded tokens at 0 and the others in proportion, scaled so that the best of them does not
    underflow, however improbable all of them are: for choices, not for the record.
    """
    left = log_probs.copy()
    left[:, list(excluded)] = -np.inf
    left -= left.max()
    return combine(left, weights, rule)


def shares(probabilities: ArrayLike) -> Floats:
    """Forward weights of a set: the probabilities (k,) of its members, scaled to sum 1; equal where all underflowed."""
    mass = np.asarray(probabilities, np.float64)
    total = mass.sum()
    return mass / total if total > 0 else np.full(len(mass), 1.0 / max(len(mass), 1))


def edges(log_probs: Float32s, weights: ArrayLike, tokens: ArrayLike) -> tuple[Floats, Floats]:
    """The edges from the k rows to the m tokens of the next set: P(i|j) and P(j|i), both (k, m) float64.

    P(j|i) is the row's own probability of the token. P(i|j), the predecessor posterior, is the softmax over i of
    log w(i) + log P(j|i); its columns sum to 1, under every combine rule. A token that no row gives any
    probability (a budget's choice) has the rows' weights.
    """
    forward = np.asarray(log_probs)[:, np.asarray(tokens, np.intp)].astype(np.float64)
    joint = forward + np.log(np.asarray(weights, np.float64))[:, None]
    joint[:, np.isneginf(joint.max(axis=0))] = np.log(np.asarray(weights, np.float64))[:, None]
    posterior = np.exp(joint - joint.max(axis=0))
    posterior /= posterior.sum(axis=0)
    return posterior, np.exp(forward)
