"""How the logits rows of a parallel set become one next-token distribution, and the edges to its tokens.

Rows are in slot order: the last row belongs to the most probable member. V-sized arrays stay float32; the edges,
a few numbers per step, are float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tempo_mlx.arrays import Float32s, Floats

COMBINE_RULES = ("mix", "last", "mean", "product", "max")


def log_probabilities(logits: Float32s, temperature: float = 1.0) -> Float32s:
    """Log-softmax of logits (k, V) / temperature along V. Temperature 0 (argmax) is recorded as if it were 1."""
    result: Float32s = logits - logits.max(axis=1, keepdims=True)
    if temperature not in (0.0, 1.0):
        with np.errstate(over="ignore"):  # a tiny temperature: everything but the best becomes -inf
            result *= np.float32(min(1.0 / max(temperature, 1e-38), 1e38))
    result -= np.log(np.exp(result).sum(axis=1, keepdims=True))
    return result


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
        result = np.exp(pooled - pooled.max())
        result /= result.sum()
    return result


def edges(log_probs: Float32s, weights: ArrayLike, tokens: ArrayLike) -> tuple[Floats, Floats]:
    """The edges from the k rows to the m tokens of the next set: P(i|j) and P(j|i), both (k, m) float64.

    P(j|i) is the row's own probability of the token. P(i|j), the predecessor posterior, is the softmax over i of
    log w(i) + log P(j|i); its columns sum to 1, under every combine rule.
    """
    forward = np.asarray(log_probs)[:, np.asarray(tokens, np.intp)].astype(np.float64)
    joint = forward + np.log(np.asarray(weights, np.float64))[:, None]
    posterior = np.exp(joint - joint.max(axis=0))
    posterior /= posterior.sum(axis=0)
    return posterior, np.exp(forward)
