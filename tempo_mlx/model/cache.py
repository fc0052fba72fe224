"""The one key/value cache: the alive slots, in slot order, in buffers that grow 256 at a time.

They shrink when much was removed.

With `bits`, every slot is stored quantised along D, in groups that share a scale and an offset, and is read back as
the nearest value so stored. A slot's numbers do not depend on its neighbours', so that what is kept, cut or copied
stays what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.errors import ModelError
from tempo_mlx.mlx import begin, mx
from tempo_mlx.model.states import States

STEP = 256
SLACK = 3 * STEP  # unused slots from which on buffers are cut: seldom, since it moves what is kept
GROUP_SIZES = (64, 32)  # of MLX's quantised formats, the more compact first


class Cache:
    """Per layer, keys and values (K, capacity, D) of which the first `len(self)` slots are in use.

    shapes: by layer, K and the widths of a key and of a value; a width of 0 keeps none, and a layer that is not named
    keeps nothing here: it has another's, or a state.
    """

    def __init__(
        self,
        shapes: Mapping[int, tuple[int, int, int]],
        dtype: mx.Dtype,
        bits: int | None = None,
        states: States | None = None,
    ) -> None:
        self.positions: Ints = np.empty(0, np.int64)
        self._bits = bits
        self._dtype = dtype
        self.states = states
        # the parts of what is stored: the numbers, or the packed numbers, their scales and their offsets
        self._keys = {layer: self._empty(groups, key) for layer, (groups, key, _) in shapes.items()}
        self._values = {
            layer: self._empty(groups, value) for layer, (groups, _, value) in shapes.items() if value
        }
        self._widths = {layer: (key, value) for layer, (_, key, value) in shapes.items()}
        self._capacity = 0
        self._length = 0  # slots before the rows of the forward pass under way
        self._begin()

    def __len__(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        return sum(int(a.nbytes) for a in self.arrays())

    def arrays(self) -> list[mx.array]:
        slots = [part for buffer in self._buffers() for part in buffer]
        return slots if self.states is None else [*slots, *self.states.arrays()]

    def recurrent(self) -> States:
        """What layers with a state keep."""
        assert self.states is not None
        return self.states

    def settle(self, length: int) -> None:
        """What is before slot `length` will not be removed, as long as anything goes on from it."""
        if self.states is not None:
            self.states.settle(length)

    def reserve(self, positions: Ints, parents: Float32s | None = None) -> None:
        """Make room for L rows at these logical positions; they count as appended once `commit` is called."""
        self.positions = np.concatenate([self.positions[: self._length], positions])
        if len(self.positions) > self._capacity:
            self._resize(len(self.positions))
        if self.states is not None:
            self.states.begin(len(positions), parents)

    def append(self, layer: int, keys: mx.array, values: mx.array | None) -> tuple[mx.array, mx.array]:
        """Write the newest rows (K, L, D) of one layer and return that layer's keys and values (K, S, D)."""
        found = self._write(self._keys[layer], keys, self._widths[layer][0])
        return found, found if values is None else self._write(
            self._values[layer], values, self._widths[layer][1]
        )

    def of(self, layer: int) -> tuple[mx.array, mx.array]:
        """Keys and values (K, S, D) of a layer that has written the newest rows already."""
        end, (key, value) = len(self.positions), self._widths[layer]
        keys, values = ([part[:, :end] for part in buffers[layer]] for buffers in (self._keys, self._values))
        return self._read(keys, key), self._read(values, value)

    def commit(self) -> None:
        self._length = len(self.positions)
        if self.states is not None:
            self.states.commit()

    def keep(self, indices: Ints) -> None:
        """Drop every slot not in `indices` (ascending). Only the part after the first dropped slot moves."""
        indices = np.asarray(indices, np.int64)
        if self.states is not None:
            self.states.keep(indices)
        moved = np.flatnonzero(indices != np.arange(len(indices)))
        if len(moved):
            first, end = int(moved[0]), len(indices)
            tail = mx.array(indices[first:])
            for buffer in self._buffers():
                for part in buffer:
                    part[:, first:end] = part[:, tail]
        self.positions = self.positions[indices]
        self._length = len(indices)
        if self._capacity - self._length > SLACK:
            self._resize(self._length)
        self._begin()

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on; nothing moves. Layers with a state may have to forget more, back to where
        they know one: `len` says how many slots are left."""
        if self.states is not None:
            length = self.states.truncate(min(length, self._length))
            self._begin()
        self.positions = self.positions[:length]
        self._length = min(length, self._length)

    def copy(self) -> Cache:
        """An independent cache with the same slots (arrays are copied when either is next written)."""
        other = copy.copy(self)
        other.positions = self.positions.copy()
        other._keys = {layer: [mx.array(part) for part in buffer] for layer, buffer in self._keys.items()}
        other._values = {layer: [mx.array(part) for part in buffer] for layer, buffer in self._values.items()}
        other.states = None if self.states is None else self.states.copy()
        other._begin()
        return other

    def take(self, other: Cache, stop: int) -> None:
        """Append the slots that another holds up to `stop` and this one lacks; those before them are the same."""
        start = len(self)
        self.reserve(other.positions[start:stop])
        for mine, theirs in zip(self._buffers(), other._buffers(), strict=True):
            for part, given in zip(mine, theirs, strict=True):
                part[:, start:stop] = given[:, start:stop]
        self.commit()
        self._begin()

    def stored(self) -> dict[str, Any]:
        """All that is kept, as numpy arrays (K, capacity, D) by name; bfloat16 as uint16."""
        kinds = {"keys": self._keys, "values": self._values}
        return {
            f"{kind}.{layer}.{i}": np.array(part.view(mx.uint16) if part.dtype == mx.bfloat16 else part)
            for kind, buffers in kinds.items()
            for layer, buffer in buffers.items()
            for i, part in enumerate(buffer)
        }

    def fill(self, arrays: Mapping[str, Any], positions: Ints) -> None:
        """Take over what `stored` gave of a cache of the same kind, so many slots of it; where nothing is held yet.

        Raises ValueError where it is of another kind.
        """
        rest = dict(arrays)
        for kind, buffers in (("keys", self._keys), ("values", self._values)):
            for layer, buffer in buffers.items():
                for i, part in enumerate(buffer):
                    new = mx.array(rest.pop(f"{kind}.{layer}.{i}", np.empty(0, np.float32)))
                    new = (
                        new.view(mx.bfloat16) if part.dtype == mx.bfloat16 and new.dtype == mx.uint16 else new
                    )
                    if new.dtype != part.dtype or new.shape != (part.shape[0], len(positions), part.shape[2]):
                        raise ValueError(f"{kind} of layer {layer}")
                    buffer[i] = new
        if rest:
            raise ValueError(", ".join(rest))
        self.positions, self._length = positions, len(positions)
        self._capacity = len(positions)
        self._begin()

    def _begin(self) -> None:
        """Have what was just described computed: another thread, which may be the next to use it, could not."""
        begin(*self.arrays())

    def _buffers(self) -> Iterator[list[mx.array]]:
        yield from self._keys.values()
        yield from self._values.values()

    def _empty(self, groups: int, width: int) -> list[mx.array]:
        return [part[:, :0] for part in self._store(mx.zeros((groups, 1, width), self._dtype), width)]

    def _resize(self, slots: int) -> None:
        """Move what is kept to buffers for so many slots, rounded up."""
        self._capacity = -(-slots // STEP) * STEP
        room = self._capacity - self._length
        pads: dict[tuple[int, int, mx.Dtype], mx.array] = {}
        for buffer in self._buffers():
            for i, part in enumerate(buffer):
                shape = (part.shape[0], part.shape[2], part.dtype)
                if shape not in pads:
                    pads[shape] = mx.zeros((part.shape[0], room, part.shape[2]), part.dtype)
                buffer[i] = mx.concatenate([part[:, : self._length], pads[shape]], axis=1)

    def _write(self, buffer: list[mx.array], rows: mx.array, width: int) -> mx.array:
        end = len(self.positions)
        start = end - rows.shape[1]
        for part, new in zip(buffer, self._store(rows, width), strict=True):
            part[:, start:end] = new
        return self._read([part[:, :end] for part in buffer], width)

    def _store(self, rows: mx.array, width: int) -> list[mx.array]:
        """(K, L, D) as the parts that are kept of it."""
        if self._bits is None:
            return [rows]
        return list(mx.quantize(rows, group_size=group_size(width), bits=self._bits))

    def _read(self, parts: list[mx.array], width: int) -> mx.array:
        if self._bits is None:
            return parts[0]
        packed, scales, offsets = parts
        rows = mx.dequantize(packed, scales, offsets, group_size(width), self._bits)
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
