"""Rotary angles from explicit logical positions (numpy float32, as transformers computes them)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tempo_mlx.architecture.architecture import Rope
from tempo_mlx.arrays import Float32s, Ints


def angles(rope: Rope, positions: Ints, length: int) -> tuple[Float32s, float]:
    """(L, rotated / 2) angles and the factor on cos and sin. `length`: highest position in use + 1."""
    frequencies, factor = np.asarray(rope.inverse_frequencies, np.float32), rope.attention_factor
    original = rope.original_max_position_embeddings
    if original is not None and length > original:
        if rope.long_inverse_frequencies is not None:
            frequencies, factor = (
                np.asarray(rope.long_inverse_frequencies, np.float32),
                rope.long_attention_factor,
            )
        elif rope.dynamic_base is not None and rope.dynamic_factor is not None:
            rotated = 2 * len(frequencies)
            stretch = rope.dynamic_factor * length / original - (rope.dynamic_factor - 1)
            base = rope.dynamic_base * stretch ** (rotated / (rotated - 2))
            frequencies = (1.0 / base ** (np.arange(0, rotated, 2) / rotated)).astype(np.float32)
    return positions.astype(np.float32)[:, None] * frequencies, factor


def follows_length(rope: Rope, length: int) -> bool:
    """Whether the angles of a text so long depend on how long it is, and not on the position alone."""
    scaled = rope.long_inverse_frequencies is not None or rope.dynamic_base is not None
    return scaled and length > (rope.original_max_position_embeddings or length)


def rotations(
    ropes: Sequence[Rope], positions: Ints, slot_positions: Ints
) -> list[tuple[Float32s, Float32s]]:
    """Per rope, cos and sin (L, rotated / 2) of the angle of each pair, with the factor on them."""
    length = int(slot_positions.max()) + 1
    turns = [angles(rope, positions, length) for rope in ropes]
    return [
        (np.cos(angle) * np.float32(factor), np.sin(angle) * np.float32(factor)) for angle, factor in turns
    ]
