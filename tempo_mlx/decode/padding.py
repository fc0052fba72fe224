"""Rows that are run beside a set's, and forgotten, where that makes the set's own cheaper.

Products on a GPU go a row at a time up to some number of rows, and in tiles of several from there on, so that 5 rows
may cost more than 8. What each number costs is measured (width.py); the rows that fill a tile see nobody but
themselves, and nobody sees them.

Shapes: L rows, n of them a set's own; S slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.model.forward import Around, Attention, Best, Choice, Chooser, Forward, Logits, Model, Pass
from tempo_mlx.model.visibility import causal_bias

PAYS = 0.9  # times the cost without: less is what measurements differ by


def paying(costs: Mapping[int, float]) -> dict[int, int]:
    """How many rows to run in place of so many, wherever more cost less. costs: of a pass, by its rows."""
    found = {}
    for rows, cost in costs.items():
        cheapest = min((more for more in costs if more > rows), key=lambda more: costs[more], default=rows)
        if rows > 1 and costs[cheapest] < PAYS * cost:
            found[rows] = cheapest
    return found


def with_padding(costs: Mapping[int, float]) -> dict[int, float]:
    """What rows cost where they are padded."""
    return {rows: costs[paying(costs).get(rows, rows)] for rows in costs}


def filled(
    tokens: Sequence[int] | Ints,
    positions: Sequence[int] | Ints,
    bias: Float32s | None,
    slots: int,
    rows: int,
) -> tuple[Ints, Ints, Float32s]:
    """Tokens, positions and bias of the same pass with its last row again until it has so many; slots: of the cache
    before it.
    """
    own = len(tokens)
    table = np.full((rows, slots + rows), -np.inf, np.float32)
    table[:own, : slots + own] = causal_bias(own, slots + own) if bias is None else bias
    np.fill_diagonal(table[own:, slots + own :], 0.0)
    ids, places = (np.append(each, np.full(rows - own, each[-1])) for each in (tokens, positions))
    return ids, places, table


def own_mass(mass: Float32s | None, own: int, rows: int, slots: int) -> Float32s | None:
    """Attention mass (layers, S), or (layers, L, S), of a pass's own rows alone."""
    if mass is None:
        return None
    seen: Float32s = mass[..., : slots + own]
    return seen[:, :own] if mass.ndim == 3 else seen * np.float32(rows / own)  # it is a mean over rows


class Padded(Around):
    """A model around another, which runs more rows where fewer cost more. rows: see `paying`."""

    def __init__(self, model: Model, rows: Mapping[int, int]) -> None:
        super().__init__(model)
        self.rows = rows

    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: Any,
        *,
        parents: Float32s | None = None,
        logits: Logits = "all",
        attention: Attention = False,
    ) -> Forward:
        own, slots = len(tokens), len(cache)
        rows = self.rows.get(own)
        if rows is None or logits != "all":
            return self.model.forward(
                tokens, positions, bias, cache, parents=parents, logits=logits, attention=attention
            )
        more = filled(tokens, positions, bias, slots, rows)
        out = self.model.forward(*more, cache, attention=attention)
        cache.truncate(slots + own)
        assert out.logits is not None
        return Forward(out.logits[:own], own_mass(out.attention_mass, own, rows, slots))


class PaddedChooser:
    """The same of a `Chooser`."""

    def __init__(self, chooser: Chooser, rows: Mapping[int, int]) -> None:
        self.chooser, self.rows = chooser, rows

    def begin(
        self,
        tokens: Sequence[int] | Pass,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: Any,
        choice: Choice,
        *,
        parents: Float32s | None = None,
        attention: Attention = False,
    ) -> Pass:
        own, slots = len(positions), len(cache)
        rows = self.rows.get(own)
        if rows is None or not isinstance(tokens, Sequence):  # a token that is not known yet is a row alone
            return self.chooser.begin(
                tokens, positions, bias, cache, choice, parents=parents, attention=attention
            )
        ids, places, table = filled(tokens, positions, bias, slots, rows)
        wanted = replace(choice, weights=np.append(choice.weights, np.zeros(rows - own)))
        begun = self.chooser.begin(ids.tolist(), places, table, cache, wanted, attention=attention)
        cache.truncate(slots + own)
        return PaddedPass(begun, own, rows, slots)


@dataclass(frozen=True)
class PaddedPass:
    inner: Pass
    own: int
    rows: int
    slots: int

    def read(self) -> Best:
        found = self.inner.read()
        mass = own_mass(found.attention_mass, self.own, self.rows, self.slots)
        return Best(found.tokens, found.log_probs[: self.own], found.normal[: self.own], mass)
