"""A weight in GGUF's blocks. Layouts: llama.cpp, ggml-quants.c."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.arrays import Float32s
from tempo_mlx.errors import ModelError
from tempo_mlx.weights.gguf_layouts import dequantize, pack, packing_of
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
            dequantize(blocks[start : start + step], self.type_name, rows[start : start + step])
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
