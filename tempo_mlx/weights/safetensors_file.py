"""A safetensors file: its header checked by the safetensors package, its data memory-mapped.

The package's numpy interface has no bfloat16, so the numbers are looked up here: the data has no gaps, and the
package gives the tensors in their order (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from tempo_mlx.files import reason_of
from tempo_mlx.weights.damage import damaged
from tempo_mlx.weights.tensor import Array

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
           "I8": "<i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?", "F8_E4M3": "<u1",
           "F8_E5M2": "<u1", "F8_E8M0": "<u1"}  # fmt: skip


@dataclass(frozen=True)
class StoredArray:
    """One entry of the header; `dtype` is safetensors' name for it, `start` counts from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class SafetensorsFile:
    path: Path
    buffer: mmap.mmap
    arrays: Mapping[str, StoredArray]

    def array(self, name: str) -> Array:
        """The stored numbers, read-only, not copied; bfloat16 comes as uint16, float8 as uint8."""
        stored = self.arrays[name]
        flat = np.frombuffer(self.buffer, _DTYPES[stored.dtype], prod(stored.shape), stored.start)
        return flat.reshape(stored.shape)


def read_safetensors(path: Path) -> SafetensorsFile:
    """Map the file, its header checked: sizes, types, names, overlaps, gaps.

    Raises: ModelError naming the file and what is wrong with it.
    """
    arrays: dict[str, StoredArray] = {}
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with safe_open(path, framework="numpy") as checked:
            for name in checked.offset_keys():
                entry = checked.get_slice(name)
                dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
                if dtype not in _DTYPES or len(shape) > 8:
                    raise SafetensorError(f"tensor {name!r} is of type {dtype} and shape {shape}")
                arrays[name] = StoredArray(dtype, shape, start)
                start += prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except OSError as error:
        raise damaged(path, f"cannot be read ({reason_of(error)})") from None
    except (ValueError, SafetensorError) as error:
        if not path.stat().st_size:
            raise damaged(path, "is empty") from None
        reason = str(error).splitlines()[0][:200]
        raise damaged(path, f"is not a usable safetensors file: {reason}") from None
    return SafetensorsFile(path, buffer, arrays)
