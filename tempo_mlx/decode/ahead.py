"""Passes that a device is given before they are asked for, so that it need not wait for Python between them.

For decodings whose sets are the best tokens of a distribution, or one drawn from it. Whatever looks at all of it
(penalties, grammars, truncation, functions of the caller's own, observers, sessions, a guide of reasoning, candidates
that are screened, combine rules for study) has none of this, and gets all of it: see `needs_all`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from tempo_mlx.arrays import Floats
from tempo_mlx.decode.combine import require_finite, scale_of
from tempo_mlx.decode.control import Control
from tempo_mlx.decode.decoder import Setup
from tempo_mlx.decode.rules import Rules
from tempo_mlx.model.forward import Best, Choice, Chooser, Pass

if TYPE_CHECKING:
    from tempo_mlx.decode.tempo import Tempo


def ahead_of(setup: Setup, rules: Rules, control: Control) -> Ahead | None:
    """None where the model chooses nothing on its device, or where that is not enough."""
    return None if setup.chooser is None or needs_all(setup, rules, control) else Ahead(setup.chooser)


def needs_all(setup: Setup, rules: Rules, control: Control) -> bool:
    own = setup.functions.select is not None or setup.guide is not None or rules.screen is not None
    return own or control.needs_all or setup.config.combine != "mix"


class Ahead:
    """The passes of one run that are under way: the newest set's, and of one text that of the token it will choose."""

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser
        self.queued: deque[Pass] = deque()

    def copy(self) -> Ahead:
        other = Ahead(self.chooser)
        other.queued = self.queued.copy()
        return other

    def read(self, tempo: Tempo) -> Best:
        """What was chosen of the newest set's rows. Raises NumbersError."""
        self.go_on(tempo)
        found = (self.queued.popleft() if self.queued else self.begin(tempo)).read()
        require_finite(found.normal[:, None])
        return found

    def go_on(self, tempo: Tempo) -> None:
        """Of one text, have its next token run before it is known here."""
        length = len(tempo.steps) + 1
        alone = tempo.rules.width == 1 and tempo.history is None
        if alone and self.queued and goes_on(tempo, length, 1):
            choice = choice_of(tempo, np.ones(1), length)
            slot = len(tempo.cache)
            sees_all = np.zeros(
                (1, slot + 1), np.float32
            )  # and not None: the same kernels as for all other sets
            self.queued.append(self.chooser.begin(self.queued[-1], [slot], sees_all, tempo.cache, choice))

    def start(self, tempo: Tempo) -> None:
        """Have the newest set run while what was chosen is written down."""
        # Layers with states could not go back to before rows that turn out to be of no use.
        if tempo.finished or tempo.model.architecture.recurrent:
            return
        if tempo.waiting and not self.queued and goes_on(tempo, len(tempo.steps), len(tempo.waiting)):
            self.queued.append(self.begin(tempo))

    def begin(self, tempo: Tempo) -> Pass:
        lattice = tempo.lattice
        choice = choice_of(tempo, lattice.weights[-len(tempo.waiting) :], len(tempo.steps))
        positions, bias, parents = tempo.seen_from(lattice)
        return self.chooser.begin(
            tempo.waiting,
            positions,
            bias,
            tempo.cache,
            choice,
            parents=parents,
            attention=tempo.history is not None,
        )


def choice_of(tempo: Tempo, weights: Floats, length: int) -> Choice:
    """What to choose for set number `length`, of rows with these weights."""
    place = tempo.place(length) if tempo.rules.sampled else None
    excluded = tuple(tempo.excluded(length))
    return Choice(weights, scale_of(tempo.config.temperature), tempo.rules.width, excluded, place)


def goes_on(tempo: Tempo, length: int, rows: int) -> bool:
    """Whether a text of so many tokens has room for another, and the cache for rows, its end apart."""
    room = tempo.model.architecture.max_position_embeddings - tempo.prompt_length
    slots = tempo.config.max_cache_tokens
    return length < min(room, tempo.config.max_tokens) and (slots is None or len(tempo.cache) + rows <= slots)
