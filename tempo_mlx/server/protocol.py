"""The messages between the server and its worker process, over one pipe.

They hold plain values only. An event's payload is already JSON: the worker writes it, the server passes it on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["generate", "ask", "completion", "session"]


@dataclass(frozen=True)
class Submit:
    """Server -> worker: begin a request."""

    id: str
    kind: Kind
    payload: dict[str, Any]


@dataclass(frozen=True)
class Cancel:
    """Server -> worker: end a request between two steps; `reason` becomes the run's finish_reason."""

    id: str
    reason: str  # cancelled | timeout


@dataclass(frozen=True)
class Probe:
    """Server -> worker: run one real forward pass, so that /health knows the model still computes."""


@dataclass(frozen=True)
class Stop:
    """Server -> worker: exit."""


@dataclass(frozen=True)
class Ready:
    """Worker -> server: the model is loaded. has_chat_template: None where nobody has looked yet."""

    model: dict[str, Any]  # the run file's "model"
    context_length: int
    has_chat_template: bool | None


@dataclass(frozen=True)
class Failed:
    """Worker -> server: the model cannot be loaded, or is lost; retrying will not help."""

    message: str
    exit_code: int
    memory: bool = False  # there is too little


@dataclass(frozen=True)
class Beat:
    """Worker -> server: heartbeat, at least once a second."""

    last_forward_age: float  # seconds
    memory_bytes: int
    sessions: int
    cache_slots: int


@dataclass(frozen=True)
class Event:
    """Worker -> server: one event of a request. `last`: the request is over, and its place is free.

    `stats`, of a step: width, rows, cache_slots, step_seconds, together (requests that shared its forward pass); of the
    first step also prefill_seconds.
    """

    id: str
    name: str
    data: str
    last: bool = False
    step: int | None = None
    stats: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """An error of a request, as the client sees it; ends the request."""

    id: str
    status: int
    code: str
    message: str
    param: str | None = None


FromServer = Submit | Cancel | Probe | Stop
FromWorker = Ready | Failed | Beat | Event | Problem
