"""Early exit: a model whose rows may leave before the last layer, and which keeps account of what that cost.

`EarlyExit` is a model like any other to the decoders. A pass looks at the exits of a plan; where the choice made there
is sure enough for every row, the logits made there are the answer, and the rows wait. The next pass that goes deeper
takes them along through the layers they have not seen, so that weights are read once and every key and value in the
cache ends up what it would have been (EE-LLM, arXiv 2312.04916, catches up alike). What the whole model would have
chosen for them is then known: the audit, by which an exit that does not keep its word is closed.

A row that stands alone is run together with those that would follow if the text went on as it did before (`Lookup`):
weights are read once for all of them, and what the decoder then asks for is there already. Such rows go through every
layer; at the last one they may be spared the vocabulary like any others.

A set's rows leave together. L rows of a pass, S slots, E model dim, V vocabulary, C tokens an exit chooses among.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.exits.account import Account
from tempo_mlx.exits.cache import AUDITED_EVERY, MOST_WAITING, Drafted, ExitCache, WaitingRows
from tempo_mlx.exits.lookup import Lookup
from tempo_mlx.exits.plan import Found, OpenExit, Plan
from tempo_mlx.mlx import mx
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.forward import Attention, Forward, Logits
from tempo_mlx.model.transformer import Transformer

MOST_ROWS = 16  # more are a prompt, whose layers are matrix products: nothing is saved there
AUDITED_TOGETHER = 16
AUDITED_FIRST = 16  # passes that leave, all of them audited; later ones, every AUDITED_EVERY-th
FLOOR = 10.0  # logits that tokens outside the shortlist have below the least one inside

Ints = NDArray[np.int64]
Float32s = NDArray[np.float32]


class EarlyExit:
    """A Transformer with exits. One for each run: it knows the run's tokens, and counts."""

    def __init__(self, model: Transformer, plan: Plan, context: Sequence[int] = ()) -> None:
        """context: tokens of the text so far, which an exit may always choose, and which may come again."""
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
        """A cache of the model, as this one takes it. Both are the same slots from now on."""
        return ExitCache(cache, self.catch_up)

    def inside(self, cache: ExitCache) -> Cache:
        """The cache of the model itself, complete, for work that the exits have no part in."""
        self.finish(cache)
        return cache.inner

    def embeddings(self, tokens: Sequence[int]) -> Float32s:
        return self.model.embeddings(tokens)

    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: ExitCache,
        *,
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
        return self.step(tokens, positions, bias, cache)

    def step(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: ExitCache,
    ) -> Forward:
        """A pass that may leave."""
        if cache.drafted and cache.drafted[0].is_of(tokens, positions, bias):
            return self.hand_out(cache.drafted.pop(0))
        cache.forget()
        rows = self.enter(tokens, positions, bias, cache)
        if self.plan.lookup and len(tokens) == 1 and (guessed := self.lookup.guess()):
            return self.step_ahead(rows, guessed, cache)
        behind = len(cache.waiting) - 1
        for item in self.plan.open:
            if behind >= MOST_WAITING and item.layer < self.layers - 1:
                continue
            self.deepen(cache, item.layer + 1)
            found, choices = self.look(item, rows.x)
            if (found.confidence >= item.least).all():
                return self.leave(cache, rows, item, choices, self.spread(found))
        self.deepen(cache, self.layers)
        return self.answer(cache, [rows], (), self.head(rows.x))

    def step_ahead(self, first: WaitingRows, guessed: Sequence[int], cache: ExitCache) -> Forward:
        """A pass of one row, and of those that would follow if the next tokens were those guessed.

        All go through every layer. An exit at the last one answers if it is sure of every row up to the first that
        chooses otherwise than guessed; those after it are dropped.
        """
        before = self.account.spent
        rows = [first]
        for token in guessed:
            rows.append(self.follow(rows[-1], token, cache))
        self.deepen(cache, self.layers)
        x, logits = joined(rows), None
        for item in self.plan.open:
            if item.layer == self.layers - 1:
                found, choices = self.look(item, x)
                asked = 1 + agreeing(choices, guessed)
                if (found.confidence[:asked] >= item.least).all():
                    logits = self.spread(found)[:asked]
                    for each, choice in zip(rows, choices[:asked, None], strict=False):
                        each.left = (item, choice)
        if logits is None:
            logits = self.head(x)
        self.account.ran_ahead(before)
        return self.answer(cache, rows, guessed, logits)

    def look(self, item: OpenExit, x: Any) -> tuple[Found, Ints]:
        """What an exit says of rows x (L, E), and the tokens (L,) it would choose."""
        start = time.perf_counter()
        found = item.read(x)
        self.account.looked(time.perf_counter() - start)
        return found, found.tokens[found.logits.argmax(axis=1)]

    def enter(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: ExitCache,
    ) -> WaitingRows:
        """Append rows that have run no layer yet."""
        return cache.enter(self.model.embedded(tokens), np.asarray(positions, np.int64), bias)

    def follow(self, rows: WaitingRows, token: int, cache: ExitCache) -> WaitingRows:
        """Append the row that comes after one that stands alone, if `token` does."""
        seen = np.pad(rows.bias, ((0, 0), (0, 1)))
        return self.enter([token], rows.positions + 1, seen, cache)

    def deepen(self, cache: ExitCache, stop: int) -> None:
        """Run the newest rows through every layer before `stop`, and with them all that wait on the way."""
        while cache.waiting and (low := cache.waiting[-1].level) < stop:
            alike = [rows for rows in cache.waiting if rows.level == low]
            upto = min([stop, *(rows.level for rows in cache.waiting if rows.level > low)])
            start = time.perf_counter()
            x, _ = self.model.run_layers(
                joined(alike), self.model.rows(*cache.seen_by(alike), cache.inner), cache.inner, low, upto
            )
            mx.eval(x)
            self.account.ran(upto - low, len(alike) == 1, time.perf_counter() - start)
            parts = mx.split(x, np.cumsum([len(rows.positions) for rows in alike])[:-1].tolist())
            for rows, part in zip(alike, parts, strict=True):
                rows.x, rows.level = part, upto

    def leave(
        self, cache: ExitCache, rows: WaitingRows, item: OpenExit, choices: Ints, logits: Float32s
    ) -> Forward:
        """Let the newest rows wait where they are, or write at once what later rows would see of them."""
        rows.left = (item, choices)
        if rows.level == self.layers:
            return self.answer(cache, [rows], (), logits)
        if self.plan.propagate:
            self.model.remember(
                rows.x, self.model.rows(*cache.seen_by([rows]), cache.inner), cache.inner, rows.level
            )
            cache.waiting.remove(rows)
        return self.count(rows, logits)

    def answer(
        self, cache: ExitCache, rows: list[WaitingRows], guessed: Sequence[int], logits: Float32s
    ) -> Forward:
        """The first rows' logits. Those of guessed ones are kept, as far as there are any; all have run every layer."""
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
        """The answer to a pass, which counts from now on, and may have to be audited."""
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
        """All waiting rows have run every layer: they are ordinary rows now, and those that left are to be audited."""
        self.await_audit(cache.waiting)
        cache.waiting = []

    def await_audit(self, rows: Sequence[WaitingRows]) -> None:
        self._to_audit += [each for each in rows if each.left is not None]
        if sum(len(each.positions) for each in self._to_audit) >= AUDITED_TOGETHER:
            self.audit()

    def audit(self) -> None:
        """Hold the choices made at exits against the whole model's, and close exits that fell short."""
        if not self._to_audit:
            return
        if not self.account.heads:
            self.head(self._to_audit[0].x[:1])  # or it would be unknown what the others saved
        start = time.perf_counter()
        best = np.array(self.model.logits(joined(self._to_audit)).argmax(axis=-1))
        at = 0
        for rows in self._to_audit:
            item, choices = rows.left
            item.note(best[at : at + len(choices)] == choices)
            at += len(choices)
        self._to_audit = []
        self.account.audited(time.perf_counter() - start)

    def head(self, x: Any) -> Float32s:
        """The logits (L, V) of all the vocabulary."""
        start = time.perf_counter()
        logits = np.array(self.model.logits(x), copy=False)
        self.account.headed(time.perf_counter() - start)
        return logits

    def catch_up(self, cache: ExitCache) -> None:
        """Run every row that waits through the layers it has not seen."""
        self.deepen(cache, self.layers)
        self.settle(cache)

    def finished(self, cache: ExitCache) -> bool:
        return not (cache.waiting or cache.drafted or self._to_audit)

    def finish(self, cache: ExitCache) -> None:
        """Nothing waits any more, and every choice has been audited."""
        cache.forget()
        self.catch_up(cache)
        self.audit()

    def timing(self) -> dict[str, float]:
        """What a run's `timing` says of it; see `Account.timing`."""
        return self.account.timing()

    def report(self) -> dict[str, Any]:
        """A run's section `early_exit`."""
        return self.account.report(self.plan.exits, kv="propagate" if self.plan.propagate else "exact")

    def spread(self, found: Found) -> Float32s:
        """Logits (L, C) of an exit as logits (L, V)."""
        if len(found.tokens) == self.architecture.vocab_size:
            return found.logits
        least = found.logits.min(axis=1, keepdims=True) - np.float32(FLOOR)
        logits: Float32s = np.repeat(least, self.architecture.vocab_size, axis=1)
        logits[:, found.tokens] = found.logits
        return logits


def joined(rows: Sequence[WaitingRows]) -> Any:
    """The states (L, E) of several passes' rows."""
    return mx.concatenate([each.x for each in rows]) if len(rows) > 1 else rows[0].x


def agreeing(choices: Ints, guessed: Sequence[int]) -> int:
    """How many guesses, from the first on, are what the row before them chose."""
    pairs = list(zip(choices.tolist(), guessed, strict=False))
    return next((at for at, (choice, guess) in enumerate(pairs) if choice != guess), len(pairs))
