"""Early exit: a model whose rows may leave before the last layer, and which keeps account of what that cost.

`EarlyExit` is a model like any other to the decoders. A pass looks at the exits of a plan; where the choice made there
is sure enough for every row, the logits made there are the answer, and the rows wait. The next pass that goes deeper
takes them along through the layers they have not seen, so that weights are read once and every key and value in the
cache ends up what it would have been (EE-LLM, arXiv 2312.04916, catches up alike). What the whole model would have
chosen for them is then known: the audit, by which an exit that does not keep its word is closed.

A set's rows leave together. L rows of a pass, S slots, E model dim, V vocabulary, C tokens an exit chooses among.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.decode.exit_account import Account
from tempo_mlx.decode.exit_plan import OpenExit, Plan
from tempo_mlx.model._mlx import mx
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.exit_cache import AUDITED_EVERY, MOST_WAITING, ExitCache, WaitingRows
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
        """context: tokens of the text so far, which an exit may always choose."""
        self.model, self.plan = model, plan
        self.architecture, self.info = model.architecture, model.info
        self.layers = model.architecture.num_hidden_layers
        self.account = Account(self.layers)
        self._to_audit: list[tuple[Any, Ints, OpenExit]] = []
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
        rows = self.enter(tokens, positions, bias, cache)
        behind = len(cache.waiting) - 1
        for item in self.plan.open:
            if behind >= MOST_WAITING and item.layer < self.layers - 1:
                continue
            self.deepen(cache, item.layer + 1)
            start = time.perf_counter()
            found = item.read(rows.x)
            self.account.looked(time.perf_counter() - start)
            if (found.confidence >= item.least).all():
                return self.leave(
                    cache, rows, item, found.tokens[found.logits.argmax(axis=1)], self.spread(found)
                )
        self.deepen(cache, self.layers)
        full = self.head(rows.x)
        self.settle(cache)
        self.account.passed(self.layers)
        return Forward(np.array(full, copy=False))

    def enter(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: ExitCache,
    ) -> WaitingRows:
        """Append rows that have run no layer yet."""
        return cache.enter(self.model.embedded(tokens), np.asarray(positions, np.int64), bias)

    def deepen(self, cache: ExitCache, stop: int) -> None:
        """Run the newest rows through every layer before `stop`, and with them all that wait on the way."""
        while cache.waiting and (low := cache.waiting[-1].level) < stop:
            joined = [rows for rows in cache.waiting if rows.level == low]
            upto = min([stop, *(rows.level for rows in cache.waiting if rows.level > low)])
            start = time.perf_counter()
            x = mx.concatenate([rows.x for rows in joined]) if len(joined) > 1 else joined[0].x
            x, _ = self.model.run_layers(
                x, self.model.rows(*cache.seen_by(joined), cache.inner), cache.inner, low, upto
            )
            mx.eval(x)
            self.account.ran(upto - low, len(joined) == 1, time.perf_counter() - start)
            parts = mx.split(x, np.cumsum([len(rows.positions) for rows in joined])[:-1].tolist())
            for rows, part in zip(joined, parts, strict=True):
                rows.x, rows.level = part, upto

    def leave(
        self, cache: ExitCache, rows: WaitingRows, item: OpenExit, choices: Ints, logits: Float32s
    ) -> Forward:
        """Let the newest rows wait where they are, or write at once what later rows would see of them."""
        if self.account.left < AUDITED_FIRST or self.account.left % AUDITED_EVERY == 0:
            rows.left = (item, choices)
        self.account.left += 1
        self.account.passed(item.layer + 1)
        item.left += len(choices)
        if rows.level == self.layers:
            self.settle(cache)
        elif self.plan.propagate:
            self.model.remember(
                rows.x, self.model.rows(*cache.seen_by([rows]), cache.inner), cache.inner, rows.level
            )
            cache.waiting.remove(rows)
        return Forward(logits, None, np.full(len(choices), item.layer))

    def settle(self, cache: ExitCache) -> None:
        """All waiting rows have run every layer: they are ordinary rows now, and those that left are to be audited."""
        self._to_audit += [
            (rows.x, rows.left[1], rows.left[0]) for rows in cache.waiting if rows.left is not None
        ]
        cache.waiting = []
        if sum(len(choices) for _, choices, _ in self._to_audit) >= AUDITED_TOGETHER:
            self.audit()

    def audit(self) -> None:
        """Hold the choices made at exits against the whole model's, and close exits that fell short."""
        if not self._to_audit:
            return
        if not self.account.heads:
            self.head(self._to_audit[0][0][:1])  # or it would be unknown what the others saved
        start = time.perf_counter()
        best = np.array(self.model.logits(mx.concatenate([x for x, _, _ in self._to_audit])).argmax(axis=-1))
        at = 0
        for _, choices, item in self._to_audit:
            item.note(best[at : at + len(choices)] == choices)
            at += len(choices)
        self._to_audit = []
        self.account.audited(time.perf_counter() - start)

    def head(self, x: Any) -> Any:
        """The logits of all the vocabulary."""
        start = time.perf_counter()
        logits = self.model.logits(x)
        mx.eval(logits)
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

    def spread(self, found: Any) -> Float32s:
        """Logits (L, C) of an exit as logits (L, V)."""
        if len(found.tokens) == self.architecture.vocab_size:
            logits: Float32s = found.logits
            return logits
        least = found.logits.min(axis=1, keepdims=True) - np.float32(FLOOR)
        logits = np.repeat(least, self.architecture.vocab_size, axis=1)
        logits[:, found.tokens] = found.logits
        return logits
