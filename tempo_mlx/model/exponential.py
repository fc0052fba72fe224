"""Functions with an exponential in them, as MLX computes them fastest.

MLX's CPU backend on x86 and Linux takes `exp` one number at a time, 10 ns each (measured); its `power` calls the C
library's, at a third of that. Softmax and SiLU were a quarter of a step of 8 rows. Elsewhere MLX's own are used.
"""

from __future__ import annotations

import platform

from tempo_mlx.mlx import mx
from tempo_mlx.model import device

E = 2.718281828459045


def by_power(x: mx.array) -> bool:
    """Whether `power` beats `exp`: on the CPU, except Apple's, where MLX vectorises. In half precision E is not e."""
    return platform.system() == "Linux" and x.dtype == mx.float32 and not device.on_gpu()


def exponentials(scores: mx.array, sinks: mx.array | None = None) -> tuple[mx.array, mx.array | None]:
    """Weights over the last axis of float32 scores (..., S), and what to divide by for their softmax (None: nothing).

    Each row has a finite number; -inf gets exactly 0. What the weights are multiplied with is mostly smaller than they
    are, so the division can wait for it. sinks (..., 1): one more score of each row, that counts in the sum alone.
    """
    if sinks is None and not by_power(scores):
        return mx.softmax(scores, axis=-1), None
    top = scores.max(axis=-1, keepdims=True)
    top = top if sinks is None else mx.maximum(top, sinks)
    raised = (lambda x: mx.power(E, x)) if by_power(scores) else mx.exp
    weights = raised(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    return weights, total if sinks is None else total + raised(sinks - top)


def gated_silu(gate: mx.array, up: mx.array) -> mx.array:
    """gate * sigmoid(gate) * up."""
    if by_power(gate):
        return (gate * up) / (1 + mx.power(1 / E, gate))
    return _gated(gate, up)


@device.fused
def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up
