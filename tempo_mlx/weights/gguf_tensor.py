"""A weight in GGUF's blocks. Layouts: llama.cpp, ggml-quants.c."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.arrays import Float32s
from tempo_mlx.errors import ModelError
from tempo_mlx.weights.tensor import CHUNK, Array, DenseTensor, Index, Kind, Layout, Quantized


@dataclass(frozen=True)
class GGUFTensor:
    """A weight in GGUF blocks: `blocks` (..., N, bytes of a row) uint8 of ggml type `type_name`, `columns` weights
    a row."""

    blocks: NDArray[np.uint8]
    type_name: str
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.blocks.shape[:-1], self.columns)

    @property
    def kind(self) -> Kind:
        return "mlx_quantized" if self.type_name in EXACT_GGUF_BITS else "float32"

    @property
    def nbytes(self) -> int:
        bits = EXACT_GGUF_BITS.get(self.type_name)
        count = int(np.prod(self.shape, dtype=np.int64))
        return count * 4 if bits is None else count * bits // 8 + count // 32 * 4

    def numpy(self) -> Float32s:
        out = np.empty(self.shape, dtype=np.float32)
        rows = out.reshape(-1, self.columns)
        blocks = self.blocks.reshape(-1, self.blocks.shape[-1])
        step = max(1, CHUNK // self.columns)
        for start in range(0, len(rows), step):
            _dequantize(blocks[start : start + step], self.type_name, rows[start : start + step])
        return out

    def raw(self) -> Array:
        if self.kind == "mlx_quantized":
            raise ModelError("A quantised weight has no plain numbers; read it with quantized() or numpy().")
        return self.numpy()

    def quantized(self) -> Quantized:
        if self.type_name not in EXACT_GGUF_BITS:
            raise ModelError(
                f"GGUF type {self.type_name} has no equal among MLX's layouts; read it with numpy()."
            )
        flat, rows = self.blocks.reshape(-1, self.blocks.shape[-1]), self.shape[:-1]
        bits = EXACT_GGUF_BITS[self.type_name]
        if self.type_name == "MXFP4":
            packed, scale = _to_mxfp4(flat)
            return packed.reshape(*rows, -1), scale.reshape(*rows, -1), None, Layout(bits, 32, "mxfp4")
        packed, scale, minimum = (each.reshape(*rows, -1) for each in _to_affine(flat, self.type_name))
        return packed, scale, minimum, Layout(bits, 32)

    def rows(self, rows: Index) -> GGUFTensor:
        return GGUFTensor(self.blocks[rows], self.type_name, self.columns)

    @property
    def group(self) -> int:
        if self.type_name in EXACT_GGUF_BITS:
            return 32
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # see _dequantize

        return int(GGML_QUANT_SIZES[GGMLQuantizationType[self.type_name]][0])

    def cut(self, start: int, stop: int) -> GGUFTensor | DenseTensor:
        if start % self.group or stop % self.group:
            return DenseTensor(self.numpy()[..., start:stop])
        width = self.blocks.shape[-1] // (self.columns // self.group)  # bytes of a block
        octets = slice(start // self.group * width, stop // self.group * width)
        return GGUFTensor(self.blocks[..., octets], self.type_name, stop - start)


# The ggml types that MLX's layouts can hold exactly, in groups of 32, and their bits.
EXACT_GGUF_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8, "MXFP4": 4}
# Of those in mode affine: bytes of a block, and where its numbers begin.
_AFFINE = {"Q4_0": (18, 2), "Q4_1": (20, 4), "Q8_0": (34, 2)}


def _split_blocks(blocks: NDArray[np.uint8], type_name: str) -> tuple[Array, Array | None, Array]:
    """Scale (N, G) float16, minimum (N, G) float16 or None, and the packed numbers (N, G, 16 or 32) uint8."""
    size, numbers = _AFFINE[type_name]
    parts = blocks.reshape(len(blocks), -1, size)
    scale = np.ascontiguousarray(parts[..., :2]).view(np.float16)[..., 0]
    minimum = np.ascontiguousarray(parts[..., 2:4]).view(np.float16)[..., 0] if type_name == "Q4_1" else None
    return scale, minimum, parts[..., numbers:]


def _dequantize(blocks: NDArray[np.uint8], type_name: str, out: Float32s) -> None:
    """Write the weights of `blocks` (N, bytes) to `out` (N, M)."""
    if type_name not in _AFFINE:
        # imported here: the package takes a quarter of a second and only K-quants and their like need it
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        out[...] = dequantize(blocks, GGMLQuantizationType[type_name]).reshape(out.shape)
        return
    scale, minimum, numbers = _split_blocks(blocks, type_name)
    groups = out.reshape(len(blocks), -1, 32)
    if type_name == "Q8_0":
        groups[...] = numbers.view(np.int8)
    else:
        groups[..., :16] = numbers & 15
        groups[..., 16:] = numbers >> 4
    if type_name == "Q4_0":
        groups -= 8
    groups *= scale.astype(np.float32)[..., None]
    if minimum is not None:
        groups += minimum.astype(np.float32)[..., None]


def _to_affine(blocks: NDArray[np.uint8], type_name: str) -> tuple[Array, Array, Array]:
    scale, minimum, numbers = _split_blocks(blocks, type_name)
    if type_name == "Q8_0":
        packed, zero = numbers ^ np.uint8(128), 128  # int8 + 128, unsigned
    else:
        packed, zero = _neighbours(numbers), 8
    if minimum is None:  # zero is a power of two: exact unless float16 overflows
        if bool(np.any(np.abs(scale) > np.float16(65504 / zero))):
            scale = scale.astype(np.float32)
        minimum = scale * scale.dtype.type(-zero)
    return _words(packed), scale, minimum


def _to_mxfp4(blocks: NDArray[np.uint8]) -> tuple[Array, Array]:
    """ggml's block is a scale (E8M0), then 16 bytes of nibbles."""
    parts = blocks.reshape(len(blocks), -1, 17)
    return _words(_neighbours(parts[..., 1:])), parts[..., 0]


def _neighbours(numbers: Array) -> Array:
    """ggml keeps weights 0..15 of a group in low nibbles, 16..31 in high ones; MLX wants neighbours in one byte."""
    unpacked = np.concatenate((numbers & 15, numbers >> 4), axis=-1)
    return np.asarray(unpacked[..., 0::2] | unpacked[..., 1::2] << 4)


def _words(octets: Array) -> Array:
    return np.ascontiguousarray(octets).reshape(len(octets), -1).view("<u4")
