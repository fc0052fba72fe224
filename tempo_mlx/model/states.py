"""What layers with a state keep of a text: the states of the newest rows, and what those of earlier ones are made of.

A state is large, and most rows' is never asked for again. So the newest rows' are held, a checkpoint is kept where a
long stretch of text ended, and of every row since then a journal: what its step of the recurrence needs. Any other
state is replayed from the checkpoint over the rows that are left, which is what a removal means (lineage.py).

S slots, L new rows, E model dim. A recurrence says what a state is; this file does not know.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.errors import ModelError
from tempo_mlx.mlx import mx
from tempo_mlx.model.lineage import Lineage, Segment, segments

FEW = 16  # rows of a pass up to which all of their states are held, not the last one's alone
STRETCH = 64  # rows of a chain from which on it is a checkpoint that is kept of them, and no journal
JOURNAL = 256  # rows of a chain after which the next checkpoint is made
CHECKPOINTS = 4
HELD_BYTES = 512 * 2**20  # of states that are held beside the newest rows'

Inputs = tuple[mx.array, ...]  # (L, ...) each: what the steps of L rows need
State = mx.array


class Recurrence(Protocol):
    """One state a row: S = step(mean state of the rows it continues, inputs), read with queries."""

    def start(self) -> State: ...
    def advance(self, states: State, inputs: Inputs) -> State:
        """states (n, ...), inputs of n rows -> (n, ...)."""
        ...

    def read(self, states: State, queries: Inputs, inputs: Inputs) -> mx.array:
        """(n, ...): what n rows see of their states."""
        ...

    def chain(self, state: State, inputs: Inputs, queries: Inputs | None) -> tuple[mx.array | None, State]:
        """The same for rows that continue one another, the first of them `state`; and the last one's state."""
        ...


@dataclass
class Memory:
    """Of one recurrence of one layer. held: states by slot. journal: inputs of the slots from States.first on."""

    recurrence: Recurrence
    held: dict[int, State] = field(default_factory=dict)
    checkpoints: dict[int, State] = field(default_factory=dict)  # by the slot after it
    journal: list[Inputs] = field(default_factory=list)

    def joined(self) -> Inputs:
        if len(self.journal) > 1:
            self.journal = [tuple(mx.concatenate(list(parts)) for parts in zip(*self.journal, strict=True))]
        return self.journal[0] if self.journal else ()

    def copy(self) -> Memory:
        return Memory(self.recurrence, dict(self.held), dict(self.checkpoints), list(self.journal))

    def arrays(self) -> list[mx.array]:
        return [*self.held.values(), *self.checkpoints.values(), *(a for part in self.journal for a in part)]


class States:
    """Of all layers of a cache. A pass is `begin`, `run` once for each recurrence, `commit`."""

    def __init__(self, recurrences: dict[tuple[int, int], Recurrence]) -> None:
        self.lineage = Lineage()
        self.memories = {key: Memory(each) for key, each in recurrences.items()}
        self.first = 0  # slot from which on there is a journal; the newest checkpoint is there
        self.length = 0
        self.plan: list[Segment] = []
        self.kept = True  # whether the pass under way is journalled

    def begin(self, rows: int, parents: Float32s | None) -> None:
        """Rows are to come, which continue others as `parents` (L, S) says; None: a chain."""
        self.lineage.append(rows, parents)
        self.kept = parents is not None or rows < STRETCH
        wanted = {slot for new in range(self.length, len(self.lineage)) for slot in self._before(new)}
        self.replay(wanted)
        self.plan = segments(
            self.lineage, self.length, len(self.lineage), parents is not None and rows <= FEW
        )

    def run(self, key: tuple[int, int], inputs: Inputs, queries: Inputs) -> mx.array:
        """What the new rows, given their inputs (L, ...), see of their states: (L, ...)."""
        memory = self.memories[key]
        known = dict(memory.held)
        pieces = [
            self._go(memory.recurrence, known, part, self.length, inputs, queries) for part in self.plan
        ]
        if self.kept:
            memory.journal.append(inputs)
        memory.held = known
        found = [piece for piece in pieces if piece is not None]
        return found[0] if len(found) == 1 else mx.concatenate(found)

    def commit(self) -> None:
        start, self.length = self.length, len(self.lineage)
        newest = (
            range(start, self.length) if self.length - start <= FEW else range(self.length - 1, self.length)
        )
        self._forget(set(newest))
        chained = self.lineage.chain == self.length
        if not self.kept or (chained and self.length - self.first > JOURNAL):
            self._checkpoint()

    def replay(self, wanted: set[int]) -> None:
        """Hold the states of these slots, run again from the checkpoint where they are not held."""
        memories = list(self.memories.values())
        if not memories or not (missing := {slot for slot in wanted if slot not in memories[0].held}):
            return
        if min(missing) < self.first - 1:
            raise ModelError(
                "This run goes on from a place in its text further back than the states that the model keeps; start "
                "it anew."
            )
        stop = max(missing) + 1
        plan = _split_at(segments(self.lineage, self.first, stop, exposed=False), missing)
        for memory in memories:
            known = {self.first - 1: memory.checkpoints[self.first]} if self.first else {}
            journal = memory.joined()
            for part in plan:
                self._go(memory.recurrence, known, part, self.first, journal, None)
            memory.held |= {slot: known[slot] for slot in missing}

    def keep(self, indices: Ints) -> None:
        """Drop every slot not in `indices` (ascending)."""
        if len(indices) == self.length:
            return
        gone = np.setdiff1d(np.arange(self.length), indices)
        if gone[0] < self.first:
            raise ModelError(
                "What was removed lies before the states that the model keeps; start the run anew."
            )
        place = {slot: at for at, slot in enumerate(indices.tolist())}
        changed = self.lineage.keep(indices)
        rows = mx.array(indices[indices >= self.first] - self.first)
        for memory in self.memories.values():
            if memory.journal:
                memory.journal = [tuple(part[rows] for part in memory.joined())]
            memory.held = {
                place[slot]: state
                for slot, state in memory.held.items()
                if slot in place and not (changed and slot > gone[0])
            }
        self.length = len(indices)

    def truncate(self, length: int) -> int:
        """Forget every slot from `length` on; how many are left, which are fewer where no state is known there."""
        if length >= self.length:
            return self.length
        memories = list(self.memories.values())
        if length < self.first:
            places = memories[0].checkpoints if memories else {}
            length = max((slot for slot in places if slot <= length), default=0)
            self.first = length
            for memory in memories:
                memory.journal = []
        for memory in memories:
            if memory.journal and length > self.first:
                memory.journal = [tuple(part[: length - self.first] for part in memory.joined())]
            elif length == self.first:
                memory.journal = []
            memory.held = {slot: state for slot, state in memory.held.items() if slot < length}
            memory.checkpoints = {slot: state for slot, state in memory.checkpoints.items() if slot <= length}
            if length == self.first and length:
                memory.held[length - 1] = memory.checkpoints[length]
        self.lineage.truncate(length)
        self.length = length
        return length

    def copy(self) -> States:
        other = copy.copy(self)
        other.lineage = self.lineage.copy()
        other.memories = {key: memory.copy() for key, memory in self.memories.items()}
        return other

    def arrays(self) -> list[mx.array]:
        return [a for memory in self.memories.values() for a in memory.arrays()]

    def _before(self, slot: int) -> list[int]:
        """The known slots that a new one continues."""
        return [above for above in self.lineage.of(slot)[0].tolist() if above < self.length]

    def _go(
        self,
        recurrence: Recurrence,
        known: dict[int, State],
        part: Segment,
        offset: int,
        inputs: Inputs,
        queries: Inputs | None,
    ) -> mx.array | None:
        """Run one segment; its last state, or all of them, become known."""
        rows = slice(part.start - offset, part.stop - offset)
        mine = tuple(each[rows] for each in inputs)
        asked = None if queries is None else tuple(each[rows] for each in queries)
        if part.chain:
            state = self._mixed(recurrence, known, [part.start])[0]
            seen, known[part.stop - 1] = recurrence.chain(state, mine, asked)
            return seen
        states = recurrence.advance(self._mixed(recurrence, known, range(part.start, part.stop)), mine)
        for at, slot in enumerate(range(part.start, part.stop)):
            known[slot] = states[at]
        return None if asked is None else recurrence.read(states, asked, mine)

    def _mixed(self, recurrence: Recurrence, known: dict[int, State], slots: list[int] | range) -> mx.array:
        """(n, ...): the mean state of what each of these slots continues."""
        parents = [self.lineage.of(slot) for slot in slots]
        means = []
        for above, shares in parents:
            if not len(above):
                means.append(recurrence.start())
            elif len(above) == 1:
                means.append(known[int(above[0])])
            else:
                stack = mx.stack([known[int(slot)] for slot in above])
                weights = mx.array(shares).reshape(-1, *[1] * (stack.ndim - 1))
                means.append((stack * weights).sum(axis=0))
        return mx.stack(means)

    def _forget(self, newest: set[int]) -> None:
        """Keep the newest rows' states, and of the others as many as there is room for, the latest first."""
        memories = self.memories.values()
        size = sum(memory.recurrence.start().nbytes for memory in memories) or 1
        room = len(newest) + HELD_BYTES // size
        for memory in memories:
            order = sorted(memory.held, key=lambda slot: (slot in newest, slot), reverse=True)
            memory.held = {slot: memory.held[slot] for slot in order[:room]}

    def _checkpoint(self) -> None:
        """Here is where replays begin from now on."""
        self.first = self.length
        for memory in self.memories.values():
            memory.checkpoints[self.length] = memory.held[self.length - 1]
            memory.checkpoints = {
                slot: memory.checkpoints[slot] for slot in sorted(memory.checkpoints)[-CHECKPOINTS:]
            }
            memory.journal = []


def _split_at(plan: list[Segment], wanted: set[int]) -> list[Segment]:
    """The same segments, chains ending where a state is wanted."""
    found = []
    for part in plan:
        start = part.start
        if part.chain:
            for slot in sorted(each for each in wanted if part.start <= each < part.stop - 1):
                found.append(Segment(start, slot + 1, slot + 1 - start > 1))
                start = slot + 1
        found.append(Segment(start, part.stop, part.chain and part.stop - start > 1))
    return found
