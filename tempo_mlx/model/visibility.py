"""From an additive bias and logical positions to what one kind of layer adds to its scores (numpy)."""

from __future__ import annotations

import numpy as np

from tempo_mlx.arrays import Float32s, Ints


def causal_bias(rows: int, slots: int) -> Float32s:
    """(L, S): row r is slot S - L + r and sees every slot up to its own."""
    own = np.arange(slots - rows, slots)[:, None]
    seen: Float32s = np.where(np.arange(slots) <= own, np.float32(0), np.float32(-np.inf))
    return seen


def window_bias(
    bias: Float32s | None,
    positions: Ints,
    slot_positions: Ints,
    window: int | None,
) -> Float32s | None:
    """The bias (L, S) of a layer that sees the last `window` logical positions; None where plain causal will do.

    positions (L,) of the rows, slot_positions (S,) of all slots, the rows' own included.
    """
    if window is None or positions.max() - slot_positions.min() < window:
        return bias
    dense = causal_bias(len(positions), len(slot_positions)) if bias is None else bias
    return np.where(positions[:, None] - slot_positions < window, dense, np.float32(-np.inf))
