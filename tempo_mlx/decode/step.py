"""What one step decides: the description of it in the run file, and the same while decoding goes on.

`RunToken` and `RunStep` are what a run file says; frozen. `Member` and `Step` are what a decoder keeps, and may still
learn something. A decoder knows no texts: a stream puts them in for those who look on (api.py), and they are put in
anew when the record is made (report/build.py).
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field, replace
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from tempo_mlx.strict import Number, Record, Switch, Text, Whole, as_list, names_of


class Tokenizer(Protocol):
    def token_text(self, token_id: int, /) -> str: ...


BY_HAND = "by hand"  # the reason where a reader decided, and no rule


@dataclass(frozen=True)
class Removal(Record):
    """Why a member was removed."""

    signal: Annotated[Text, "what was weighed: posterior, attention, or a name of your rule's"]
    score: Annotated[Number, "of the member, by that signal"]
    threshold: Annotated[Number, "that the score was held against"]
    unattended: Annotated[Switch, "no later row sees it, but it is still its set's token in the text"] = False


class Edge(NamedTuple):
    """[slot, P(i|j), P(j|i)]: from row i of the previous set to member j."""

    slot: Annotated[Whole, Field(title="slot", description="slot of row i")]
    posterior: Annotated[Number, Field(title="posterior", description="P(i|j)")]
    forward: Annotated[Number, Field(title="forward", description="P(j|i)")]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return as_list(cls, handler)


@dataclass(frozen=True)
class RunToken(Record):
    """One kept token of a set."""

    may_lack = frozenset({"position", "branch"})

    id: Annotated[Whole, "in the model's vocabulary"]
    text: Annotated[Text, "of the token; empty where it is part of a character"] = field(
        default="", kw_only=True
    )
    probability: Annotated[Number, "in the distribution it was chosen from, after temperature"]
    slot: Annotated[Whole | None, "order of append, counted from the first prompt token; null: ends the text"]
    weight: Annotated[
        Number | None, "share of the probability of its set's members with a slot; null without one"
    ]
    parents: Annotated[
        tuple[Edge, ...], "every row of the previous step; P(i|j) sums to 1; none at step 0"
    ] = ()
    removed_after: Annotated[Whole | None, "after which step's rows it was removed; null: it stayed"] = None
    removed_why: Annotated[Removal | None, "null where it stayed"] = None
    attention: Annotated[Number | None, "mean over heads, layers and newest rows, the last while alive"] = (
        None
    )
    posterior: Annotated[Number | None, "probability that what followed uses it, the last while alive"] = None
    position: Annotated[Whole | None, "logical position, where it is not the step's"] = None
    branch: Annotated[Whole | None, "number of its branch, under tree decoding"] = None


def with_plain_numbers(record: Any) -> dict[str, Any]:
    """The fields of a record, in Python's numbers, whatever numpy scalars it holds: JSON knows no others."""
    values = {name: getattr(record, name) for name in names_of(record.__class__)}
    for name, value in values.items():
        if isinstance(value, np.generic):
            values[name] = value.item()
        elif isinstance(value, Removal):  # which may be of a rule of the caller's own
            values[name] = Removal(**with_plain_numbers(value))
    return values


def learn(record: Member | Step, name: str, value: object) -> None:
    """Set what a record is to learn; all else of it is frozen."""
    if name not in record.learns:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")
    object.__setattr__(record, name, value)


class Member(RunToken):
    """A kept token while decoding goes on: later steps may still learn four things about it, and a stream its text."""

    learns = frozenset({"removed_after", "removed_why", "attention", "posterior", "text"})
    removed_after: int | None
    removed_why: Removal | None
    attention: float | None
    posterior: float | None
    text: str

    def __setattr__(self, name: str, value: object) -> None:
        learn(self, name, value)

    def record(self, text: str) -> RunToken:
        """The member as the run file says it."""
        return RunToken(**{**with_plain_numbers(self), "text": text})


@dataclass(frozen=True)
class Rejected(Record):
    """A candidate that was dropped before it got a slot."""

    id: Annotated[Whole, "in the model's vocabulary"]
    text: Annotated[Text, "of the token"] = field(default="", kw_only=True)
    probability: Annotated[Number, "as of a member"]
    why: Annotated[Text, "which rule dropped it"]


@dataclass(frozen=True)
class RunStep(Record):
    """One parallel set: the tokens kept at one step."""

    may_lack = frozenset({"masked"})

    step: Annotated[Whole, "its number, from 0"]
    position: Annotated[Whole, "logical position of its members: prompt length + step"]
    threshold: Annotated[Number | None, "probability a member needed; null where the selection uses none"]
    exit_layer: Annotated[Whole | None, "layer after which the deciding rows left; null: after the last"] = (
        field(default=None, kw_only=True)
    )
    residual_probability: Annotated[Number, "1 - the sum of the members' probabilities"]
    masked: Annotated[
        tuple[Number, ...] | None, "at temperature 1, of each row chosen from: what a grammar took away"
    ] = field(default=None, kw_only=True)
    tokens: Annotated[tuple[RunToken, ...], "the members, best first"]
    rejected: Annotated[tuple[Rejected, ...], "candidates that were dropped before they got a slot"] = ()

    @property
    def best_text(self) -> str:
        """The text of its most probable member; empty where that ends the text."""
        return self.tokens[0].text if self.tokens[0].slot is not None else ""


class Step(RunStep):
    """A set while decoding goes on.

    `text`: its members that are alive, as `[A/B]`; empty until a stream gave it.
    `removed`: slots of earlier sets removed by what the previous set's rows showed.
    `seconds`: wall-clock from the previous step's choice to this one's.
    """

    learns = frozenset({"rejected", "removed", "seconds", "text"})
    tokens: tuple[Member, ...]
    rejected: tuple[Rejected, ...]
    text: str = ""
    removed: tuple[int, ...] = ()
    seconds: float = 0.0

    def __setattr__(self, name: str, value: object) -> None:
        learn(self, name, value)

    @classmethod
    def of(cls, record: RunStep) -> Step:
        """A recorded step as a decoder keeps it; the edges in slot order."""
        members = (Member(**{**vars(t), "parents": tuple(sorted(t.parents))}) for t in record.tokens)
        return cls(**{**vars(record), "tokens": tuple(members)})

    def record(self, tokenizer: Tokenizer) -> RunStep:
        """The step as the run file says it, with the text of each token, read alone."""
        text = tokenizer.token_text
        values = with_plain_numbers(self)
        values["tokens"] = tuple(member.record(text(member.id)) for member in self.tokens)
        values["rejected"] = tuple(replace(item, text=text(item.id)) for item in self.rejected)
        return RunStep(**values)
