"""The server's side of one model: start its worker, queue requests, hand out events, replace it when it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

from tempo_mlx.load_config import LoadConfig
from tempo_mlx.ranks import processes as ranks
from tempo_mlx.server.errors import ApiError, nested_too_deeply
from tempo_mlx.server.metrics import Metrics
from tempo_mlx.server.process import WorkerProcess
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
    Submit,
)
from tempo_mlx.server.settings import Pace, ServerConfig, model_name

log = logging.getLogger("tempo_mlx.server")

WATCH_SECONDS = 0.25
STABLE_SECONDS = 30.0  # a worker that lived this long is restarted at once, others after a growing pause
LONGEST_PAUSE = 30.0
REMEMBERED_SESSIONS = 1000
UNREAD_EVENTS = 10_000  # a client with this many unread events has stopped reading

State = Literal["loading", "ready", "unloaded", "dead", "failed", "stopping"]


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
    """Owns a model's worker process. `submit` a request, iterate over `events(ticket)`, `cancel` it."""

    def __init__(self, load: LoadConfig, config: ServerConfig, metrics: Metrics, pace: Pace) -> None:
        self.load, self.config, self.metrics, self.pace = load, config, metrics, pace
        self.name = model_name(load, config)
        self.state: State = "loading"
        self.ready: Ready | None = None
        self.failure: Failed | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.beside: Callable[[], int | None] = lambda: (
            0
        )  # bytes that other models take; None: one is being loaded
        self.make_room: Callable[[], asyncio.Task[None] | None] = lambda: (
            None
        )  # done when another is unloaded
        self.on_demand = False  # loaded for requests, which wait until it is
        self.keep_alive = config.keep_alive  # seconds after `used`, when the model is unloaded; None: never
        self.used = time.monotonic()
        self.restarts = 0
        self.beat: Beat | None = None
        self.beat_at = time.monotonic()
        self.sessions: OrderedDict[str, None] = OrderedDict()  # made by this worker, the most recent ones
        self.lost_sessions: OrderedDict[str, None] = OrderedDict()  # made by workers that died
        self._waiting: deque[Ticket] = deque()
        self._running: dict[str, Ticket] = {}
        self._process: WorkerProcess | None = None
        self._beside = 0  # as it was told
        self._ending: asyncio.Task[None] | None = None  # of the process before
        self._started = 0.0
        self._probing: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life of the worker

    async def start(self, load: bool = True) -> None:
        self._loop = asyncio.get_running_loop()
        if load:
            self._spawn(0)
        else:
            self.state = "unloaded"
        self._keep(self._watch())

    async def stop(self) -> None:
        self.state = "stopping"
        for task in self._tasks:
            task.cancel()
        if self._process is not None:
            await self._process.end()
        for ticket in [*self._running.values(), *self._waiting]:
            self._finish(ticket, shutting_down())

    def wake(self) -> None:
        """Load the model again where it was unloaded."""
        if self.state == "unloaded":
            self.state, self.failure, self.on_demand = "loading", None, True
            self._keep(self._respawn(0.0))

    async def awake(self) -> Ready:
        """What the model is, once it is loaded. Raises ApiError."""
        self.wake()
        while self.state == "loading" and self.on_demand:
            await asyncio.sleep(0.02)
        if self.state != "ready" or self.ready is None:
            raise self._unavailable()
        return self.ready

    def unload(self) -> asyncio.Task[None]:
        """Free the memory of an idle model: its worker ends, and with it its sessions."""
        log.info("model unloaded", extra={"model": self.name})
        assert self._process is not None
        self._ending = self._keep(self._process.end())
        self._process, self.state, self.beat = None, "unloaded", None
        self._lose_sessions()
        return self._ending

    @property
    def idle(self) -> bool:
        """Whether the model can be unloaded; with ranks it could not be loaded again."""
        return self.state == "ready" and not self._running and not self._waiting and ranks.rank() is None

    @property
    def memory(self) -> int | None:
        """Bytes of its process; None while that is being settled."""
        if self._process is None:
            return 0
        return self.beat.memory_bytes if self.beat else None

    @property
    def kept_sessions(self) -> int:
        return self.beat.sessions if self.beat else 0

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

    def _spawn(self, beside: int) -> None:
        self._beside, self.state, self.beat, self._started = beside, "loading", None, time.monotonic()
        self.beat_at = self._started
        self._process = WorkerProcess(self.load, self.config, beside, self._receive, self._died)
        log.info("worker started", extra={"worker_pid": self.pid, "restarts": self.restarts})

    def _receive(self, message: FromWorker, process: WorkerProcess) -> None:
        if process is not self._process:
            return
        self.beat_at = time.monotonic()
        if isinstance(message, Beat):
            self.beat = message
            if self._probing is not None and not self._probing.done() and message.last_forward_age < 1.0:
                self._probing.set_result(None)
        elif isinstance(message, Ready):
            self.ready, self.used = message, time.monotonic()
            if self.state == "loading":
                self.state = "ready"
            log.info("model loaded", extra={"model": message.model.get("id"),
                                            "seconds": round(time.monotonic() - self._started, 2)})  # fmt: skip
            self._dispatch()
        elif isinstance(message, Failed):
            self._failed(message)
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

    def _failed(self, failure: Failed) -> None:
        """The model cannot be had. Where others can make room for it, it is loaded again; where requests had it loaded,
        the next may try again; else that is the end.
        """
        if self._process is not None:
            self._ending = self._keep(self._process.end())  # with the thread that writes to it
        self._process = None
        freed = self.make_room() if failure.memory else None
        meanwhile = (
            failure.memory and (self.beside() or 0) < 0.9 * self._beside
        )  # another was unloaded by itself
        if freed is not None or meanwhile:
            self._keep(self._respawn(0.0, freed))
            return
        self.failure, self.state = failure, "failed"
        log.error(failure.message)
        for ticket in [*self._running.values(), *self._waiting]:
            self._finish(ticket, self._no_model(failure))
        if self.on_demand:
            self.state = "unloaded"
        else:
            self.on_failure()

    def _died(self, process: WorkerProcess) -> None:
        """The worker is gone: fail its requests, and start another."""
        if process is not self._process or self.state == "stopping":
            return
        if ranks.rank() is not None:
            self._failed(Failed("The process of rank 0 that runs the model died, and with it the other ranks; "
                                "start all ranks again.", 1))  # fmt: skip
            return
        self._process, self.state, self.ready, self.on_demand = None, "dead", None, False
        log.error("worker died", extra={"exit_code": process.bury(), "in_flight": len(self._running)})
        self.metrics.worker_restarts.inc()
        self.restarts += 1
        if self._probing is not None and not self._probing.done():
            self._probing.set_result(None)
        self._lose_sessions()
        for ticket in list(self._running.values()):
            self._finish(
                ticket,
                ApiError(503, "worker_died", "The process that runs the model died and is being restarted; "
                         "send the request again.", headers={"Retry-After": "5"}),
            )  # fmt: skip
        lived = time.monotonic() - self._started
        quick = self.restarts if lived < STABLE_SECONDS else 0
        self._keep(self._respawn(min(LONGEST_PAUSE, 0.5 * 2.0 ** min(quick, 10)) if quick > 1 else 0.0))

    def _lose_sessions(self) -> None:
        self.lost_sessions.update(self.sessions)
        self.sessions.clear()
        while len(self.lost_sessions) > REMEMBERED_SESSIONS:
            self.lost_sessions.popitem(last=False)

    async def _respawn(self, pause: float, freed: asyncio.Task[None] | None = None) -> None:
        """freed: done when there is room."""
        await asyncio.sleep(pause)
        for ending in (self._ending, freed):
            if ending is not None:
                await ending
        while (beside := self.beside()) is None:
            await asyncio.sleep(0.05)
        if self.state != "stopping":
            self._spawn(beside)

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
            told = self.beat_at > self.used  # whether what was done last left a session
            unused = self.keep_alive is not None and now - self.used > self.keep_alive
            if unused and told and self.idle and not self.kept_sessions:
                self.unload()

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- requests

    def submit(self, kind: Kind, payload: dict[str, Any], *, id: str, owner: str | None = None) -> Ticket:
        """Queue a request. Raises ApiError when it cannot be taken: loading, dead, queue full, id in use."""
        self.wake()
        if self.state != "ready" and not (self.state == "loading" and self.on_demand):
            raise self._unavailable()
        if id in self._running or any(t.id == id for t in self._waiting):
            raise ApiError(
                409, "conflict", f"A request with the id {id} is already in flight; choose another id."
            )
        if self.running + self.waiting >= self.config.concurrency + self.config.queue_size:
            self.metrics.refused.inc()
            raise ApiError(503, "queue_full", "Too many requests are waiting; try again in a few seconds.",
                           headers={"Retry-After": "5"})  # fmt: skip
        ticket = Ticket(id, kind, payload, owner, time.monotonic() + self.config.request_timeout)
        self.keep_alive = self.config.keep_alive
        self._waiting.append(ticket)
        self._dispatch()
        return ticket

    def remember_session(self, id: str) -> None:
        """Made, or used."""
        self.sessions[id] = None
        self.sessions.move_to_end(id)
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
            self._send(Cancel(ticket.id, reason))

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
            try:
                self._send(Submit(ticket.id, ticket.kind, ticket.payload))
            except RecursionError:
                self._finish(ticket, nested_too_deeply())

    def _finish(self, ticket: Ticket, error: ApiError | None = None) -> None:
        if ticket.state == "done":
            return
        if ticket.state == "running":
            del self._running[ticket.id]
        else:
            self._waiting.remove(ticket)
        ticket.state, self.used = "done", time.monotonic()
        ticket.outcome = error.code if error else ticket.cancelled or "ok"
        self.metrics.requests.labels(ticket.kind, ticket.outcome).inc()
        self.metrics.request_seconds.labels(ticket.kind).observe(time.monotonic() - ticket.created)
        if error is not None:
            ticket.events.put_nowait(error)
        self._dispatch()

    def _send(self, message: FromServer) -> None:
        if self._process is not None:
            self._process.send(message)

    def _unavailable(self) -> ApiError:
        if self.state == "stopping":
            return shutting_down()
        if self.failure is not None:
            return self._no_model(self.failure)
        return ApiError(503, "loading", "The model is being loaded; try again in a few seconds.",
                        headers={"Retry-After": "3"})  # fmt: skip

    def _no_model(self, failure: Failed) -> ApiError:
        message = failure.message.replace(self.load.model, self.name)  # paths are not for clients
        if not failure.memory:
            return ApiError(503, "model_failed", message)
        if self.beside() != 0:
            message += " The models loaded beside it are in use: try again when they are not."
        return ApiError(503, "memory", message)

    # -- health

    async def probe(self, patience: float = 5.0) -> str:
        """`ok`, `loading`, `dead`, `stalled` or `shutting_down`. An idle worker must prove that it still computes."""
        if self.state != "ready":
            shown = {"stopping": "shutting_down", "failed": "dead", "unloaded": "ok"}
            return shown.get(self.state, self.state)
        if time.monotonic() - self.beat_at > max(5.0, 0.5 * self.pace.worker_timeout):
            return "stalled"
        idle = not self._running and self.beat is not None
        if idle and self.beat is not None and self.beat.last_forward_age > self.pace.probe_after:
            if self._probing is None or self._probing.done():
                self._probing = self._loop.create_future()
                self._send(Probe())
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
