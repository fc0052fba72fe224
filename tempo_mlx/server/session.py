"""Sessions: a superposed run that is kept, cache and all, so that a reader can go back and decide otherwise.

The cache is an arena (observe.py) on which every state of the run is a view. So branching, removing and undoing
recompute nothing but the rows of one set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tempo_mlx.config import GenerateConfig, as_dict
from tempo_mlx.decode import thinking
from tempo_mlx.decode.combine import combine
from tempo_mlx.decode.pruning import AttentionHistory, PruneContext, Pruned, PruneRule
from tempo_mlx.decode.step import Member, Rejected, Removal, Step
from tempo_mlx.decode.tempo import Tempo
from tempo_mlx.errors import MemoryLimitError
from tempo_mlx.lattice import Lattice
from tempo_mlx.report.build import build_run, cut_at_stop
from tempo_mlx.report.records import RunPrompt
from tempo_mlx.report.run import Run, best_path
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.observe import Arena, View
from tempo_mlx.server.replay import enter_set, learn, remove_recorded, run_set
from tempo_mlx.strict import plain

DECODERS = ("superposed", "plain")
UNDO_LEVELS = 64
BY_HAND = "by hand"
Interrupted = Callable[[], str | None]


@dataclass(frozen=True)
class State:
    """A point a reader can come back to. `label`: what was done to get here."""

    label: str
    tempo: Tempo
    pinned: frozenset[int]


@dataclass
class Session:
    """One kept run. Its methods change it; every change can be undone."""

    id: str
    prompt: RunPrompt
    config: GenerateConfig
    arena: Arena
    tokenizer: Any
    state: State
    first: np.ndarray[Any, np.dtype[np.float32]]  # (1, V): log-probabilities after the prompt
    rule: PruneRule | None
    created: float = field(default_factory=time.time)
    used: float = field(default_factory=time.time)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    busy: bool = False
    undo: list[State] = field(default_factory=list)
    redo: list[State] = field(default_factory=list)

    @property
    def tempo(self) -> Tempo:
        return self.state.tempo

    @property
    def finished(self) -> str | None:
        """Why the run cannot go on, if so."""
        return self._ending(self.tempo)

    # -- what a reader does

    def extend(self, count: int, interrupted: Interrupted) -> Iterator[Step]:
        """Continue by `count` steps, fewer when the text ends; what was done stays when it is interrupted."""
        if self.finished:
            raise conflict("The run is finished; undo, or branch from an earlier step.")
        tempo = self.tempo.copy()
        begun, done = time.perf_counter(), 0
        try:
            while done < count and not interrupted():
                step = self._advance(tempo)
                done += 1
                yield step
                if self._ending(tempo):
                    break
        finally:
            self.decode_seconds += time.perf_counter() - begun
            if done:
                self._enter(f"continue {done}", tempo, self.state.pinned)

    def branch(self, step: int, token: int) -> None:
        """Cut the run back to `step`, and let that step be this token alone."""
        if not 0 <= token < self.arena.architecture.vocab_size:
            raise ApiError(
                422, "invalid_value", f"token_id {token} is not in the model's vocabulary.", "token_id"
            )
        self._rechoose(step, [token], f"branch {step}: {self.tokenizer.token_text(token).strip()}")

    def remove(self, slot: int) -> None:
        """Remove one member: a set that is still to be run is formed anew, an earlier one loses it from here on."""
        index, member = self._alive(slot)
        if slot in self.state.pinned:
            raise conflict(f"Slot {slot} is pinned; unpin it first.")
        siblings = [m for m in self.tempo.steps[index].tokens if m.slot != slot and m.removed_after is None]
        if not any(m.slot is not None for m in siblings):
            raise conflict(f"Slot {slot} is the last member of its set; branch, or undo, instead.")
        label = f"remove {index}: {self.tokenizer.token_text(member.id).strip()}"
        if index == len(self.tempo.steps) - 1:
            self._rechoose(index, [m.id for m in siblings], label)
            return
        tempo = self.tempo.copy()
        if tempo.waiting:
            tempo.run_rows()
            learn(tempo)
        newest = tempo.lattice.num_sets - 1
        tempo.note_evidence()
        gone = tempo.members.pop(slot, None)
        if gone is not None:  # the rows just run may have removed it on their own
            score = gone.probability if gone.posterior is None else gone.posterior
            gone.removed_after, gone.removed_why = newest, Removal(BY_HAND, float(score), 1.0)
            tempo.cache.keep(tempo.lattice.remove([slot]))
        self._enter(label, tempo, self.state.pinned)

    def pin(self, slot: int, pinned: bool) -> None:
        """Pinned members are spared by retroactive pruning."""
        index, member = self._alive(slot)
        if (slot in self.state.pinned) == pinned:
            return
        now = self.state.pinned | {slot} if pinned else self.state.pinned - {slot}
        label = f"{'pin' if pinned else 'unpin'} {index}: {self.tokenizer.token_text(member.id).strip()}"
        self._enter(label, self.tempo.copy(), now)

    def step_back(self) -> None:
        if not self.undo:
            raise conflict("There is nothing to undo.")
        self.redo.append(self.state)
        self.state = self.undo.pop()

    def step_forward(self) -> None:
        if not self.redo:
            raise conflict("There is nothing to redo.")
        self.undo.append(self.state)
        self.state = self.redo.pop()

    # -- how it is done

    def _ending(self, tempo: Tempo) -> str | None:
        if tempo.finished or (self.config.stop and self._holds_stop(tempo)):
            return "stop"
        full = (
            tempo.lattice.prompt_length + len(tempo.steps) >= self.arena.architecture.max_position_embeddings
        )
        return "length" if full else None

    def _holds_stop(self, tempo: Tempo) -> bool:
        """Whether the most probable reading holds a stop string."""
        reading = best_path(tempo.steps)
        text: str = self.tokenizer.decode([token.id for token in reading], continues=True)
        return cut_at_stop(text, self.config.stop) != text

    def _advance(self, tempo: Tempo) -> Step:
        """One step, after making room for it where the arena is full."""
        width = len(tempo.waiting)
        if len(self.arena.cache) + width > self.arena.limit:
            self._make_room(tempo, width)
        step = tempo.advance()
        tempo.note_evidence()
        learn(tempo)
        return step

    def _make_room(self, tempo: Tempo, rows: int) -> None:
        """Forget what could be redone, then the oldest that could be undone, until `rows` more fit."""
        self.redo.clear()
        while True:
            self.arena.compact([s.tempo.cache for s in (self.state, *self.undo)] + [tempo.cache])
            if len(self.arena.cache) + rows <= self.arena.limit or not self.undo:
                return
            del self.undo[: max(1, len(self.undo) // 4)]

    def _enter(self, label: str, tempo: Tempo, pinned: frozenset[int]) -> None:
        if tempo.waiting:
            tempo.log_probs = tempo.log_probs[
                :0
            ]  # to be computed anew; V-sized, and kept for every undo level
        tempo.rule = spare(self.rule, pinned)
        self.undo.append(self.state)
        del self.undo[:-UNDO_LEVELS]
        self.redo.clear()
        self.state = State(label, tempo, pinned)

    def _alive(self, slot: int) -> tuple[int, Member]:
        for index, step in enumerate(self.tempo.steps):
            for member in step.tokens:
                if member.slot == slot:
                    if member.removed_after is not None:
                        raise conflict(f"Slot {slot} has been removed already.")
                    return index, member
        raise ApiError(404, "not_found", f"The run has no slot {slot}.", "slot")

    def _rechoose(self, step: int, tokens: Sequence[int], label: str) -> None:
        """Go back to before `step` was chosen, and choose these tokens (best first)."""
        if not 0 <= step < len(self.tempo.steps):
            raise ApiError(404, "not_found", f"The run has no step {step}.", "step")
        old = self.tempo.steps[step]
        tempo = self._before(step)
        probabilities = combine(tempo.log_probs, tempo.weights, self.config.combine)
        if not (probabilities[list(tokens)] > 0.0).all():
            raise conflict("The model gives that token no probability here; choose another.")
        new = tempo.append(np.asarray(tokens, np.int64), probabilities)
        others = [m for m in old.tokens if m.id not in tokens]
        by_hand = (Rejected(m.id, m.probability, BY_HAND) for m in others)
        new.rejected = (*by_hand, *(r for r in old.rejected if r.id not in tokens))
        tempo.steps.append(new)
        first = tempo.lattice.prompt_length
        for earlier in tempo.steps[:-1]:
            first += sum(m.slot is not None for m in earlier.tokens)
        self._enter(label, tempo, frozenset(slot for slot in self.state.pinned if slot < first))

    def _before(self, step: int) -> Tempo:
        """The run as it was with its first `step` sets run, the last of them anew (for its logits)."""
        tempo = self.tempo.copy()
        steps, tempo.steps = tempo.steps, []
        tempo.lattice, tempo.members, tempo.waiting = Lattice(tempo.lattice.prompt_length), {}, []
        tempo.evidence, tempo.weights, tempo.log_probs = None, np.ones(1), self.first
        tempo.probed = None
        if tempo.history is not None:
            tempo.history = AttentionHistory(self.config.pruning_window)
        view: View = tempo.cache
        known = view.known
        view.rows = view.known = known[: tempo.lattice.prompt_length]
        for record in steps[:step]:
            enter_set(tempo, record)
            if record.step == step - 1:
                self._make_room_for_rows(tempo)
                run_set(tempo)
            else:
                view.rows = np.concatenate([view.rows, known[tempo.lattice.newest]])
                tempo.waiting = []
            learn(tempo)
            remove_recorded(tempo, steps[:step])
        for record in tempo.steps:
            for member in record.tokens:
                member.posterior = member.attention = None
                if member.removed_after is not None and member.removed_after >= step:
                    member.removed_after = member.removed_why = None
        return tempo

    def _make_room_for_rows(self, tempo: Tempo) -> None:
        if len(self.arena.cache) + len(tempo.waiting) > self.arena.limit:
            raise MemoryLimitError("The session's cache is full; export the run, or start a new session.")

    # -- what a reader sees

    def run(self) -> Run:
        self.tempo.note_evidence()
        tempo, seconds = self.tempo, self.decode_seconds
        timing = {"prefill_seconds": self.prefill_seconds, "decode_seconds": seconds,
                  "tokens_per_second": len(tempo.steps) / seconds if seconds else 0.0}  # fmt: skip
        run = build_run(
            tempo.steps,
            prompt=self.prompt,
            model_info=self.arena.info,
            config=as_dict(self.config),
            tokenizer=self.tokenizer,
            decoder=self.config.decoder,
            finish_reason=self.finished or "cancelled",
            timing=timing,
        )
        if not self.config.enable_thinking:
            return run
        reasoning, answer = thinking.split(run.final_text, thinking.is_open(self.prompt.text))
        return replace(run, reasoning=reasoning, final_text=answer)

    def describe(self, ttl: float) -> dict[str, Any]:
        return {
            "id": self.id,
            "created_at": self.created,
            "expires_at": self.used + ttl,
            "busy": self.busy,
            "run": self.run().to_dict(),
            "finished": self.finished,
            "pinned": sorted(self.state.pinned),
            "undo": [s.label for s in (*self.undo[1:], self.state)] if self.undo else [],
            "redo": [s.label for s in self.redo],
        }

    def members(self, index: int) -> dict[str, Any]:
        """Everything known about one step's candidates, and what each kept one would say next."""
        steps = self.tempo.steps
        if not 0 <= index < len(steps):
            raise ApiError(404, "not_found", f"The run has no step {index}.", "step")
        self.tempo.note_evidence()
        step = steps[index]
        if index == len(steps) - 1 and self.tempo.waiting and self.tempo.probed is None:
            ahead = self._look_ahead()
        else:
            known = self.tempo.cache.known
            ahead = {
                m.slot: self.arena.top.get(int(known[m.slot])) for m in step.tokens if m.slot is not None
            }
        record: dict[str, Any] = plain(step.record(self.tokenizer))
        for member, entry in zip(step.tokens, record["tokens"], strict=True):
            top = ahead.get(member.slot)
            entry["status"], entry["why"] = explain(member, step, member is step.tokens[0])
            entry["pinned"] = member.slot in self.state.pinned
            entry["next"] = [] if top is None else [
                {"id": i, "text": self.tokenizer.token_text(i), "probability": p}
                for i, p in zip(top[0].tolist(), np.exp(top[1].astype(np.float64)).tolist(), strict=True)
            ]  # fmt: skip
        return record

    def _look_ahead(self) -> dict[int | None, Any]:
        """The top tokens of rows that have not been run: run on a copy, and forgotten."""
        length = len(self.arena.cache)
        tempo = self.tempo.copy()
        self._make_room_for_rows(tempo)
        newest = tempo.lattice.newest.tolist()
        run_set(tempo)
        tops = {slot: self.arena.top[length + i] for i, slot in enumerate(newest)}
        self.arena.truncate(length)
        return tops


def spare(rule: PruneRule | None, pinned: frozenset[int]) -> PruneRule | None:
    """`rule`, but never against a pinned member."""
    if rule is None:
        return None

    def decide(context: PruneContext) -> list[Pruned]:
        return [entry for entry in rule(context) if entry.slot not in pinned]

    return PruneRule(decide, rule.needs_attention)


def explain(member: Member, step: Step, best: bool) -> tuple[str, str]:
    """Status and one sentence: why this member is here, or no longer is."""
    probability = f"{member.probability:.3g}"
    why = member.removed_why
    if member.removed_after is not None and why is not None:
        if why.signal == BY_HAND:
            return "removed", f"Removed by hand after step {member.removed_after}."
        sentence = f"its {why.signal} {why.score:.3g} was under {why.threshold:.3g} after step {member.removed_after}"
        if why.unattended:
            return "unattended", f"No longer attended to ({sentence}), but kept for the text."
        return "removed", f"Removed: {sentence}."
    if member.slot is None:
        return "end", f"Ends the text; probability {probability}."
    if step.threshold is not None and member.probability >= step.threshold:
        return "kept", f"Kept: its probability {probability} is at least the threshold {step.threshold:.3g}."
    if best:
        return "kept", f"Kept: with probability {probability} it is the best of its step."
    return "kept", f"Kept: chosen with probability {probability}."


def conflict(message: str) -> ApiError:
    return ApiError(409, "conflict", message)
