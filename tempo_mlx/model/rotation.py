"""Rotary embedding in MLX: the pairs (i, i + half) of every head turned by the angle of its row's position."""

from __future__ import annotations

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.mlx import mx

FEW = 16  # rows up to which the CPU turns them by one small product for each, not by operations on every element


class Rotation:
    """Made once a forward pass for L rows; half: pairs of a head that turn, D >= 2 half.

    As matrices (L, D, D) for few rows on the CPU, whose operations cost more to start than to do; otherwise as cos
    and sin (L, 1, D) with x cos + swapped(x) sin, swapped exchanging the two of a pair, and the sign in sin.
    """

    def __init__(self, cos: Float32s, sin: Float32s, head_dim: int) -> None:
        rows, self.half = cos.shape
        rest = head_dim - 2 * self.half
        wide_cos = np.concatenate([cos, cos, np.ones((rows, rest), np.float32)], axis=1)
        wide_sin = np.concatenate([-sin, sin, np.zeros((rows, rest), np.float32)], axis=1)
        self.matrices = None
        if rows <= FEW and mx.default_device().type == mx.cpu:
            matrices = np.zeros((rows, head_dim, head_dim), np.float32)
            place = np.arange(head_dim)
            matrices[:, place, place] = wide_cos
            matrices[:, self.swapped(place), place] += wide_sin
            self.matrices = mx.array(matrices)
        else:
            self.cos, self.sin = mx.array(wide_cos[:, None]), mx.array(wide_sin[:, None])

    def swapped(self, place: Ints) -> Ints:
        """The other of each pair; what does not turn stays."""
        first, second, rest = np.split(place, [self.half, 2 * self.half])
        return np.concatenate([second, first, rest])

    def __call__(self, x: mx.array) -> mx.array:
        """x (L, heads, D), turned in float32."""
        y = x.astype(mx.float32)
        if self.matrices is not None:
            return (y @ self.matrices).astype(x.dtype)
        first, second, rest = mx.split(y, [self.half, 2 * self.half], axis=-1)
        return (y * self.cos + mx.concatenate([second, first, rest], axis=-1) * self.sin).astype(x.dtype)
