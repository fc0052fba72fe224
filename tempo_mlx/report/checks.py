"""What a run may not contradict. Checked whenever a run is made, so also when one is read from a file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.decode.step import RunStep, RunToken
from tempo_mlx.errors import RunFileError
from tempo_mlx.strict import is_unicode
from tempo_mlx.token_ids import token_ids

if TYPE_CHECKING:
    from tempo_mlx.report.run import Run

FINISH_REASONS = ("stop", "length", "cancelled", "timeout", "memory")
SUM_TOLERANCE = 1e-6  # of P(i|j) over i, which is computed in float64
PROBABILITY_TOLERANCE = 1e-5  # sums of float32 probabilities exceed 1 by so little


def check(run: Run) -> None:
    need(run.decoder in DECODERS, f"decoder is {run.decoder!r}; it must be one of {', '.join(DECODERS)}")
    reasons = " or ".join(FINISH_REASONS)
    need(run.finish_reason in FINISH_REASONS, f"finish_reason is {run.finish_reason!r}; it must be {reasons}")
    need(bool(run.prompt.token_ids), "prompt has no tokens")
    rules = chain.from_iterable(
        (name, rule.name, rule.sha256 or "") for name, rule in (run.custom or {}).items()
    )
    texts = (run.prompt.text, run.reasoning or "", run.text, run.final_text, *(p.text for p in run.paths))
    need(all(map(is_unicode, (*texts, *rules))), "texts are not all valid Unicode")
    check_finite((path.logprob for path in run.paths), "paths")
    next_slot = run.prompt_length
    previous: frozenset[int] = frozenset()
    furthest = run.prompt_length + sum(len(step.tokens) for step in run.steps)
    for index, step in enumerate(run.steps):
        slots = check_step(step, index, previous, len(run.steps))
        expected = list(range(next_slot, next_slot + len(slots)))
        need(slots == expected, f"step {index} has the slots {slots}; they must go on from {next_slot}")
        places = (step.position, *(token.position or 0 for token in step.tokens))
        need(
            max(places) <= furthest,
            f"step {index} has position {max(places)}, beyond the run's {furthest} tokens",
        )
        next_slot += len(slots)
        previous = frozenset(slots)


def check_vocabulary(run: Run, vocabulary: int) -> None:
    """RunFileError where a run holds a token that a model with so many does not have."""
    texts: list[tuple[str, Iterable[int]]] = [("prompt", run.prompt.token_ids)]
    for step in run.steps:
        texts.append((f"step {step.step}", (token.id for token in step.tokens)))
        texts.append((f"step {step.step}'s rejected", (item.id for item in step.rejected)))
    texts += [(f"path {number}", path.token_ids) for number, path in enumerate(run.paths)]
    for where, ids in texts:
        token_ids(ids, vocabulary, f"The run's {where}", RunFileError)


def check_step(step: RunStep, index: int, previous: frozenset[int], num_steps: int) -> list[int]:
    """`previous`: the slots of the step before. Returns this one's, in order."""
    where = f"step {index}"
    need(step.step == index, f"{where} is numbered {step.step}")
    need(bool(step.tokens), f"{where} has no tokens")
    check_finite((step.residual_probability, step.threshold), where)
    for token in step.tokens:
        check_token(token, step, f"{where}, token {token.id},", previous, num_steps)
    for item in step.rejected:
        need(is_unicode(item.text + item.why), f"{where} rejects a text that is not valid Unicode")
        check_probabilities((item.probability,), where)
    return sorted(token.slot for token in step.tokens if token.slot is not None)


def check_token(token: RunToken, step: RunStep, where: str, previous: frozenset[int], num_steps: int) -> None:
    need(is_unicode(token.text), f"{where} has a text that is not valid Unicode")
    check_finite((token.attention, token.posterior), where)
    need(
        (token.slot is None) == (token.weight is None),
        f"{where} must have slot and weight both null, or neither",
    )
    check_probabilities((token.probability, token.weight or 0.0), where)
    need(token.weight != 0.0, f"{where} has weight 0; a member with a slot has a share")
    check_edges(token, step.step, where, previous)
    why, after = token.removed_why, token.removed_after
    if after is None:
        need(why is None, f"{where} says removed_why but its removed_after is null")
        return
    need(token.slot is not None, f"{where} is removed, but without a slot")
    need(step.step < after < num_steps, f"{where} must name a later step of the run as removed_after")
    if why is not None:
        need(is_unicode(why.signal), f"{where} names a signal that is not valid Unicode")
        check_finite((why.score, why.threshold), where)


def check_edges(token: RunToken, step: int, where: str, previous: frozenset[int]) -> None:
    if not step:
        need(not token.parents, f"{where} has parents, in the first step")
        return
    slots, posterior, forward = zip(*token.parents, strict=True) if token.parents else ((), (), ())
    need(
        bool(slots) and len(set(slots)) == len(slots) and previous.issuperset(slots),
        f"{where} must have different slots of the previous step as its parents",
    )
    check_probabilities((*posterior, *forward), where)
    need(abs(sum(posterior) - 1.0) <= SUM_TOLERANCE, f"{where} has P(i|j) that do not sum to 1")


def need(condition: bool, fault: str) -> None:
    if not condition:
        raise RunFileError(f"The run's {fault}.")


def check_finite(numbers: Iterable[float | None], where: str) -> None:
    for number in numbers:
        if number is not None and not math.isfinite(number):
            raise RunFileError(f"The run's {where} must have finite numbers, not {number}.")


def check_probabilities(numbers: Iterable[float], where: str) -> None:
    for number in numbers:
        if not -PROBABILITY_TOLERANCE <= number <= 1.0 + PROBABILITY_TOLERANCE:  # NaN neither
            raise RunFileError(f"The run's {where} has {number}, which is no probability.")
