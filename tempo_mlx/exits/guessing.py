"""Lossless early exit where no row can wait: layers keep a state, or embeddings of their own.

Rows are guessed from the text alone (`Lookup`) and run with the one before them, through the whole model at once. Those
that the decoder does not ask for are forgotten, and with them what states were made of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.exits.ahead import LOOKUP
from tempo_mlx.exits.cache import Drafted, ExitCache, WaitingRows
from tempo_mlx.exits.self_speculation import SelfSpeculation
from tempo_mlx.mlx import mx
from tempo_mlx.model.forward import Attention, Forward, Logits
from tempo_mlx.model.visibility import causal_bias


class Guessing(SelfSpeculation):
    """A SelfSpeculation without exits."""

    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: ExitCache,
        *,
        parents: Float32s | None = None,
        logits: Logits = "all",
        attention: Attention = False,
    ) -> Forward:
        if logits == "all":
            self.lookup.add(tokens[-1:])  # the likeliest of a set
        alone = len(tokens) == 1 and logits == "all" and not attention and _is_chain(parents)
        if alone and cache.drafted and cache.drafted[0].is_of(tokens, positions, bias):
            return self.hand_out(cache.drafted.pop(0))
        cache.forget()
        start = time.perf_counter()
        guessed = self.guesses() if alone else []
        if guessed:
            found = self.ahead(int(tokens[0]), int(positions[0]), bias, guessed, cache)
        else:
            found = self.model.forward(
                tokens, positions, bias, cache.inner, parents=parents, logits=logits, attention=attention
            )
            if found.logits is not None:
                self.account.passed(self.layers)
        if alone:
            self.payoff.took(time.perf_counter() - start, self._source)
        return found

    def guesses(self) -> list[int]:
        self.payoff.step()
        guessed = self.lookup.guess() if self.payoff.allows(LOOKUP) else []
        self._source = LOOKUP if guessed else None
        return guessed

    def ahead(
        self, token: int, position: int, bias: Float32s | None, guessed: list[int], cache: ExitCache
    ) -> Forward:
        """A pass of one row, and of those that would follow if the next tokens were those guessed."""
        count, before = 1 + len(guessed), len(cache.inner)
        wide = causal_bias(count, before + count)
        if bias is not None:
            wide[:, : before + 1] = bias
        parents = np.eye(count, before + count, before - 1, dtype=np.float32)
        positions = position + np.arange(count)
        out = self.model.forward([token, *guessed], positions, wide, cache.inner, parents=parents)
        assert out.logits is not None
        nothing = mx.zeros((1, 0))
        cache.drafted = [
            Drafted(
                each,
                WaitingRows(
                    nothing, positions[at : at + 1], wide[at : at + 1, : before + at + 1], self.layers
                ),
                out.logits[at : at + 1],
            )
            for at, each in enumerate(guessed, 1)
        ]
        self.account.drafted += len(guessed)
        self.account.passed(self.layers)
        return Forward(out.logits[:1])

    def report(self) -> dict[str, Any]:
        return {"lossless": True, "lookup": True, "layer": None, "target": None}


def _is_chain(parents: Float32s | None) -> bool:
    """Whether one row continues the newest one alone."""
    return parents is None or (len(parents) == 1 and parents.shape[1] > 1 and parents[0, -2] == 1.0)
