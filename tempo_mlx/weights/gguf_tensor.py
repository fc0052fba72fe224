"""A weight in GGUF's blocks. Layouts: llama.cpp, ggml-quants.c."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.arrays import Float32s
from tempo_mlx.errors import ModelError
from tempo_mlx.weights.gguf_layouts import pack, packing_of
from tempo_mlx.weights.tensor import CHUNK, Array, DenseTensor, FloatType, Index, Kind, Layout, Quantized


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
        return "mlx_quantized" if packing_of(self.type_name).exact else "float32"

    @property
    def layout(self) -> Layout:
        return packing_of(self.type_name).layout

    @property
    def float_type(self) -> FloatType:
        return "float16" if self.layout.mode == "affine" else "bfloat16"

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes(math.prod(self.shape))

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
        packed, scales, minima, layout = pack(
            self.blocks.reshape(-1, self.blocks.shape[-1]), self.type_name, self.columns
        )
        rows = self.shape[:-1]
        minima = None if minima is None else minima.reshape(*rows, -1)
        return packed.reshape(*rows, -1), scales.reshape(*rows, -1), minima, layout

    def rows(self, rows: Index) -> GGUFTensor:
        return GGUFTensor(self.blocks[rows], self.type_name, self.columns)

    @property
    def group(self) -> int:
        return packing_of(self.type_name).block

    def cut(self, start: int, stop: int) -> GGUFTensor | DenseTensor:
        if start % self.group or stop % self.group:
            return DenseTensor(self.numpy()[..., start:stop])
        width = self.blocks.shape[-1] // (self.columns // self.group)  # bytes of a block
        octets = slice(start // self.group * width, stop // self.group * width)
        return GGUFTensor(self.blocks[..., octets], self.type_name, stop - start)


# Of the types that are dequantised here, not by the gguf package: bytes of a block, and where its numbers begin.
_OWN = {"Q4_0": (18, 2), "Q4_1": (20, 4), "Q8_0": (34, 2)}


def _split_blocks(blocks: NDArray[np.uint8], type_name: str) -> tuple[Array, Array | None, Array]:
    """Scale (N, G) float16, minimum (N, G) float16 or None, and the packed numbers (N, G, 16 or 32) uint8."""
    size, numbers = _OWN[type_name]
    parts = blocks.reshape(len(blocks), -1, size)
    scale = np.ascontiguousarray(parts[..., :2]).view(np.float16)[..., 0]
    minimum = np.ascontiguousarray(parts[..., 2:4]).view(np.float16)[..., 0] if type_name == "Q4_1" else None
    return scale, minimum, parts[..., numbers:]


def _dequantize(blocks: NDArray[np.uint8], type_name: str, out: Float32s) -> None:
    """Write the weights of `blocks` (N, bytes) to `out` (N, M)."""
    if type_name not in _OWN:
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
