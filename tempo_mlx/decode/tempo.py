"""Superposed decoding: TEMPO's own loop.

One `advance` is one step: run the newest set's rows, prune what they show to be unused, combine the rows into one
distribution, select the next set from it, append it to the lattice. Everything that decides is a pure function of
another module; what changes the lattice and the cache is here, where you can see it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.combine import combine, edges, log_probabilities
from tempo_mlx.decode.prefill import check_prompt, never, prefill
from tempo_mlx.decode.pruning import (
    AttentionHistory,
    PruneContext,
    Pruned,
    PruneRule,
    make_rule,
    open_sets,
    settle,
)
from tempo_mlx.decode.schedules import scheduled
from tempo_mlx.decode.selection import select
from tempo_mlx.decode.step import Edge, Member, Rejected, Step
from tempo_mlx.decode.strategies import coherence, diversity, make_strategy, support_of
from tempo_mlx.lattice import Lattice
from tempo_mlx.model.forward import Attention, Forward, Model

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]


class Tempo:
    """The state of one superposed run (one token a step under the plain decoder). `copy` it to branch or to undo."""

    def __init__(
        self,
        model: Model,
        prompt_ids: Sequence[int],
        config: GenerateConfig,
        *,
        eos_ids: Iterable[int] = (),
        prune: PruneRule | Callable[[PruneContext], Iterable[Pruned]] | None = None,
        cache: Any | None = None,
        interrupted: Callable[[], str | None] = never,
        guide: Callable[[Sequence[int]], int | None] | None = None,
    ) -> None:
        """Runs the prompt; `cache` may hold a prefix of it. Raises PromptError, and Interrupted during prefill.

        guide(token_ids): the one token that must follow the best token of each set so far, or None.
        """
        check_prompt(model, prompt_ids)
        self.model = model
        self.config = config
        self.eos_ids = frozenset(eos_ids)
        by_attention = config.pruning_signal == "attention"
        self.threshold = scheduled(config, config.threshold, "selection")
        self.pruning_threshold = scheduled(
            config, config.attention_threshold if by_attention else config.posterior_threshold, "pruning"
        )
        self.strategy = make_strategy(config)
        self.rule = (
            make_rule(config)
            if prune is None
            else prune
            if isinstance(prune, PruneRule)
            else PruneRule(prune)
        )
        self.history = (
            AttentionHistory(config.pruning_window) if self.rule and self.rule.needs_attention else None
        )
        self.guide = guide
        self.random = np.random.default_rng(config.seed)
        self.cache = model.new_cache() if cache is None else cache
        self.lattice = Lattice(len(prompt_ids))
        self.steps: list[Step] = []
        self.members: dict[int, Member] = {}  # alive, by slot
        self.evidence: tuple[Ints, Floats, Float32s | None] | None = (
            None  # slots, their posterior and attention
        )
        self.log_probs = log_probabilities(
            prefill(model, prompt_ids, self.cache, interrupted), config.temperature
        )
        self.weights: Floats = np.ones(1)  # (k,) of the rows of log_probs (k, V)
        self.waiting: list[int] = []  # the newest set's tokens, in slot order, until its rows are run
        self.exit_layer: int | None = None  # where the rows that log_probs are of left the model
        self.probed: Forward | None = None  # the newest set's rows, where choosing it has run them already
        self.clock = time.perf_counter()

    @property
    def finished(self) -> bool:
        """Whether the most probable token of the newest set ends the text."""
        return bool(self.steps) and self.steps[-1].tokens[0].id in self.eos_ids

    def advance(self) -> Step:
        """One step. The newest set's rows are run first, so that a run's last set never is."""
        removed = self.run_rows() if self.waiting else ()
        probabilities = combine(self.log_probs, self.weights, self.config.combine)  # (V,)
        tokens = self.select(probabilities)
        dropped = self.screen(tokens, probabilities) if self.strategy is not None else {}
        step = self.append(np.array([t for t in tokens.tolist() if t not in dropped]), probabilities)
        step.rejected = tuple(
            Rejected(token, float(probabilities[token]), why) for token, why in dropped.items()
        )
        step.removed = removed
        now = time.perf_counter()
        step.seconds, self.clock = now - self.clock, now
        self.steps.append(step)
        return step

    def run_rows(self) -> tuple[int, ...]:
        """Forward the newest set, all members in one pass; returns the slots that this removed."""
        forward = self.probed or self.forward(self.lattice, self.waiting, attention=self.history is not None)
        assert forward.logits is not None
        self.probed = None
        self.exit_layer = forward.left_at
        self.log_probs = log_probabilities(forward.logits, self.config.temperature)
        self.weights = self.lattice.weights[-len(self.waiting) :]
        self.waiting = []
        return self.prune(forward.attention_mass)

    def forward(self, lattice: Lattice, tokens: Sequence[int], attention: Attention) -> Forward:
        """Run the newest set of `lattice` (tokens in slot order) and append its rows to the cache."""
        config = self.config
        if config.custom_rope:
            positions = np.full(len(tokens), lattice.prompt_length + lattice.num_sets - 1)
        else:
            positions = lattice.newest  # the ablation: each slot its own position
        bias = lattice.bias(config.attend, config.allow_intraset_token_visibility)
        return self.model.forward(tokens, positions, bias, self.cache, attention=attention)

    def prune(self, attention_mass: Float32s | None) -> tuple[int, ...]:
        """Weigh the open sets by the rows just run and remove what the rule names; returns the removed slots."""
        lattice, newest = self.lattice, self.lattice.num_sets - 1
        earlier = slice(None, len(lattice.slots) - len(lattice.newest))
        attention = (
            None
            if attention_mass is None
            else attention_mass[:, lattice.prompt_length :].mean(axis=0)[earlier]
        )
        self.evidence = lattice.slots[earlier], lattice.posterior()[earlier], attention
        if self.rule is None:
            return ()
        window = self.config.pruning_window
        if self.history is not None and attention_mass is not None:
            self.history = self.history.record(lattice, attention_mass)
        context = PruneContext(
            newest, self.pruning_threshold(newest), open_sets(lattice, self.members, window, self.history)
        )
        pruned = settle(context, self.rule(context), self.config.complete_removal_mode)
        if not pruned:
            return ()
        slots = tuple(entry.slot for entry in pruned)
        self.note_evidence(slots)
        for entry in pruned:
            member = self.members.pop(entry.slot)
            member.removed_after, member.removed_why = newest, entry.why
        self.cache.keep(lattice.remove(slots))
        return slots

    def select(self, probabilities: Float32s) -> Ints:
        """The next set's tokens, best first."""
        config, index = self.config, len(self.steps)
        forced = self.guide([step.tokens[0].id for step in self.steps]) if self.guide else None
        if forced is not None:
            return np.array([forced])
        excluded = self.eos_ids if index < config.min_steps else frozenset[int]()
        if config.decoder == "plain" and config.temperature > 0:
            return sample(probabilities, excluded, self.random)
        rule = config.selection
        value = {"min-p": config.min_p, "top-p": config.top_p, "top-k": config.top_k}.get(
            rule, self.threshold(index)
        )
        single = config.decoder == "plain" or config.temperature == 0
        width = 1 if single else int(config.max_parallel_tokens)
        return select(probabilities, rule=rule, value=value, max_width=width, excluded=excluded)

    def screen(self, tokens: Ints, probabilities: Float32s) -> dict[int, str]:
        """Which of the selected tokens (best first) are dropped before they get a slot, and why.

        Coherence runs the candidates' rows to see what they attend to (the probe). Where rows do not see their
        siblings, the survivors' rows are what they would have been alone, and are kept.
        """
        assert self.strategy is not None
        candidates = [t for t in tokens.tolist() if t not in self.eos_ids]
        dropped: dict[int, str] = {}
        if self.strategy.clusters is not None and len(candidates) > 1:
            gone = diversity(self.model.embeddings(candidates), self.strategy.clusters)
            dropped = {candidates[i]: why for i, why in gone.items()}
            candidates = [t for t in candidates if t not in dropped]
        if self.strategy.coherence is None or len(candidates) < 2:
            return dropped
        trial, start = copy.copy(self.lattice), len(self.cache)
        self.extend(trial, candidates[::-1], probabilities)
        probe = self.forward(trial, candidates[::-1], attention="rows")
        assert probe.logits is not None and probe.attention_mass is not None
        support = support_of(probe.attention_mass[:, ::-1], trial.prompt_length)  # best first
        gone = coherence(support, self.strategy.coherence(len(self.steps)))
        dropped.update({candidates[i]: why for i, why in gone.items()})
        if self.config.allow_intraset_token_visibility or not self.config.custom_rope:
            self.cache.truncate(start)  # rows saw the others, or sit where the others moved them: run again
        else:
            rows = np.array([i for i, t in enumerate(candidates[::-1]) if t not in dropped])
            slots = np.concatenate([np.arange(start), start + rows])
            self.cache.keep(slots)
            self.probed = Forward(probe.logits[rows], probe.attention_mass[:, rows][:, :, slots].mean(axis=1))
        return dropped

    def extend(
        self, lattice: Lattice, tokens: Sequence[int], probabilities: Float32s
    ) -> tuple[list[int], list[float]]:
        """Append a set (slot order) to `lattice`: its slots and its forward weights."""
        if not tokens:
            return [], []
        weights = probabilities[list(tokens)].astype(np.float64)
        weights /= weights.sum()
        posterior = edges(self.log_probs, self.weights, tokens)[0] if lattice.num_sets else None
        return lattice.append(weights, posterior).tolist(), weights.tolist()

    def append(self, tokens: Ints, probabilities: Float32s) -> Step:
        """Give the tokens that do not end the text a slot each, in ascending probability, and record the set."""
        index = len(self.steps)
        parents = self.lattice.newest.tolist() if index else []
        posterior, forward = edges(self.log_probs, self.weights, tokens)  # (k, m) each, columns best first
        kept = [t for t in tokens[::-1].tolist() if t not in self.eos_ids]
        slots, weights = self.extend(self.lattice, kept, probabilities)
        by_token = dict(zip(kept, zip(slots, weights, strict=True), strict=True))
        members = []
        for column, token in enumerate(tokens.tolist()):
            slot, weight = by_token.get(token, (None, None))
            between = zip(parents, posterior[:, column].tolist(), forward[:, column].tolist(), strict=False)
            member = Member(
                token,
                float(probabilities[token]),
                slot,
                weight,
                tuple(Edge(*e) for e in between),
                position=None if self.config.custom_rope else slot,
            )
            if slot is not None:
                self.members[slot] = member
            members.append(member)
        self.waiting = kept
        return Step(
            step=index,
            position=self.lattice.prompt_length + index,
            threshold=self.threshold(index) if self.config.selection == "threshold" else None,
            residual_probability=1.0 - sum(m.probability for m in members),
            tokens=members,
            exit_layer=self.exit_layer,
        )

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
        other.random, other.steps = copy.deepcopy((self.random, self.steps))
        slotted = (m for s in other.steps for m in s.tokens if m.slot is not None)
        other.members = {m.slot: m for m in slotted if m.slot in self.members}
        return other


def sample(probabilities: Float32s, excluded: Iterable[int], random: np.random.Generator) -> Ints:
    """One token drawn from the distribution without the excluded ids."""
    mass = probabilities.astype(np.float64)
    mass[list(excluded)] = 0.0
    cumulative = np.cumsum(mass)
    return np.array([np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")])
