"""Is a set what its rule selects? Held against the file exactly, and against the distribution within tolerance."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from tempo_mlx.arrays import Float32s, Floats, Ints
from tempo_mlx.config import SELECTIONS, GenerateConfig
from tempo_mlx.decode.schedules import scheduled
from tempo_mlx.decode.step import RunStep
from tempo_mlx.report.verify.book import SUMMED, Book


@dataclass(frozen=True)
class Candidate:
    """A token that the selection kept, whatever became of it, with its recorded probability."""

    id: int
    text: str
    probability: float


def candidates_of(record: RunStep) -> list[Candidate]:
    """All that the selection of a step kept: its tokens, then those that were dropped."""
    tokens = [Candidate(token.id, token.text, token.probability) for token in record.tokens]
    return tokens + [Candidate(item.id, item.text, item.probability) for item in record.rejected]


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda item: (-item.probability, item.id))


@dataclass(frozen=True)
class Selection:
    """What selects: `rule` with its value at this step, at most `width` tokens, none of `excluded`."""

    rule: str
    value: float
    width: int
    excluded: Collection[int]

    def floor(self, best: float) -> float:
        """The least probability that is kept, rounded as the comparison in the distribution's float32 rounds it."""
        value = {"threshold": self.value, "min-p": self.value * best}.get(self.rule, 0.0)
        return float(np.float32(value))

    def numbers(self, best: Floats, slack: float) -> Ints:
        """How many of the best tokens may be kept, if each of their probabilities (at most `width`) is off by slack."""
        if self.rule == "top-p":
            before = np.cumsum(best) - best
            least, most = before < self.value - slack, before < self.value + slack
        else:
            floor = self.floor(float(best[0]))
            least, most = best > floor + slack, best >= floor - slack
        return np.arange(max(1, int(least.sum())), max(1, int(most.sum())) + 1)


def selection_of(config: GenerateConfig, step: int, width: int, excluded: Collection[int]) -> Selection:
    rule = config.selection
    if rule == "threshold":
        value = scheduled(config, config.threshold, "selection")(step)
    else:
        value = float(getattr(config, SELECTIONS[rule][0]))
    if rule == "top-k":
        width = min(width, int(value))
    return Selection(rule, value, width, excluded)


def check_eligible(book: Book, step: int, kept: Sequence[Candidate], excluded: Collection[int]) -> None:
    for candidate in kept:
        if candidate.id in excluded:
            book.lie(
                "min_steps",
                f"Step {step} holds {candidate.text!r}, which ends the text; config.min_steps rules that out here.",
            )


def check_possible(book: Book, step: int, drawn: Candidate, distribution: Float32s) -> None:
    """Only what a truncation left can have been drawn; at its edge the last bits decide."""
    least = float(distribution[distribution > 0.0].min())
    if distribution[drawn.id] == 0.0 and drawn.probability < least - book.tolerance.of(
        distribution, drawn.id
    ):
        book.lie("selection", f"Step {step} draws {drawn.text!r}, which the settings leave no probability.")


def check_masked(book: Book, record: RunStep, masked: Sequence[float] | None) -> None:
    """What a grammar took away from each row."""
    said = record.masked
    if said is None or masked is None or len(said) != len(masked):
        book.same(f"what a grammar took away in step {record.step}", said, masked)
        return
    for recorded, computed in zip(said, masked, strict=True):
        book.number("probability masked", record.step, None, recorded, computed, book.tolerance.base)


def check_set(
    book: Book, step: int, kept: Sequence[Candidate], selection: Selection, distribution: Float32s | None
) -> None:
    """kept: best first. distribution (V,): what they were chosen from; None where that is not known exactly."""
    check_eligible(book, step, kept, selection.excluded)
    probabilities = [candidate.probability for candidate in kept]
    order = [(-candidate.probability, candidate.id) for candidate in kept]
    if order != sorted(order) or len({candidate.id for candidate in kept}) < len(kept):
        book.lie("order", f"The tokens of step {step} are not different ones, the most probable first.")
        probabilities.sort(reverse=True)
    if len(kept) > selection.width:
        book.lie(
            "width", f"Step {step} keeps {len(kept)} tokens; its selection keeps at most {selection.width}."
        )
    _check_floor(book, step, kept, selection, probabilities)
    if distribution is not None:
        _check_complete(book, step, selection, probabilities, [c.id for c in kept], distribution)


def _check_floor(
    book: Book, step: int, kept: Sequence[Candidate], selection: Selection, probabilities: list[float]
) -> None:
    """None but the best is under what the rule asks for."""
    if selection.width > 1:
        floor = selection.floor(probabilities[0])
        for candidate in kept[1:]:
            if candidate.probability < floor:
                book.lie(
                    "selection",
                    f"Step {step} keeps {candidate.text!r} at probability {candidate.probability:.6g}; by "
                    f"{selection.rule} {selection.value:g} it needs {floor:.6g}.",
                )
    before = float(np.sum(probabilities[:-1], dtype=np.float64))
    if selection.rule == "top-p" and len(kept) > 1 and before > selection.value + SUMMED:
        book.lie("selection", f"Step {step} keeps more tokens than top-p {selection.value:g} needs.")


def _check_complete(
    book: Book,
    step: int,
    selection: Selection,
    probabilities: list[float],
    ids: list[int],
    distribution: Float32s,
) -> None:
    """No token that is not kept should have been: none beats the best, or is good enough where there is room."""
    others = distribution.copy()
    others[[*ids, *selection.excluded]] = -1.0
    missing = int(others.argmax())
    found = float(others[missing])
    slack = max(book.tolerance.of(distribution, i) for i in (missing, ids[0], ids[-1]))
    bound = probabilities[0]
    if selection.width > 1 and len(ids) >= selection.width:
        bound = probabilities[-1]
    elif selection.width > 1 and selection.rule in ("threshold", "min-p"):
        bound = min(bound, selection.floor(probabilities[0]))
    elif selection.width > 1:
        enough = selection.rule == "top-p" and sum(probabilities) >= selection.value - SUMMED - slack
        bound = probabilities[-1] if enough else 0.0
    if found > bound + slack:
        book.lie(
            "selection",
            f"Step {step} lacks token {missing}, of probability {found:.6g}; by {selection.rule} "
            f"{selection.value:g} and at most {selection.width} tokens, one of {bound:.6g} would be kept.",
        )


def say_drawn(book: Book, config: GenerateConfig) -> None:
    """Its seed is taken at its word: what it draws depends on every one of the bits that a dense pass may differ in."""
    book.open(f"that it was seed {config.seed} that drew these tokens (decode again with --rerun)")


def check_drawn(book: Book, step: int, config: GenerateConfig, token: int, distribution: Float32s) -> None:
    """A drawn token is one that could be drawn: the selection would keep it, or it is the best."""
    selection = selection_of(config, step, len(distribution), ())
    probability, best = float(distribution[token]), float(distribution.max())
    slack = max(book.tolerance.of(distribution, token), SUMMED)
    better = distribution[distribution > probability + slack]
    allowed = probability >= min(selection.floor(best), best) - slack
    if selection.rule == "top-p":
        allowed = float(better.sum(dtype=np.float64)) < selection.value + slack
    elif selection.rule == "top-k":
        allowed = len(better) < selection.width
    if not allowed:
        book.lie(
            "selection",
            f"Step {step} draws token {token} at probability {probability:.6g}, which {selection.rule} "
            f"{selection.value:g} rules out.",
        )
