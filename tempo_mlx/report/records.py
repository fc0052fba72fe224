"""What a run file says beside its steps (decode/step.py) and the run as a whole (report/run.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tempo_mlx.strict import Number, Record, Switch, Text, Whole


@dataclass(frozen=True)
class RunPrompt(Record):
    """What was continued."""

    text: Annotated[Text, "of the prompt, chat template included"]
    token_ids: Annotated[tuple[Whole, ...], "of the prompt; slots 0 up to their number"]


@dataclass(frozen=True)
class RunPath(Record):
    """One reading."""

    token_ids: Annotated[tuple[Whole, ...], "of the reading"]
    text: Annotated[Text, "of the reading"]
    logprob: Annotated[Number, "natural logarithm of its probability, summed over its tokens"]
    exact: Annotated[Switch, "logprob is from a forward pass over this reading alone"]


PINNED = (
    "pin"  # what a reader of a session decided: members that stayed, though a rule would have removed them
)


@dataclass(frozen=True)
class RunRule(Record):
    """A function of the caller's own that decided in place of a setting."""

    name: Annotated[Text, "of the function"]
    sha256: Annotated[Text | None, "of its source; null where there is none to read"]
