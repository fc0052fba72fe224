"""The header of a safetensors file, checked before a byte of data is touched; the data stays memory-mapped.

The format: https://github.com/huggingface/safetensors#format. The package's numpy interface has no bfloat16.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tempo_mlx.errors import ModelError
from tempo_mlx.weights.tensor import Array

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
           "I8": "<i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?"}  # fmt: skip
_MAX_HEADER = 16 << 20


@dataclass(frozen=True)
class StoredArray:
    """One entry of the header; `dtype` is safetensors' name for it, `start` counts from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    path: Path
    buffer: mmap.mmap
    arrays: Mapping[str, StoredArray]

    def array(self, name: str) -> Array:
        """The stored numbers, read-only, not copied; bfloat16 comes as uint16."""
        stored = self.arrays[name]
        dtype = np.dtype(_DTYPES[stored.dtype])
        flat = np.frombuffer(self.buffer, dtype, stored.nbytes // dtype.itemsize, stored.start)
        return flat.reshape(stored.shape)


def read_safetensors(path: Path) -> SafetensorsFile:
    """Map the file and check its header: sizes, types, names, overlaps, gaps.

    Raises: ModelError naming the file and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelError(f"The model's file {path} is missing; fetch the model again.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {path}: {error}.") from None

    def fail(reason: str) -> ModelError:
        return ModelError(f"{path} is not a usable safetensors file: {reason}; fetch it again.")

    if len(buffer) < 8:
        raise fail("it is shorter than its header's length field")
    header_size = int.from_bytes(buffer[:8], "little")
    if header_size > min(_MAX_HEADER, len(buffer) - 8):
        raise fail(f"its header claims {header_size} bytes")
    header = _parse_header(buffer[8 : 8 + header_size], fail)
    data_start = 8 + header_size
    arrays: dict[str, StoredArray] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            arrays[name] = _check_entry(name, entry, data_start, len(buffer), fail)
    end = data_start
    for name, stored in sorted(arrays.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if stored.start != end:
            raise fail(
                f"tensor {name!r} {'overlaps' if stored.start < end else 'leaves a gap after'} the one before"
            )
        end = stored.start + stored.nbytes
    if end != len(buffer):
        raise fail(f"{len(buffer) - end} bytes at its end belong to no tensor")
    return SafetensorsFile(path, buffer, arrays)


def _parse_header(text: bytes, fail: Any) -> dict[str, Any]:
    # An entry takes about 60 bytes, five commas and three brackets; refuse what would only blow up in memory.
    if text.count(b",") > len(text) // 8 + 16 or text.count(b"[") + text.count(b"{") > len(text) // 12 + 16:
        raise fail("its header is not a table of tensors")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise fail("its header names a tensor, or a field, twice")
        return table

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise fail("its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise fail("its header is not a table of tensors")
    return header


def _check_entry(name: str, entry: Any, data_start: int, file_size: int, fail: Any) -> StoredArray:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"the entry of tensor {name!r} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise fail(f"tensor {name!r} has the unsupported type {dtype!r}")
    if not _natural_numbers(shape, 8) or not _natural_numbers(offsets, 2) or len(offsets) != 2:
        raise fail(f"the shape or offsets of tensor {name!r} are not whole numbers")
    nbytes = np.dtype(_DTYPES[dtype]).itemsize
    for size in shape:
        nbytes *= size
    start, end = offsets
    if end > file_size - data_start or end - start != nbytes:
        raise fail(f"tensor {name!r} of shape {shape} lies at bytes {start} to {end}")
    return StoredArray(dtype, tuple(shape), data_start + start, nbytes)


def _natural_numbers(values: Any, most: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(each) is int and each >= 0 for each in values)
    )
