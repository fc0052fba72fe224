"""What a run may not contradict. Checked whenever a run is made, so also when one is read from a file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tempo_mlx.errors import RunFileError
from tempo_mlx.report.fields import as_number
from tempo_mlx.report.records import RunStep, RunToken

if TYPE_CHECKING:
    from tempo_mlx.report.run import Run

DECODERS = ("superposed", "tree", "mcts", "beam", "diverse-beam", "sample", "plain")
FINISH_REASONS = ("stop", "length", "cancelled", "timeout", "memory")
SUM_TOLERANCE = 1e-6  # of P(i|j) over i, which is computed in float64
PROBABILITY_TOLERANCE = 1e-5  # sums of float32 probabilities exceed 1 by so little


def check(run: Run) -> None:
    if run.decoder not in DECODERS:
        raise RunFileError(f"The run's decoder is {run.decoder!r}; it must be one of {', '.join(DECODERS)}.")
    if run.finish_reason not in FINISH_REASONS:
        raise RunFileError(
            f"The run's finish_reason is {run.finish_reason!r}; it must be {' or '.join(FINISH_REASONS)}."
        )
    if not run.prompt.token_ids:
        raise RunFileError("The run's prompt has no tokens.")
    for text in (
        run.prompt.text,
        run.reasoning or "",
        run.text,
        run.final_text,
        *(path.text for path in run.paths),
    ):
        _check_text(text, "a text")
    for path in run.paths:
        as_number(path.logprob, "a path's logprob")
    next_slot = run.prompt_length
    previous: frozenset[int] = frozenset()
    for index, step in enumerate(run.steps):
        where = f"step {index}"
        if step.step != index:
            raise RunFileError(f"The run's {where} is numbered {step.step}.")
        if not step.tokens:
            raise RunFileError(f"The run's {where} has no tokens.")
        for number in (step.residual_probability, step.threshold):
            if number is not None:
                as_number(number, where)
        for token in step.tokens:
            _check_token(token, step, where, previous, len(run.steps))
        for item in step.rejected:
            _check_text(item.text, where)
            _check_probability(item.probability, where)
        slots = sorted(token.slot for token in step.tokens if token.slot is not None)
        if slots != list(range(next_slot, next_slot + len(slots))):
            raise RunFileError(
                f"The slots of the run's {where} are {slots}; they must go on from {next_slot}."
            )
        next_slot += len(slots)
        previous = frozenset(slots)


def _check_token(
    token: RunToken, step: RunStep, where: str, previous: frozenset[int], num_steps: int
) -> None:
    where = f"{where}, token {token.id}"
    _check_text(token.text, where)
    _check_probability(token.probability, where)
    for number in (token.weight, token.attention, token.posterior):
        if number is not None:
            as_number(number, where)
    if (token.slot is None) != (token.weight is None):
        raise RunFileError(f"In the run's {where}, slot and weight must both be null, or neither.")
    if token.weight is not None:
        _check_probability(token.weight, where)
    parents = [edge.slot for edge in token.parents]
    if step.step == 0 and parents:
        raise RunFileError(f"In the run's {where}, a token of the first step has parents.")
    if step.step > 0 and (
        not parents or len(set(parents)) < len(parents) or not previous.issuperset(parents)
    ):
        raise RunFileError(f"In the run's {where}, the parents must be different slots of the previous step.")
    for edge in token.parents:
        _check_probability(edge.posterior, where)
        _check_probability(edge.forward, where)
    if parents and not math.isclose(
        sum(edge.posterior for edge in token.parents), 1.0, abs_tol=SUM_TOLERANCE
    ):
        raise RunFileError(f"In the run's {where}, P(i|j) of the parents must sum to 1.")
    if token.removed_after is not None:
        if token.slot is None:
            raise RunFileError(f"In the run's {where}, a token without a slot is removed.")
        if not step.step < token.removed_after < num_steps:
            raise RunFileError(f"In the run's {where}, removed_after must name a later step of the run.")
        if token.removed_why is not None:
            as_number(token.removed_why.score, where)
            as_number(token.removed_why.threshold, where)
    elif token.removed_why is not None:
        raise RunFileError(f"In the run's {where}, removed_why is given but removed_after is null.")


def _check_probability(value: float, where: str) -> None:
    if not -PROBABILITY_TOLERANCE <= as_number(value, where) <= 1.0 + PROBABILITY_TOLERANCE:
        raise RunFileError(f"In the run's {where}, {value} is no probability.")


def _check_text(text: str, where: str) -> None:
    """Lone surrogates are no text: they cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RunFileError(f"In the run's {where}, the text is not valid Unicode.") from None
