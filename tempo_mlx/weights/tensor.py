"""One weight of a checkpoint, still where it lies on disk: dense, MLX-quantised, or in GGUF blocks.

MLX's affine layout (mlx.core.quantize): groups of `group_size` weights along the last axis, each weight
scale * q + bias, with q unsigned and packed into uint32, the first weight in the lowest bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.arrays import Float32s
from tempo_mlx.errors import ModelError

Kind = Literal["float32", "float16", "bfloat16", "mlx_quantized"]
Array = NDArray[Any]
Rows = slice | NDArray[np.intp]
# packed (N, M * bits / 32) uint32, scales and biases (N, M / group_size), bits, group_size
Quantized = tuple[Array, Array, Array, int, int]

_CHUNK = 1 << 18  # weights dequantised at once: float32 chunks that stay in the cache


class Tensor(Protocol):
    """A weight of shape `shape`; `kind` says what `raw` (dense) or `quantized` (mlx_quantized) gives."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def nbytes(self) -> int:
        """Bytes it takes in its own kind."""
        ...

    def numpy(self) -> Float32s:
        """The weight as float32, dequantised; may be read-only."""
        ...

    def raw(self) -> Array:
        """The stored numbers of a dense weight: float32, float16, or uint16 for bfloat16."""
        ...

    def quantized(self) -> Quantized:
        """The weight in MLX's affine layout, without loss; only for kind mlx_quantized."""
        ...

    def rows(self, rows: Rows) -> Tensor:
        """The same kind of weight, with these rows of axis 0."""
        ...

    @property
    def group(self) -> int:
        """How many neighbouring columns are stored together."""
        ...

    def cut(self, start: int, stop: int) -> Tensor:
        """These columns; dequantised where they do not begin and end with a group."""
        ...


@dataclass(frozen=True)
class DenseTensor:
    """`data` is float32, float16, or uint16 holding bfloat16. `subtract` is taken off by `numpy` and `raw`
    (GGUF stores Gemma's norms as 1 + w)."""

    data: Array
    subtract: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def kind(self) -> Kind:
        kinds: dict[str, Kind] = {"float32": "float32", "float16": "float16", "uint16": "bfloat16"}
        return kinds[self.data.dtype.name]

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def numpy(self) -> Float32s:
        data = self.data
        wide = bfloat16_to_float32(data) if data.dtype == np.uint16 else np.asarray(data, dtype=np.float32)
        return wide - np.float32(self.subtract) if self.subtract else wide

    def raw(self) -> Array:
        if not self.subtract:
            return self.data
        wide = self.numpy()
        return float32_to_bfloat16(wide) if self.data.dtype == np.uint16 else wide.astype(self.data.dtype)

    def quantized(self) -> Quantized:
        raise ModelError(f"A {self.kind} weight is not quantised; read it with raw() or numpy().")

    def rows(self, rows: Rows) -> DenseTensor:
        return DenseTensor(self.data[rows], self.subtract)

    @property
    def group(self) -> int:
        return 1

    def cut(self, start: int, stop: int) -> DenseTensor:
        return DenseTensor(self.data[:, start:stop], self.subtract)


@dataclass(frozen=True)
class AffineTensor:
    """A weight stored in MLX's affine layout."""

    packed: Array
    scales: Array  # float32, float16, or uint16 holding bfloat16
    biases: Array
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], self.packed.shape[-1] * 32 // self.bits)

    @property
    def kind(self) -> Kind:
        return "mlx_quantized"

    @property
    def nbytes(self) -> int:
        return int(self.packed.nbytes + self.scales.nbytes + self.biases.nbytes)

    def numpy(self) -> Float32s:
        out = np.empty(self.shape, dtype=np.float32)
        scales, biases = DenseTensor(self.scales).numpy(), DenseTensor(self.biases).numpy()
        step = max(1, _CHUNK // max(1, self.shape[-1]))
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            q = unpack_bits(self.packed[part], self.bits)
            groups = out[part].reshape(len(q), -1, self.group_size)
            np.multiply(q.reshape(groups.shape), scales[part, :, None], out=groups)
            groups += biases[part, :, None]
        return out

    def raw(self) -> Array:
        raise ModelError("A quantised weight has no plain numbers; read it with quantized() or numpy().")

    def quantized(self) -> Quantized:
        return self.packed, self.scales, self.biases, self.bits, self.group_size

    def rows(self, rows: Rows) -> AffineTensor:
        return AffineTensor(
            self.packed[rows], self.scales[rows], self.biases[rows], self.bits, self.group_size
        )

    @property
    def group(self) -> int:
        return self.group_size

    def cut(self, start: int, stop: int) -> AffineTensor | DenseTensor:
        size = self.group_size
        if start % size or stop % size:
            return DenseTensor(self.numpy()[:, start:stop])
        words, groups = (
            slice(start * self.bits // 32, stop * self.bits // 32),
            slice(start // size, stop // size),
        )
        parts = self.packed[:, words], self.scales[:, groups], self.biases[:, groups]
        return AffineTensor(*parts, self.bits, size)


@dataclass(frozen=True)
class GGUFTensor:
    """A weight in GGUF blocks: `blocks` (N, bytes of a row) uint8 of ggml type `type_name`, `columns` weights
    a row."""

    blocks: NDArray[np.uint8]
    type_name: str
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.blocks.shape[:-1], self.columns)

    @property
    def kind(self) -> Kind:
        return "mlx_quantized" if self.type_name in AFFINE_GGUF_BITS else "float32"

    @property
    def nbytes(self) -> int:
        bits = AFFINE_GGUF_BITS.get(self.type_name)
        count = int(np.prod(self.shape, dtype=np.int64))
        return count * 4 if bits is None else count * bits // 8 + count // 32 * 4

    def numpy(self) -> Float32s:
        out = np.empty(self.shape, dtype=np.float32)
        rows = out.reshape(-1, self.columns)
        blocks = self.blocks.reshape(-1, self.blocks.shape[-1])
        step = max(1, _CHUNK // self.columns)
        for start in range(0, len(rows), step):
            _dequantize(blocks[start : start + step], self.type_name, rows[start : start + step])
        return out

    def raw(self) -> Array:
        if self.kind == "mlx_quantized":
            raise ModelError("A quantised weight has no plain numbers; read it with quantized() or numpy().")
        return self.numpy()

    def quantized(self) -> Quantized:
        if self.type_name not in AFFINE_GGUF_BITS:
            raise ModelError(
                f"GGUF type {self.type_name} has no equal among MLX's layouts; read it with numpy()."
            )
        return _to_affine(self.blocks, self.type_name)

    def rows(self, rows: Rows) -> GGUFTensor:
        return GGUFTensor(self.blocks[rows], self.type_name, self.columns)

    @property
    def group(self) -> int:
        if self.type_name in AFFINE_GGUF_BITS:
            return 32
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # see _dequantize

        return int(GGML_QUANT_SIZES[GGMLQuantizationType[self.type_name]][0])

    def cut(self, start: int, stop: int) -> GGUFTensor | DenseTensor:
        if start % self.group or stop % self.group:
            return DenseTensor(self.numpy()[:, start:stop])
        width = self.blocks.shape[-1] // (self.columns // self.group)  # bytes of a block
        octets = slice(start // self.group * width, stop // self.group * width)
        return GGUFTensor(self.blocks[:, octets], self.type_name, stop - start)


@dataclass(frozen=True)
class Reordered:
    """`tensor` with its rows in another order, put so when it is asked for: a copy of a large weight."""

    tensor: Tensor
    order: NDArray[np.intp]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def kind(self) -> Kind:
        return self.tensor.kind

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def group(self) -> int:
        return self.tensor.group

    def numpy(self) -> Float32s:
        return self.tensor.rows(self.order).numpy()

    def raw(self) -> Array:
        return self.tensor.rows(self.order).raw()

    def quantized(self) -> Quantized:
        return self.tensor.rows(self.order).quantized()

    def rows(self, rows: Rows) -> Tensor:
        return self.tensor.rows(self.order[rows])

    def cut(self, start: int, stop: int) -> Tensor:
        return Reordered(self.tensor.cut(start, stop), self.order)


# The ggml types that MLX's affine layout can hold exactly, in groups of 32, and their bits.
AFFINE_GGUF_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}


def _split_blocks(blocks: NDArray[np.uint8], type_name: str) -> tuple[Array, Array | None, Array]:
    """Scale (N, G) float16, minimum (N, G) float16 or None, and the packed numbers (N, G, 16 or 32) uint8."""
    size, numbers = {"Q4_0": (18, 2), "Q4_1": (20, 4), "Q8_0": (34, 2)}[type_name]
    parts = blocks.reshape(len(blocks), -1, size)
    scale = np.ascontiguousarray(parts[..., :2]).view(np.float16)[..., 0]
    minimum = np.ascontiguousarray(parts[..., 2:4]).view(np.float16)[..., 0] if type_name == "Q4_1" else None
    return scale, minimum, parts[..., numbers:]


def _dequantize(blocks: NDArray[np.uint8], type_name: str, out: Float32s) -> None:
    """Write the weights of `blocks` (N, bytes) to `out` (N, M). Layouts: llama.cpp, ggml-quants.c."""
    if type_name not in AFFINE_GGUF_BITS:
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


def _to_affine(blocks: NDArray[np.uint8], type_name: str) -> Quantized:
    scale, minimum, numbers = _split_blocks(blocks, type_name)
    bits = AFFINE_GGUF_BITS[type_name]
    if type_name == "Q8_0":
        packed = numbers ^ np.uint8(128)  # int8 + 128, unsigned
    else:  # low nibbles are weights 0..15, high nibbles 16..31; MLX wants neighbours in one byte
        unpacked = np.concatenate((numbers & 15, numbers >> 4), axis=-1)
        packed = unpacked[..., 0::2] | unpacked[..., 1::2] << 4
    if minimum is None:
        zero = 8 if bits == 4 else 128  # a power of two: exact unless float16 overflows
        if bool(np.any(np.abs(scale) > np.float16(65504 / zero))):
            scale = scale.astype(np.float32)
        minimum = scale * scale.dtype.type(-zero)
    flat = np.ascontiguousarray(packed).reshape(len(blocks), -1).view("<u4")
    return flat, scale, minimum, bits, 32


def unpack_bits(packed: Array, bits: int) -> Array:
    """(N, W) uint32 -> (N, W * 32 / bits) uint8, first weight in the lowest bits."""
    octets = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return np.asarray(octets)
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return np.asarray((octets[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(len(packed), -1)
    # 3, 5 and 6 bits straddle bytes
    single = np.unpackbits(octets, axis=-1, bitorder="little").reshape(len(packed), -1, bits)
    return np.asarray(np.packbits(single, axis=-1, bitorder="little")[..., 0])


def bfloat16_to_float32(data: Array) -> Float32s:
    wide = data.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float32_to_bfloat16(data: Float32s) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
