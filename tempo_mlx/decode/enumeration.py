"""Distinct texts with their exact probabilities, and how much is not looked at: `--decoder enumerate`.

leaves.py says in what order texts are followed; here their rows are run, up to `rows` in a pass, in one cache in which
each sees the prompt and its own ancestors. Rows that no path which may still be wanted goes on from leave the cache.
Should one be wanted after all, it is run again.

Shapes: L rows of one forward pass, n rows in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s, Floats
from tempo_mlx.decode.combine import log_probabilities, shares
from tempo_mlx.decode.control import Controlled
from tempo_mlx.decode.decoder import Decoder, DecoderSpec, Reading, Setup
from tempo_mlx.decode.leaves import Agenda, Path, Place, line, masses
from tempo_mlx.decode.selection import entropy, make_selector
from tempo_mlx.decode.step import Edge, Member, Step
from tempo_mlx.decode.tree import reading_of
from tempo_mlx.lattice import ancestor_bias, ancestor_parents

KEPT_PATHS = 256  # of which rows stay in the cache, where no number of leaves says how many may be wanted
KEPT_ROWS = 8192  # unless max_cache_tokens says how many slots there may be
TIDY = 64  # rows without a use from which on they leave the cache


class Enumeration(Decoder):
    """The state of one enumeration. A step is a pass: the tokens that came to be known by it."""

    def __init__(self, setup: Setup) -> None:
        """Runs the prompt. Raises PromptError, and Interrupted."""
        super().__init__(setup)
        config = self.config
        self.agenda = Agenda(
            config.leaves,
            config.coverage,
            config.merge_length,
            self.ends,
            lambda place: setup.reads(place.token_ids()),
            config.warmup,
            config.confidence_window,
            config.leaf_order == "doubt",
        )
        self.select = make_selector(config, self.model.architecture.vocab_size)
        self.rows: list[Place] = []  # in the cache, after the prompt
        self.parents: list[int] = []  # (n,) of each the row before it in its text; -1 for the prompt
        self.passes = self.rows_run = 0
        self.tidy_at = TIDY  # so many rows
        self.most_slots = self.prompt_length
        self.paths = list(self.agenda.followed)
        self.after = self.control(self.run_prompt(setup), [[]])  # the tips of `paths`: L rows

    @property
    def finished(self) -> bool:
        return self.agenda.done

    @property
    def length(self) -> int:
        return 0

    @property
    def full(self) -> bool:
        return self.config.max_passes is not None and self.passes >= self.config.max_passes

    @property
    def slots_next(self) -> int:
        """What the heaviest path takes: of all others the rows can leave the cache."""
        return self.prompt_length + max((path.tip.length for path in self.paths[:1]), default=0)

    def advance(self) -> Step:
        """One pass over the newest tokens of the paths that are followed; the first has the prompt's to go by."""
        if self.steps:
            self.paths, self.after = self.run(self.paths)
        for path, known, tempered in zip(self.paths, masses_of(self.after), self.after.tempered, strict=True):
            self.learn(path, known, tempered)
        self.agenda.settle()
        self.paths = self.agenda.next(self.config.rows)
        fresh = sorted(self.agenda.fresh, key=lambda place: place.log_prob)
        self.agenda.fresh = []
        slots = {each.number: self.prompt_length + each.number for place in fresh for each in line(place)}
        return self.record(self.step_of(len(self.steps), fresh, slots, {}, len(self.paths)))

    def learn(self, path: Path, masses: Floats, tempered: Float32s) -> None:
        """What may follow the tip of a path. masses (V,): the model's; tempered (V,): what is chosen from."""
        chances = np.exp(tempered)
        kept = self.select(chances, path.tip.length, self.excluded(path.tip.length))
        if self.config.branch_entropy and entropy(chances) < self.config.branch_entropy:
            kept = kept[:1]
        found = masses[kept]  # what underflowed is kept only where nothing else may follow
        logs = np.log(np.maximum(found, np.finfo(np.float64).tiny))
        self.agenda.learn(path, kept, logs, 1.0 - float(found.sum()))

    def ends(self, place: Place) -> bool:
        """Whether a text ends here: by its token, a stop string, or its length."""
        if place.token in self.eos_ids or (self.stops is not None and self.stops(place.back())):
            place.finished = True
        context = self.model.architecture.max_position_embeddings - self.prompt_length
        return place.finished or place.length >= min(self.config.max_tokens, context)

    # -- the cache

    def run(self, paths: Sequence[Path]) -> tuple[list[Path], Controlled]:
        """What may follow the tips (L rows) of the paths, of as many as there is room for.

        Rows before a tip that have left the cache are run again.
        """
        limit = self.config.max_cache_tokens
        most = KEPT_ROWS if limit is None else limit - self.prompt_length
        if len(self.rows) >= self.tidy_at or len(self.rows) + len(self.missing(paths)) > most:
            self.tidy(most)
        able = list(paths)
        while len(able) > 1 and len(self.rows) + len(self.missing(able)) > most:
            able.pop()
        new = self.missing(able)
        texts = [path.tip.token_ids() for path in able] if self.control.reads_texts else []
        self.control.ahead(texts)
        logits = self.forward(list(new.values()))
        rows_of = [(path.tip.row or 0) - len(self.rows) + len(new) for path in able]
        return able, self.control(logits[rows_of], texts)

    def missing(self, paths: Sequence[Path]) -> dict[int, Place]:
        """The rows up to the tips of the paths that are not in the cache, by number; parents first."""
        new: dict[int, Place] = {}
        for path in paths:
            rows = [place for place in line(path.tip) if place.row is None and place.length]
            new |= {place.number: place for place in reversed(rows)}
        return new

    def forward(self, new: Sequence[Place]) -> Float32s:
        """One pass over new rows; the logits (L, V) after them."""
        for place in new:
            place.row = len(self.rows)
            self.rows.append(place)
            self.parents.append(row_before(place))
        count = len(new)
        bias = np.zeros((count, self.prompt_length + len(self.rows)), np.float32)
        bias[:, self.prompt_length :] = ancestor_bias(self.parents, count)
        forward = self.model.forward(
            [place.token for place in new],
            np.array([self.prompt_length + place.length - 1 for place in new]),
            bias,
            self.cache,
            parents=ancestor_parents(self.parents, count, self.prompt_length),
        )
        assert forward.logits is not None
        self.passes += 1
        self.rows_run += count
        self.most_slots = max(self.most_slots, len(self.cache))
        return forward.logits

    def tidy(self, most: int) -> None:
        """Let rows leave the cache that the heaviest paths, with all of theirs at most so many, do not go on from."""
        needed: set[int] = set()
        for place in self.agenda.pending(KEPT_PATHS):
            rows = {each.number for each in line(place) if each.length}
            if needed and len(needed | rows) > most:
                break
            needed |= rows
        staying = [place for place in self.rows if place.number in needed]
        indices = np.array([place.row for place in staying], np.int64)
        self.cache.keep(np.concatenate([np.arange(self.prompt_length), self.prompt_length + indices]))
        for place in self.rows:
            place.row = None
        self.rows, self.parents = staying, []
        for row, place in enumerate(staying):
            place.row = row
            self.parents.append(row_before(place))
        self.tidy_at = len(self.rows) + TIDY

    # -- the record

    def readings(self) -> list[Reading]:
        """The leaves, in order."""
        paths = self.agenda.outcome()
        leaves = [path for path in paths if path.ended == "leaf"]
        return [
            replace(reading_of(path.tip), branch=number)
            for number, path in enumerate(leaves or [path for path in paths if not path.ended])
        ]

    def statistics(self, token_text: Callable[[int], str]) -> dict[str, Any]:
        """For the run file: probabilities of all texts, and what it took. most_slots: held at once."""
        found = masses(self.agenda.outcome())
        return {**vars(found), "passes": self.passes, "rows": self.rows_run, "most_slots": self.most_slots}

    def recorded(self) -> list[Step]:
        """The tree by the length of its texts: step t has all tokens that a text has in place t."""
        layers: list[dict[int, Place]] = []
        branches: dict[int, int] = {}
        for number, path in enumerate(self.agenda.outcome()):
            for place in line(path.tip):
                branches.setdefault(place.number, number)
            layers += [{} for _ in range(path.tip.length - len(layers))]
            for place in line(path.tip):
                if place.length:
                    layers[place.length - 1][place.number] = place
        slots: dict[int, int] = {}
        steps: list[Step] = []
        rows = 0
        for layer in layers:
            places = sorted(layer.values(), key=lambda place: place.log_prob)
            going = [place.number for place in places if not place.finished]
            first = self.prompt_length + len(slots)
            slots |= {number: first + index for index, number in enumerate(going)}
            steps.append(self.step_of(len(steps), places, slots, branches, rows))
            rows = len(going)
        return steps

    def step_of(
        self,
        index: int,
        places: Sequence[Place],
        slots: Mapping[int, int],
        branches: Mapping[int, int],
        rows: int,
    ) -> Step:
        """Places, by rising probability of their texts, as a step. rows: that they follow."""
        weights = iter(shares([place.probability for place in places if not place.finished]).tolist())
        members = []
        for place in places:
            before = place.parent
            edges: tuple[Edge, ...] = ()
            if isinstance(before, Place) and before.length:
                edges = (Edge(slots[before.number], 1.0, place.probability),)
            own = None if place.finished else slots[place.number], None if place.finished else next(weights)
            position = self.prompt_length + place.length - 1
            elsewhere = None if position == self.prompt_length + index else position
            branch = branches.get(place.number)
            members.append(
                Member(place.token, place.probability, *own, edges, branch=branch, position=elsewhere)
            )
        by_threshold = self.config.selection == "threshold"
        return Step(
            step=index,
            position=self.prompt_length + index,
            threshold=self.config.threshold if by_threshold else None,
            residual_probability=1.0 - sum(member.probability for member in members) / max(rows, 1),
            tokens=tuple(reversed(members)),
        )


def masses_of(after: Controlled) -> Floats:
    """The model's probabilities (L, V); what must not come next has its own, too. Each row sums to 1."""
    full = after.tempered if after.logits is None else log_probabilities(after.logits)
    masses: Floats = np.exp(full).astype(np.float64)
    masses /= masses.sum(axis=1, keepdims=True)
    return masses


def row_before(place: Place) -> int:
    before = place.parent
    assert isinstance(before, Place)
    return -1 if before.row is None else before.row


ENUMERATE = DecoderSpec(
    "enumerate", Enumeration, texts="leaves", masses=True, functions=("logits_processors",)
)
