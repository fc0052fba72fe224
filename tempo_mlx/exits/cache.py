"""A cache whose newest rows may not have been through all layers yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.exits.plan import OpenExit
from tempo_mlx.mlx import mx
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.visibility import causal_bias

MOST_DRAFTED = 6  # rows an exit drafts, the first included, before all go through the upper layers
MOST_WAITING = 4  # passes whose rows may wait at the same time
AUDITED_EVERY = 4  # after the first ones, only every fourth early pass is audited: each costs a full head


@dataclass
class WaitingRows:
    """The rows of one pass. x (L, E): the input of layer `level`; positions (L,); bias (L, S), with S as of the pass.
    left: the exit they took and the tokens chosen there, if those are to be audited.
    """

    x: mx.array
    positions: Ints
    bias: Float32s
    level: int = 0
    left: tuple[OpenExit, Ints] | None = None


@dataclass(frozen=True)
class Drafted:
    """A row that was run through every layer before it was asked for, and its logits (1, V)."""

    token: int
    rows: WaitingRows
    logits: Float32s

    def is_of(
        self, tokens: Sequence[int] | Ints, positions: Sequence[int] | Ints, bias: Float32s | None
    ) -> bool:
        """Whether it is the requested pass. Biases may differ by rounding."""
        if len(tokens) != 1 or (tokens[0], positions[0]) != (self.token, self.rows.positions[0]):
            return False
        own = self.rows.bias
        if bias is None:
            return not own.any()
        return bias.shape == own.shape and np.allclose(bias, own, rtol=0.0, atol=1e-6)


class ExitCache:
    """`inner`, whose last slots are those of the rows in `waiting` (in slot order, the deeper ones first) or `drafted`.

    catch_up(self) runs waiting rows through all layers; it is called before a slot that one of them sees is dropped.
    """

    def __init__(self, inner: Cache, catch_up: Callable[[ExitCache], None]) -> None:
        self.inner = inner
        self.waiting: list[WaitingRows] = []
        self.drafted: list[Drafted] = []
        self._catch_up = catch_up

    def __len__(self) -> int:
        return len(self.inner) - len(self.drafted)

    @property
    def positions(self) -> Ints:
        return self.inner.positions[: len(self)]

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def enter(self, x: mx.array, positions: Ints, bias: Float32s | None) -> WaitingRows:
        """Append rows that are to run."""
        self.inner.reserve(positions)
        self.inner.commit()
        slots = len(self.inner)
        rows = WaitingRows(x, positions, causal_bias(len(positions), slots) if bias is None else bias)
        self.waiting.append(rows)
        return rows

    def seen_by(self, waiting: Sequence[WaitingRows]) -> tuple[Ints, Float32s]:
        """Positions (L,) and bias (L, S) of several passes' rows, the cache's newest, as those of one."""
        positions = np.concatenate([rows.positions for rows in waiting])
        bias = np.full((len(positions), len(self.inner)), -np.inf, np.float32)
        at = 0
        for rows in waiting:
            count, slots = rows.bias.shape
            bias[at : at + count, :slots] = rows.bias
            at += count
        return positions, bias

    def hold(self, drafted: Sequence[Drafted], dropped: int) -> None:
        """Keep rows that were run ahead, the last to wait, until they are asked for; forget the `dropped` last ones."""
        self.inner.truncate(len(self.inner) - dropped)
        self.waiting = self.waiting[: len(self.waiting) - len(drafted) - dropped]
        self.drafted = list(drafted)

    def keep(self, indices: Ints) -> None:
        """Drop every slot not in `indices` (ascending)."""
        self.forget()
        indices = np.asarray(indices, np.int64)
        stays = np.zeros(len(self.inner), bool)
        stays[indices] = True
        if any((rows.bias[:, ~stays[: rows.bias.shape[1]]] != -np.inf).any() for rows in self.waiting):
            self._catch_up(self)
        for rows in self.waiting:
            rows.bias = rows.bias[:, stays[: rows.bias.shape[1]]]
        self.inner.keep(indices)

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on, and the rows that wait there."""
        self.forget()
        while self.waiting and length < len(self.inner):
            rows = self.waiting[-1]
            first = len(self.inner) - len(rows.positions)
            if first < length:
                self._catch_up(self)  # part of a set stays
                break
            self.waiting.pop()
            self.inner.truncate(first)
        self.inner.truncate(length)

    def settle(self, length: int) -> None:
        self.inner.settle(length)

    def forget(self) -> None:
        """Drop what was run ahead."""
        self.inner.truncate(len(self))
        self.drafted = []
