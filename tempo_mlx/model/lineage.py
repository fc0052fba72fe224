"""Which rows each row continues, for layers that keep a state (numpy, shared by both backends).

A row of a chain continues the row before it. In a parallel set or a tree a row says with which weights it continues
earlier rows; they sum to 1. What is removed leaves the weights of those that stay, scaled to sum 1 again; a row all
of whose parents are gone continues what they continued.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from tempo_mlx.arrays import Bools, Float32s, Ints

Parents = tuple[Ints, Float32s]  # slots, and the weight of each


class Lineage:
    """The parents of every slot. The first `chain` slots continue one another and are not listed."""

    def __init__(self) -> None:
        self.chain = 0
        self.listed: list[Parents] = []

    def __len__(self) -> int:
        return self.chain + len(self.listed)

    def append(self, rows: int, parents: Float32s | None) -> None:
        """parents (L, S): of each new row its weights over all slots, its own pass included; None: a chain."""
        start = len(self)
        if parents is None:
            if not self.listed:
                self.chain += rows
                return
            self.listed += [_only(slot - 1) for slot in range(start, start + rows)]
            return
        for row, weights in enumerate(parents):
            slot = start + row
            found = np.flatnonzero(weights[:slot])
            if not self.listed and slot == self.chain and _is(found, weights, slot - 1):
                self.chain += 1
            else:
                self.listed.append((found, weights[found].astype(np.float32)))

    def of(self, slot: int) -> Parents:
        if slot >= self.chain:
            return self.listed[slot - self.chain]
        return _only(slot - 1)

    def keep(self, indices: Ints) -> int | None:
        """Drop every slot not in `indices` (ascending); the first of those that stay which has other parents now."""
        size = len(self)
        if len(indices) == size:
            return None
        first = int(np.flatnonzero(np.append(indices, -1) != np.arange(len(indices) + 1))[0])
        alive = np.zeros(size, bool)
        alive[indices] = True
        place = np.cumsum(alive) - 1
        resolved: dict[int, Parents] = {}
        changed: int | None = None
        for slot in range(first, size):
            slots, weights = self.of(slot)
            stays = alive[slots]
            if not stays.all():
                changed = int(place[slot]) if changed is None and alive[slot] else changed
                slots, weights = _inherit(slots, weights, stays, resolved)
            resolved[slot] = slots, weights
        start = min(first, self.chain)
        kept = [
            resolved[slot] if slot >= first else self.of(slot) for slot in range(start, size) if alive[slot]
        ]
        self.listed = [(place[slots], weights) for slots, weights in kept]
        self.chain = start
        return changed

    def truncate(self, length: int) -> None:
        self.chain = min(self.chain, length)
        del self.listed[length - self.chain :]

    def copy(self) -> Lineage:
        other = copy.copy(self)
        other.listed = list(self.listed)
        return other


def _only(slot: int) -> Parents:
    if slot < 0:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    return np.array([slot]), np.ones(1, np.float32)


def _is(found: Ints, weights: Float32s, slot: int) -> bool:
    if slot < 0:
        return len(found) == 0
    return len(found) == 1 and int(found[0]) == slot and float(weights[slot]) == 1.0


def _inherit(slots: Ints, weights: Float32s, stays: Bools, resolved: dict[int, Parents]) -> Parents:
    """The weights of a row some of whose parents are gone."""
    if weights[stays].sum() > 0:
        left = weights[stays]
        return slots[stays], (left / left.sum()).astype(np.float32)
    mixed: dict[int, float] = {}
    for slot, weight in zip(slots.tolist(), weights.tolist(), strict=True):
        for above, share in zip(*resolved[slot], strict=True):
            mixed[int(above)] = mixed.get(int(above), 0.0) + weight * float(share)
    order = sorted(mixed)
    total = sum(mixed.values()) or 1.0
    return np.array(order, np.int64), np.array([mixed[slot] / total for slot in order], np.float32)


@dataclass(frozen=True)
class Segment:
    """Slots start to stop, of which no state is known yet. chain: each continues the one before it, and the first what
    its parents say; otherwise all of them continue known slots, and can be run at once."""

    start: int
    stop: int
    chain: bool


def segments(lineage: Lineage, first: int, stop: int, exposed: bool) -> list[Segment]:
    """How to run the slots from `first` on, in as few goes as their parents allow.

    exposed: the state of every one of them is wanted, and not only of those that others continue.
    """
    branching = set()
    for slot in range(max(first, lineage.chain), stop):
        for above in lineage.of(slot)[0].tolist():
            if above != slot - 1:
                branching.add(above)
    found = []
    at = first
    while at < stop:
        end = at + 1
        while end < stop and end >= lineage.chain and not _within(lineage.of(end)[0], at):
            end += 1
        chain = end == at + 1
        if chain and not exposed:
            while end < stop and end - 1 not in branching and _continues(lineage, end):
                end += 1
        found.append(Segment(at, end, chain and end > at + 1))
        at = end
    return found


def _within(slots: Ints, start: int) -> bool:
    return bool(len(slots) and slots.max() >= start)


def _continues(lineage: Lineage, slot: int) -> bool:
    if slot < lineage.chain:
        return True
    slots, weights = lineage.of(slot)
    return len(slots) == 1 and int(slots[0]) == slot - 1 and float(weights[0]) == 1.0
