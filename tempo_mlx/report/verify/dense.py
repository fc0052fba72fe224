"""A run as one forward pass over all its tokens, in chunks: rows, positions and bias from the run file alone.

Every member that was run is a row with the position it must have, and its bias is replayed from the recorded parents,
weights and removals. No cache is compacted: who is gone is masked. Only rows that decide something give logits, and
only a chunk's are held at once.

Shapes: N rows, S slots, k rows of a set, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.decode.prefill import CHUNK
from tempo_mlx.decode.score import LOGITS_AT_ONCE
from tempo_mlx.decode.step import RunStep, RunToken
from tempo_mlx.errors import RunFileError
from tempo_mlx.lattice import Lattice, ancestor_bias, ancestor_parents
from tempo_mlx.model.forward import Attention, Forward, Logits, Model
from tempo_mlx.model.rope import follows_length
from tempo_mlx.report.verify.claims import Claims


@dataclass(frozen=True)
class Seen:
    """The slots that a set sees (m,), its own included; the bias of its rows on them, and what they continue (k, m)."""

    slots: Ints
    bias: Float32s
    parents: Float32s


@dataclass(frozen=True)
class DenseRun:
    """N rows in slot order: the prompt's, then those of every set that was run.

    set_ends: slots up to the end of the prompt, and of each set. seen: of each set of a lattice what its rows see;
    parents: of each row of a tree the row before it in its text, -1 in the prompt. removals: of a lattice, after a set.
    """

    tokens: Ints  # (N,)
    positions: Ints  # (N,)
    set_ends: list[int]
    seen: list[Seen]
    parents: Ints
    removals: dict[int, list[int]]

    def bias(self, start: int, stop: int) -> Float32s | None:
        """(stop - start, stop): of rows that are all the prompt's (plain causal: None), or none."""
        prompt = self.set_ends[0]
        if start < prompt:
            return None
        bias = self._scattered(start, stop, -np.inf, [each.bias for each in self.seen])
        bias[:, :prompt] = 0.0
        if not self.seen:
            bias[:, prompt:] = ancestor_bias(self.parents[: stop - prompt], stop - start)
        return bias

    def continued(self, start: int, stop: int) -> Float32s | None:
        """(stop - start, stop): what rows continue, for layers that keep a state; the prompt is a chain (None)."""
        prompt = self.set_ends[0]
        if start < prompt:
            return None
        if not self.seen:
            return ancestor_parents(self.parents[: stop - prompt], stop - start, prompt)
        return self._scattered(start, stop, 0.0, [each.parents for each in self.seen])

    def _scattered(self, start: int, stop: int, rest: float, tables: list[Float32s]) -> Float32s:
        """What sets say of the slots they see, as rows on all slots."""
        found = np.full((stop - start, stop), rest, np.float32)
        for seen, rows, end in zip(self.seen, tables, self.set_ends[1:], strict=False):
            first = end - len(rows)
            if start <= first < stop:
                found[first - start : end - start, seen.slots] = rows
        return found


def dense_run(claims: Claims) -> DenseRun:
    """The rows and who sees whom. Raises RunFileError where an edge is missing."""
    run, config = claims.run, claims.config
    sets = [in_slot_order(step) for step in (run.steps if claims.last_was_run else run.steps[:-1])]
    tokens = [*run.prompt.token_ids, *(token.id for members in sets for token in members)]
    positions = list(range(run.prompt_length))
    for index, members in enumerate(sets):
        own = not config.custom_rope and run.is_lattice
        first = len(positions)
        positions += [first + i if own else run.prompt_length + index for i in range(len(members))]
    ends = np.cumsum([run.prompt_length, *(len(members) for members in sets)]).tolist()
    seen: list[Seen] = []
    parents: list[int] = []
    removals: dict[int, list[int]] = {}
    if run.is_lattice:
        for token in (token for members in sets for token in members):
            if token.removed_after is not None and token.slot is not None:
                removals.setdefault(token.removed_after, []).append(token.slot)
        seen = list(_seen(claims, sets, removals))
    else:
        for members in sets:
            parents += [
                token.parents[0].slot - run.prompt_length if token.parents else -1 for token in members
            ]
    return DenseRun(np.array(tokens), np.array(positions), ends, seen, np.array(parents, np.int64), removals)


def _seen(claims: Claims, sets: list[list[RunToken]], removals: dict[int, list[int]]) -> Iterator[Seen]:
    """Append and remove as the run did."""
    lattice, config = Lattice(claims.run.prompt_length), claims.config
    prompt = np.arange(lattice.prompt_length)
    for index, members in enumerate(sets):
        lattice.append([token.weight or 0.0 for token in members], edges_of(members, lattice, index))
        bias = lattice.bias(config.attend, config.allow_intraset_token_visibility)
        yield Seen(np.concatenate([prompt, lattice.slots]), bias, lattice.parents(config.carry))
        if index in removals:
            lattice.remove(removals[index])


def edges_of(members: list[RunToken], lattice: Lattice, step: int) -> Any:
    """P(i|j) (rows of the previous set, members); None at the first step."""
    if not step:
        return None
    rows = lattice.newest.tolist()
    for token in members:
        if sorted(edge.slot for edge in token.parents) != rows:
            raise RunFileError(f"In the run's step {step}, a token lacks a parent of the previous step.")
    return np.array([[edge.posterior for edge in sorted(token.parents)] for token in members]).T


def in_slot_order(step: RunStep) -> list[RunToken]:
    return sorted(
        (token for token in step.tokens if token.slot is not None), key=lambda token: token.slot or 0
    )


class Alive:
    """Stands in for a cache: which of the dense run's slots a decoder still has in its own."""

    def __init__(self, count: int) -> None:
        self.slots: Ints = np.arange(count)
        self.given = count  # slots ever given out

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def positions(self) -> Ints:
        return self.slots

    def grow(self, count: int) -> None:
        self.slots = np.append(self.slots, np.arange(self.given, self.given + count))
        self.given += count

    def keep(self, indices: Ints) -> None:
        self.slots = self.slots[indices]

    def truncate(self, length: int) -> None:
        self.slots = self.slots[:length]

    def settle(self, length: int) -> None:
        """Nothing: the dense pass knows what is removed when."""


class Replayed:
    """Answers a decoder that makes the run's own choices: as a model, out of the dense pass.

    attention: what the run's rule wants, of all rows. one_by_one: a pass for each set, and not for many at once, since
    candidates that were not kept are to be run on what was there (`attention="rows"`).
    """

    def __init__(self, dense: DenseRun, model: Model, *, attention: bool, one_by_one: bool) -> None:
        self.model, self.dense = model, dense
        self.architecture: Architecture = model.architecture
        self.info = model.info
        self.embeddings = model.embeddings
        self.cache = model.new_cache()  # of the dense pass
        self.alive = Alive(dense.set_ends[0] - 1)
        self.attention: Attention = "rows" if attention else False
        longest = int(dense.positions.max()) + 1
        # Rotary angles may depend on how long the text was then; and a cache may round what it stores, so that the last
        # bit of a sum becomes a step of the rounding.
        follows = any(follows_length(rope, longest) for rope in self.architecture.ropes)
        self.compact = self.architecture.recurrent and bool(dense.removals)
        self.one_by_one = one_by_one or follows or bool(self.info.get("kv_bits"))
        self.answers = self._answers()

    def new_cache(self) -> Alive:
        return self.alive

    def forward(
        self,
        tokens: Any,
        positions: Any,
        bias: Float32s | None,
        cache: Alive,
        *,
        parents: Float32s | None = None,
        logits: Logits = "all",
        attention: Attention = False,
    ) -> Forward:
        """The rows of the prompt's end, then those of one set after the other."""
        if attention == "rows":
            return self._probe(tokens, positions, bias, parents, cache)
        found, mass = next(self.answers)
        cache.grow(len(found))
        if mass is None or not attention:
            return Forward(found)
        seen = mass.mean(axis=1)
        return Forward(
            found, seen if self.compact else seen[:, cache.slots]
        )  # rows see nothing of who is gone

    def _probe(self, tokens: Any, positions: Any, bias: Any, parents: Any, cache: Alive) -> Forward:
        """Run candidates on what is alive, and forget them."""
        before, count = len(self.cache), len(tokens)
        places = np.arange(before) if self.compact else cache.slots
        columns = np.concatenate([places, np.arange(before, before + count)])
        dense = np.full((count, before + count), -np.inf, np.float32)
        dense[:, columns] = bias
        continued = None
        if parents is not None:
            continued = np.zeros_like(dense)
            continued[:, columns] = parents
        forward = self.model.forward(
            tokens, positions, dense, self.cache, parents=continued, attention="rows"
        )
        self.cache.keep(np.arange(before))
        assert forward.attention_mass is not None
        cache.slots = np.append(cache.slots, np.arange(cache.given, cache.given + count))
        return Forward(forward.logits, forward.attention_mass[:, :, columns])

    def _answers(self) -> Iterator[tuple[Float32s, Float32s | None]]:
        """Logits (k, V) of the prompt's last row and of each set; attention (layers, k, S) where that is wanted."""
        ends = self.dense.set_ends
        for start in range(0, ends[0], CHUNK):
            stop = min(start + CHUNK, ends[0])
            last = self._run(start, stop, "last" if stop == ends[0] else "none", False)
            self.cache.settle(stop)
        assert last.logits is not None
        yield last.logits, None
        if self.compact:
            yield from self._compacted()
            return
        first = 0
        while first + 1 < len(ends):
            after = self._together(first)
            out = self._run(ends[first], ends[after], "all", self.attention)
            assert out.logits is not None
            for index in range(first, after):
                rows = slice(ends[index] - ends[first], ends[index + 1] - ends[first])
                yield out.logits[rows], None if out.attention_mass is None else out.attention_mass[:, rows]
            self.cache.settle(ends[after - 1])
            first = after

    def _compacted(self) -> Iterator[tuple[Float32s, Float32s | None]]:
        """Set by set, and what was removed leaves the cache: what a state was made of differs before and after."""
        dense = self.dense
        for index, seen in enumerate(dense.seen):
            rows = slice(dense.set_ends[index], dense.set_ends[index + 1])
            out = self.model.forward(
                dense.tokens[rows],
                dense.positions[rows],
                seen.bias,
                self.cache,
                parents=seen.parents,
                attention=self.attention,
            )
            assert out.logits is not None
            stays = ~np.isin(seen.slots, dense.removals.get(index, []))
            if not stays.all():
                self.cache.keep(np.flatnonzero(stays))
            later = (slot for at, gone in dense.removals.items() if at > index for slot in gone)
            open_from = min([rows.start, *later])
            self.cache.settle(int(np.searchsorted(seen.slots[stays], open_from)))
            yield out.logits, out.attention_mass

    def _together(self, first: int) -> int:
        """The set after the last that is run in one pass with set `first`."""
        ends, a = self.dense.set_ends, self.architecture
        numbers = max(a.vocab_size, a.num_hidden_layers * ends[-1] if self.attention else 0)
        most = max(1, min(CHUNK, LOGITS_AT_ONCE // numbers))
        after = first + 1
        while not self.one_by_one and after + 1 < len(ends) and ends[after + 1] - ends[first] <= most:
            after += 1
        return after

    def _run(self, start: int, stop: int, logits: Logits, attention: Attention) -> Forward:
        dense = self.dense
        bias = dense.bias(start, stop)
        parents = dense.continued(start, stop) if self.architecture.recurrent else None
        return self.model.forward(
            dense.tokens[start:stop], dense.positions[start:stop], bias, self.cache, parents=parents, logits=logits,
            attention=attention,
        )  # fmt: skip
