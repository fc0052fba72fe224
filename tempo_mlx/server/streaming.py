"""Answers of requests that run in the worker: whole, or as server-sent events. A client that leaves cancels."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tempo_mlx.server.engine import Engine, Ticket
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.protocol import Event

Render = Callable[[Event], Iterable[bytes]]


class Gone(Exception):
    """The client closed the connection."""


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(engine: Engine, ticket: Ticket, request: Request) -> list[Event]:
    """Wait for the request's end; all its events. Raises ApiError; Gone, with the request cancelled, on disconnect."""

    async def collect() -> list[Event]:
        return [event async for event in engine.events(ticket) if event is not None]

    work = asyncio.ensure_future(collect())
    watch = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Gone
        return work.result()
    finally:
        engine.cancel(ticket)
        for task in (work, watch):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await task


async def last(engine: Engine, ticket: Ticket, request: Request) -> Event:
    return (await whole(engine, ticket, request))[-1]


class EventStream(Response):
    """text/event-stream of a ticket. `render` turns each event into bytes; heartbeats fill the silence.

    Nothing is sent before the first event is there, so that a request that fails at once gets a plain error.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        engine: Engine,
        ticket: Ticket,
        *,
        render: Render,
        fail: Callable[[ApiError], Iterable[bytes]],
        beat: Callable[[Ticket], Iterable[bytes]],
        queued: Callable[[int], bytes] | None = None,
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.engine, self.ticket = engine, ticket
        self.render_event, self.fail, self.beat, self.queued = render, fail, beat, queued
        self.quiet_since = time.monotonic()
        self.position = -1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(disconnected(receive))
        work = asyncio.ensure_future(self._send(send))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self.engine.cancel(self.ticket)
            for task in (work, watch):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, ApiError, OSError):
                    await task

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
            for chunk in self._queued():
                begun = True
                yield chunk
            async for event in self.engine.events(self.ticket, self._pause):
                for chunk in self._silence() if event is None else self.render_event(event):
                    begun = True
                    self.quiet_since = time.monotonic()
                    yield chunk
        except ApiError as error:
            if not begun:
                raise
            for chunk in self.fail(error):
                yield chunk

    def _pause(self) -> float:
        """Seconds until something has to be said."""
        left = max(0.01, self.quiet_since + self.engine.pace.heartbeat - time.monotonic())
        return min(left, 0.5) if self.ticket.state == "waiting" else left

    def _silence(self) -> Iterator[bytes]:
        yield from self._queued()
        if time.monotonic() - self.quiet_since >= self.engine.pace.heartbeat:
            yield from self.beat(self.ticket)

    def _queued(self) -> Iterator[bytes]:
        """The place in the queue, whenever it changes."""
        if self.ticket.state == "waiting" and self.queued is not None:
            position = self.engine.position(self.ticket)
            if position != self.position:
                self.position = position
                yield self.queued(position)


def sse(name: str | None, data: str, id: int | None = None) -> bytes:
    """One server-sent event; `data` is JSON, so it is one line."""
    head = (f"id: {id}\n" if id is not None else "") + (f"event: {name}\n" if name else "")
    return f"{head}data: {data}\n\n".encode()


def native(engine: Engine, ticket: Ticket) -> EventStream:
    """Our own events: the worker's, heartbeats, and an error as the last one."""

    def render(event: Event) -> Iterable[bytes]:
        yield sse(event.name, event.data, event.step)

    def fail(error: ApiError) -> Iterable[bytes]:
        yield sse("error", json.dumps({**error.body(ticket.id), "status": error.status}))

    def beat(ticket: Ticket) -> Iterable[bytes]:
        data: dict[str, Any] = {
            "elapsed_seconds": round(time.monotonic() - ticket.created, 3),
            "state": "queued" if ticket.state == "waiting" else "running",
            "queue_position": engine.position(ticket),
        }
        yield sse("heartbeat", json.dumps(data))

    def queued(position: int) -> bytes:
        return sse("queued", json.dumps({"request_id": ticket.id, "position": position}))

    return EventStream(engine, ticket, render=render, fail=fail, beat=beat, queued=queued)
