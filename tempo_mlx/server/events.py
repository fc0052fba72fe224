"""The events of a request, as the worker sends them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tempo_mlx.decode.decoder import Reading
from tempo_mlx.decode.settled import removal_window
from tempo_mlx.decode.step import Member, Step
from tempo_mlx.decode.thinking import Splitter
from tempo_mlx.report.growing import GrowingAnswer, GrowingPhrases
from tempo_mlx.report.phrases import Phrase
from tempo_mlx.strict import plain
from tempo_mlx.task import Task

SCORED_SETS = 64  # how many sets back scores are compared at every step
TOLD = ("slot", "removed_after", "removed_why", "posterior", "attention")  # of a member that was removed


@dataclass(frozen=True)
class Output:
    """One event before it is JSON. `last`: the request is over."""

    name: str
    data: Any
    last: bool = False
    step: int | None = None
    stats: dict[str, float] = field(default_factory=dict)


@dataclass
class _Seen:
    step: int
    member: Member
    scores: tuple[float | None, float | None]
    removed: bool


class StepEvents:
    """Turns steps into `step` events; remembers earlier members, to report removals and new scores.

    Of a lattice each event says which phrases have settled since the last, and what follows them as it is now; where
    reasoning is told from the answer, both of each. Texts that stand for themselves settle at the end.
    """

    def __init__(
        self, task: Task, earlier: Iterable[Step] = (), texts: Callable[[], Sequence[Reading]] = list
    ) -> None:
        """texts: those of a decoding that is no lattice, best first."""
        self._tokenizer = task.loaded.tokenizer
        self._reader, self._texts = task.answers, texts
        self._answer = (
            GrowingAnswer(Splitter(task.opened, self._tokenizer.reasoning)) if task.thinks else None
        )
        window, stop = removal_window(task.config), task.config.stop
        self._phrases = GrowingPhrases(self._tokenizer, window, stop=stop) if task.spec.lattice else None
        self._seen: dict[int, _Seen] = {}
        self._begun = time.perf_counter()
        self._steps = 0
        self._settled: list[Phrase] = []  # and not yet told
        for step in earlier:
            self._remember(step)
            self._settled += self._phrases.add(step) if self._phrases else []
        if self._phrases:
            self._settled += self._phrases.catch_up()

    def _remember(self, step: Step) -> None:
        for member in step.tokens:
            if member.slot is not None:
                removed = member.removed_after is not None
                self._seen[member.slot] = _Seen(step.step, member, scores_of(member), removed)
        horizon = step.step - SCORED_SETS
        while self._seen:
            slot = next(iter(self._seen))
            if self._seen[slot].step >= horizon:
                break
            del self._seen[slot]

    def event(self, step: Step, cache_slots: int, prefill_seconds: float | None = None) -> Output:
        removed, scores = [], []
        for slot, seen in self._seen.items():
            member, now = seen.member, scores_of(seen.member)
            if member.removed_after is not None and not seen.removed:
                seen.removed = True
                record = plain(member.record(""))
                removed.append({"step": seen.step, **{name: record[name] for name in TOLD}})
            elif now != seen.scores:
                scores.append([slot, *now])
            seen.scores = now
        self._remember(step)
        self._steps += 1
        elapsed = time.perf_counter() - self._begun
        stats = stats_of(step, cache_slots, prefill_seconds)
        shown = {**stats, "elapsed_seconds": elapsed, "tokens_per_second": self._steps / max(elapsed, 1e-9)}
        data = {**plain(step.record(self._tokenizer)), "removed": removed, "scores": scores, "stats": shown}
        return Output("step", {**data, **self._read(step)}, step=step.step, stats=stats)

    def _read(self, step: Step) -> dict[str, Any]:
        if self._phrases is None:
            texts = [] if self._answer is None else self._texts()
            return told([], *self._reader.read(texts[0].token_ids)) if texts else {}
        settled, self._settled = [*self._settled, *self._phrases.add(step)], []
        tail = self._phrases.tail()
        if self._answer is None:
            return {"phrases": phrase_records(settled), "tail": tail}
        reasoning, phrases = self._answer.add(settled)
        return told(phrases, *self._answer.rest(tail), reasoning)


def told(
    phrases: Iterable[Phrase], reasoning_tail: str | None, tail: str, reasoning: str = ""
) -> dict[str, Any]:
    """What has settled of the answer and of the reasoning, and what follows each as it is now."""
    answer = {"phrases": phrase_records(phrases), "tail": tail}
    return {**answer, "reasoning": reasoning, "reasoning_tail": reasoning_tail or ""}


def phrase_records(phrases: Iterable[Phrase]) -> list[dict[str, Any]]:
    return [asdict(phrase) for phrase in phrases]


def stats_of(step: Step, cache_slots: int, prefill_seconds: float | None) -> dict[str, float]:
    """What the server counts of a step; prefill_seconds: of the first one."""
    stats: dict[str, float] = {
        "width": len(step.tokens),
        "rows": sum(member.slot is not None for member in step.tokens),
        "cache_slots": cache_slots,
        "step_seconds": step.seconds,
    }
    return stats if prefill_seconds is None else {**stats, "prefill_seconds": prefill_seconds}


def scores_of(member: Member) -> tuple[float | None, float | None]:
    """In Python's numbers, whatever they were computed in."""
    posterior, attention = member.posterior, member.attention
    return None if posterior is None else float(posterior), None if attention is None else float(attention)
