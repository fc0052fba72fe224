"""What one decoding step records. The fields are those of the run file (report/run.py)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Removal:
    """Why a member was removed: which signal, its score, and the threshold the score was held against."""

    signal: str
    score: float
    threshold: float
    unattended: bool = False  # keep_unattended: no longer seen, but still the set's token in the text


@dataclass(frozen=True)
class Edge:
    """From row i of the previous set to member j: `posterior` is P(i|j), `forward` is P(j|i)."""

    slot: int
    posterior: float
    forward: float


@dataclass
class Member:
    """One kept token. Mutable only in what later steps may still learn about it (the last four fields)."""

    id: int
    probability: float
    slot: int | None
    weight: float | None
    parents: tuple[Edge, ...] = ()
    position: int | None = None  # only where it differs from the step's
    branch: int | None = None  # only under tree decoding
    removed_after: int | None = None
    removed_why: Removal | None = None
    attention: float | None = None
    posterior: float | None = None


@dataclass(frozen=True)
class Rejected:
    """A candidate that was dropped before it got a slot."""

    id: int
    probability: float
    why: str


@dataclass
class Step:
    """Set number `step`, chosen at logical position `position`; `tokens` best first.

    `exit_layer`: after which the rows it was chosen from left the model, None where they went through all of it.
    `removed`: slots of earlier sets removed by what the previous set's rows showed.
    `seconds`: wall-clock from the previous step's choice to this one's.
    """

    step: int
    position: int
    threshold: float | None
    residual_probability: float
    tokens: list[Member]
    rejected: list[Rejected] = field(default_factory=list)
    exit_layer: int | None = None
    removed: tuple[int, ...] = ()
    seconds: float = 0.0
