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
    chunk: int | None = None,
) -> Float32s | None:
    """The bias (L, S) of a layer that sees the last `window` logical positions, or only those of its own block of
    `chunk`; None where plain causal will do.

    positions (L,) of the rows, slot_positions (S,) of all slots, the rows' own included.
    """
    far = window is not None and positions.max() - slot_positions.min() >= window
    cut = chunk is not None and positions.max() // chunk != slot_positions.min() // chunk
    if not far and not cut:
        return bias
    dense = causal_bias(len(positions), len(slot_positions)) if bias is None else bias
    if window is not None:
        dense = np.where(positions[:, None] - slot_positions < window, dense, np.float32(-np.inf))
    if chunk is not None:
        dense = np.where(positions[:, None] // chunk == slot_positions // chunk, dense, np.float32(-np.inf))
    return dense
