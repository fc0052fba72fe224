"""One cache for all states of a run that one can go back in.

Every state's cache is a `View`: a choice of the arena's rows, the rest of which are masked. A decoder works on it as on
any model, and knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.decode.combine import require_finite
from tempo_mlx.errors import ComputeError, MemoryLimitError, ModelError
from tempo_mlx.lattice import Lattice
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.forward import Attention, Forward, Logits, Model
from tempo_mlx.model.states import Journal, States
from tempo_mlx.model.visibility import causal_bias

Top = tuple[Ints, Float32s]  # ids and log-probabilities, best first


def top_tokens(log_probs: Float32s, count: int) -> Top:
    """The `count` most probable tokens of one row (V,)."""
    count = min(count, len(log_probs))
    ids = np.argpartition(log_probs, len(log_probs) - count)[-count:]
    ids = ids[np.lexsort((ids, -log_probs[ids]))]
    return ids.astype(np.int64), log_probs[ids]


class View:
    """A cache that is a choice of an arena's rows. Copying, dropping and truncating cost nothing.

    `rows` (len,): arena rows of the alive slots, in slot order. `known`: arena row of every slot that has been run,
    alive or not; -1 for the others. `states`: of layers that keep some, which are this choice's own; what they are made
    of is the arena's.
    """

    def __init__(self, arena: Arena, states: States | None) -> None:
        self.arena, self.states = arena, states
        self.rows: Ints = np.empty(0, np.int64)
        self.known: Ints = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def positions(self) -> Ints:
        positions: Ints = self.arena.cache.positions[self.rows]
        return positions

    @property
    def nbytes(self) -> int:
        return int(self.arena.cache.nbytes)

    def keep(self, indices: Ints) -> None:
        self.rows = self.rows[indices]
        if self.states is not None:
            self.states.keep(indices)

    def truncate(self, length: int) -> None:
        self.rows = self.rows[:length]
        if self.states is not None:
            self.states.truncate(length)

    def settle(self, length: int) -> None:
        """Nothing: in a session anything may still be removed, or gone back to."""

    def copy(self) -> View:
        other = View(self.arena, None if self.states is None else self.states.copy())
        other.rows, other.known = self.rows, self.known
        self.arena.use(other)
        return other

    def learn(self, lattice: Lattice) -> None:
        """Remember which slots the rows are, for the time after they have been dropped. The newest set may be without
        rows yet.
        """
        prompt = lattice.prompt_length
        slots = np.concatenate([np.arange(prompt), lattice.slots[: len(self) - prompt]])
        known = np.full(int(slots[-1]) + 1, -1)
        known[: len(self.known)] = self.known[: len(known)]
        known[slots] = self.rows
        self.known = known

    def restore(self, slots: Ints, parents: Float32s | None) -> None:
        """Hold the rows of these slots again, after those held, which they continue as `parents` (L, S) says."""
        rows = self.known[slots]
        self.rows = np.concatenate([self.rows, rows])
        if self.states is not None and parents is not None:
            self.states.restore(rows - self.states.first, parents)


class Arena:
    """A model whose caches are `View`s of one cache that only grows, so that going back needs no recomputation.

    What a view does not hold is masked, which means the same as not being there. `top[row]`: the top tokens of what is
    chosen from after that row, once `observe` was shown it. `limit`: most rows; MemoryLimitError beyond it. `compact`
    drops rows that no view needs.
    """

    def __init__(self, model: Model, limit: int, cache: Any = None, count: int = 20) -> None:
        """cache: may hold the beginning of a prompt.

        Raises ModelError for a model whose layers keep states that are not to be had here.
        """
        self.model, self.limit, self.count = model, limit, count
        self.architecture, self.info = model.architecture, model.info
        self.cache: Any = model.new_cache() if cache is None else cache
        self.top: dict[int, Top] = {}
        self.recent: list[ref[View]] = []  # the last is in use; their states are held
        if model.architecture.recurrent and not isinstance(self.cache, Cache):
            raise ModelError(
                f"A session on a {model.architecture.family} model, whose layers keep states, runs on the MLX backend "
                "in one process; leave out --backend torch, or mlx.launch."
            )

    def new_cache(self) -> View:
        states = self.cache.states.copy() if self.architecture.recurrent else None
        if states is not None:
            states.journal, states.pooled = Journal(), True
        return View(self, states)

    def beginning(self) -> View:
        """A view of the rows that the arena was given to begin with."""
        view = self.new_cache()
        view.rows = np.arange(len(self.cache))
        return view

    def use(self, view: View) -> None:
        """Run this view next. Hold its states, and of the others' those of the one before it: a state may be large."""
        self.recent = [*(each for each in self.recent if each() not in (None, view)), ref(view)]
        while len(self.recent) > 2:
            old = self.recent.pop(0)()
            if old is not None and old.states is not None:
                old.states.let_go()

    def embeddings(self, tokens: Sequence[int]) -> Float32s:
        return self.model.embeddings(tokens)

    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: View,
        *,
        logits: Logits = "all",
        attention: Attention = False,
        **rest: Any,
    ) -> Forward:
        start, count, alive = len(self.cache), len(tokens), len(cache.rows)
        if start + count > self.limit:
            raise MemoryLimitError(
                f"The session has reached its {self.limit} cache rows; export it, or start a new one."
            )
        own = np.arange(start, start + count)
        columns = np.concatenate([cache.rows, own])
        wide = bias
        if alive < start:  # some rows are not this view's
            wide = np.full((count, start + count), -np.inf, np.float32)
            wide[:, columns] = causal_bias(count, alive + count) if bias is None else bias
        if cache.states is not None:
            self.cache.states = cache.states
        self.use(cache)
        try:
            out = self.model.forward(
                tokens, positions, wide, self.cache, logits=logits, attention=attention, **rest
            )
            if out.logits is not None:
                require_finite(out.logits)
        except ComputeError:
            if cache.states is None:
                self.cache.truncate(start)
            raise
        cache.rows = columns
        mass = out.attention_mass
        return (
            out if mass is None or alive == start else Forward(out.logits, mass[..., columns], out.exit_layer)
        )

    def observe(self, log_probs: Float32s) -> None:
        """What is chosen from after each of the newest rows (k, V) of the view in use."""
        view = self.recent[-1]()
        assert view is not None
        for row, each in zip(view.rows[-len(log_probs) :].tolist(), log_probs, strict=True):
            self.top[row] = top_tokens(each, self.count)

    def truncate(self, length: int) -> None:
        """Forget the newest rows; no view may hold one of them."""
        self._keep(np.arange(length))
        self.top = {row: top for row, top in self.top.items() if row < length}

    def compact(self, views: Sequence[View]) -> None:
        """Drop every row that none of `views` holds or knows, and renumber."""
        needed = np.unique(
            np.concatenate([a for view in views for a in (view.rows, view.known[view.known >= 0])])
        )
        if len(needed) == len(self.cache):
            return
        self._keep(needed)
        new = {old: index for index, old in enumerate(needed.tolist())}
        self.top = {new[row]: top for row, top in self.top.items() if row in new}
        for view in views:
            view.rows = np.searchsorted(needed, view.rows)
            view.known = np.where(view.known < 0, -1, np.searchsorted(needed, view.known))
            if view.states is not None:
                view.states.rows = view.rows[view.states.first :] - view.states.first

    def _keep(self, rows: Ints) -> None:
        """Drop all rows but these, and of the journal, too, which has one for each row since the prompt."""
        if not self.architecture.recurrent:
            self.cache.keep(rows)
            return
        states, self.cache.states = self.cache.states, None
        self.cache.keep(rows)
        self.cache.states = states
        states.journal.keep(rows[rows >= states.first] - states.first)
