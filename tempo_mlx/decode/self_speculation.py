"""Lossless early exit: the exits draft, the whole model decides (self-speculative decoding, as LayerSkip does it).

A pass of one row that is sure at its exit is followed, inside the same call, by the pass that would come next if the
choice made there were taken: its token, the next position, seeing what the row before saw. So on, until an exit is
unsure; then all of them go through the upper layers together, for one reading of the weights. The first row's logits
are the answer. The others' are kept: when the decoder asks for just that pass, its logits are there, exact, and when
it asks for another, they are dropped and the model is run. So no decoder knows of it, and none can be led astray:
neither by the end of a text, nor by a removal, nor by chance.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from tempo_mlx.decode.early_exit import EarlyExit, Float32s, Ints
from tempo_mlx.decode.exit_plan import OpenExit, Plan
from tempo_mlx.model._mlx import mx
from tempo_mlx.model.exit_cache import Drafted, ExitCache
from tempo_mlx.model.forward import Forward
from tempo_mlx.model.transformer import Transformer

MOST_DRAFTED = 6  # rows that go through the upper layers together
LEARNING = 4  # steps of one row that run in full first, to know what they take
RELEARNING = 16  # every so-many-th after that
REMEMBERED = 7  # full steps, of which the median counts


class SelfSpeculation(EarlyExit):
    """An EarlyExit whose logits are always the whole model's."""

    def __init__(self, model: Transformer, plan: Plan, context: Sequence[int] = ()) -> None:
        super().__init__(model, plan, context)
        self.payoff = Payoff()
        self.drafted = self.accepted = 0

    @property
    def drafting(self) -> OpenExit | None:
        """The exit that drafts: the deepest before the last layer."""
        return max(
            (e for e in self.plan.exits if e.layer < self.layers - 1), key=lambda e: e.layer, default=None
        )

    def step(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: ExitCache,
    ) -> Forward:
        if cache.drafted and cache.drafted[0].is_of(tokens, positions, bias):
            self.accepted += 1
            self.payoff.yielded()
            return Forward(cache.drafted.pop(0).logits)
        cache.forget()
        item = self.drafting
        drafts = item is not None and len(tokens) == 1 and self.payoff.drafts()
        start = time.perf_counter()
        rows = [self.enter(tokens, positions, bias, cache)]
        chosen: list[int] = []
        while drafts and item is not None and len(rows) < MOST_DRAFTED:
            self.deepen(cache, item.layer + 1)
            found = item.read(rows[-1].x)
            if found.confidence[0] < item.least:
                break
            chosen.append(int(found.tokens[found.logits[0].argmax()]))
            seen = np.pad(rows[-1].bias, ((0, 0), (0, 1)))
            rows.append(self.enter(chosen[-1:], rows[-1].positions + 1, seen, cache))
        self.deepen(cache, self.layers)
        logits = np.array(self.head(mx.concatenate([each.x for each in rows])), copy=False)
        cache.waiting = []
        first = len(rows[0].positions)
        cache.drafted = [
            Drafted(token, int(each.positions[0]), each.bias, logits[first + at : first + at + 1])
            for at, (token, each) in enumerate(zip(chosen, rows[1:], strict=True))
        ]
        self.drafted += len(chosen)
        if len(tokens) == 1:
            self.payoff.took(time.perf_counter() - start, drafts)
        return Forward(logits[:first])

    def timing(self) -> dict[str, float]:
        """How many rows were run ahead, and how many of them the decoder asked for: it depends on what pays."""
        return {"early_exit_drafted": self.drafted, "early_exit_accepted": self.accepted}

    def report(self) -> dict[str, Any]:
        item = self.drafting
        return {"lossless": True, "layer": item and item.layer, "target": item and item.target}


class Payoff:
    """Whether drafting is worth it: what it took, against what the steps it gave would have taken in full.

    It stops for good once it has lost more than one full step.
    """

    def __init__(self) -> None:
        self._full: deque[float] = deque(maxlen=REMEMBERED)
        self._steps = 0
        self._balance = 0.0  # seconds won
        self.stopped = False

    def drafts(self) -> bool:
        """Whether the next pass of one row is to draft."""
        self._steps += 1
        if self._full and self._balance < -self.full:
            self.stopped = True
        return not self.stopped and self._steps > LEARNING and self._steps % RELEARNING != 0

    @property
    def full(self) -> float:
        """Seconds of a full step."""
        return float(np.median(self._full)) if self._full else 0.0

    def took(self, seconds: float, drafted: bool) -> None:
        """A pass took so long; it gave one step, whatever else it gives."""
        if drafted:
            self._balance += self.full - seconds
        else:
            self._full.append(seconds)

    def yielded(self) -> None:
        """A drafted row was asked for: one more full step that need not be run."""
        self._balance += self.full
