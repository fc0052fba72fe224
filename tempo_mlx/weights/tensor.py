"""One weight of a checkpoint, still where it lies on disk: dense, MLX-quantised, or (gguf_tensor.py) in GGUF blocks.

MLX's layouts (mlx.core.quantize): groups of `group_size` weights along the last axis, of `bits` each, packed into
uint32, the first weight in the lowest bits. Mode affine: scale * q + bias, with q unsigned. mxfp4, mxfp8, nvfp4: q is
a float of 4 (E2M1) or 8 bits (E4M3), the scale a power of two (E8M0) or, in nvfp4, an E4M3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.arrays import Float32s
from tempo_mlx.errors import ModelError

FloatType = Literal["float32", "float16", "bfloat16"]
Kind = FloatType | Literal["mlx_quantized"]
Array = NDArray[Any]
Rows = slice | NDArray[np.intp]
Index = Rows | tuple[slice, slice]  # of axes 0 and 1, where the numbers lie as they are stored


@dataclass(frozen=True)
class Layout:
    """How MLX packs a weight."""

    bits: int
    group_size: int
    mode: str = "affine"  # a key of MODES

    def nbytes(self, count: int, scale_bytes: int = 2) -> int:
        """Of so many weights, with scales and biases of so many bytes."""
        return count * self.bits // 8 + count // self.group_size * (
            2 * scale_bytes if self.mode == "affine" else 1
        )


# Mode -> the (bits, group size) that MLX has, and those it takes unless told.
MODES: Mapping[str, tuple[frozenset[tuple[int, int]], tuple[int, int]]] = MappingProxyType(
    {
        "affine": (frozenset(itertools.product((1, 2, 3, 4, 5, 6, 8), (32, 64, 128))), (4, 64)),
        "mxfp4": (frozenset({(4, 32)}), (4, 32)),
        "mxfp8": (frozenset({(8, 32)}), (8, 32)),
        "nvfp4": (frozenset({(4, 16)}), (4, 16)),
    }
)
# packed (..., N, M * bits / 32) uint32, scales and biases (..., N, M / group_size); only affine has biases
Quantized = tuple[Array, Array, Array | None, Layout]

# Which quantised weights stay so: all, none, or those of which no number changes by it
Packing = bool | Literal["exact"]

CHUNK = 1 << 18  # weights dequantised at once: float32 chunks that stay in the cache


class Tensor(Protocol):
    """A weight of shape `shape`; `kind` says what gives it without loss: `raw` (dense), or `quantized`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def layout(self) -> Layout | None:
        """Of what `quantized` gives, with a loss where `kind` is dense; None: it cannot be packed."""
        ...

    @property
    def float_type(self) -> FloatType:
        """What its numbers, or the scales they are quantised with, are kept in."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes it takes, packed where it can be."""
        ...

    def numpy(self) -> Float32s:
        """The weight as float32, dequantised; may be read-only."""
        ...

    def raw(self) -> Array:
        """The stored numbers of a dense weight: float32, float16, or uint16 for bfloat16."""
        ...

    def quantized(self) -> Quantized:
        """The weight in one of MLX's layouts; only where `layout` is one."""
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


def kept_layout(tensor: Tensor, packing: Packing) -> Layout | None:
    """In which a weight stays packed; None where it is unpacked. "exact" is what a CPU multiplies by (few_rows.c):
    matrices in 4 bits, or in 8, to which any others are widened."""
    layout = tensor.layout
    if layout is None or isinstance(packing, bool):
        return layout if packing else None
    if tensor.kind != "mlx_quantized" or layout.mode != "affine" or len(tensor.shape) != 2:
        return None
    return layout if layout.bits == 4 else replace(layout, bits=8)


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
        return self.float_type

    @property
    def layout(self) -> None:
        return None

    @property
    def float_type(self) -> FloatType:
        kinds: dict[str, FloatType] = {"float32": "float32", "float16": "float16", "uint16": "bfloat16"}
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

    def rows(self, rows: Index) -> DenseTensor:
        return DenseTensor(self.data[rows], self.subtract)

    @property
    def group(self) -> int:
        return 1

    def cut(self, start: int, stop: int) -> DenseTensor:
        return DenseTensor(self.data[..., start:stop], self.subtract)


@dataclass(frozen=True)
class PackedTensor:
    """A weight stored in one of MLX's layouts."""

    packed: Array
    scales: Array  # affine: float32, float16, or uint16 holding bfloat16; the others: uint8
    biases: Array | None
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], self.packed.shape[-1] * 32 // self.layout.bits)

    @property
    def kind(self) -> Kind:
        return "mlx_quantized"

    @property
    def float_type(self) -> FloatType:
        return DenseTensor(self.scales).float_type if self.layout.mode == "affine" else "bfloat16"

    @property
    def nbytes(self) -> int:
        return int(
            self.packed.nbytes + self.scales.nbytes + (0 if self.biases is None else self.biases.nbytes)
        )

    def numpy(self) -> Float32s:
        out = np.empty((math.prod(self.shape[:-1]), self.shape[-1]), dtype=np.float32)
        packed, scales = (each.reshape(len(out), each.shape[-1]) for each in (self.packed, self.scales))
        biases = None if self.biases is None else DenseTensor(self.biases.reshape(scales.shape)).numpy()
        factors = (
            DenseTensor(scales).numpy() if self.layout.mode == "affine" else _SCALES[self.layout.mode][scales]
        )
        step = max(1, CHUNK // max(1, self.shape[-1]))
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            q = unpack_bits(packed[part], self.layout.bits)
            if self.layout.mode != "affine":
                q = _FLOATS[self.layout.bits][q]
            groups = out[part].reshape(len(q), -1, self.layout.group_size)
            np.multiply(q.reshape(groups.shape), factors[part, :, None], out=groups)
            if biases is not None:
                groups += biases[part, :, None]
        return out.reshape(self.shape)

    def raw(self) -> Array:
        raise ModelError("A quantised weight has no plain numbers; read it with quantized() or numpy().")

    def quantized(self) -> Quantized:
        return self.packed, self.scales, self.biases, self.layout

    def rows(self, rows: Index) -> PackedTensor:
        return self._with(*(None if each is None else each[rows] for each in self._parts))

    @property
    def group(self) -> int:
        return self.layout.group_size

    def cut(self, start: int, stop: int) -> PackedTensor | DenseTensor:
        size = self.layout.group_size
        if start % size or stop % size:
            return DenseTensor(self.numpy()[..., start:stop])
        words = slice(start * self.layout.bits // 32, stop * self.layout.bits // 32)
        groups = slice(start // size, stop // size)
        biases = None if self.biases is None else self.biases[..., groups]
        return self._with(self.packed[..., words], self.scales[..., groups], biases)

    @property
    def _parts(self) -> tuple[Array, Array, Array | None]:
        return self.packed, self.scales, self.biases

    def _with(self, packed: Any, scales: Any, biases: Any) -> PackedTensor:
        return replace(self, packed=packed, scales=scales, biases=biases)


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
    def layout(self) -> Layout | None:
        return self.tensor.layout

    @property
    def float_type(self) -> FloatType:
        return self.tensor.float_type

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


@dataclass(frozen=True)
class ColumnsReordered:
    """`tensor` with its columns in another order, put so when it is asked for; dequantised where what is stored
    together does not stay together."""

    tensor: Tensor
    order: NDArray[np.intp]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def groups(self) -> NDArray[np.intp] | None:
        """The order of the groups of columns that are packed, or stored, together; None: they are torn apart."""
        size = self.tensor.group if self.tensor.layout is None else self.tensor.layout.group_size
        if len(self.order) % size:
            return None
        rows = self.order.reshape(-1, size)
        whole = rows[:, :1] % size == 0
        return rows[:, 0] // size if bool(np.all(whole & (rows - rows[:, :1] == np.arange(size)))) else None

    @property
    def kind(self) -> Kind:
        packed = self.tensor.kind == "mlx_quantized"
        return "float32" if packed and self.groups is None else self.tensor.kind

    @property
    def layout(self) -> Layout | None:
        return None if self.groups is None else self.tensor.layout

    @property
    def float_type(self) -> FloatType:
        return self.tensor.float_type

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes if self.layout == self.tensor.layout else 4 * math.prod(self.shape)

    @property
    def group(self) -> int:
        return self.tensor.group if self.kind == "mlx_quantized" else 1

    def numpy(self) -> Float32s:
        return self.tensor.numpy()[..., self.order]

    def raw(self) -> Array:
        return self.numpy() if self.kind == "float32" else self.tensor.raw()[..., self.order]

    def quantized(self) -> Quantized:
        groups = self.groups
        packed, scales, biases, layout = self.tensor.quantized()
        if groups is None:
            raise ModelError("A dense weight is not quantised; read it with raw() or numpy().")
        words = packed.reshape(*packed.shape[:-1], len(groups), -1)[..., groups, :].reshape(packed.shape)
        return words, scales[..., groups], None if biases is None else biases[..., groups], layout

    def rows(self, rows: Rows) -> Tensor:
        return ColumnsReordered(self.tensor.rows(rows), self.order)

    def cut(self, start: int, stop: int) -> Tensor:
        return DenseTensor(self.numpy()[..., start:stop])


def _small_floats(exponent_bits: int, fraction_bits: int) -> Float32s:
    """The value of every float of one sign bit and so many others; E4M3's two NaNs included."""
    code = np.arange(2 ** (1 + exponent_bits + fraction_bits))
    fraction = (code & (2**fraction_bits - 1)) / 2**fraction_bits
    exponent = code >> fraction_bits & (2**exponent_bits - 1)
    bias = 2 ** (exponent_bits - 1) - 1
    size = np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias))
    if (exponent_bits, fraction_bits) == (4, 3):
        size[[127, 255]] = np.nan
    return np.asarray(np.where(code >> (exponent_bits + fraction_bits), -size, size), np.float32)


_FLOATS = {4: _small_floats(2, 1), 8: _small_floats(4, 3)}  # bits of a weight -> its value
_E8M0 = np.append(2.0 ** (np.arange(255.0) - 127), np.nan).astype(np.float32)
_SCALES = {"mxfp4": _E8M0, "mxfp8": _E8M0, "nvfp4": _FLOATS[8]}


def packed_bits(q: Array, bits: int) -> Array:
    """(N, M) numbers below 2^bits -> (N, M * bits / 32) uint32, the first in the lowest bits."""
    octets = np.ascontiguousarray(q)
    if bits == 4:
        pairs = octets.view("<u2")
        octets = (pairs | pairs >> 4).astype(np.uint8)  # of which the lower bytes stay
    elif bits < 8:  # eight numbers fill so many bytes
        words = octets.view("<u8")
        for lower, upper, shift in _lanes(bits):
            words = words & lower | words >> shift & upper
        octets = np.ascontiguousarray(words[..., None].view(np.uint8)[..., :bits])
    return octets.reshape(len(q), -1).view("<u4")


def unpack_bits(packed: Array, bits: int) -> Array:
    """(N, W) uint32 -> (N, W * 32 / bits) uint8, first weight in the lowest bits."""
    octets = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return np.asarray(octets)
    eight = np.zeros((len(octets), octets.shape[1] // bits, 8), np.uint8)
    eight[..., :bits] = octets.reshape(len(octets), -1, bits)
    words = eight.view("<u8")
    for lower, upper, shift in reversed(_lanes(bits)):
        words = words & lower | (words & upper) << shift
    return words.view(np.uint8).reshape(len(packed), -1)


@cache
def _lanes(bits: int) -> tuple[tuple[np.uint64, np.uint64, np.uint64], ...]:
    """How the numbers of eight bytes come together in three steps, in lanes of 2, 4 and 8 bytes: of each lane the bits
    of its first half, those where its second half goes, and how far that is."""
    found = []
    for half in (1, 2, 4):
        numbers = (1 << half * bits) - 1
        every = sum(1 << start for start in range(0, 64, 16 * half))
        found.append((numbers * every, (numbers << half * bits) * every, half * (8 - bits)))
    return tuple((np.uint64(lower), np.uint64(upper), np.uint64(shift)) for lower, upper, shift in found)


def bfloat16_to_float32(data: Array) -> Float32s:
    wide = data.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float32_to_bfloat16(data: Float32s) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
