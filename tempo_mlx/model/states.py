"""What layers with a state keep of a text: the states of the newest rows, and what those of earlier ones are made of.

A state is large, and most rows' is never asked for again. So the newest rows' are held, those of a base (where a long
stretch of text ended, or before which nothing will be removed), and of every row since then a journal: what its step of
the recurrence needs. Any other state is replayed from the base over the rows that are left, which is what a removal
means (lineage.py).

S slots, L new rows, E model dim. A recurrence says what a state is; this file does not know.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tempo_mlx.architecture.states import CHECKPOINTS, HELD_BYTES, JOURNAL
from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.errors import ModelError
from tempo_mlx.mlx import mx
from tempo_mlx.model.lineage import Lineage, Segment, segments

FEW = 16  # rows of a pass up to which all of their states are held, not the last one's alone
STRETCH = 64  # rows of a chain from which on it is a checkpoint that is kept of them, and no journal

Key = tuple[int, int]  # a layer, and which of its recurrences
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


class Journal:
    """What the steps of rows need, of every recurrence. It only grows, so that all that go on from the same rows share
    it; each knows which of its rows are its own."""

    def __init__(self) -> None:
        self.count = 0
        self._parts: dict[Key, list[Inputs]] = {}

    def add(self, count: int, inputs: Mapping[Key, Inputs]) -> None:
        """So many rows, of every recurrence at once."""
        for key, each in inputs.items():
            self._parts.setdefault(key, []).append(each)
        self.count += count

    def of(self, key: Key, rows: Ints) -> Inputs:
        parts = self._parts.get(key, [])
        if len(parts) > 1:
            self._parts[key] = parts = [
                tuple(mx.concatenate(list(each)) for each in zip(*parts, strict=True))
            ]
        index = mx.array(rows)
        return tuple(each[index] for each in parts[0]) if parts else ()

    def keep(self, rows: Ints) -> None:
        """Drop all rows but these; nobody may need one of the others."""
        for key in self._parts:
            self._parts[key] = [self.of(key, rows)]
        self.count = len(rows)

    def taken(self, rows: Ints) -> Journal:
        """One of its own, of these rows."""
        if not len(rows):
            return Journal()
        other = copy.copy(self)
        other._parts = {key: list(parts) for key, parts in self._parts.items()}
        other.keep(rows)
        return other

    def arrays(self) -> list[mx.array]:
        return [each for parts in self._parts.values() for part in parts for each in part]


@dataclass
class Memory:
    """Of one recurrence of one layer. held: states by slot. base: those that replays begin from, of slots before
    States.first. checkpoints: by the slot after it."""

    recurrence: Recurrence
    held: dict[int, State] = field(default_factory=dict)
    base: dict[int, State] = field(default_factory=dict)
    checkpoints: dict[int, State] = field(default_factory=dict)

    def copy(self) -> Memory:
        return Memory(self.recurrence, dict(self.held), dict(self.base), dict(self.checkpoints))

    def arrays(self) -> list[mx.array]:
        return [*self.held.values(), *self.base.values(), *self.checkpoints.values()]


class States:
    """Of all layers of a cache. A pass is `begin`, `run` once for each recurrence, `commit`.

    pooled: the journal is one for many (sessions/arena.py), so nothing of it is dropped here.
    """

    def __init__(self, recurrences: dict[Key, Recurrence]) -> None:
        self.lineage = Lineage()
        self.memories = {key: Memory(each) for key, each in recurrences.items()}
        self.journal = Journal()
        self.pooled = False
        self.first = 0  # slot from which on there is a journal
        self.rows: Ints = np.empty(0, np.int64)  # of the journal, by slot from there on
        self.length = 0
        self.plan: list[Segment] = []
        self.kept = True  # whether the pass under way is journalled
        self.text = True  # whether it goes on with one text, of which nothing will be gone back on
        self.given: dict[Key, Inputs] = {}  # what it is given, for the journal

    def begin(self, rows: int, parents: Float32s | None) -> None:
        """Rows are to come, which continue others as `parents` (L, S) says; None: a chain."""
        self._drop_unfinished()
        self.given = {}
        self.lineage.append(rows, parents)
        self.text = parents is None
        self.kept = not self.text or rows < STRETCH
        wanted = {slot for new in range(self.length, len(self.lineage)) for slot in self._before(new)}
        self.replay(wanted)
        self.plan = segments(
            self.lineage, self.length, len(self.lineage), parents is not None and rows <= FEW
        )

    def run(self, key: Key, inputs: Inputs, queries: Inputs) -> mx.array:
        """What the new rows, given their inputs (L, ...), see of their states: (L, ...)."""
        memory = self.memories[key]
        known = dict(memory.held)
        pieces = [
            self._go(memory.recurrence, known, part, self.length, inputs, queries) for part in self.plan
        ]
        if self.kept:
            self.given[key] = inputs
        memory.held = known
        found = [piece for piece in pieces if piece is not None]
        return found[0] if len(found) == 1 else mx.concatenate(found)

    def commit(self) -> None:
        start, self.length = self.length, len(self.lineage)
        count = self.length - start
        if self.kept:
            self._own(np.arange(self.journal.count, self.journal.count + count))
            self.journal.add(count, self.given)
        self._forget(set(range(start if count <= FEW else self.length - 1, self.length)))
        if not self.kept:
            self._begin_anew(self.length)
        elif not self.pooled:
            if self.text and self.lineage.chain == self.length:
                self.settle(self.length)
            if self.journal.count > 2 * len(self.rows) + JOURNAL:  # most of it is of rows that are no more
                self.journal, self.rows = self.journal.taken(self.rows), np.arange(len(self.rows))

    def restore(self, rows: Ints, parents: Float32s) -> None:
        """Append slots that have been run before: these rows of the journal."""
        self.lineage.append(len(rows), parents)
        self._own(rows)
        self.length = len(self.lineage)

    def settle(self, slot: int) -> None:
        """What is before `slot` will be there as long as what goes on from it; once it is much, its journal goes."""
        if slot - self.first > JOURNAL:
            self._begin_anew(slot)

    def replay(self, wanted: set[int]) -> None:
        """Hold the states of these slots, run again from the base where they are not held."""
        for memory in self.memories.values():
            memory.held |= {slot: memory.base[slot] for slot in wanted & memory.base.keys()}
        known_slots = next((memory.held.keys() for memory in self.memories.values()), wanted)
        if not (missing := wanted - known_slots):
            return
        if min(missing) < self.first:
            raise ModelError(
                "This run goes on from a place in its text further back than the states that the model keeps; start "
                "it anew."
            )
        stop = max(missing) + 1
        plan = _split_at(segments(self.lineage, self.first, stop, exposed=False), missing)
        for key, memory in self.memories.items():
            known = dict(memory.base)
            inputs = self.journal.of(key, self.rows[: stop - self.first])
            for part in plan:
                self._go(memory.recurrence, known, part, self.first, inputs, None)
            memory.held |= {slot: known[slot] for slot in missing}

    def keep(self, indices: Ints) -> None:
        """Drop every slot not in `indices` (ascending)."""
        if len(indices) == self.length:
            return
        gone = np.setdiff1d(np.arange(self.length), indices)
        place = {slot: at for at, slot in enumerate(indices.tolist())}
        changed = self.lineage.keep(indices)
        settled = self.first - int((gone < self.first).sum())
        self.rows = self.rows[indices[indices >= self.first] - self.first]
        for memory in self.memories.values():
            memory.base = {place[slot]: state for slot, state in memory.base.items() if slot in place}
            memory.held = {
                place[slot]: state
                for slot, state in memory.held.items()
                if slot in place and (changed is None or slot < gone[0])
            }
            memory.checkpoints = {
                slot: state for slot, state in memory.checkpoints.items() if slot <= gone[0]
            }
        self.first, self.length = settled, len(indices)
        known = {slot for memory in self.memories.values() for slot in memory.base}
        if changed is not None and (changed < settled or self._roots(settled) - known):
            raise ModelError(
                "What was removed lies before the states that the model keeps; start the run anew."
            )

    def truncate(self, length: int) -> int:
        """Forget every slot from `length` on; how many are left, which are fewer where no state is known there."""
        if length >= self.length:
            return self.length
        if length < self.first:
            places = {slot for memory in self.memories.values() for slot in memory.checkpoints}
            self.first = length = max((slot for slot in places if slot <= length), default=0)
            for memory in self.memories.values():
                memory.base = {length - 1: memory.checkpoints[length]} if length else {}
        self.rows = self.rows[: length - self.first]
        for memory in self.memories.values():
            memory.held = {slot: state for slot, state in memory.held.items() if slot < length}
            memory.checkpoints = {slot: state for slot, state in memory.checkpoints.items() if slot <= length}
        self.lineage.truncate(length)
        self.length = length
        return length

    def copy(self) -> States:
        other = copy.copy(self)
        other.lineage = self.lineage.copy()
        other.memories = {key: memory.copy() for key, memory in self.memories.items()}
        return other

    def let_go(self) -> None:
        """Hold no states but those that the others can be made of again."""
        for memory in self.memories.values():
            memory.held = {}

    def arrays(self) -> list[mx.array]:
        return [*self.journal.arrays(), *(a for memory in self.memories.values() for a in memory.arrays())]

    def _roots(self, slot: int) -> set[int]:
        """The slots before `slot` that those from there on continue."""
        slots = range(slot, self.length)
        return {above for new in slots for above in self.lineage.of(new)[0].tolist() if above < slot}

    def _drop_unfinished(self) -> None:
        """Forget the rows of a pass that was begun and broken off."""
        if len(self.lineage) > self.length:
            self.lineage.truncate(self.length)
            for memory in self.memories.values():
                memory.held = {slot: state for slot, state in memory.held.items() if slot < self.length}

    def _own(self, rows: Ints) -> None:
        self.rows = np.concatenate([self.rows, rows])

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

    def _begin_anew(self, slot: int) -> None:
        """Let replays begin from `slot` on; where what is before it is one text, it can be gone back to."""
        last = slot == self.length or self.lineage.chain >= slot
        roots = self._roots(slot) | ({slot - 1} if last else set())
        self.replay(roots)
        for memory in self.memories.values():
            memory.base = {root: memory.held[root] for root in roots}
            memory.held = {at: state for at, state in memory.held.items() if at >= slot or at in roots}
            if last:
                memory.checkpoints[slot] = memory.base[slot - 1]
            latest = sorted(memory.checkpoints)[-CHECKPOINTS:]
            memory.checkpoints = {at: memory.checkpoints[at] for at in latest}
        self.rows = self.rows[max(0, slot - self.first) :]
        self.journal = self.journal.taken(self.rows)
        self.first, self.rows = slot, np.arange(len(self.rows))


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
