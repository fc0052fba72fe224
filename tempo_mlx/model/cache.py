"""The one key/value cache: the alive slots, in slot order, in buffers that grow 256 at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.model._mlx import mx

STEP = 256


class Cache:
    """Per layer, keys and values (K, capacity, D) of which the first `len(self)` slots are in use."""

    def __init__(self, layers: int, groups: int, head_dim: int, dtype: Any) -> None:
        self.positions: NDArray[np.int64] = np.empty(0, np.int64)
        self._shape = (groups, 0, head_dim)
        self._dtype = dtype
        self._keys = [mx.zeros(self._shape, dtype) for _ in range(layers)]
        self._values = [mx.zeros(self._shape, dtype) for _ in range(layers)]
        self._length = 0  # slots before the rows of the forward pass under way

    def __len__(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        return sum(int(a.nbytes) for a in self.arrays())

    def arrays(self) -> list[Any]:
        return [*self._keys, *self._values]

    def reserve(self, positions: NDArray[np.int64]) -> None:
        """Make room for L rows at these logical positions; they count as appended once `commit` is called."""
        self.positions = np.concatenate([self.positions[: self._length], positions])
        needed = len(self.positions)
        if needed > self._keys[0].shape[1]:
            room = (needed + STEP - 1) // STEP * STEP - self._length
            pad = mx.zeros((self._shape[0], room, self._shape[2]), self._dtype)
            self._keys = [mx.concatenate([a[:, : self._length], pad], axis=1) for a in self._keys]
            self._values = [mx.concatenate([a[:, : self._length], pad], axis=1) for a in self._values]

    def append(self, layer: int, keys: Any, values: Any) -> tuple[Any, Any]:
        """Write the new rows (K, L, D) of one layer and return that layer's keys and values (K, S, D)."""
        start, end = self._length, len(self.positions)
        self._keys[layer][:, start:end] = keys
        self._values[layer][:, start:end] = values
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def commit(self) -> None:
        self._length = len(self.positions)

    def keep(self, indices: NDArray[np.int64]) -> None:
        """Drop every slot not in `indices` (ascending). Only the part after the first dropped slot moves."""
        indices = np.asarray(indices, np.int64)
        moved = np.flatnonzero(indices != np.arange(len(indices)))
        if len(moved):
            first, end = int(moved[0]), len(indices)
            tail = mx.array(indices[first:])
            for buffers in (self._keys, self._values):
                for i, a in enumerate(buffers):
                    a[:, first:end] = a[:, tail]
                    buffers[i] = a
        self.positions = self.positions[indices]
        self._length = len(indices)

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on; nothing moves."""
        self.positions = self.positions[:length]
        self._length = min(length, self._length)

    def copy(self) -> Cache:
        """An independent cache with the same slots (arrays are copied when either is next written)."""
        other = Cache.__new__(Cache)
        other.positions = self.positions.copy()
        other._shape, other._dtype, other._length = self._shape, self._dtype, self._length
        other._keys = [mx.array(a) for a in self._keys]
        other._values = [mx.array(a) for a in self._values]
        return other
