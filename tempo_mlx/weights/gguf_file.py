"""The header of a GGUF file, read with every count, size and offset held against the file's length first.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package's own reader trusts
the header; only its block layouts are used here (tensor.py).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tempo_mlx.errors import ModelError
from tempo_mlx.files import reason_of
from tempo_mlx.weights.damage import damaged
from tempo_mlx.weights.gguf_tensor import GGUFTensor
from tempo_mlx.weights.tensor import DenseTensor, Tensor

# value types of metadata: numpy dtype of the fixed-size ones
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# ggml type number -> name, weights a block, bytes a block
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
# Further ones in files people have, for the sentence that refuses them.
_OTHERS = {31: " (Q4_0_4_4)", 32: " (Q4_0_4_8)", 33: " (Q4_0_8_8)", 40: " (NVFP4)", 41: " (Q1_0)"}
_DENSE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_MAX_ENTRIES = 1 << 16  # metadata keys, or tensors: far above any model, far below what would hurt
_MAX_KEY = 1 << 16


@dataclass(frozen=True)
class StringArray:
    """`count` strings that start at byte `start`; decoded only when asked for: vocabularies are long."""

    buffer: mmap.mmap
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        offset, buffer, unpack = self.start, self.buffer, struct.Struct("<Q").unpack_from
        for _ in range(self.count):  # lengths were checked when the header was read
            end = offset + 8 + unpack(buffer, offset)[0]
            yield buffer[offset + 8 : end].decode("utf-8", "replace")
            offset = end


@dataclass(frozen=True)
class GGUFFile:
    path: Path
    metadata: Mapping[str, Any]  # numbers, strings, numpy arrays, StringArray
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Info:
    """A tensor's header: `shape` in numpy order (rows first); `offset` from where the tensors start."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    nbytes: int

    def tensor(self, buffer: mmap.mmap, base: int) -> Tensor:
        start = base + self.offset
        if self.type_name in _DENSE:
            dtype = np.dtype(_DENSE[self.type_name])
            data = np.frombuffer(buffer, dtype, self.nbytes // dtype.itemsize, start)
            return DenseTensor(data.reshape(self.shape))
        octets = np.frombuffer(buffer, np.uint8, self.nbytes, start)
        return GGUFTensor(octets.reshape(*self.shape[:-1], -1), self.type_name, self.shape[-1])


class _Header:
    """A cursor over the header that never reads past the end of the file."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path, self.buffer, self.size, self.offset = path, buffer, len(buffer), 0

    def fail(self, reason: str) -> ModelError:
        return damaged(self.path, f"is not a usable GGUF file: {reason}")

    def advance(self, nbytes: int) -> int:
        """Step over `nbytes` and return where they start."""
        start = self.offset
        if nbytes > self.size - start:
            raise self.fail(f"it ends inside its header (byte {self.size})")
        self.offset = start + nbytes
        return start

    def number(self, dtype: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self.buffer, kind, 1, self.advance(kind.itemsize))[0].item()

    def u32(self) -> int:
        return int(struct.unpack_from("<I", self.buffer, self.advance(4))[0])

    def u64(self) -> int:
        return int(struct.unpack_from("<Q", self.buffer, self.advance(8))[0])

    def name(self, what: str) -> str:
        length = self.u64()
        if not 0 < length <= _MAX_KEY:
            raise self.fail(f"a {what} has a name of {length} bytes")
        start = self.advance(length)
        try:
            return self.buffer[start : self.offset].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"a {what}'s name is not UTF-8") from None

    def string(self) -> str:
        start = self.advance(self.u64())
        return self.buffer[start : self.offset].decode("utf-8", "replace")

    def strings(self, count: int) -> StringArray:
        start, size, unpack = self.offset, self.size, struct.Struct("<Q").unpack_from
        offset = start
        for _ in range(count):
            if offset > size - 8:
                raise self.fail(f"it ends inside a list of {count} strings")
            offset += 8 + unpack(self.buffer, offset)[0]
        if offset > size:
            raise self.fail(f"it ends inside a list of {count} strings")
        self.offset = offset
        return StringArray(self.buffer, start, count)

    def value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.fail(f"metadata key {key!r} has the unknown type {kind}")
        element, count = self.u32(), self.u64()
        if element == _STRING:
            if count > (self.size - self.offset) // 8:
                raise self.fail(f"metadata key {key!r} claims {count} strings")
            return self.strings(count)
        if element not in _SCALARS:
            raise self.fail(f"metadata key {key!r} is a list of the unsupported type {element}")
        dtype = np.dtype(_SCALARS[element])
        if count > (self.size - self.offset) // dtype.itemsize:
            raise self.fail(f"metadata key {key!r} claims {count} numbers")
        return np.frombuffer(self.buffer, dtype, count, self.advance(count * dtype.itemsize))


def read_gguf(path: Path) -> GGUFFile:
    """Read and check the header. Nothing is allocated from a number in the file before it is checked.

    Raises: ModelError for anything but a complete, consistent, little-endian GGUF file of version 2 or 3.
    """
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelError(f"There is no file {path}; check the path given as the model.") from None
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {reason_of(error)}.") from None
    except ValueError:  # nothing can be mapped
        raise damaged(path, "is empty") from None
    header = _Header(path, buffer)
    if buffer[: min(4, len(buffer))] != b"GGUF":
        raise header.fail("it does not start with the letters GGUF")
    header.advance(4)
    version = header.u32()
    if version not in (2, 3):
        endian = " (a big-endian file)" if version & 0xFFFF == 0 and version else ""
        raise ModelError(
            f"{path} is a GGUF file of version {version}{endian}, and only versions 2 and 3 are read; take a newer "
            "conversion of the model."
        )
    tensor_count, key_count = header.u64(), header.u64()
    if max(tensor_count, key_count) > _MAX_ENTRIES or tensor_count * 32 + key_count * 13 > header.size:
        raise header.fail(f"it claims {tensor_count} tensors and {key_count} metadata keys")
    metadata = _read_metadata(header, key_count)
    tensors = _read_tensors(header, tensor_count, metadata.get("general.alignment", 32))
    return GGUFFile(path, metadata, tensors)


def _read_metadata(header: _Header, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = header.name("metadata key")
        if key in metadata:
            raise header.fail(f"metadata key {key!r} appears twice")
        metadata[key] = header.value(key, header.u32())
    return metadata


def _read_tensors(header: _Header, count: int, alignment: Any) -> dict[str, Tensor]:
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise header.fail(f"general.alignment is {alignment!r}, not a power of two from 8 up")
    infos: dict[str, _Info] = {}
    for _ in range(count):
        info = _read_tensor(header, alignment)
        if info.name in infos:
            raise header.fail(f"tensor {info.name!r} appears twice")
        infos[info.name] = info
    base = end = -(-header.offset // alignment) * alignment
    for info in sorted(infos.values(), key=lambda each: each.offset):
        if base + info.offset < end:
            raise header.fail(f"tensor {info.name!r} overlaps the one before it")
        end = base + info.offset + info.nbytes
        if end > header.size:
            raise header.fail(f"tensor {info.name!r} ends at byte {end} of {header.size}")
    return {name: info.tensor(header.buffer, base) for name, info in infos.items()}


def _read_tensor(header: _Header, alignment: int) -> _Info:
    name = header.name("tensor")
    dimensions = header.u32()
    if not 1 <= dimensions <= 4:
        raise header.fail(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(header.u64() for _ in range(dimensions))[::-1]
    kind, offset = header.u32(), header.u64()
    if kind not in TYPES:
        raise ModelError(
            f"{header.path} holds the tensor {name!r} in ggml's type {kind}{_OTHERS.get(kind, '')}, which tempo-mlx "
            "does not read; take another quantisation of the model, such as Q4_K_M or Q8_0."
        )
    type_name, block, block_bytes = TYPES[kind]
    weights = 1
    for size in shape:  # Python's integers do not overflow
        weights *= size
    if weights == 0 or shape[-1] % block:
        raise header.fail(f"tensor {name!r} of shape {shape} does not fill blocks of {block} ({type_name})")
    if offset % alignment:
        raise header.fail(f"tensor {name!r} starts at {offset}, not a multiple of {alignment}")
    return _Info(name, shape, type_name, offset, weights // block * block_bytes)
