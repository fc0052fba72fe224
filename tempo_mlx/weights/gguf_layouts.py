"""GGUF's blocks as MLX packs weights: in groups of 32, unsigned numbers q of a few bits, scale * q + minimum.

Most ggml types fit exactly, as far as the scales keep their precision: a type that has one scale for 32 weights, or for
a multiple of them. Those with a scale for 16 do not and are requantised: Q6_K by the larger scale of the two, which
leaves that half exact, the others from the smallest to the largest of the 32. Layouts: llama.cpp, ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from tempo_mlx.arrays import Float32s
from tempo_mlx.weights.tensor import CHUNK, Array, Layout, Quantized, packed_bits

GROUP = 32
# (n, groups, 32) uint8, and scale and minimum (n, groups)
Numbers = tuple[Array, Array, Array]


@dataclass(frozen=True)
class Packing:
    """numbers: of blocks (n, bytes of one). block: weights of one. exact: whether scale * q + minimum is the weight."""

    bits: int
    numbers: Callable[[Array], Numbers]
    block: int = 256
    exact: bool = True
    mode: str = "affine"

    @property
    def layout(self) -> Layout:
        return Layout(self.bits, GROUP, self.mode)


def pack(blocks: Array, type_name: str, columns: int) -> Quantized:
    """blocks (N, bytes of a row) -> (N, columns) in MLX's layout, some rows at a time."""
    packing = packing_of(type_name)
    affine, groups = packing.mode == "affine", (len(blocks), columns // GROUP)
    packed = np.empty((len(blocks), columns * packing.bits // 32), np.uint32)
    scales, minima = np.empty(groups, np.float32 if affine else np.uint8), np.zeros(groups, np.float32)
    step = max(1, CHUNK // columns)
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        q, scale, minimum = packing.numbers(
            blocks[part].reshape(groups[1] * len(blocks[part]) * GROUP // packing.block, -1)
        )
        packed[part] = packed_bits(q.reshape(-1, columns), packing.bits)
        scales[part] = scale.reshape(-1, groups[1])
        if affine:
            minima[part] = minimum.reshape(-1, groups[1])
    if not affine:
        return packed, scales, None, packing.layout
    if packing.block == GROUP and not np.any(np.abs(minima) > 65504):  # the scales are the file's own
        return packed, scales.astype(np.float16), minima.astype(np.float16), packing.layout
    return packed, scales, minima, packing.layout


def _half(octets: Array) -> Float32s:
    """(n, 2) -> (n, 1)."""
    return np.ascontiguousarray(octets).view("<f2").astype(np.float32)


def _nibbles(octets: Array) -> Array:
    """(..., n) -> (..., 2 n): the low halves of the bytes, then the high ones."""
    half = octets.shape[-1]
    out = np.empty((*octets.shape[:-1], 2 * half), np.uint8)
    np.bitwise_and(octets, 15, out=out[..., :half])
    np.right_shift(octets, 4, out=out[..., half:])
    return out


def _around(q: Array, scale: Array, zero: float) -> Numbers:
    """Of weights scale * (q - zero)."""
    return q, scale, scale * np.float32(-zero)


def _q4_0(b: Array) -> Numbers:
    return _around(_nibbles(b[:, 2:]), _half(b[:, :2]), 8)


def _q4_1(b: Array) -> Numbers:
    return _nibbles(b[:, 4:]), _half(b[:, :2]), _half(b[:, 2:4])


def _fifth_bits(octets: Array) -> Array:
    return np.unpackbits(octets, axis=-1, bitorder="little") << 4


def _q5_0(b: Array) -> Numbers:
    return _around(_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6]), _half(b[:, :2]), 16)


def _q5_1(b: Array) -> Numbers:
    return _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]), _half(b[:, :2]), _half(b[:, 2:4])


def _q8_0(b: Array) -> Numbers:
    return _around(b[:, 2:] ^ np.uint8(128), _half(b[:, :2]), 128)  # int8 + 128


def _mxfp4(b: Array) -> Numbers:
    """q are floats (E2M1), the scale is a power of two (E8M0)."""
    return _nibbles(b[:, 1:]), b[:, :1], b[:, :0]


def _k_scales(b: Array) -> tuple[Float32s, Float32s]:
    """Of Q4_K and Q5_K: scale and minimum (n, 8) from d, dmin, and 6 bits for each in 12 bytes, four at once."""
    low, mixed, high = np.ascontiguousarray(b[:, 4:16]).view("<u4").T
    scale = np.stack([low & 0x3F3F3F3F, high & 0x0F0F0F0F | low >> 2 & 0x30303030], axis=-1)
    minimum = np.stack([mixed & 0x3F3F3F3F, high >> 4 & 0x0F0F0F0F | mixed >> 2 & 0x30303030], axis=-1)
    return _half(b[:, :2]) * scale.view(np.uint8), -(_half(b[:, 2:4]) * minimum.view(np.uint8))


def _q4_k(b: Array) -> Numbers:
    return _nibbles(b[:, 16:].reshape(-1, 4, 32)), *_k_scales(b)


def _q5_k(b: Array) -> Numbers:
    q = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return q | fifth << 4, *_k_scales(b)


def _six_bits(b: Array) -> tuple[Array, Array, Float32s]:
    """Of Q6_K: numbers (n, 8, 2, 16) and their scales (n, 8, 2), int8, by a scale of all (n, 1)."""
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    high <<= 4
    low |= high
    q = low.view(np.int8).reshape(-1, 8, 2, 16)
    q -= 32
    return q, b[:, 192:208].view(np.int8).reshape(-1, 8, 2), _half(b[:, 208:])


def _q6_k(b: Array) -> Numbers:
    q, scales, scale = _six_bits(b)
    sub = scales.astype(np.float32)
    larger = np.where(np.abs(sub[..., 1]) > np.abs(sub[..., 0]), sub[..., 1], sub[..., 0])
    share = np.divide(4 * sub, larger[..., None], out=np.zeros_like(sub), where=larger[..., None] != 0)
    eight = q * share[..., None]
    eight += 128
    np.minimum(np.rint(eight, out=eight), 255, out=eight)
    return _around(eight.astype(np.uint8).reshape(-1, 8, 32), scale * larger / 4, 128)


def _codes() -> Array:
    values = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    return (np.array(values) + 128).astype(np.uint8)


_IQ4_CODES = _codes()


def _iq4_nl(b: Array) -> Numbers:
    return _around(_IQ4_CODES[_nibbles(b[:, 2:])], _half(b[:, :2]), 128)


def _iq4_xs(b: Array) -> Numbers:
    shifts = np.arange(0, 16, 2, dtype=np.uint16)
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> shifts & 3
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    scale = (low | high << 4).astype(np.float32) - 32
    return _around(_IQ4_CODES[_nibbles(b[:, 8:].reshape(-1, 8, 16))], _half(b[:, :2]) * scale, 128)


def _dequantised(b: Array, type_name: str) -> Float32s:
    """(n, bytes) -> (n, groups, 32)."""
    # imported here: the package takes a quarter of a second
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return np.asarray(dequantize(b, GGMLQuantizationType[type_name]), np.float32).reshape(len(b), -1, GROUP)


def _counted(b: Array, type_name: str, scale: Float32s, zero: float) -> Numbers:
    """Of weights that are multiples of something: scale (n, groups) as it is for q - zero."""
    w = _dequantised(b, type_name)
    steps = np.divide(w, scale[..., None], out=np.zeros_like(w), where=scale[..., None] != 0)
    return _around(np.rint(steps + np.float32(zero)).astype(np.uint8), scale, zero)


def _iq3_xxs(b: Array) -> Numbers:
    scale = np.ascontiguousarray(b[:, 66:]).view("<u4") >> 28
    return _counted(b, "IQ3_XXS", _half(b[:, :2]) * (scale.astype(np.float32) + np.float32(0.5)), 32)


def _iq3_s(b: Array) -> Numbers:
    scale = np.stack([b[:, 106:110] & 15, b[:, 106:110] >> 4], axis=-1).reshape(-1, 8)
    return _counted(b, "IQ3_S", _half(b[:, :2]) * (2 + 4 * scale.astype(np.float32)), 7.5)


def _ternary(type_name: str) -> Callable[[Array], Numbers]:
    return lambda b: _counted(b, type_name, np.repeat(_half(b[:, -2:]), 8, axis=1), 1)


def _between(type_name: str, bits: int) -> Packing:
    """Anything else: 2^bits - 1 steps from the smallest of the 32 to the largest."""

    def numbers(b: Array) -> Numbers:
        w = _dequantised(b, type_name)
        minimum, largest = w.min(-1), w.max(-1)
        scale = (largest - minimum) / np.float32(2**bits - 1)
        steps = np.divide(
            w - minimum[..., None], scale[..., None], out=np.zeros_like(w), where=scale[..., None] > 0
        )
        return np.rint(steps).astype(np.uint8), scale, minimum

    return Packing(bits, numbers, exact=False)


PACKINGS: Mapping[str, Packing] = MappingProxyType(
    {
        "Q4_0": Packing(4, _q4_0, block=32),
        "Q4_1": Packing(4, _q4_1, block=32),
        "Q5_0": Packing(5, _q5_0, block=32),
        "Q5_1": Packing(5, _q5_1, block=32),
        "Q8_0": Packing(8, _q8_0, block=32),
        "MXFP4": Packing(4, _mxfp4, block=32, mode="mxfp4"),
        "IQ4_NL": Packing(8, _iq4_nl, block=32),
        "Q4_K": Packing(4, _q4_k),
        "Q5_K": Packing(5, _q5_k),
        "Q6_K": Packing(8, _q6_k, exact=False),
        "IQ4_XS": Packing(8, _iq4_xs),
        "IQ3_XXS": Packing(6, _iq3_xxs),
        "IQ3_S": Packing(4, _iq3_s),
        "TQ1_0": Packing(2, _ternary("TQ1_0")),
        "TQ2_0": Packing(2, _ternary("TQ2_0")),
    }
)


def packing_of(type_name: str) -> Packing:
    return PACKINGS.get(type_name) or _between(type_name, 6)


# Whose numbers come to the very weights: scale * q needs no more than float32's 24 bits, or is what defines the weight.
_BY_NUMBERS = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q4_K", "Q5_K"})


def dequantize(blocks: Array, type_name: str, out: Float32s) -> None:
    """Write the weights of blocks (N, bytes of a row) to `out` (N, M)."""
    packing = packing_of(type_name)
    if type_name in _BY_NUMBERS:
        q, scale, minimum = packing.numbers(blocks.reshape(out.size // packing.block, -1))
        groups = out.reshape(-1, GROUP)
        np.multiply(q.reshape(groups.shape), scale.reshape(-1, 1), out=groups)
        groups += minimum.reshape(-1, 1)
    elif type_name == "Q8_0":
        parts = blocks.reshape(out.size // GROUP, -1)
        np.multiply(parts[:, 2:].view(np.int8), _half(parts[:, :2]), out=out.reshape(-1, GROUP))
    elif type_name == "Q6_K":
        q, scales, scale = _six_bits(blocks.reshape(out.size // packing.block, -1))
        np.multiply(q, (scale[..., None] * scales)[..., None], out=out.reshape(q.shape))
    else:
        out[...] = _dequantised(blocks, type_name).reshape(out.shape)
