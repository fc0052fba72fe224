"""The model as requests share it: each has a seat, and decodes as if the model were its own.

A request runs on a call stack of its own (a greenlet). Where its decoder calls `forward`, the stack is put aside with
what it asks for, until the worker has made one pass of what all of them ask for; so decoders know nothing of it. Such a
pass is for decoders whose rows see one text each: with one request or many, their numbers are the same within rounding.
Superposed sets are chosen by thresholds, which may tell such numbers apart, and so take turns.

A prompt is run by itself. What another request has run of the same beginning is copied, and the rest comes in pieces,
between which others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.errors import ComputeError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.forward import Around, Ask, Attention, Forward, Logits
from tempo_mlx.model.rope import follows_length
from tempo_mlx.model.together import together
from tempo_mlx.model.transformer import Transformer
from tempo_mlx.server.stacks import pause

log = logging.getLogger("tempo_mlx.worker")

PIECE = 64  # tokens of a prompt that are run before others go on; fewer take longer in all
LEAST_SHARED = 32  # tokens of a common beginning that are worth copying
MOST_ROWS = 128  # of a pass: more take as much longer as they are more


class Seat(Around):
    """A `Model` as one request has it. joins: whether its passes may be made together with others'."""

    model: Transformer

    def __init__(self, model: Transformer, seats: Seats, joins: bool) -> None:
        super().__init__(model)
        self.seats, self.joins = seats, joins
        self.prompt: list[int] = []  # as far as it has been run, into the first slots of `cache`
        self.cache: Cache | None = None

    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: Cache,
        *,
        parents: Float32s | None = None,
        logits: Logits = "all",
        attention: Attention = False,
    ) -> Forward:
        if bias is None and logits != "all" and not attention and self.seats.divides:
            return self.run_prompt(np.asarray(tokens), np.asarray(positions), cache, logits)
        if self.joins and logits == "all" and not attention and len(tokens) <= MOST_ROWS:
            answer = pause(Ask(tokens, np.asarray(positions, np.int64), bias, cache))
            if answer is not None:
                return answer
        return self.model.forward(
            tokens, positions, bias, cache, parents=parents, logits=logits, attention=attention
        )

    def run_prompt(self, tokens: Ints, positions: Ints, cache: Cache, logits: Logits) -> Forward:
        if positions[0] == 0:
            self.prompt, self.cache = [], cache
        known = cache is self.cache and len(self.prompt) == positions[0]  # all that the cache holds
        done = 0
        while True:
            done += self.copy_known(tokens[done:], cache) if known else 0
            stop = len(tokens) if len(self.seats.taken) == 1 else min(done + PIECE, len(tokens))
            part, last = slice(done, stop), stop == len(tokens)
            out = self.model.forward(
                tokens[part], positions[part], None, cache, logits=logits if last else "none"
            )
            if known:
                self.prompt += tokens[part].tolist()
            if last:
                return out
            done = stop
            pause()

    def copy_known(self, tokens: Ints, cache: Cache) -> int:
        """Take over what another seat has run of these tokens, all but the last at most; how many."""
        start, longest, source = len(self.prompt), 0, None
        for other in self.seats.taken.values():
            if other is None or other is self or other.cache is None or other.prompt[:start] != self.prompt:
                continue
            pairs = zip(other.prompt[start : len(other.cache)], tokens[:-1].tolist(), strict=False)
            equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if equal > longest:
                longest, source = equal, other.cache
        if source is None or longest < LEAST_SHARED:
            return 0
        cache.take(source, start + longest)
        self.prompt += tokens[:longest].tolist()
        return longest


class Seats:
    """The seats at one model. `taken`: by request; None where one has the model itself."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.taken: dict[str, Seat | None] = {}
        a = loaded.model.architecture  # a piece of a prompt must not depend on what comes after it
        self.divides = not any(follows_length(rope, a.max_position_embeddings) for rope in a.ropes)

    def take(self, id: str, config: GenerateConfig) -> LoadedModel:
        """The model for a request."""
        seat = self.seat(config)
        self.taken[id] = seat
        return self.loaded if seat is None else replace(self.loaded, model=seat)

    def seat(self, config: GenerateConfig) -> Seat | None:
        """None where passes are more than rows over slots, and where the device is kept busy better without."""
        model, joins = self.loaded.model, config.decoder != "superposed"
        if not isinstance(model, Transformer) or model.architecture.recurrent or config.early_exit:
            return None
        ahead = self.loaded.chooser is not None and DECODERS[config.decoder].lattice  # see decode/ahead.py
        return None if ahead and not (joins and self.taken) else Seat(model, self, joins)

    def leave(self, id: str) -> None:
        self.taken.pop(id, None)

    def answer(self, asks: Sequence[Ask]) -> list[tuple[Forward | None, int]]:
        """To each what it asks for, and how many shared the pass; None where it is to be run by who asks."""
        found: list[tuple[Forward | None, int]] = []
        for group in groups(asks):
            answers: Sequence[Forward | None] = [None] * len(group)
            if len(group) > 1 and isinstance(self.loaded.model, Transformer):
                try:
                    answers = together(self.loaded.model, group)
                except ComputeError as error:  # whose fault it is shows when each runs its own
                    log.warning("a pass of %d requests failed: %s", len(group), error)
            found += [(answer, 1 if answer is None else len(group)) for answer in answers]
        return found


def groups(asks: Sequence[Ask]) -> list[list[Ask]]:
    """In their order, as few as can be of at most MOST_ROWS rows."""
    found: list[list[Ask]] = []
    room = 0
    for ask in asks:
        if (room := room - len(ask.tokens)) < 0:
            found.append([])
            room = MOST_ROWS - len(ask.tokens)
        found[-1].append(ask)
    return found
