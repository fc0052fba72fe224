"""The server's side of the worker: start it, queue requests, hand out its events, replace it when it dies.

Everything runs on the event loop, except two threads that only read from and write to the pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from tempo_mlx.load_config import LoadConfig
from tempo_mlx.ranks import processes as ranks
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.metrics import Metrics
from tempo_mlx.server.protocol import (
    Beat,
    Cancel,
    Event,
    Failed,
    FromServer,
    FromWorker,
    Kind,
    Probe,
    Problem,
    Ready,
    Stop,
    Submit,
)
from tempo_mlx.server.settings import Pace, ServerConfig
from tempo_mlx.server.worker import main as worker_main

log = logging.getLogger("tempo_mlx.server")

WATCH_SECONDS = 0.25
STABLE_SECONDS = 30.0  # a worker that lived this long is restarted at once, others after a growing pause
LONGEST_PAUSE = 30.0
REMEMBERED_SESSIONS = 1000
UNREAD_EVENTS = 10_000  # a client with this many unread events has stopped reading

State = Literal["loading", "ready", "dead", "failed", "stopping"]


@dataclass
class Ticket:
    """One request on its way: waiting, then running in the worker, then done. Its events arrive in `events`."""

    id: str
    kind: Kind
    payload: dict[str, Any]
    owner: str | None
    deadline: float  # monotonic
    created: float = field(default_factory=time.monotonic)
    state: Literal["waiting", "running", "done"] = "waiting"
    events: asyncio.Queue[Event | ApiError] = field(default_factory=asyncio.Queue)
    cancelled: str | None = None
    outcome: str = ""


class Engine:
    """Owns the worker process. `submit` a request, iterate over `events(ticket)`, `cancel` it."""

    def __init__(self, load: LoadConfig, config: ServerConfig, metrics: Metrics, pace: Pace) -> None:
        self.load, self.config, self.metrics, self.pace = load, config, metrics, pace
        self.state: State = "loading"
        self.ready: Ready | None = None
        self.failure: Failed | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.restarts = 0
        self.beat: Beat | None = None
        self.beat_at = time.monotonic()
        self.generation = 0  # counts workers, so that a dead one's messages are ignored
        self.sessions: OrderedDict[str, None] = OrderedDict()  # made by this worker, the most recent ones
        self.lost_sessions: OrderedDict[str, None] = OrderedDict()  # made by workers that died
        self._waiting: deque[Ticket] = deque()
        self._running: dict[str, Ticket] = {}
        self._process: BaseProcess | None = None
        self._outbox: queue.SimpleQueue[FromServer | None] = queue.SimpleQueue()
        self._started = 0.0
        self._probing: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life of the worker

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._spawn()
        self._keep(self._watch())

    async def stop(self) -> None:
        """Ask the worker to end, then kill it."""
        self.state = "stopping"
        for task in self._tasks:
            task.cancel()
        self._outbox.put(Stop())
        self._outbox.put(None)
        process = self._process
        if process is not None:
            await asyncio.to_thread(process.join, 2.0)
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join, 5.0)
        for ticket in [*self._running.values(), *self._waiting]:
            self._finish(ticket, shutting_down())

    async def drain(self, seconds: float) -> None:
        """Refuse new requests and let those in flight finish; after `seconds`, cancel them (their text is kept)."""
        self.state = "stopping"
        for ticket in list(self._waiting):
            self._finish(ticket, shutting_down())
        end = time.monotonic() + seconds
        while self._running and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for ticket in list(self._running.values()):
            self.cancel(ticket)
        end = time.monotonic() + 2.0
        while self._running and time.monotonic() < end:
            await asyncio.sleep(0.02)

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self.generation += 1
        self.state, self.beat, self._started = "loading", None, time.monotonic()
        self.beat_at = self._started
        self._process = context.Process(
            target=worker_main, args=(theirs, self.load, self.config), name="tempo-mlx worker", daemon=True
        )
        self._process.start()
        theirs.close()  # so that the pipe closes when the worker dies
        self._outbox = queue.SimpleQueue()
        threading.Thread(target=_write, args=(ours, self._outbox), name="to worker", daemon=True).start()
        threading.Thread(
            target=self._read, args=(ours, self.generation), name="from worker", daemon=True
        ).start()
        log.info("worker started", extra={"worker_pid": self._process.pid, "restarts": self.restarts})

    def _read(self, connection: Connection, generation: int) -> None:
        """Thread: pass the worker's messages to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop has closed
            try:
                while True:
                    message = connection.recv()
                    self._loop.call_soon_threadsafe(self._receive, message, generation)
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(self._died, generation)

    def _receive(self, message: FromWorker, generation: int) -> None:
        if generation != self.generation:
            return
        self.beat_at = time.monotonic()
        if isinstance(message, Beat):
            self.beat = message
            self.metrics.beat(message)
            if self._probing is not None and not self._probing.done() and message.last_forward_age < 1.0:
                self._probing.set_result(None)
        elif isinstance(message, Ready):
            self.ready = message
            if self.state == "loading":
                self.state = "ready"
            log.info("model loaded", extra={"model": message.model.get("id"),
                                            "seconds": round(time.monotonic() - self._started, 2)})  # fmt: skip
            self._dispatch()
        elif isinstance(message, Failed):
            self.failure, self.state = message, "failed"
            log.error(message.message)
            for ticket in [*self._running.values(), *self._waiting]:
                self._finish(ticket, ApiError(503, "model_failed", message.message))
            self.on_failure()
        elif message.id in self._running:
            ticket = self._running[message.id]
            if isinstance(message, Problem):
                self._finish(ticket, ApiError(message.status, message.code, message.message, message.param))
                return
            if message.stats:
                self.metrics.step(message.stats)
            ticket.events.put_nowait(message)
            if message.last:
                self._finish(ticket)
            elif ticket.events.qsize() > UNREAD_EVENTS:
                self.cancel(ticket)

    def _died(self, generation: int) -> None:
        """The worker is gone: fail its requests, and start another."""
        if generation != self.generation or self.state in ("failed", "stopping"):
            return
        if ranks.rank() is not None:
            self._receive(Failed("The process of rank 0 that runs the model died, and with it the other ranks; "
                                 "start all ranks again.", 1), generation)  # fmt: skip
            return
        assert self._process is not None
        self._process.join(1.0)
        self.state, self.ready = "dead", None
        self._outbox.put(None)
        log.error("worker died", extra={"exit_code": self._process.exitcode, "in_flight": len(self._running)})
        self.metrics.worker_restarts.inc()
        self.restarts += 1
        if self._probing is not None and not self._probing.done():
            self._probing.set_result(None)
        self.lost_sessions.update(self.sessions)
        self.sessions.clear()
        while len(self.lost_sessions) > REMEMBERED_SESSIONS:
            self.lost_sessions.popitem(last=False)
        for ticket in list(self._running.values()):
            self._finish(
                ticket,
                ApiError(503, "worker_died", "The process that runs the model died and is being restarted; "
                         "send the request again.", headers={"Retry-After": "5"}),
            )  # fmt: skip
        lived = time.monotonic() - self._started
        quick = self.restarts if lived < STABLE_SECONDS else 0
        self._keep(self._respawn(min(LONGEST_PAUSE, 0.5 * 2.0 ** min(quick, 10)) if quick > 1 else 0.0))

    async def _respawn(self, pause: float) -> None:
        await asyncio.sleep(pause)
        self._spawn()

    async def _watch(self) -> None:
        """Enforce deadlines, and kill a worker that hangs."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            for ticket in list(self._waiting):
                if now > ticket.deadline:
                    self._finish(ticket, ApiError(504, "timeout", "The request timed out before its turn came; "
                                                  "try again when the server is less busy."))  # fmt: skip
            for ticket in list(self._running.values()):
                if now > ticket.deadline and ticket.cancelled is None:
                    self.cancel(ticket, "timeout")
            if self.state == "ready" and now - self.beat_at > self.pace.worker_timeout:
                log.error("worker gives no sign of life", extra={"seconds": round(now - self.beat_at, 1)})
                assert self._process is not None
                self._process.kill()
                self.beat_at = now
            self._gauge()

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- requests

    def submit(self, kind: Kind, payload: dict[str, Any], *, id: str, owner: str | None = None) -> Ticket:
        """Queue a request. Raises ApiError when it cannot be taken: loading, dead, queue full, id in use."""
        if self.state != "ready":
            raise self._unavailable()
        if id in self._running or any(t.id == id for t in self._waiting):
            raise ApiError(
                409, "conflict", f"A request with the id {id} is already in flight; choose another id."
            )
        if len(self._running) >= self.config.concurrency and len(self._waiting) >= self.config.queue_size:
            self.metrics.refused.inc()
            raise ApiError(503, "queue_full", "Too many requests are waiting; try again in a few seconds.",
                           headers={"Retry-After": "5"})  # fmt: skip
        ticket = Ticket(id, kind, payload, owner, time.monotonic() + self.config.request_timeout)
        self._waiting.append(ticket)
        self._dispatch()
        return ticket

    def remember_session(self, id: str) -> None:
        self.sessions[id] = None
        if len(self.sessions) > REMEMBERED_SESSIONS:
            self.sessions.popitem(last=False)

    def find(self, id: str, owner: str | None) -> Ticket | None:
        """A request in flight, if it is the owner's."""
        ticket = self._running.get(id) or next((t for t in self._waiting if t.id == id), None)
        return ticket if ticket is not None and ticket.owner == owner else None

    def cancel(self, ticket: Ticket, reason: str = "cancelled") -> None:
        """End a request: at once if it waits, between two steps if it is running."""
        if ticket.state == "waiting":
            self._finish(
                ticket, ApiError(409, "cancelled", "The request was cancelled before its turn came.")
            )
        elif ticket.state == "running" and ticket.cancelled is None:
            ticket.cancelled = reason
            self._outbox.put(Cancel(ticket.id, reason))

    async def events(
        self, ticket: Ticket, pause: Callable[[], float | None] = lambda: None
    ) -> AsyncIterator[Event | None]:
        """The ticket's events up to its last; None whenever `pause()` seconds pass without one. Raises ApiError.

        Leaving the iteration early does not cancel the request; `cancel` does.
        """
        while True:
            try:
                item = await asyncio.wait_for(ticket.events.get(), pause())
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(item, ApiError):
                raise item
            yield item
            if item.last:
                return

    def position(self, ticket: Ticket) -> int:
        """How many requests are ahead of this one; 0 when it is running."""
        return self._waiting.index(ticket) + 1 if ticket in self._waiting else 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def _dispatch(self) -> None:
        while self.state == "ready" and self._waiting and len(self._running) < self.config.concurrency:
            ticket = self._waiting.popleft()
            ticket.state = "running"
            self._running[ticket.id] = ticket
            self.metrics.queue_seconds.observe(time.monotonic() - ticket.created)
            self._outbox.put(Submit(ticket.id, ticket.kind, ticket.payload))
        self._gauge()

    def _finish(self, ticket: Ticket, error: ApiError | None = None) -> None:
        if ticket.state == "done":
            return
        if ticket.state == "running":
            del self._running[ticket.id]
        else:
            self._waiting.remove(ticket)
        ticket.state = "done"
        ticket.outcome = error.code if error else ticket.cancelled or "ok"
        self.metrics.requests.labels(ticket.kind, ticket.outcome).inc()
        self.metrics.request_seconds.labels(ticket.kind).observe(time.monotonic() - ticket.created)
        if error is not None:
            ticket.events.put_nowait(error)
        self._dispatch()

    def _gauge(self) -> None:
        self.metrics.running.set(len(self._running))
        self.metrics.waiting.set(len(self._waiting))

    def _unavailable(self) -> ApiError:
        if self.state == "stopping":
            return shutting_down()
        if self.state == "failed":
            assert self.failure is not None
            return ApiError(503, "model_failed", self.failure.message)
        return ApiError(503, "loading", "The model is being loaded; try again in a few seconds.",
                        headers={"Retry-After": "3"})  # fmt: skip

    # -- health

    async def probe(self, patience: float = 5.0) -> str:
        """`ok`, `loading`, `dead`, `stalled` or `shutting_down`. An idle worker must prove that it still computes."""
        if self.state != "ready":
            return {"stopping": "shutting_down", "failed": "dead"}.get(self.state, self.state)
        if time.monotonic() - self.beat_at > max(5.0, 0.5 * self.pace.worker_timeout):
            return "stalled"
        idle = not self._running and self.beat is not None
        if idle and self.beat is not None and self.beat.last_forward_age > self.pace.probe_after:
            if self._probing is None or self._probing.done():
                self._probing = self._loop.create_future()
                self._outbox.put(Probe())
            try:
                await asyncio.wait_for(asyncio.shield(self._probing), patience)
            except asyncio.TimeoutError:
                return "stalled"
            if self.state != "ready":
                return "dead"
        return "ok"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None


def shutting_down() -> ApiError:
    return ApiError(503, "shutting_down", "The server is shutting down; try again later.")


def _write(connection: Connection, outbox: queue.SimpleQueue[FromServer | None]) -> None:
    """Thread: send the outbox, so that a full pipe never blocks the event loop."""
    with contextlib.suppress(OSError):  # the worker is dead: the reader reports it
        while (message := outbox.get()) is not None:
            connection.send(message)
