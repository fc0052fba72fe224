"""Rotary embedding in MLX: the pairs (i, i + half) of every head turned by the angle of its row's position."""

from __future__ import annotations

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.mlx import mx
from tempo_mlx.model import device

FEW = 16  # rows up to which the CPU turns them by one small product for each, not by operations on every element


class Rotation:
    """Made once a forward pass for L rows; half: pairs of a head that turn, D >= 2 half.

    As matrices (L, D, D) for few rows on the CPU, whose operations cost more to start than to do; otherwise as cos
    and sin (L, 1, D) with x cos + swapped(x) sin, swapped exchanging the two of a pair, and the sign in sin.
    """

    def __init__(self, cos: Float32s, sin: Float32s, head_dim: int, interleaved: bool = False) -> None:
        """interleaved: dimension 2i turns with 2i + 1, not with i + half."""
        rows, self.half = cos.shape
        self.interleaved = interleaved
        rest = head_dim - 2 * self.half
        both = (cos, cos), (-sin, sin)
        if interleaved:
            cosines, sines = (np.stack(pair, axis=-1).reshape(rows, -1) for pair in both)
        else:
            cosines, sines = (np.concatenate(pair, axis=1) for pair in both)
        wide_cos = np.concatenate([cosines, np.ones((rows, rest), np.float32)], axis=1)
        wide_sin = np.concatenate([sines, np.zeros((rows, rest), np.float32)], axis=1)
        self.matrices = None
        if rows <= FEW and not device.on_gpu():
            matrices = np.zeros((rows, head_dim, head_dim), np.float32)
            place = np.arange(head_dim)
            matrices[:, place, place] = wide_cos
            matrices[:, self.swapped(place), place] += wide_sin
            self.matrices = mx.array(matrices)
        else:
            self.cos, self.sin = mx.array(wide_cos[:, None]), mx.array(wide_sin[:, None])

    def swapped(self, place: Ints) -> Ints:
        """The other of each pair; what does not turn stays."""
        if self.interleaved:
            return np.where(place < 2 * self.half, place ^ 1, place)
        first, second, rest = np.split(place, [self.half, 2 * self.half])
        return np.concatenate([second, first, rest])

    def __call__(self, x: mx.array) -> mx.array:
        """x (L, heads, D), turned in float32."""
        y = x.astype(mx.float32)
        if self.matrices is not None:
            return (y @ self.matrices).astype(x.dtype)
        if self.interleaved:
            pairs, rest = mx.split(y, [2 * self.half], axis=-1)
            pairs = pairs.reshape(*pairs.shape[:-1], self.half, 2)[..., ::-1].reshape(pairs.shape)
            swapped = mx.concatenate([pairs, rest], axis=-1)
        else:
            first, second, rest = mx.split(y, [self.half, 2 * self.half], axis=-1)
            swapped = mx.concatenate([second, first, rest], axis=-1)
        return (y * self.cos + swapped * self.sin).astype(x.dtype)
