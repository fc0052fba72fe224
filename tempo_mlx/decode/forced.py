"""Tokens that a grammar leaves no choice about, run in the pass of the token before them.

For one text at a time (the plain decoder): a row that is asked for later has been run already, and costs no pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.decode.constraint import Constraint
from tempo_mlx.model.forward import Around, Attention, Forward, Logits, Model


class RunsForced(Around):
    """A model around another; its rows come one by one, each the newest of the one text, after `constraint.ahead`."""

    def __init__(self, model: Model, constraint: Constraint, prompt_length: int, longest: int) -> None:
        """longest: of prompt and text together."""
        super().__init__(model)
        self.constraint = constraint
        self.prompt_length, self.longest = prompt_length, longest
        self.known: list[
            tuple[int, Float32s]
        ] = []  # tokens whose rows the cache holds already, and their logits (1, V)

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
        first = int(positions[0])
        known, self.known = self.known, []
        if known and known[0][0] == tokens[0]:
            self.known = known[1:]
            return Forward(known[0][1])
        if known:  # it was another token after all
            cache.truncate(len(cache) - len(known))
        forced = self.constraint.forced[: self.longest - first - 1] if first >= self.prompt_length else []
        if not forced:
            return self.model.forward(
                tokens, positions, bias, cache, parents=parents, logits=logits, attention=attention
            )
        rows = [int(tokens[0]), *forced]
        out = self.model.forward(rows, np.arange(first, first + len(rows)), None, cache)
        assert out.logits is not None
        self.known = [(token, out.logits[i : i + 1]) for i, token in enumerate(forced, 1)]
        return Forward(out.logits[:1])
