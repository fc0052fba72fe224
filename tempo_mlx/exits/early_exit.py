"""Early exit: a model whose rows may leave before the last layer, and which measures what that saves.

To the decoders, `EarlyExit` is a model like any other. A pass looks at the exits of a plan; where one is confident
enough for every row, its logits are the answer, and the rows wait. The next pass that goes deeper takes them along
through the layers they have missed, so weights are read once and every key and value in the cache ends up what it
would have been (EE-LLM, arXiv 2312.04916, catches up the same way). What the whole model would have chosen for them is
then known; this audit closes an exit that falls short of its promise.

A single row is run together with those that would follow if the text went on as it did before (`Lookup`): weights are
read once for all of them, and what the decoder asks for next is there already. Such rows go through every layer; at
the last one they may skip the full vocabulary like any others.

A set's rows leave together. L rows of a pass, S slots, E model dim, V vocabulary, C tokens an exit chooses among.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.exits.ahead import Lookup
from tempo_mlx.exits.cache import AUDITED_EVERY, MOST_WAITING, Drafted, ExitCache, WaitingRows
from tempo_mlx.exits.plan import ExitPlan, Found, OpenExit
from tempo_mlx.mlx import mx
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.failures import told_failures
from tempo_mlx.model.forward import Attention, Forward, Logits
from tempo_mlx.model.transformer import Transformer

MOST_ROWS = 16  # more rows are a prompt, which is compute-bound: nothing is saved there
AUDITED_TOGETHER = 16
AUDITED_FIRST = 16  # passes that leave, all of them audited; later ones, every AUDITED_EVERY-th
FLOOR = 10.0  # how far below the least shortlisted logit all other tokens are set


class EarlyExit:
    """A Transformer with exits. One for each run: it knows the run's tokens, and counts."""

    def __init__(self, model: Transformer, plan: ExitPlan, context: Sequence[int] = ()) -> None:
        """context: tokens of the text so far, which an exit may always choose, and which may recur."""
        self.model, self.plan = model, plan
        self.architecture, self.info = model.architecture, model.info
        self.layers = model.architecture.num_hidden_layers
        self.account = Account(self.layers)
        self.lookup = Lookup(context)
        self._to_audit: list[WaitingRows] = []
        plan.widen(context)

    def new_cache(self) -> ExitCache:
        return self.cache_around(self.model.new_cache())

    def cache_around(self, cache: Cache) -> ExitCache:
        return ExitCache(cache, self.catch_up)

    def inside(self, cache: ExitCache) -> Cache:
        self.finish(cache)
        return cache.inner

    def embeddings(self, tokens: Sequence[int]) -> Float32s:
        return self.model.embeddings(tokens)

    @told_failures()
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
        """See `model.forward`. Prompts, and passes whose attention is asked for, go through every layer."""
        self.plan.widen(tokens)
        if logits == "all":
            self.lookup.add(tokens[-1:])  # the likeliest of a set
        if logits != "all" or attention or len(tokens) > MOST_ROWS:
            cache.forget()
            self.catch_up(cache)
            return self.model.forward(
                tokens, positions, bias, cache.inner, logits=logits, attention=attention
            )
        if cache.drafted and cache.drafted[0].is_of(tokens, positions, bias):
            return self.hand_out(cache.drafted.pop(0))
        cache.forget()
        return self.step(self.enter(tokens, np.asarray(positions, np.int64), bias, cache), cache)

    def step(self, rows: WaitingRows, cache: ExitCache) -> Forward:
        """A pass that may leave."""
        if self.plan.lookup and len(rows.positions) == 1 and (guessed := self.lookup.guess()):
            return self.step_ahead(rows, guessed, cache)
        behind = len(cache.waiting) - 1
        for item in self.plan.open:
            if behind >= MOST_WAITING and item.layer < self.layers - 1:
                continue
            self.deepen(cache, item.layer + 1)
            found = self.look(item, rows.x)
            if (found.confidence >= item.least).all():
                return self.leave(cache, rows, item, found)
        self.deepen(cache, self.layers)
        return self.answer(cache, [rows], (), self.head(rows.x))

    def step_ahead(self, first: WaitingRows, guessed: Sequence[int], cache: ExitCache) -> Forward:
        """A pass of one row, and of those that would follow if the next tokens were those guessed.

        All go through every layer. An exit at the last one answers if it is confident about every row up to the first
        that disagrees with the guess; the rows after that are dropped.
        """
        rows = [first]
        with self.account.running_ahead():
            for token in guessed:
                rows.append(self.follow(rows[-1], token, cache))
            self.deepen(cache, self.layers)
            logits = self.answer_ahead(rows, guessed)
        return self.answer(cache, rows, guessed, logits)

    def answer_ahead(self, rows: Sequence[WaitingRows], guessed: Sequence[int]) -> Float32s:
        """The logits of rows that have run every layer: by the exit at the last layer if it is sure, else in full."""
        x = joined(rows)
        for item in self.plan.open:
            if item.layer == self.layers - 1:
                found = self.look(item, x)
                if asked := answered(found, guessed, item.least):
                    for each, choice in zip(rows, found.choices[:asked, None], strict=False):
                        each.left = (item, choice)
                    return self.spread(found)[:asked]
        return self.head(x)

    def look(self, item: OpenExit, x: mx.array) -> Found:
        """What an exit says of rows x (L, E)."""
        with self.account.clock("look"):
            return item.read(x)

    def enter(
        self, tokens: Sequence[int] | Ints, positions: Ints, bias: Float32s | None, cache: ExitCache
    ) -> WaitingRows:
        """Append rows that have not been through any layer yet."""
        return cache.enter(self.model.embedded(tokens), positions, bias)

    def follow(self, rows: WaitingRows, token: int, cache: ExitCache) -> WaitingRows:
        """Append the row that comes after a single one if its token is `token`."""
        return self.enter([token], rows.positions + 1, np.pad(rows.bias, ((0, 0), (0, 1))), cache)

    def deepen(self, cache: ExitCache, stop: int) -> None:
        """Run the newest rows up to layer `stop`, together with all rows that wait on the way."""
        while cache.waiting and (low := cache.waiting[-1].level) < stop:
            alike = [rows for rows in cache.waiting if rows.level == low]
            upto = min([stop, *(rows.level for rows in cache.waiting if rows.level > low)])
            start = time.perf_counter()
            x, _ = self.model.run_layers(
                joined(alike), self.model.rows(*cache.seen_by(alike), cache.inner), cache.inner, low, upto
            )
            parts = mx.split(x, np.cumsum([len(rows.positions) for rows in alike])[:-1].tolist())
            mx.eval(parts, cache.inner.arrays())  # nothing is left for a thread that may be another
            self.account.ran(upto - low, len(alike) == 1, time.perf_counter() - start)
            for rows, part in zip(alike, parts, strict=True):
                rows.x, rows.level = part, upto

    def leave(self, cache: ExitCache, rows: WaitingRows, item: OpenExit, found: Found) -> Forward:
        """Let the newest rows wait where they are, or fill in their remaining keys and values at once."""
        rows.left = (item, found.choices)
        if rows.level == self.layers:
            return self.answer(cache, [rows], (), self.spread(found))
        if self.plan.propagate:
            self.model.remember(
                rows.x, self.model.rows(*cache.seen_by([rows]), cache.inner), cache.inner, rows.level
            )
            mx.eval(cache.inner.arrays())
            cache.waiting.remove(rows)
        return self.count(rows, self.spread(found))

    def answer(
        self, cache: ExitCache, rows: list[WaitingRows], guessed: Sequence[int], logits: Float32s
    ) -> Forward:
        """The logits of the first rows; those of the guessed rows are kept. All have been through every layer."""
        first = len(rows[0].positions)
        drafted = [
            Drafted(token, each, logits[at : at + 1])
            for at, token, each in zip(range(first, len(logits)), guessed, rows[1:], strict=False)
        ]
        self.account.drafted += len(guessed)
        cache.hold(drafted, len(guessed) - len(drafted))
        found = self.count(rows[0], logits[:first])
        self.settle(cache)
        return found

    def hand_out(self, drafted: Drafted) -> Forward:
        """The answer to a pass that was run ahead."""
        self.account.accepted += 1
        found = self.count(drafted.rows, drafted.logits)
        self.await_audit([drafted.rows])
        return found

    def count(self, rows: WaitingRows, logits: Float32s) -> Forward:
        """The answer to a pass, which is now counted, and audited if it is due."""
        if rows.left is None:
            self.account.passed(self.layers)
            return Forward(logits)
        item, choices = rows.left
        if self.account.left >= AUDITED_FIRST and self.account.left % AUDITED_EVERY:
            rows.left = None
        self.account.left += 1
        self.account.passed(item.layer + 1)
        item.left += len(choices)
        return Forward(logits, None, np.full(len(choices), item.layer))

    def settle(self, cache: ExitCache) -> None:
        """All waiting rows have been through every layer: they are ordinary rows now; early ones await their audit."""
        self.await_audit(cache.waiting)
        cache.waiting = []

    def await_audit(self, rows: Sequence[WaitingRows]) -> None:
        self._to_audit += [each for each in rows if each.left is not None]
        if sum(len(each.positions) for each in self._to_audit) >= AUDITED_TOGETHER:
            self.audit()

    def audit(self) -> None:
        """Compare the choices made at exits with the whole model's."""
        if not self._to_audit:
            return
        if not self.account.times["head"]:
            self.head(self._to_audit[0].x[:1])  # a timing to compare the exits' savings with
        with self.account.clock("audit"):
            best = np.array(self.model.logits(joined(self._to_audit)).argmax(axis=-1))
            for rows in self._to_audit:
                if rows.left is not None:
                    item, choices = rows.left
                    own, best = best[: len(choices)], best[len(choices) :]
                    item.note(own == choices)
            self._to_audit = []

    def head(self, x: mx.array) -> Float32s:
        """The logits (L, V) of all the vocabulary."""
        with self.account.clock("head"):
            return np.array(self.model.logits(x), copy=False)

    def catch_up(self, cache: ExitCache) -> None:
        """Run every waiting row through its remaining layers."""
        self.deepen(cache, self.layers)
        self.settle(cache)

    def finished(self, cache: ExitCache) -> bool:
        return not (cache.waiting or cache.drafted or self._to_audit)

    def finish(self, cache: ExitCache) -> None:
        cache.forget()
        self.catch_up(cache)
        self.audit()

    def timing(self) -> dict[str, float]:
        return self.account.timing()

    def report(self) -> dict[str, Any]:
        return self.account.report(self.plan)

    def spread(self, found: Found) -> Float32s:
        """Logits (L, C) of an exit as logits (L, V)."""
        if len(found.tokens) == self.architecture.vocab_size:
            return found.logits
        least = found.logits.min(axis=1, keepdims=True) - np.float32(FLOOR)
        logits: Float32s = np.repeat(least, self.architecture.vocab_size, axis=1)
        logits[:, found.tokens] = found.logits
        return logits


def joined(rows: Sequence[WaitingRows]) -> mx.array:
    """The states (L, E) of several passes' rows."""
    return mx.concatenate([each.x for each in rows]) if len(rows) > 1 else rows[0].x


def answered(found: Found, guessed: Sequence[int], least: float) -> int:
    """Of rows run ahead, how many an exit answers: all that are asked for, if it is sure of them, or none."""
    asked = 1 + agreeing(found.choices, guessed)
    return asked if (found.confidence[:asked] >= least).all() else 0


def agreeing(choices: Ints, guessed: Sequence[int]) -> int:
    """How many leading guesses are what the row before each chose."""
    pairs = list(zip(choices.tolist(), guessed, strict=False))
    return next((at for at, (choice, guess) in enumerate(pairs) if choice != guess), len(pairs))


class Account:
    """What a run did and saved: seconds by kind of work, and the depth of each pass."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.passes = self.depth = 0  # of a step; layers they went through before the answer
        self.left = 0  # passes that left early
        self.drafted = self.accepted = 0  # rows run ahead, and those that were asked for
        self.ahead, self.ahead_seconds = 0, 0.0  # passes that guesses were run with, and what they took
        self.seconds: defaultdict[str, float] = defaultdict(float)  # of "layers", "head", "look", "audit"
        self.times: defaultdict[str, int] = defaultdict(int)
        self._alone = (0, 0.0)  # layers that ran one pass's rows alone, and their seconds

    def took(self, kind: str, seconds: float) -> None:
        self.seconds[kind] += seconds
        self.times[kind] += 1

    @contextmanager
    def clock(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.took(kind, time.perf_counter() - start)

    def ran(self, layers: int, alone: bool, seconds: float) -> None:
        self.took("layers", seconds)
        if alone:
            self._alone = self._alone[0] + layers, self._alone[1] + seconds

    def passed(self, depth: int) -> None:
        self.passes += 1
        self.depth += depth

    @contextmanager
    def running_ahead(self) -> Iterator[None]:
        """Book the time spent inside to a pass that also runs guesses."""
        seconds, times = self.seconds.copy(), self.times.copy()
        yield
        self.ahead += 1
        self.ahead_seconds += sum(self.seconds.values()) - sum(seconds.values())
        self.seconds, self.times = seconds, times

    def timing(self) -> dict[str, float]:
        """Estimated savings as shares of the time of full passes: from layers (net of catching up), from the
        vocabulary head (net of looks and audits), and from running ahead.
        """
        took = self.seconds
        if not (self.passes and self.times["head"] and self._alone[0]):
            return {}
        layers, head = self.layers * self._alone[1] / self._alone[0], took["head"] / self.times["head"]
        alone = self.passes - self.accepted - self.ahead  # passes that had nothing to do with guesses
        saved = {
            "layers": alone * layers - took["layers"],
            "head": alone * head - took["head"] - took["look"] - took["audit"],
            "lookup": (self.accepted + self.ahead) * (layers + head) - self.ahead_seconds,
        }
        full = self.passes * (layers + head)
        return {f"early_exit_saved_by_{name}": seconds / full for name, seconds in saved.items()}

    def report(self, plan: ExitPlan) -> dict[str, Any]:
        """What happened, without times."""
        audited, agreed = sum(item.audited for item in plan.exits), sum(item.agreed for item in plan.exits)
        names = ("layer", "target", "least", "left", "audited", "agreed", "closed")
        return {
            "kv": "propagate" if plan.propagate else "exact",
            "passes": self.passes,
            "mean_layers": self.depth / self.passes if self.passes else None,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "agreement": agreed / audited if audited else None,
            "exits": [{name: getattr(item, name) for name in names} for item in plan.exits],
        }
