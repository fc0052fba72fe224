"""Answers of requests that run in the worker: whole, or as server-sent events. A client that leaves cancels."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from itertools import chain
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tempo_mlx.server.engine import Engine, Ticket
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.protocol import Event

T = TypeVar("T")


class Gone(Exception):
    """The client closed the connection."""


async def attended(work: Coroutine[Any, Any, T], receive: Receive, engine: Engine, ticket: Ticket) -> T:
    """What `work` comes to. Raises Gone where the client leaves first; the ticket is not worked on any longer."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        engine.cancel(ticket)
        for each in (task, watch):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError, OSError):
                await each


async def last(engine: Engine, ticket: Ticket, request: Request) -> Event:
    """The event a request ends with. Raises ApiError; Gone on disconnect."""

    async def collect() -> Event:
        return [event async for event in engine.events(ticket) if event is not None][-1]

    return await attended(collect(), request.receive, engine, ticket)


class EventStream(Response):
    """text/event-stream of a ticket: the worker's events, and heartbeats in their silence. An error is the last.

    Nothing is sent before the first event is there, so that a request that fails at once gets a plain error.
    """

    media_type = "text/event-stream"

    def __init__(self, engine: Engine, ticket: Ticket) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.engine, self.ticket = engine, ticket
        self.quiet_since = time.monotonic()
        self.position = -1

    def written(self, event: Event) -> Iterable[bytes]:
        """An event of the worker's."""
        yield sse(event.name, event.data, event.step)

    def failed(self, error: ApiError) -> bytes:
        return sse("error", json.dumps({**error.body(self.ticket.id), "status": error.status}))

    def beat(self) -> bytes:
        data: dict[str, Any] = {
            "elapsed_seconds": round(time.monotonic() - self.ticket.created, 3),
            "state": "queued" if self.ticket.state == "waiting" else "running",
            "queue_position": self.engine.position(self.ticket),
        }
        return sse("heartbeat", json.dumps(data))

    def queued(self) -> Iterator[bytes]:
        """The place in the queue, whenever it changes."""
        if self.ticket.state == "waiting" and self.engine.position(self.ticket) != self.position:
            self.position = self.engine.position(self.ticket)
            yield sse("queued", json.dumps({"request_id": self.ticket.id, "position": self.position}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(Gone):
            await attended(self._send(send), receive, self.engine, self.ticket)

    async def _send(self, send: Send) -> None:
        started = False
        async for chunk in self._chunks():
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        begun = False
        try:
            for chunk in self.queued():
                begun = True
                yield chunk
            async for event in self.engine.events(self.ticket, self._pause):
                for chunk in chain(() if event is None else self.written(event), self._silence()):
                    begun = True
                    self.quiet_since = time.monotonic()
                    yield chunk
        except ApiError as error:
            if not begun:
                raise
            yield self.failed(error)

    def _pause(self) -> float:
        """Seconds until something has to be said."""
        left = max(0.01, self.quiet_since + self.engine.pace.heartbeat - time.monotonic())
        return min(left, 0.5) if self.ticket.state == "waiting" else left

    def _silence(self) -> Iterator[bytes]:
        yield from self.queued()
        if time.monotonic() - self.quiet_since >= self.engine.pace.heartbeat:
            yield self.beat()


def sse(name: str | None, data: str, id: int | None = None) -> bytes:
    """One server-sent event; `data` is JSON, so it is one line."""
    head = (f"id: {id}\n" if id is not None else "") + (f"event: {name}\n" if name else "")
    return f"{head}data: {data}\n\n".encode()
