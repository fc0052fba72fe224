"""Lossless early exit: rows are run ahead, the whole model decides (self-speculative decoding, as in LayerSkip).

A pass of one row also runs, in the same call, the rows likely to come next: those that the text suggests (`Lookup`),
or, where that pays, those an exit drafts while it is confident. All go through the upper layers together, reading the
weights once. The first row's logits are the answer; the others' are kept. If the decoder asks for exactly that pass
next, its exact logits are there; if it asks for another, they are dropped and the model is run. So decoders need not
know, and nothing can mislead them: not the end of a text, not a removal, not sampling.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tempo_mlx.exits.ahead import EXIT, LOOKUP, Payoff
from tempo_mlx.exits.cache import MOST_DRAFTED, Drafted, ExitCache, WaitingRows
from tempo_mlx.exits.early_exit import EarlyExit, joined
from tempo_mlx.exits.plan import ExitPlan
from tempo_mlx.model.forward import Forward
from tempo_mlx.model.transformer import Transformer


class SelfSpeculation(EarlyExit):
    """An EarlyExit whose logits are always the whole model's."""

    def __init__(self, model: Transformer, plan: ExitPlan, context: Sequence[int] = ()) -> None:
        super().__init__(model, plan, context)
        self.payoff = Payoff()
        self._source: str | None = None  # of the rows that are run ahead

    def hand_out(self, drafted: Drafted) -> Forward:
        self.payoff.yielded(self._source)
        return super().hand_out(drafted)

    def step(self, rows: WaitingRows, cache: ExitCache) -> Forward:
        start = time.perf_counter()
        alone = len(rows.positions) == 1
        ran = [rows]
        guessed = self.run_ahead(ran, cache) if alone else []
        self.deepen(cache, self.layers)
        found = self.answer(cache, ran, guessed, self.head(joined(ran)))
        if alone:
            self.payoff.took(time.perf_counter() - start, self._source)
        return found

    def run_ahead(self, rows: list[WaitingRows], cache: ExitCache) -> list[int]:
        """Append rows that may come next to `rows` and to the cache; returns their tokens."""
        self._source = None
        self.payoff.step()
        if self.plan.lookup and self.payoff.allows(LOOKUP) and (guessed := self.lookup.guess()):
            self._source = LOOKUP
            for token in guessed:
                rows.append(self.follow(rows[-1], token, cache))
            return guessed
        chosen: list[int] = []
        if self.plan.drafts is not None and self.payoff.allows(EXIT):
            self._source = EXIT
            while len(rows) < MOST_DRAFTED:
                self.deepen(cache, self.plan.drafts.layer + 1)
                found = self.plan.drafts.read(rows[-1].x)
                if found.confidence[0] < self.plan.drafts.least:
                    break
                chosen.append(int(found.choices[0]))
                rows.append(self.follow(rows[-1], chosen[-1], cache))
        return chosen

    def timing(self) -> dict[str, float]:
        """How many rows were run ahead, and how many of those were used; both vary with timing."""
        return {
            "early_exit_drafted": self.account.drafted,
            "early_exit_accepted": self.account.accepted,
        }

    def report(self) -> dict[str, Any]:
        item = self.plan.drafts
        return {
            "lossless": True,
            "lookup": self.plan.lookup,
            "layer": item and item.layer,
            "target": item and item.target,
        }
