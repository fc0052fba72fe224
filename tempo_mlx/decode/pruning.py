"""Retroactive pruning: which members of earlier sets go, by what came after them.

After set u has been run, the sets u - window .. u - 1 that still have at least two alive members are *open*.
A `PruneRule` looks at them, all at once (`PruneContext`), and names the members to remove, each with the
score and the threshold it was held against (`Pruned`). `settle` then applies the removal mode where a whole
set would go. Everything here is a function of small arrays; the loop changes lattice and cache.

A rule of your own is a function from a `PruneContext` to `Pruned` entries:

    def stale(context):
        for view in context.sets:
            if context.step - view.step >= 3:  # three sets later only the likeliest reading may stay
                yield from view.under(view.posterior, view.posterior.max(), "stale")

    tempo_mlx.generate(..., prune=stale)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tempo_mlx.arrays import Float32s, Floats, Ints
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.step import Member, Removal
from tempo_mlx.errors import ConfigError
from tempo_mlx.lattice import Lattice
from tempo_mlx.settings import shown

REMOVAL_MODES = ("keep_token", "keep_unattended", "remove_position")
SINKS = 4  # prompt slots at most that soak up attention whatever they say (StreamingLLM, arXiv 2309.17453)
LOCAL_SETS = 5  # "local" attention comes from at most this many following sets


@dataclass(frozen=True)
class Pruned:
    """A member to remove, and why."""

    slot: int
    why: Removal


@dataclass(frozen=True)
class SetView:
    """The k alive members of one open set t, in slot order (ascending probability).

    probabilities, weights (k,): as recorded at selection, not renormalised after removals.
    posterior (k,): the share of all readings, up to the newest set, that use each member; sums to 1.
    attention (n, layers, k): what the rows of set t + 1 + i gave each member (mean over rows and heads,
    attention sinks taken out, see `without_sinks`); the newest last. None unless the rule asked for
    attention.
    """

    step: int
    slots: Ints
    tokens: Ints
    probabilities: Floats
    weights: Floats
    posterior: Floats
    attention: Float32s | None = None

    def under(self, scores: ArrayLike, threshold: ArrayLike, signal: str) -> list[Pruned]:
        """The members whose score (k,) is under the threshold: one, or each member's own (k,)."""
        values = np.asarray(scores, np.float64)
        bounds = np.broadcast_to(np.asarray(threshold, np.float64), values.shape)
        return [
            Pruned(int(self.slots[i]), Removal(signal, float(values[i]), float(bounds[i])))
            for i in np.flatnonzero(values < bounds)
        ]


@dataclass(frozen=True)
class PruneContext:
    """What a rule sees: the open sets, oldest first, after set `step` was run.

    `threshold` is the pruning threshold in force at this step: the signal's own setting, or the value of the
    schedule where `dynamic_target` moves it.
    """

    step: int
    threshold: float
    sets: tuple[SetView, ...]


@dataclass(frozen=True)
class PruneRule:
    """A function that prunes. `needs_attention`: every set's `attention` is filled in (costs a little a
    step)."""

    decide: Callable[[PruneContext], Iterable[Pruned]]
    needs_attention: bool = False

    def __call__(self, context: PruneContext) -> list[Pruned]:
        """Raises ConfigError where the function returns anything else."""
        found = self.decide(context)
        listed = list(found) if isinstance(found, Iterable) else None
        if listed is None or not all(isinstance(entry, Pruned) for entry in listed):
            raise ConfigError(
                f"The prune function returned {shown(found if listed is None else listed)} at step {context.step}; it "
                "must return Pruned entries, such as those of view.under(...), and an empty list for none."
            )
        return listed


def prune_rule(config: GenerateConfig) -> PruneRule | None:
    """The rule the settings ask for; None with retroactive pruning off."""
    if config.pruning_signal is None:
        return None
    if config.pruning_signal == "attention":
        return by_attention(
            relative_threshold=config.relative_threshold,
            num_layers=config.num_layers_to_use,
            multi_scale=config.multi_scale_attention,
            steepness=config.sigmoid_steepness or None,
        )
    if config.pruning_signal == "random":
        return at_random(config.seed, relative=config.relative_posterior)
    rule = by_posterior if config.pruning_signal == "posterior" else by_probability
    return rule(relative=config.relative_posterior)


def by_posterior(*, relative: bool = False) -> PruneRule:
    """Remove members whose posterior, sum_j w_u(j) gamma_j(t, member), is under the threshold.

    Without removals and under `mix` this is the forward-backward posterior: the probability, given the sets
    chosen so far, that a reading drawn from the lattice uses the member. `relative`: the threshold counts in
    units of the largest posterior of the set.
    """
    return _scored("posterior", lambda view: view.posterior, relative)


def by_probability(*, relative: bool = False) -> PruneRule:
    """Remove members by their forward weight, renormalised over the alive members of the set (for ablation).

    The score is on the scale of the posterior, which it would equal if nothing later were evidence.
    """
    return _scored("probability", lambda view: view.weights / view.weights.sum(), relative)


def at_random(seed: int, *, relative: bool = False) -> PruneRule:
    """Remove every member with a probability equal to the threshold (for ablation).

    The score is one uniform number for each (seed, slot), so it stays the same at every step, and a member
    that passed once goes later only if the threshold rises. `relative` counts in units of the set's largest
    draw.
    """

    def draws(view: SetView) -> Floats:
        return np.array([np.random.default_rng([seed, slot]).random() for slot in view.slots.tolist()])

    return _scored("random", draws, relative)


def by_attention(
    *,
    relative_threshold: float = 0.5,
    num_layers: int | None = None,
    multi_scale: bool = True,
    steepness: float | None = 10.0,
) -> PruneRule:
    """Remove members that later rows attend to little: the original's signal, done in full.

    A member is seen in one or several *views*, each one attention value for each later set i = t+1 .. u:

    - plain: a_i, the mean over the last `num_layers` layers (all by default);
    - `multi_scale` adds the mean weighted by depth, linearly from 0.5 for the first of these layers to 1.0
      for the last, and the plain mean over the nearest `LOCAL_SETS` following sets only.

    Its score is the mean of the views' means over i. The threshold is the absolute one, or, if that is
    larger, `relative_threshold` times the mean score of the set's alive members (0: no relative rule).

    With `steepness` the decision is a sigmoid's: every value x of every view is held against its own
    threshold h (absolute or relative as above, among the members' values at i), and votes sigmoid(steepness *
    (x / h - 1)) to keep. The score is then the mean vote, the threshold 0.5. A steep sigmoid counts the later
    sets that attended enough; a flat one decides nearly like the mean.
    """

    def decide(context: PruneContext) -> Iterable[Pruned]:
        for view in context.sets:
            if view.attention is None:
                raise ValueError("pruning by attention needs the attention of every open set")
            values, shares = _attention_views(view.attention, num_layers, multi_scale)
            if steepness is None:
                scores = shares @ values
                bound = max(context.threshold, relative_threshold * float(scores.mean()))
                yield from view.under(scores, bound, "attention")
            else:
                votes = _votes(values, context.threshold, relative_threshold, steepness)
                yield from view.under(shares @ votes, 0.5, "attention")

    return PruneRule(decide, needs_attention=True)


def settle(context: PruneContext, pruned: Iterable[Pruned], mode: str) -> list[Pruned]:
    """What is really removed, in slot order, where a rule would empty a set.

    `keep_token`: the member with the best score stays (ties: the higher probability). `keep_unattended`: all
    go, but the best is marked and remains the set's token in text and paths. `remove_position`: all go.
    Raises ValueError where a rule names a slot that is not open.
    """
    if mode not in REMOVAL_MODES:
        raise ValueError(f"the removal mode is one of {', '.join(REMOVAL_MODES)}, not {mode!r}")
    named = {entry.slot: entry for entry in pruned}
    settled = []
    for view in context.sets:
        entries = [named.pop(slot, None) for slot in view.slots.tolist()]
        hit = [entry for entry in entries if entry is not None]
        if len(hit) == len(entries) and mode != "remove_position":
            best = max(range(len(hit)), key=lambda i: (hit[i].why.score, view.probabilities[i], i))
            marked = Removal(
                hit[best].why.signal, hit[best].why.score, hit[best].why.threshold, unattended=True
            )
            hit[best : best + 1] = [] if mode == "keep_token" else [Pruned(hit[best].slot, marked)]
        settled += hit
    if named:
        raise ValueError(
            f"the pruning rule named slots {sorted(named)}, which are not members of an open set"
        )
    return settled


@dataclass(frozen=True)
class AttentionHistory:
    """The attention that alive slots received, forward by forward, as far back as the window reaches."""

    window: int
    records: tuple[tuple[int, Ints, Float32s], ...] = ()  # set that was run, slots (n,), mass (layers, n)

    def record(self, lattice: Lattice, attention_mass: Float32s) -> AttentionHistory:
        """With the mass (layers, S) that the rows of the newest set, just run, gave the alive slots."""
        newest = lattice.num_sets - 1
        first = int(np.searchsorted(lattice.sets, newest - self.window))
        mass = without_sinks(attention_mass, lattice.prompt_length)[:, lattice.prompt_length + first :]
        entry = (newest, lattice.slots[first:], mass)
        return AttentionHistory(self.window, (*self.records, entry)[-self.window :])

    def received(self, slots: Ints, since: int) -> Float32s:
        """(n, layers, k): what each set after `since`, oldest first, gave the alive slots (k,)."""
        return np.stack(
            [mass[:, np.searchsorted(known, slots)] for step, known, mass in self.records if step > since]
        )


def without_sinks(attention_mass: Float32s, prompt_length: int) -> Float32s:
    """Attention mass (layers, S) as shares of what is left without the first prompt slots, which count as 0.

    A few first slots receive most of the attention whatever they hold; taken out, thresholds mean the same in
    layers with a strong sink and in layers without.
    """
    sinks = min(SINKS, prompt_length)
    rest = 1.0 - attention_mass[:, :sinks].sum(axis=1, keepdims=True)
    result: Float32s = attention_mass / np.maximum(rest, np.finfo(np.float32).eps)
    result[:, :sinks] = 0.0
    return result


def open_sets(
    lattice: Lattice, members: Mapping[int, Member], window: int, history: AttentionHistory | None = None
) -> tuple[SetView, ...]:
    """The open sets of a lattice whose newest set has just been run; `members` by slot."""
    newest = lattice.num_sets - 1
    steps = np.arange(max(0, newest - window), newest)
    starts = np.searchsorted(lattice.sets, steps, "left").tolist()
    ends = np.searchsorted(lattice.sets, steps, "right").tolist()
    posterior = lattice.posterior()
    views = []
    for step, start, end in zip(steps.tolist(), starts, ends, strict=True):
        if end - start < 2:
            continue
        slots = lattice.slots[start:end]
        known = [members[slot] for slot in slots.tolist()]
        views.append(
            SetView(
                step,
                slots,
                np.array([member.id for member in known]),
                np.array([member.probability for member in known]),
                lattice.weights[start:end],
                posterior[start:end],
                None if history is None else history.received(slots, step),
            )
        )
    return tuple(views)


def _scored(signal: str, score: Callable[[SetView], Floats], relative: bool) -> PruneRule:
    def decide(context: PruneContext) -> Iterable[Pruned]:
        for view in context.sets:
            scores = score(view)
            bound = context.threshold * float(scores.max()) if relative else context.threshold
            yield from view.under(scores, bound, signal)

    return PruneRule(decide)


def _attention_views(attention: Float32s, num_layers: int | None, multi_scale: bool) -> tuple[Floats, Floats]:
    """attention (n, layers, k) -> the values (N, k) of all views, and the share (N,) of each in the mean."""
    layers = attention[:, -num_layers:] if num_layers else attention
    views = [layers.mean(axis=1, dtype=np.float64)]  # (n, k)
    if multi_scale:
        depth = np.linspace(0.5, 1.0, layers.shape[1])
        views += [(depth / depth.sum()) @ layers, views[0][:LOCAL_SETS]]
    shares = [np.full(len(view), 1.0 / (len(view) * len(views))) for view in views]
    return np.concatenate(views), np.concatenate(shares)


def _votes(values: Floats, absolute: float, relative: float, steepness: float) -> Floats:
    """How much each value (N, k) speaks for keeping its member: (N, k), 0.5 at the threshold of its row."""
    bounds = np.maximum(absolute, relative * values.mean(axis=1, keepdims=True))
    bounds = np.broadcast_to(bounds, values.shape)
    ratio = np.divide(values, bounds, out=np.full_like(values, np.inf), where=bounds > 0.0)  # none is under 0
    votes: Floats = 1.0 / (1.0 + np.exp(-np.clip(steepness * (ratio - 1.0), -500.0, 500.0)))
    return votes
