"""Superposed decoding: TEMPO's own loop.

One `advance` is one step, in seven: run the newest set's rows, prune what they show to be unused, combine them into one
distribution, select the next set from it, screen its candidates, append it to the lattice, record it. What decides is
in `Rules` (rules.py); what changes the lattice and the cache is here, where you can see it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.arrays import Float32s, Floats, Ints
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.ahead import Ahead, ahead_of
from tempo_mlx.decode.combine import combine, combine_without, edges, shares
from tempo_mlx.decode.decoder import Decoder, DecoderSpec, Setup
from tempo_mlx.decode.pruning import AttentionHistory, PruneContext, Pruned, open_sets, settle
from tempo_mlx.decode.rules import Rules, make_rules
from tempo_mlx.decode.schedules import Schedule
from tempo_mlx.decode.selection import draw
from tempo_mlx.decode.step import Edge, Member, Rejected, Step
from tempo_mlx.decode.strategies import screen, shows_attention
from tempo_mlx.errors import ConfigError, RunFileError
from tempo_mlx.lattice import Lattice
from tempo_mlx.model.forward import Attention, Forward


class Tempo(Decoder):
    """The state of one superposed run (one token a step under the plain decoder). `copy` it to branch or to undo."""

    def __init__(self, setup: Setup, rules: Rules) -> None:
        """Runs the prompt. Raises PromptError, and Interrupted; ConfigError for what the model cannot do."""
        super().__init__(setup)
        check_states(self.model.architecture, self.config, rules)
        self._rules = rules
        self.ahead = ahead_of(setup, rules, self.control)
        self.pinned: frozenset[int] = frozenset()  # slots that no rule removes
        self.spared: frozenset[int] = frozenset()  # those that one would have removed
        self.first = self.control(self.run_prompt(setup), [[]])  # of one row
        self.rewind()

    def rewind(self) -> None:
        """To where the prompt has been run, and nothing else; the cache is the caller's to bring there."""
        self.steps: list[Step] = []
        self.lattice = Lattice(self.prompt_length)
        self.members: dict[int, Member] = {}  # alive, by slot
        # slots, their posterior and attention
        self.evidence: tuple[Ints, Floats, Float32s | None] | None = None
        self.history = (
            AttentionHistory(self.config.pruning_window)
            if self.rules.prune and self.rules.prune.needs_attention
            else None
        )
        self.log_probs, self.masked = (
            self.first.tempered,
            self.first.masked,
        )  # (k, V), or of fewer columns (k, n)
        self.columns: Ints | None = None  # (n,) the tokens that those are of, ascending
        self.weights: Floats = np.ones(1)  # (k,) of the rows of log_probs
        if self.ahead is not None:
            self.ahead.queued.clear()
        self.waiting: list[int] = []  # the newest set's tokens, in slot order, until its rows are run
        self.exit_layer: int | None = None  # where the rows that log_probs are of left the model
        self.probed: Forward | None = None  # the newest set's rows, where screening it has run them already

    @property
    def rules(self) -> Rules:
        """Not to be replaced under way: the run's file would not say so. See `Functions`."""
        return self._rules

    @property
    def text(self) -> list[int]:
        """The best token of every set: the text, where there is but one."""
        return [step.tokens[0].id for step in self.steps]

    @property
    def threshold(self) -> Schedule | None:
        """What sets are selected by, if by a threshold."""
        return self._rules.threshold

    @property
    def finished(self) -> bool:
        """Whether the most probable token of the newest set ends the text."""
        return bool(self.steps) and self.steps[-1].tokens[0].id in self.eos_ids

    @property
    def slots(self) -> int:
        return self.lattice.size - len(self.waiting)

    def advance(self) -> Step:
        """One step. The newest set's rows are run first, so that a run's last set never is."""
        ran = self.run()
        removed = self.prune(ran)
        probabilities = self.combine()
        tokens = self.select(probabilities)
        kept, rejected = self.screen(tokens, probabilities)
        step = self.append(kept, probabilities)
        step.rejected, step.removed = rejected, removed
        return self.record(step)

    def run(self) -> bool:
        """Forward the newest set, all members in one pass, and note what it shows of earlier sets; False where that has
        been done.
        """
        if not self.waiting:
            return False
        mass = self.run_all() if self.ahead is None else self.read(self.ahead)
        self.weights = self.lattice.weights[-len(self.waiting) :]
        self.waiting = []
        lattice = self.lattice
        earlier = slice(None, len(lattice.slots) - len(lattice.newest))
        attention = None if mass is None else mass[:, lattice.prompt_length :].mean(axis=0)[earlier]
        self.evidence = lattice.slots[earlier], lattice.posterior()[earlier], attention
        if self.history is not None and mass is not None:
            self.history = self.history.record(lattice, mass)
        return True

    def run_all(self) -> Float32s | None:
        """Have all of the newest rows' distributions, and the attention mass where it is wanted."""
        texts = [self.text] * len(self.waiting) if self.control.reads_texts else []
        self.control.ahead(texts)
        # A set that was probed is run again where a reader went back, and shows the same.
        seen = self.history is not None or shows_attention(self.rules.screen, self.config, self.steps[-1])
        forward = self.probed or self.forward(self.lattice, self.waiting, attention=seen)
        assert forward.logits is not None
        self.probed = None
        self.exit_layer = forward.left_at
        rows = self.control(forward.logits, texts)
        self.log_probs, self.masked, self.columns = rows.tempered, rows.masked, None
        return forward.attention_mass

    def read(self, ahead: Ahead) -> Float32s | None:
        """Have the best of the newest rows' mixture, and the attention mass where it is wanted."""
        found = ahead.read(self)
        self.log_probs, self.columns = found.log_probs, found.tokens
        return found.attention_mass

    def forward(self, lattice: Lattice, tokens: Sequence[int], attention: Attention) -> Forward:
        """Run the newest set of `lattice` (tokens in slot order) and append its rows to the cache."""
        positions, bias, parents = self.seen_from(lattice)
        return self.model.forward(tokens, positions, bias, self.cache, parents=parents, attention=attention)

    def seen_from(self, lattice: Lattice) -> tuple[Ints, Float32s, Float32s | None]:
        """The newest set's positions (k,), bias (k, S), and what its rows continue (k, S)."""
        config, count = self.config, len(lattice.newest)
        if config.custom_rope:
            positions = np.full(count, lattice.prompt_length + lattice.num_sets - 1)
        else:
            positions = lattice.newest  # the ablation: each slot its own position
        bias = lattice.bias(config.attend, config.allow_intraset_token_visibility)
        return positions, bias, self.parents(lattice)

    def parents(self, lattice: Lattice) -> Float32s | None:
        """What the newest set's rows continue, where layers keep states."""
        return lattice.parents(self.config.carry) if self.model.architecture.recurrent else None

    def prune(self, ran: bool) -> tuple[int, ...]:
        """Weigh the open sets by the rows just run, if any were, and remove what the rule names; returns the removed
        slots.
        """
        pruned = self.weigh() if ran else []
        slots = tuple(entry.slot for entry in pruned)
        self.note_evidence(slots)
        for entry in pruned:
            member = self.members[entry.slot]
            member.removed_after, member.removed_why = self.lattice.num_sets - 1, entry.why
        self.drop(slots)
        newest = self.lattice.num_sets - 1
        first = newest if self.rules.prune is None else min(newest, newest + 1 - self.config.pruning_window)
        self.cache.settle(self.prompt_length + int((self.lattice.sets < first).sum()))  # no longer open
        return slots

    def weigh(self) -> list[Pruned]:
        """What is to be removed, and why, by the rows just run."""
        rule, newest = self.rules.prune, self.lattice.num_sets - 1
        if rule is None:
            return []
        views = open_sets(self.lattice, self.members, self.config.pruning_window, self.history)
        context = PruneContext(newest, self.rules.pruning_threshold(newest), views)
        named = rule(context)
        self.spared |= self.pinned & {entry.slot for entry in named}
        named = [entry for entry in named if entry.slot not in self.pinned]
        return settle(context, named, self.config.complete_removal_mode)

    def drop(self, slots: Sequence[int]) -> None:
        """Let lattice and cache go on without these alive members of earlier sets."""
        if slots:
            for slot in slots:
                del self.members[slot]
            self.cache.keep(self.lattice.remove(slots))

    def combine(self) -> Float32s:
        """The next distribution, (V,) or of the columns there are."""
        return combine(self.log_probs, self.weights, self.config.combine)

    def select(self, probabilities: Float32s) -> Ints:
        """The next set's tokens, best first, as columns of what is known of them."""
        index = len(self.steps)
        forced = self.guide(self.text) if self.guide else None
        if forced is not None:
            return np.array([forced])
        if self.columns is not None and self.rules.sampled:
            return np.zeros(1, np.int64)
        excluded = list(self.excluded(index))
        columns = excluded
        if self.columns is not None:  # a device may have given none of them
            columns = np.flatnonzero(np.isin(self.columns, excluded)).tolist()
        eligible = probabilities
        if excluded:
            eligible = combine_without(self.log_probs, self.weights, self.config.combine, columns)
            if not self.rules.sampled and not np.delete(probabilities, columns).any():
                return np.array([eligible.argmax()])  # all others underflowed: no rule can tell them apart
        if self.rules.sampled:
            return np.array([draw(eligible, self.place(index))])
        return self.rules.select(probabilities, index, columns)

    def place(self, index: int) -> float:
        """Where in its distribution a step draws, 0..1: by seed and step alone, wherever a run was gone on with."""
        random = np.random.PCG64(self.config.seed)
        random.advance(index)
        return float(np.random.Generator(random).random())

    def screen(self, tokens: Ints, probabilities: Float32s) -> tuple[Ints, tuple[Rejected, ...]]:
        """Those of the selected tokens (best first) that join the set, and those that do not."""
        dropped, self.probed = screen(self, self.rules.screen, tokens, probabilities)
        rejected = (Rejected(token, float(probabilities[token]), why) for token, why in dropped.items())
        return np.array([token for token in tokens.tolist() if token not in dropped]), tuple(rejected)

    def extend(
        self, lattice: Lattice, tokens: Sequence[int], probabilities: Float32s
    ) -> tuple[list[int], list[float]]:
        """Append a set (slot order) to `lattice`: its slots and its forward weights."""
        if not tokens:
            return [], []
        weights = shares(probabilities[list(tokens)])
        posterior = edges(self.log_probs, self.weights, tokens)[0] if lattice.num_sets else None
        return lattice.append(weights, posterior).tolist(), weights.tolist()

    def append(self, chosen: Ints, probabilities: Float32s) -> Step:
        """Give the tokens that do not end the text a slot each, in ascending probability, and record the set.

        chosen: their columns, which are the tokens themselves where all are known.
        """
        index = len(self.steps)
        parents = self.lattice.newest.tolist() if index else []
        posterior, forward = edges(self.log_probs, self.weights, chosen)  # (k, m) each, columns best first
        tokens = chosen if self.columns is None else self.columns[chosen]
        named = dict(zip(chosen.tolist(), tokens.tolist(), strict=True))
        kept = [column for column in reversed(named) if named[column] not in self.eos_ids]
        slots, weights = self.extend(self.lattice, kept, probabilities)
        places = dict(zip(kept, zip(slots, weights, strict=True), strict=True))
        members = []
        for number, (column, token) in enumerate(named.items()):
            slot, weight = places.get(column, (None, None))
            between = zip(parents, posterior[:, number].tolist(), forward[:, number].tolist(), strict=False)
            member = Member(
                token,
                float(probabilities[column]),
                slot,
                weight,
                tuple(Edge(*e) for e in between),
                position=None if self.config.custom_rope else slot,
            )
            if slot is not None:
                self.members[slot] = member
            members.append(member)
        self.waiting = [named[column] for column in kept]
        return Step(
            step=index,
            position=self.lattice.prompt_length + index,
            threshold=None if self.threshold is None else self.threshold(index),
            residual_probability=1.0 - sum(m.probability for m in members),
            tokens=tuple(members),
            exit_layer=self.exit_layer,
            masked=self.masked,
        )

    def record(self, step: Step) -> Step:
        """Keep a step that is complete; where the model chooses on its device, that goes on with it."""
        super().record(step)
        if self.ahead is not None:
            self.ahead.start(self)
        return step

    def note_evidence(self, slots: Iterable[int] | None = None) -> None:
        """Write the last posterior and attention of these slots (all alive ones by default) into their records."""
        if self.evidence is None:
            return
        known, posterior, attention = self.evidence
        for slot in self.members if slots is None else slots:
            column = int(np.searchsorted(known, slot))
            if column < len(known) and known[column] == slot:
                self.members[slot].posterior = float(posterior[column])
                self.members[slot].attention = None if attention is None else float(attention[column])

    def copy(self) -> Tempo:
        """An independent state; the arrays are shared until written."""
        other = copy.copy(self)
        other.cache, other.lattice = self.cache.copy(), copy.copy(self.lattice)
        other.steps = copy.deepcopy(self.steps)
        other.ahead = None if self.ahead is None else self.ahead.copy()
        slotted = (m for s in other.steps for m in s.tokens if m.slot is not None)
        other.members = {m.slot: m for m in slotted if m.slot in self.members}
        return other

    def shed(self) -> None:
        """Let go of what the next run computes anew, and is large."""
        if self.waiting:
            self.log_probs = self.log_probs[:0]

    # -- going back

    def enter(self, record: Step) -> None:
        """Append a recorded set: the same weights, edges and slots as when it was chosen. Raises RunFileError."""
        kept = sorted((m for m in record.tokens if m.slot is not None), key=lambda m: m.slot or 0)
        if kept:
            parents = np.array([[edge.posterior for edge in m.parents] for m in kept]).T
            slots = self.lattice.append([m.weight or 0.0 for m in kept], parents if record.step else None)
            if slots.tolist() != [m.slot for m in kept]:
                raise RunFileError(f"The slots of step {record.step} do not follow those before it.")
            self.members.update({int(m.slot): m for m in kept if m.slot is not None})
        self.waiting = [m.id for m in kept]
        self.steps.append(record)

    def replay(
        self, records: Sequence[Step], known: Callable[[Ints, Float32s | None], None] | None = None
    ) -> Iterator[None]:
        """Take over recorded sets, one a turn, and remove what was removed once each had been run.

        The last one's rows are left to be run where it removed nothing. known: appends the rows of these slots, and
        what they continue, to the cache; without it they are run again, all but the last set's.
        """
        removed: dict[int, list[int]] = {}
        for member in (member for record in records for member in record.tokens):
            if member.removed_after is not None and member.slot is not None:
                removed.setdefault(member.removed_after, []).append(member.slot)
        for record in records:
            self.enter(record)
            if record is not records[-1] and known is not None:
                known(self.lattice.newest, self.parents(self.lattice))
                self.waiting = []
            elif record is not records[-1] or record.step in removed:
                self.run()
            self.drop([slot for slot in removed.get(record.step, ()) if slot in self.members])
            yield

    def at(self, step: int) -> Tempo:
        """This run as it was before set `step` was chosen, the rows that it is chosen from run anew.

        For a cache that keeps the rows of removed members (sessions/arena.py).
        """
        other = self.copy()
        records = other.steps[:step]
        other.rewind()
        other.cache.truncate(self.prompt_length)
        for _ in other.replay(records, known=other.cache.restore):
            pass
        other.run()
        for member in (member for record in records for member in record.tokens):
            if member.removed_after is None or member.removed_after >= step:
                member.posterior = member.attention = member.removed_after = member.removed_why = None
        return other


def check_states(a: Architecture, config: GenerateConfig, rules: Rules) -> None:
    """Raises ConfigError for settings that mean nothing where layers keep states instead of slots."""
    if a.recurrent and config.attend in ("all", "weighted"):
        raise ConfigError(
            f"attend {config.attend} means nothing to a {a.family} model, whose layers keep a state that rows "
            "continue; choose lineage or best."
        )
    if a.attention is None and rules.prune is not None and rules.prune.needs_attention:
        raise ConfigError(
            f"A {a.family} model has no attention to prune by; choose --pruning-signal posterior."
        )


def superposed(setup: Setup) -> Tempo:
    return Tempo(setup, make_rules(setup.config, setup.functions))


def plain(setup: Setup) -> Tempo:
    return Tempo(setup, make_rules(setup.config, setup.functions, single=True))


SUPERPOSED = DecoderSpec(
    "superposed",
    superposed,
    lattice=True,
    editable=True,
    log_probs=True,
    functions=("prune", "select", "schedule"),
)
PLAIN = DecoderSpec(
    "plain", plain, lattice=True, editable=True, log_probs=True, functions=("logits_processors",)
)
