"""Connections that ask for nothing: how long they may stay, and which must go when there are too many."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

ACCEPTED_AT_ONCE = 64  # connections, before any of them can be closed again
OTHER_FILES = 64  # that the server has open beside connections


def most_connections(wanted: int) -> int:
    """As many as are wanted, and as the limit on open files leaves room for."""
    try:
        import resource
    except ImportError:  # Windows
        return wanted
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = wanted if files == resource.RLIM_INFINITY else files - OTHER_FILES - ACCEPTED_AT_ONCE
    return max(1, min(wanted, room))


class Connections:
    """All that are open, and a maker of them for uvicorn. The one that has been idle for longest makes room."""

    def __init__(self, most: int, patience: float) -> None:
        """patience: seconds from a connection's opening, or its last answer, to the end of a request's head."""
        self.most, self.patience = most, patience
        self.idle: dict[Connection, None] = {}  # longest first
        self.open = 0

    def __call__(self, **given: Any) -> Connection:
        return Connection(self, **given)

    def make_room(self) -> None:
        """Where none is idle, every one is answered, and as many as there are."""
        if self.open > self.most and self.idle:
            next(iter(self.idle)).leave()


class Connection(H11Protocol):
    """uvicorn's, which alone would wait for ever for a request."""

    def __init__(self, others: Connections, **given: Any) -> None:
        super().__init__(**given)
        self.others = others
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.others.open += 1
        self.note()
        self.others.make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.note()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.note()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.others.open -= 1
        self.forget()

    def note(self) -> None:
        """Start to wait for a request's head, or see that it has come."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.forget()
        elif self.timer is None and not self.transport.is_closing():
            self.others.idle[self] = None
            self.timer = self.loop.call_later(self.others.patience, self.leave)

    def forget(self) -> None:
        self.others.idle.pop(self, None)
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def leave(self) -> None:
        self.forget()
        self.transport.close()
