"""The lattice: which slots exist, which are alive, and what a new row may see of them.

A lattice is the prompt followed by parallel sets. Every member of every set occupies one *slot*, numbered in
append order from the first prompt token and never renumbered. All members of set t share one logical
*position*, prompt length + t. numpy only; nothing here knows a model.

Shapes: k members of the newest set, m alive slots after the prompt (the newest set included), S = prompt + m.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tempo_mlx.arrays import Float32s, Floats, Ints

CARRY_RULES = ("best", "lineage")
ATTEND_RULES = ("lineage", "all", "weighted", "best")


class Lattice:
    """Grows by `append`, shrinks by `remove`; `bias` says what the newest set's rows see.

    Only alive slots are kept, in ascending order, so the columns of every array here are the columns of the
    KV cache. `gamma` (k, m) is the lineage posterior of the newest rows (defaults: P(a path through row j
    used member m)); its recursion is in `append`.
    """

    def __init__(self, prompt_length: int) -> None:
        if prompt_length < 1:
            raise ValueError("a lattice starts with at least one prompt token")
        self.prompt_length = prompt_length
        self.num_sets = 0
        self.num_slots = prompt_length  # slots ever given out
        self.slots: Ints = np.empty(0, np.int64)  # (m,) alive, ascending, prompt excluded
        self.sets: Ints = np.empty(0, np.int64)  # (m,) the set each belongs to
        self.weights: Floats = np.empty(0)  # (m,) forward weight, fixed at selection
        self.gamma: Floats = np.empty((0, 0))  # (k, m)
        self.chains: Ints = np.empty((0, 0), np.int64)  # (k, sets before the newest): slot, -1 for none
        self.newest: Ints = np.empty(0, np.int64)  # (k,) slots of the newest set
        self.edges: tuple[Ints, Floats] | None = (
            None  # slots of the set before it, and P(i|j) (k_previous, k)
        )
        self._removed: Ints = np.empty(0, np.int64)  # slots removed since the last append

    @property
    def size(self) -> int:
        """Alive slots, the prompt included: the length of the cache."""
        return self.prompt_length + len(self.slots)

    def append(self, weights: Sequence[float] | Floats, posterior: Floats | None) -> Ints:
        """Add a set and return its slots (k,).

        weights (k,): forward weights, in slot order. posterior (k_previous, k): P(i|j), columns summing to 1;
        None for the first set. With gamma_i(t, i) = 1:

        gamma_j(u, m) = sum_i P(i|j) gamma_i(u, m), scaled to sum 1 over the alive members of each set u;
        where that sum has underflowed to 0, gamma_j is the forward weight, renormalised the same way.
        """
        weight = np.asarray(weights, np.float64)
        count = len(weight)
        slots = np.arange(self.num_slots, self.num_slots + count)
        if posterior is None:
            if self.num_sets:
                raise ValueError("only the first set has no parents")
            past = np.empty((count, 0))
            chains = np.empty((count, 0), np.int64)
        else:
            past = self._lineage(posterior)
            best = posterior.argmax(axis=0)  # ties: the lowest slot
            chains = np.concatenate([self.chains[best], self.newest[best, None]], axis=1)
            if len(self._removed):
                self._mend(chains, past)
                self._removed = self._removed[:0]
        self.edges = None if posterior is None else (self.newest, posterior)
        self.gamma = np.concatenate([past, np.eye(count)], axis=1)
        self.chains = chains
        self.slots = np.concatenate([self.slots, slots])
        self.sets = np.concatenate([self.sets, np.full(count, self.num_sets)])
        self.weights = np.concatenate([self.weights, weight])
        self.newest = slots
        self.num_slots += count
        self.num_sets += 1
        return slots

    def bias(self, attend: str, intraset: bool = False) -> Float32s:
        """Additive attention bias of the newest set's rows over all alive slots: (k, S) float32.

        `lineage`: log gamma. `all`: 0. `weighted`: log of the forward weight renormalised over the alive
        members of its set. `best`: 0 on one member of each earlier set, the row's chain. -inf: not seen. The
        prompt and a row's own slot have 0; siblings are seen only with `intraset`, under `all` and
        `weighted`.
        """
        count, earlier = len(self.newest), len(self.slots) - len(self.newest)
        bias = np.zeros((count, self.size), np.float32)
        past = bias[:, self.prompt_length : self.prompt_length + earlier]
        own = bias[:, self.prompt_length + earlier :]
        own[:] = -np.inf
        if attend == "lineage":
            with np.errstate(divide="ignore"):
                past[:] = np.log(self.gamma[:, :earlier])
        elif attend == "weighted":
            with np.errstate(divide="ignore"):
                past[:] = np.log(self._shares()[:earlier])
                if intraset:
                    own[:] = np.log(self.weights[earlier:])
        elif attend == "best":
            past[:] = -np.inf
            row, step = np.nonzero(self.chains >= 0)
            past[row, np.searchsorted(self.slots, self.chains[row, step])] = 0.0
        elif attend == "all":
            if intraset:
                own[:] = 0.0
        else:
            raise ValueError(f"attend is one of {', '.join(ATTEND_RULES)}, not {attend!r}")
        np.fill_diagonal(own, 0.0)
        return bias

    def parents(self, carry: str) -> Float32s:
        """What the newest set's rows continue, for layers that keep a state: (k, S) float32, each row summing to 1.

        `lineage`: the set before, as probable as each of it is the row's own past; `best`: the most probable of it.
        What has been removed since the newest set was appended must not be what its rows continue.
        """
        parents = np.zeros((len(self.newest), self.size), np.float32)
        if self.edges is None:
            parents[:, self.prompt_length - 1] = 1.0
            return parents
        slots, posterior = self.edges
        if carry == "lineage":
            parents[:, self.prompt_length + np.searchsorted(self.slots, slots)] = posterior.T
        elif carry == "best":
            best = slots[posterior.argmax(axis=0)]  # ties: the lowest slot
            parents[np.arange(len(parents)), self.prompt_length + np.searchsorted(self.slots, best)] = 1.0
        else:
            raise ValueError(f"carry is one of {', '.join(CARRY_RULES)}, not {carry!r}")
        return parents

    def posterior(self) -> Floats:
        """(m,): sum over the newest rows j of w(j) gamma_j(member), the share of the readings using each slot."""
        return self.weights[-len(self.newest) :] @ self.gamma

    def remove(self, slots: Sequence[int] | Ints) -> Ints:
        """Remove alive members of earlier sets; return the cache indices (ascending) that stay."""
        gone = np.isin(self.slots, slots)
        if gone.sum() != len(slots) or gone[len(self.slots) - len(self.newest) :].any():
            raise ValueError(f"slots {list(slots)} are not all alive members of earlier sets")
        self._removed = np.append(self._removed, self.slots[gone])
        keep = np.flatnonzero(~gone)
        self.slots, self.sets, self.weights = self.slots[keep], self.sets[keep], self.weights[keep]
        self.gamma = self.gamma[:, keep]
        return np.concatenate([np.arange(self.prompt_length), self.prompt_length + keep])

    def _lineage(self, posterior: Floats) -> Floats:
        """(k, m): gamma of new rows over the slots alive now."""
        gamma: Floats = posterior.T @ self.gamma
        starts = self._starts()
        mass = np.add.reduceat(gamma, starts, axis=1)  # (k, sets)
        widths = np.diff(np.append(starts, len(self.slots)))
        lost = np.repeat(mass == 0.0, widths, axis=1)
        gamma /= np.repeat(np.where(mass == 0.0, 1.0, mass), widths, axis=1)
        if lost.any():
            gamma[:] = np.where(lost, self._shares(), gamma)
        return gamma

    def _mend(self, chains: Ints, gamma: Floats) -> None:
        """Replace removed chain members by the alive member of their set with the largest gamma, in place."""
        for row, step in zip(*np.nonzero(np.isin(chains, self._removed)), strict=True):
            columns = np.flatnonzero(self.sets == step)
            chains[row, step] = self.slots[columns[gamma[row, columns].argmax()]] if len(columns) else -1

    def _starts(self) -> Ints:
        return np.flatnonzero(np.diff(self.sets, prepend=-1))

    def _shares(self) -> Floats:
        """(m,): forward weights renormalised over the alive members of each set."""
        starts = self._starts()
        widths = np.diff(np.append(starts, len(self.slots)))
        shares: Floats = self.weights / np.repeat(np.add.reduceat(self.weights, starts), widths)
        return shares


def ancestor_parents(parents: Sequence[int] | Ints, count: int, shared: int) -> Float32s:
    """(count, shared + n): what the last `count` of n rows of a tree continue, after `shared` slots that all have seen:
    their parent, or the last of those slots. parents (n,): as of `ancestor_bias`.
    """
    above = np.asarray(parents, np.int64)
    table = np.zeros((count, shared + len(above)), np.float32)
    continued = shared + above[len(above) - count :]
    rows = np.flatnonzero(continued >= 0)  # the first row of all continues nothing
    table[rows, continued[rows]] = 1.0
    return table


def ancestor_bias(parents: Sequence[int] | Ints, count: int) -> Float32s:
    """(count, n): what the last `count` of n rows of a tree see of all n: 0 on their ancestors and themselves.

    parents (n,): of each row the index of the row before it in its text, which is a lower one; -1 for none.
    """
    above = np.asarray(parents, np.int64)
    bias = np.full((count, len(above)), -np.inf, np.float32)
    rows, seen = np.arange(count), np.arange(len(above) - count, len(above))
    while len(rows):
        bias[rows, seen] = 0.0
        seen = above[seen]
        rows, seen = rows[seen >= 0], seen[seen >= 0]
    return bias
