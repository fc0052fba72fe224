"""Rotary embedding in MLX: the pairs (i, i + half) of every head turned by the angle of its row's position."""

from __future__ import annotations

import math

import numpy as np

from tempo_mlx.arrays import Float32s
from tempo_mlx.mlx import mx
from tempo_mlx.model import device

FEW = 16  # rows up to which the CPU turns them by one small product for each, not by operations on every element


class Rotation:
    """Made once a forward pass for L rows; half: pairs of a head that turn, D >= 2 half.

    As matrices (L, D, D) for few rows on the CPU, whose operations cost more to start than to do; otherwise as what the
    first and the second of each pair give to both, which a GPU does in one operation.
    """

    def __init__(self, cos: Float32s, sin: Float32s, head_dim: int, interleaved: bool = False) -> None:
        """interleaved: dimension 2i turns with 2i + 1, not with i + half."""
        rows, self.half = cos.shape
        self.place = -1 if interleaved else -2  # of the two of a pair, once D is taken apart
        self.matrices = None
        if rows <= FEW and not device.on_gpu():
            matrices = np.zeros((rows, head_dim, head_dim), np.float32)
            matrices[:] = np.eye(head_dim)
            turning = np.arange(2 * self.half).reshape((-1, 2) if interleaved else (2, -1))
            first, second = turning.T if interleaved else turning
            matrices[:, first, first] = matrices[:, second, second] = cos
            matrices[:, first, second], matrices[:, second, first] = sin, -sin
            self.matrices = mx.array(matrices)
        elif self.half:
            # What does not turn is turned by 0 where it is as wide as what does, or a multiple.
            parts = head_dim // (2 * self.half) if head_dim % (2 * self.half) == 0 else 1
            cos, sin = (
                np.concatenate(
                    [each[:, None], np.full((rows, parts - 1, self.half), rest, np.float32)], axis=1
                )
                for each, rest in ((cos, 1), (sin, 0))
            )
            given = (cos, sin), (-sin, cos)  # (L, 1, parts, 2, half), or (L, 1, parts, half, 2)
            self.first, self.second = (mx.array(np.stack(each, axis=self.place)[:, None]) for each in given)

    def __call__(self, x: mx.array) -> mx.array:
        """x (L, heads, D), turned in float32."""
        if not self.half:
            return x
        if self.matrices is not None:
            return (x.astype(mx.float32) @ self.matrices).astype(x.dtype)
        rows, heads, dim = x.shape
        _, _, *apart = self.first.shape
        turning, rest = (x, None) if math.prod(apart) == dim else mx.split(x, [2 * self.half], axis=-1)
        pairs = turning.reshape(rows, heads, *apart)
        first, second = mx.split(pairs, 2, axis=self.place)
        turned = _turn(first, second, self.first, self.second).reshape(rows, heads, -1)
        return turned if rest is None else mx.concatenate([turned, rest], axis=-1)


@device.fused
def _turn(first: mx.array, second: mx.array, of_first: mx.array, of_second: mx.array) -> mx.array:
    turned = first.astype(mx.float32) * of_first + second.astype(mx.float32) * of_second
    return turned.astype(first.dtype)
