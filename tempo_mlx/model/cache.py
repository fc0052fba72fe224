"""The one key/value cache: the alive slots, in slot order, in buffers that grow 256 at a time.

They shrink when much was removed.

With `bits`, every slot is stored quantised along D, in groups that share a scale and an offset, and is read back as
the nearest value so stored. A slot's numbers do not depend on its neighbours', so that what is kept, cut or copied
stays what it was.
"""

from __future__ import annotations

import copy

import numpy as np

from tempo_mlx.arrays import Ints
from tempo_mlx.errors import ModelError
from tempo_mlx.mlx import mx

STEP = 256
SLACK = 3 * STEP  # unused slots from which on buffers are cut: seldom, since it moves what is kept
GROUP_SIZES = (64, 32)  # of MLX's quantised formats, the more compact first


class Cache:
    """Per layer, keys and values (K, capacity, D) of which the first `len(self)` slots are in use."""

    def __init__(
        self, layers: int, groups: int, head_dim: int, dtype: mx.Dtype, bits: int | None = None
    ) -> None:
        self.positions: Ints = np.empty(0, np.int64)
        self._bits = bits
        self._group_size = group_size(head_dim) if bits else 0
        self._dtype = dtype
        self._empty = [part[:, :0] for part in self._store(mx.zeros((groups, 1, head_dim), dtype))]
        # the parts of what is stored: the numbers, or the packed numbers, their scales and their offsets
        self._keys = [list(self._empty) for _ in range(layers)]
        self._values = [list(self._empty) for _ in range(layers)]
        self._length = 0  # slots before the rows of the forward pass under way

    def __len__(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        return sum(int(a.nbytes) for a in self.arrays())

    def arrays(self) -> list[mx.array]:
        return [part for buffer in (*self._keys, *self._values) for part in buffer]

    def reserve(self, positions: Ints) -> None:
        """Make room for L rows at these logical positions; they count as appended once `commit` is called."""
        self.positions = np.concatenate([self.positions[: self._length], positions])
        if len(self.positions) > self._capacity:
            self._resize(len(self.positions))

    def append(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the newest rows (K, L, D) of one layer and return that layer's keys and values (K, S, D)."""
        return self._write(self._keys[layer], keys), self._write(self._values[layer], values)

    def commit(self) -> None:
        self._length = len(self.positions)

    def keep(self, indices: Ints) -> None:
        """Drop every slot not in `indices` (ascending). Only the part after the first dropped slot moves."""
        indices = np.asarray(indices, np.int64)
        moved = np.flatnonzero(indices != np.arange(len(indices)))
        if len(moved):
            first, end = int(moved[0]), len(indices)
            tail = mx.array(indices[first:])
            for buffer in (*self._keys, *self._values):
                for part in buffer:
                    part[:, first:end] = part[:, tail]
        self.positions = self.positions[indices]
        self._length = len(indices)
        if self._capacity - self._length > SLACK:
            self._resize(self._length)

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on; nothing moves."""
        self.positions = self.positions[:length]
        self._length = min(length, self._length)

    def copy(self) -> Cache:
        """An independent cache with the same slots (arrays are copied when either is next written)."""
        other = copy.copy(self)
        other.positions = self.positions.copy()
        other._keys = [[mx.array(part) for part in buffer] for buffer in self._keys]
        other._values = [[mx.array(part) for part in buffer] for buffer in self._values]
        return other

    @property
    def _capacity(self) -> int:
        return int(self._keys[0][0].shape[1])

    def _resize(self, slots: int) -> None:
        """Move what is kept to buffers for so many slots, rounded up."""
        room = -(-slots // STEP) * STEP - self._length
        pads = [mx.zeros((part.shape[0], room, part.shape[2]), part.dtype) for part in self._empty]
        for buffer in (*self._keys, *self._values):
            for i, pad in enumerate(pads):
                buffer[i] = mx.concatenate([buffer[i][:, : self._length], pad], axis=1)

    def _write(self, buffer: list[mx.array], rows: mx.array) -> mx.array:
        end = len(self.positions)
        start = end - rows.shape[1]
        for part, new in zip(buffer, self._store(rows), strict=True):
            part[:, start:end] = new
        return self._read([part[:, :end] for part in buffer])

    def _store(self, rows: mx.array) -> list[mx.array]:
        """(K, L, D) as the parts that are kept of it."""
        if self._bits is None:
            return [rows]
        return list(mx.quantize(rows, group_size=self._group_size, bits=self._bits))

    def _read(self, parts: list[mx.array]) -> mx.array:
        if self._bits is None:
            return parts[0]
        packed, scales, offsets = parts
        rows = mx.dequantize(packed, scales, offsets, self._group_size, self._bits)
        return rows.astype(self._dtype)


def group_size(head_dim: int) -> int:
    """How many of a slot's D numbers share a scale. Raises ModelError where no size divides D."""
    for size in GROUP_SIZES:
        if head_dim % size == 0:
            return size
    raise ModelError(
        f"A quantised KV cache needs a head dim that is a multiple of {GROUP_SIZES[-1]}, and the model's is "
        f"{head_dim}; leave out --kv-bits."
    )
