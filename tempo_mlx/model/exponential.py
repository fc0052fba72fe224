"""Functions with an exponential in them, as MLX computes them fastest.

MLX's CPU backend on x86 and Linux takes `exp` one number at a time, 10 ns each (measured); its `power` calls the C
library's, at a third of that. Softmax and SiLU were a quarter of a step of 8 rows. Elsewhere MLX's own are used.
"""

from __future__ import annotations

import math
import platform
from typing import Any

from tempo_mlx.model._mlx import mx


def by_power() -> bool:
    """Whether `power` beats `exp` here: on the CPU, except Apple's, where MLX vectorises."""
    return platform.system() == "Linux" and mx.default_device().type == mx.cpu


def softmax(scores: Any) -> Any:
    """Softmax over the last axis of float32 scores (..., S); each row has a finite number, -inf gets exactly 0."""
    if not by_power():
        return mx.softmax(scores, axis=-1)
    weights = mx.power(math.e, scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def silu(x: Any) -> Any:
    """x * sigmoid(x)."""
    return x / (1 + mx.power(math.e, -x)) if by_power() else x * mx.sigmoid(x)
