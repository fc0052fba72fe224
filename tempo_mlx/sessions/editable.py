"""A superposed run that is kept, cache and all, so that a reader can go back and decide otherwise.

The cache is an arena (arena.py) on which every state of the run is a view. So branching, removing and undoing recompute
nothing but the rows of one set.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tempo_mlx.decode.prefill import Interrupt, Interrupted
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.decode.step import BY_HAND, Member, Rejected, Removal, Step
from tempo_mlx.decode.tempo import Tempo
from tempo_mlx.errors import ArgumentError, ConflictError, NotInRunError
from tempo_mlx.report.records import PINNED, RunRule
from tempo_mlx.report.run import Run
from tempo_mlx.sessions.arena import Arena
from tempo_mlx.strict import plain
from tempo_mlx.task import Task

UNDO_LEVELS = 64


@dataclass(frozen=True)
class State:
    """A point a reader can come back to. `label`: what was done to get here."""

    label: str
    tempo: Tempo


class EditableRun:
    """One kept run. Its methods change it; every change can be undone."""

    def __init__(self, task: Task, max_rows: int, interrupted: Interrupt) -> None:
        """Runs the prompt. Raises ArgumentError where one cannot go back in such a run, PromptError, Interrupted."""
        if not task.spec.editable:
            kinds = " or ".join(spec.name for spec in DECODERS.values() if spec.editable)
            raise ArgumentError(f"Sessions need decoder {kinds}, not {task.spec.name}.", "decoder")
        if task.config.early_exit:
            raise ArgumentError("Sessions go through the whole model; leave out early_exit.", "early_exit")
        known = task.loaded.cache_for(task.prompt.token_ids)
        self.arena = Arena(task.loaded.model, max_rows, known)
        self.task, self.tokenizer = replace(task, observer=self.arena.observe), task.loaded.tokenizer
        begun = time.perf_counter()
        tempo = self.task.start(self.arena, interrupted, self.arena.beginning())
        assert isinstance(tempo, Tempo)
        tempo.cache.learn(tempo.lattice)
        self.prefill_seconds, self.decode_seconds = time.perf_counter() - begun, 0.0
        self.state = State("", tempo)
        self.undo: list[State] = []
        self.redo: list[State] = []

    @property
    def tempo(self) -> Tempo:
        return self.state.tempo

    @property
    def finished(self) -> str | None:
        """Why the run cannot go on, if so."""
        return self.task.ending(self.tempo, self.task.watch())

    # -- what a reader does

    def take_over(self, steps: Sequence[Step], interrupted: Interrupt) -> Iterator[None]:
        """Begin with the steps of another run, one a turn. Raises RunFileError, and Interrupted."""
        for _ in self.tempo.replay(steps):
            self.tempo.cache.learn(self.tempo.lattice)
            yield
            if reason := interrupted():
                raise Interrupted(reason)

    def extend(self, count: int, interrupted: Interrupt) -> Iterator[Step]:
        """Continue by `count` steps, fewer when the text ends; what was done stays when it is interrupted."""
        if self.finished:
            raise ConflictError("The run is finished; undo, or branch from an earlier step.")
        tempo, watch = self.tempo.copy(), self.task.watch()
        begun, done = time.perf_counter(), 0
        try:
            while done < count and not interrupted():
                step = self._advance(tempo)
                done += 1
                yield step
                if self.task.ending(tempo, watch):
                    break
        finally:
            self.decode_seconds += time.perf_counter() - begun
            if done:
                self._enter(f"continue {done}", tempo)

    def branch(self, step: int, token: int, then: Sequence[int] = ()) -> None:
        """Cut the run back to `step`, and let that step be this token alone, and the next ones those of `then`."""
        for id in (token, *then):
            if not 0 <= id < self.arena.architecture.vocab_size:
                raise ArgumentError(f"token_id {id} is not in the model's vocabulary.", "token_id")
        tempo = self._rechosen(step, [token])
        for id in then:
            self._force(tempo, id)
        self._enter(self._label("branch", step, token), tempo)

    def remove(self, slot: int) -> None:
        """Remove one member: a set that is still to be run is formed anew, an earlier one loses it from here on."""
        index, member = self._alive(slot)
        if slot in self.tempo.pinned:
            raise ConflictError(f"Slot {slot} is pinned; unpin it first.")
        siblings = [m for m in self.tempo.steps[index].tokens if m.slot != slot and m.removed_after is None]
        if not any(m.slot is not None for m in siblings):
            raise ConflictError(f"Slot {slot} is the last member of its set; branch, or undo, instead.")
        label = self._label("remove", index, member.id)
        if index == len(self.tempo.steps) - 1:
            self._enter(label, self._rechosen(index, [m.id for m in siblings]))
            return
        tempo = self.tempo.copy()
        tempo.prune(tempo.run())
        tempo.cache.learn(tempo.lattice)
        tempo.note_evidence()
        gone = tempo.members.get(slot)
        if gone is not None:  # the rows just run may have removed it on their own
            score = gone.probability if gone.posterior is None else gone.posterior
            gone.removed_after = tempo.lattice.num_sets - 1
            gone.removed_why = Removal(BY_HAND, float(score), 1.0)
            tempo.drop([slot])
        self._enter(label, tempo)

    def pin(self, slot: int, pinned: bool) -> None:
        """Pinned members are spared by retroactive pruning."""
        index, member = self._alive(slot)
        if (slot in self.tempo.pinned) == pinned:
            return
        tempo = self.tempo.copy()
        tempo.pinned = tempo.pinned | {slot} if pinned else tempo.pinned - {slot}
        self._enter(self._label("pin" if pinned else "unpin", index, member.id), tempo)

    def step_back(self) -> None:
        if not self.undo:
            raise ConflictError("There is nothing to undo.")
        self.redo.append(self.state)
        self.state = self.undo.pop()

    def step_forward(self) -> None:
        if not self.redo:
            raise ConflictError("There is nothing to redo.")
        self.undo.append(self.state)
        self.state = self.redo.pop()

    # -- how it is done

    def _label(self, action: str, step: int, token: int) -> str:
        return f"{action} {step}: {self.tokenizer.token_text(token).strip()}"

    def _advance(self, tempo: Tempo) -> Step:
        """One step, after making room for it where the arena is full."""
        self._reserve(tempo)
        self.arena.use(tempo.cache)  # a set whose rows are there runs nothing
        step = tempo.advance()
        tempo.note_evidence()
        tempo.cache.learn(tempo.lattice)
        return step

    def _reserve(self, tempo: Tempo) -> None:
        if len(self.arena.cache) + len(tempo.waiting) > self.arena.limit:
            self._make_room(tempo, len(tempo.waiting))

    def _make_room(self, tempo: Tempo, rows: int) -> None:
        """Forget what could be redone, then the oldest that could be undone, until `rows` more fit."""
        self.redo.clear()
        while True:
            self.arena.compact([s.tempo.cache for s in (self.state, *self.undo)] + [tempo.cache])
            if len(self.arena.cache) + rows <= self.arena.limit or not self.undo:
                return
            del self.undo[: max(1, len(self.undo) // 4)]

    def _enter(self, label: str, tempo: Tempo) -> None:
        tempo.shed()  # kept for every undo level
        self.undo.append(self.state)
        del self.undo[:-UNDO_LEVELS]
        self.redo.clear()
        self.state = State(label, tempo)

    def _step(self, index: int) -> Step:
        if not 0 <= index < len(self.tempo.steps):
            raise NotInRunError(f"The run has no step {index}.", "step")
        return self.tempo.steps[index]

    def _alive(self, slot: int) -> tuple[int, Member]:
        for index, step in enumerate(self.tempo.steps):
            for member in step.tokens:
                if member.slot == slot:
                    if member.removed_after is not None:
                        raise ConflictError(f"Slot {slot} has been removed already.")
                    return index, member
        raise NotInRunError(f"The run has no slot {slot}.", "slot")

    def _rechosen(self, index: int, tokens: Sequence[int]) -> Tempo:
        """Go back to before step `index` was chosen, and choose these tokens (best first)."""
        old = self._step(index)
        tempo = self.tempo.at(index)
        tempo.cache.learn(tempo.lattice)
        probabilities = tempo.combine()
        if not (probabilities[list(tokens)] > 0.0).all():
            raise ConflictError("The model gives that token no probability here; choose another.")
        first = tempo.lattice.num_slots
        new = tempo.append(np.asarray(tokens, np.int64), probabilities)
        others = [m for m in old.tokens if m.id not in tokens]
        by_hand = (Rejected(m.id, m.probability, BY_HAND) for m in others)
        new.rejected = (*by_hand, *(r for r in old.rejected if r.id not in tokens))
        tempo.record(new)
        tempo.pinned = frozenset(slot for slot in tempo.pinned if slot < first)
        tempo.spared = frozenset(slot for slot in tempo.spared if slot < first)
        return tempo

    def _force(self, tempo: Tempo, token: int) -> None:
        """One more step, of this token alone; the best of the others is noted as what was decided against."""
        if tempo.finished:
            raise ConflictError("A token that ends the text can only be the last.")
        self._reserve(tempo)
        removed = tempo.prune(tempo.run())
        probabilities = tempo.combine()
        if not probabilities[token] > 0.0:
            raise ConflictError("The model gives that token no probability here; choose another.")
        others = probabilities.copy()
        others[token] = -1.0
        rival = int(others.argmax())
        step = tempo.append(np.array([token]), probabilities)
        step.rejected, step.removed = (Rejected(rival, float(probabilities[rival]), BY_HAND),), removed
        tempo.record(step)
        tempo.note_evidence()
        tempo.cache.learn(tempo.lattice)

    # -- what a reader sees

    def run(self) -> Run:
        self.tempo.note_evidence()
        seconds = self.decode_seconds
        run = self.task.assemble(
            self.tempo,
            finish_reason=self.finished or "cancelled",
            timing={
                "prefill_seconds": self.prefill_seconds,
                "decode_seconds": seconds,
                "tokens_per_second": len(self.tempo.steps) / seconds if seconds else 0.0,
            },
        )
        if not self.tempo.spared:
            return run
        slots = ", ".join(map(str, sorted(self.tempo.spared)))
        return replace(run, custom={**(run.custom or {}), PINNED: RunRule(f"slots {slots}", None)})

    def describe(self) -> dict[str, Any]:
        run = self.run()
        return {
            "run": run.to_dict(),
            "phrases": [asdict(phrase) for phrase in run.phrases],
            "finished": self.finished,
            "pinned": sorted(self.tempo.pinned),
            "undo": [s.label for s in (*self.undo[1:], self.state)] if self.undo else [],
            "redo": [s.label for s in self.redo],
        }

    def members(self, index: int) -> dict[str, Any]:
        """Everything known about one step's candidates, and what each kept one would say next."""
        step, tokenizer = self._step(index), self.tokenizer
        self.tempo.note_evidence()
        if index == len(self.tempo.steps) - 1 and self.tempo.waiting:
            ahead = self._look_ahead()
        else:
            known = self.tempo.cache.known
            rows = {m.slot: int(known[m.slot]) for m in step.tokens if m.slot is not None}
            ahead = {slot: self.arena.top.get(row) for slot, row in rows.items()}
        record: dict[str, Any] = plain(step.record(tokenizer))
        for member, entry in zip(step.tokens, record["tokens"], strict=True):
            top = ahead.get(member.slot)
            entry["status"], entry["why"] = explain(member, step, member is step.tokens[0])
            entry["pinned"] = member.slot in self.tempo.pinned
            entry["next"] = [] if top is None else [
                {"id": i, "text": tokenizer.token_text(i), "probability": p}
                for i, p in zip(top[0].tolist(), np.exp(top[1].astype(np.float64)).tolist(), strict=True)
            ]  # fmt: skip
        return record

    def _look_ahead(self) -> dict[int | None, Any]:
        """The top tokens after the newest set: run on a copy, and forgotten."""
        length = len(self.arena.cache)
        tempo = self.tempo.copy()
        tempo.run()
        slots, rows = tempo.lattice.newest.tolist(), tempo.cache.rows.tolist()
        tops = {slot: self.arena.top[row] for slot, row in zip(slots, rows[-len(slots) :], strict=True)}
        self.arena.truncate(length)
        return tops


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
    if best and step.threshold is not None:
        return "kept", f"Kept: with probability {probability} it is the best of its step."
    return "kept", f"Kept: chosen with probability {probability}."
