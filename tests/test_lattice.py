"""The lattice against a slow, obvious reference, for random lattices with removals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_mlx.lattice import ATTEND_RULES, Lattice

PROMPT = 3


class Reference:
    """Everything the definitions speak of, as dictionaries over slots, nothing compacted, nothing vectorised."""

    def __init__(self) -> None:
        self.sets: list[list[int]] = []
        self.weight: dict[int, float] = {}
        self.removed_after: dict[int, int] = {}
        self.gamma: dict[int, dict[int, float]] = {}
        self.chain: dict[int, dict[int, int]] = {}

    def alive(self, step: int) -> list[int]:
        return [s for s in self.sets[step] if s not in self.removed_after]

    def append(self, weights: list[float], posterior: np.ndarray | None, first_slot: int) -> None:
        parents = self.sets[-1] if self.sets else []
        new = list(range(first_slot, first_slot + len(weights)))
        for column, j in enumerate(new):
            self.weight[j] = weights[column]
            gamma: dict[int, float] = {}
            chain: dict[int, int] = {}
            for step, members in enumerate(self.sets):
                alive = self.alive(step)
                raw = {}
                for m in alive:
                    raw[m] = sum(
                        posterior[row, column]
                        * (float(m == i) if i in members else self.gamma[i].get(m, 0.0))
                        for row, i in enumerate(parents)
                    )
                total = sum(raw.values())
                if total == 0 and alive:
                    raw, total = {m: self.weight[m] for m in alive}, sum(self.weight[m] for m in alive)
                gamma.update({m: value / total for m, value in raw.items()})
            if parents:
                best = parents[max(range(len(parents)), key=lambda row: (posterior[row, column], -row))]
                chain = {**self.chain[best], len(self.sets) - 1: best}
                for step, member in list(chain.items()):
                    if member in self.removed_after:
                        alive = self.alive(step)
                        if alive:
                            chain[step] = max(alive, key=lambda m: (gamma[m], -m))
                        else:
                            del chain[step]
            self.gamma[j], self.chain[j] = gamma, chain
        self.sets.append(new)

    def bias(self, attend: str, intraset: bool) -> np.ndarray:
        rows = self.sets[-1]
        slots = [s for step in range(len(self.sets)) for s in self.alive(step)]
        out = np.full((len(rows), PROMPT + len(slots)), -np.inf)
        out[:, :PROMPT] = 0
        for r, j in enumerate(rows):
            for c, m in enumerate(slots, PROMPT):
                step = next(t for t, members in enumerate(self.sets) if m in members)
                share = self.weight[m] / sum(self.weight[x] for x in self.alive(step))
                if m == j:
                    out[r, c] = 0
                elif m in rows:
                    if intraset and attend in ("all", "weighted"):
                        out[r, c] = 0 if attend == "all" else np.log(share)
                elif attend == "all":
                    out[r, c] = 0
                elif attend == "weighted":
                    out[r, c] = np.log(share)
                elif attend == "best":
                    out[r, c] = 0 if self.chain[j].get(step) == m else -np.inf
                else:
                    out[r, c] = np.log(self.gamma[j][m]) if self.gamma[j][m] > 0 else -np.inf
        return out


@st.composite
def histories(draw):
    """Random sets with weights, edges (zeros included) and, after each set, removals from earlier sets."""
    steps = []
    width = 0
    for index in range(draw(st.integers(1, 6))):
        previous, width = width, draw(st.integers(1, 4))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        weights = rng.dirichlet(np.ones(width))
        posterior = None
        if index:
            posterior = rng.dirichlet(np.full(previous, 0.5), size=width).T
            if draw(st.booleans()):  # rows that used one predecessor only
                posterior = np.eye(previous)[rng.integers(previous, size=width)].T
        steps.append(
            (weights, posterior, draw(st.lists(st.integers(0, 30), max_size=3)), draw(st.booleans()))
        )
    return steps


@settings(max_examples=300, deadline=None)
@given(histories())
def test_bias_and_gamma_equal_the_reference(history) -> None:
    lattice, reference = Lattice(PROMPT), Reference()
    for weights, posterior, removals, whole in history:
        first = lattice.num_slots
        slots = lattice.append(weights, posterior)
        reference.append(list(weights), posterior, first)
        assert slots.tolist() == reference.sets[-1]
        for attend in ATTEND_RULES:
            for intraset in (False, True):
                np.testing.assert_allclose(
                    lattice.bias(attend, intraset), reference.bias(attend, intraset), atol=1e-5, rtol=1e-5
                )
        for step in range(lattice.num_sets):  # gamma sums to one over the alive members of each set
            columns = lattice.sets == step
            if columns.any():
                np.testing.assert_allclose(lattice.gamma[:, columns].sum(axis=1), 1.0, atol=1e-9)
        earlier = [s for step in range(len(reference.sets) - 1) for s in reference.alive(step)]
        gone = {earlier[r % len(earlier)] for r in removals} if earlier else set()
        if whole and len(reference.sets) > 1:
            gone |= set(reference.alive(0))
        kept = lattice.remove(sorted(gone))
        before = [*range(PROMPT), *(s for t in range(len(reference.sets)) for s in reference.alive(t))]
        reference.removed_after.update(dict.fromkeys(gone, lattice.num_sets - 1))
        after = [*range(PROMPT), *(s for t in range(len(reference.sets)) for s in reference.alive(t))]
        assert [before[i] for i in kept] == after
        assert lattice.slots.tolist() == after[PROMPT:]


def test_a_posterior_is_the_share_of_readings_using_a_member() -> None:
    lattice = Lattice(1)
    lattice.append([0.4, 0.6], None)
    lattice.append([0.25, 0.75], np.array([[0.9, 0.2], [0.1, 0.8]]))
    np.testing.assert_allclose(
        lattice.posterior(), [0.25 * 0.9 + 0.75 * 0.2, 0.25 * 0.1 + 0.75 * 0.8, 0.25, 0.75]
    )


def test_only_alive_members_of_earlier_sets_can_be_removed() -> None:
    lattice = Lattice(2)
    lattice.append([0.4, 0.6], None)
    with pytest.raises(ValueError, match="alive members of earlier sets"):
        lattice.remove([2])
    lattice.append([1.0], np.array([[0.5], [0.5]]))
    lattice.remove([2])
    with pytest.raises(ValueError, match="alive members of earlier sets"):
        lattice.remove([2])
    with pytest.raises(ValueError, match="attend is one of"):
        lattice.bias("nearest")
    with pytest.raises(ValueError, match="no parents"):
        lattice.append([1.0], None)


def test_a_branch_sees_its_own_ancestors_only() -> None:
    lattice = Lattice(1)
    lattice.append([0.5, 0.5], None)  # slots 1, 2
    lattice.append(
        [0.4, 0.3, 0.3], np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    )  # 3 under 1; 4 and 5 under 2
    lattice.append([0.5, 0.5], np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))  # 6 under 5; 7 under 4
    seen = lattice.bias("lineage") == 0
    assert np.flatnonzero(seen[0]).tolist() == [0, 2, 5, 6]
    assert np.flatnonzero(seen[1]).tolist() == [0, 2, 4, 7]
