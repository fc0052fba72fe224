"""The processes of one run: rank 0 decides, the others follow.

`mlx.launch` starts the same command on every rank. Rank 0 runs as if it were alone; whatever it wants computed is a
function that it calls on all ranks at once (`Leader.run`), in which MLX's collectives meet. The others `follow`: they
decide nothing and print nothing, so they can never disagree.

Calls travel over one TCP connection from each rank to rank 0, which also carries a heartbeat every second in both
directions. So every rank knows within `timeout` seconds that another has died or hangs, even while MLX waits for it:
rank 0 raises RankLostError from the call, the others end. Python objects are pickled: as with MLX's own connections,
the machines' network is trusted, and peers must present a secret that was shared over MLX's connections.
"""

from __future__ import annotations

import atexit
import contextlib
import hmac
import json
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tempo_mlx._version import __version__
from tempo_mlx.errors import BackendError, RankLostError, TempoError
from tempo_mlx.ranks.link import (
    CONNECT_SECONDS,
    NOTE_SIZE,
    TIMEOUT,
    Link,
    addresses,
    connect,
    hosts_of_rank_0,
    is_local,
    join,
    tell,
)

if TYPE_CHECKING:
    from tempo_mlx.mlx import mx

ASK_SECONDS = 0.1  # how often `spread` checks for an interruption
REASON_SECONDS = 2.0  # how long a failed computation waits to learn whether a lost rank is the cause


def rank() -> int | None:
    """This process's rank; None where no launcher started it, or no other process."""
    if "MLX_HOSTFILE" in os.environ and not addresses():
        return None  # mlx.launch -n 1 names an empty file
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return None


@dataclass
class Local:
    """A rank's state for the functions called on it: MLX's group, and objects by number.

    stopping: set when the result of the current call is no longer wanted.
    """

    group: mx.distributed.Group
    stopping: threading.Event = field(default_factory=threading.Event)
    objects: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """Call function(local, *arguments), and send back the result if `reply`."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    reply: bool


@dataclass(frozen=True)
class CallFailed:
    """A call on another rank raised; that rank has ended."""

    reason: str


@dataclass(frozen=True)
class Timeout:
    seconds: float


@dataclass(frozen=True)
class Leave:
    code: int


@cache
def lead() -> Leader:
    """Rank 0's side, one per process, as with MLX's group."""
    return Leader()


class Leader:
    """Calls functions on all ranks. This rank's own calls run in a thread, so that a caller can be told when one will
    never return."""

    def __init__(self) -> None:
        """Wait for the other ranks. Raises BackendError if they do not connect."""
        self.failure: RankLostError | None = None
        self.links: dict[int, Link] = {}
        self._pids: dict[int, int] = {}
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()  # (rank, message)
        self._numbers = iter(range(1, sys.maxsize))
        self._stopping = threading.Event()
        self._dropped: list[int] = []
        self._closing = False
        self._failing = threading.Lock()
        secret = secrets.token_hex(16)
        hosts = hosts_of_rank_0()
        with socket.create_server(("127.0.0.1" if is_local(hosts[0]) else "", 0)) as server:
            note = {"hosts": hosts, "port": server.getsockname()[1], "secret": secret}
            threading.Thread(target=self._work, args=(note,), name="rank 0", daemon=True).start()
            self.size: int = self._take()[1]
            self._accept(server, secret)
        atexit.register(self.close)

    def number(self) -> int:
        """A name for an object, the same on every rank."""
        return next(self._numbers)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call function(local, *arguments) on every rank; returns this rank's result.

        Raises RankLostError, from then on always, and whatever the function raises here.
        """
        self._drop()
        self._send(Call(function, arguments, reply=False))
        return self.run_here(function, *arguments)

    def run_here(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call it on this rank only; it must not wait for the others."""
        self._calls.put(Call(function, arguments, reply=True))
        return self._take()[1]

    def run_all(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call it on every rank; returns all results, by rank."""
        call = Call(function, arguments, reply=True)
        self._send(call)
        self._calls.put(call)
        replies = dict(self._take() for _ in range(self.size))
        return [replies[rank] for rank in range(self.size)]

    def tell(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call it on every rank without waiting; calls keep their order."""
        self._drop()
        call = Call(function, arguments, reply=False)
        self._send(call)
        self._calls.put(call)

    def spread(
        self,
        function: Callable[..., Any],
        jobs: Sequence[tuple[Any, ...]],
        interrupted: Callable[[], str | None] = lambda: None,
    ) -> Iterator[Any]:
        """The results of function(local, *job), in order; each job runs on one rank, whichever is free.

        Ends early once `interrupted()`, when this rank, told by `local.stopping`, has broken off.
        """
        waiting = iter(enumerate(jobs))
        working: dict[int, int] = {}  # rank -> index of its job
        done: dict[int, Any] = {}

        def give(rank: int) -> None:
            for index, job in waiting:
                working[rank] = index
                self._send(Call(function, job, reply=True), only=rank)
                return

        for rank in range(self.size):
            give(rank)
        for index in range(len(jobs)):
            while index not in done:
                if interrupted():
                    self._stopping.set()
                    while 0 in working:
                        working.pop(self._take()[0])
                    return
                with contextlib.suppress(queue.Empty):
                    rank, value = self._take(ASK_SECONDS)
                    done[working.pop(rank)] = value
                    give(rank)
            yield done.pop(index)

    def forget(self, number: int) -> None:
        """Drop an object. Safe in finalisers, which may run during a call: sent with the next one."""
        self._dropped.append(number)

    def _drop(self) -> None:
        if self._dropped:
            gone, self._dropped = self._dropped, []
            self.tell(_forget, gone)

    def check(self) -> None:
        """Raises RankLostError if a rank was lost."""
        if self.failure is not None:
            raise self.failure

    def set_timeout(self, seconds: float) -> None:
        """Seconds without a heartbeat after which a rank counts as lost."""
        for link in self.links.values():
            link.timeout = seconds
        self._send(Timeout(seconds))

    def close(self) -> None:
        """Release the other ranks. After a loss, end the process: MLX's threads would wait forever."""
        self._closing = True
        if self.failure is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        for link in self.links.values():
            with contextlib.suppress(OSError):  # already gone, which is fine
                link.send(Leave(0))

    def _send(self, message: Any, only: int | None = None) -> None:
        self.check()
        if only == 0:
            self._calls.put(message)
        for rank, link in self.links.items():
            if only in (None, rank):
                try:
                    link.send(message)
                except OSError:
                    self._lost(rank, "has ended", False)
        self.check()

    def _take(self, patience: float | None = None) -> tuple[int, Any]:
        """The next reply, and whose it is. Raises queue.Empty after `patience` seconds."""
        self.check()
        rank, value = self._inbox.get(timeout=patience)
        if isinstance(value, Exception):
            if not isinstance(value, TempoError):  # a lost rank may be the cause
                deadline = time.monotonic() + REASON_SECONDS
                while self.links and self.failure is None and time.monotonic() < deadline:
                    time.sleep(0.01)
                self.check()
            raise value
        return rank, value

    def _work(self, note: dict[str, Any]) -> None:
        """Thread: all MLX work of this rank."""
        try:
            local = Local(join(), self._stopping)
            tell(local.group, note)
        except BackendError as error:
            self._inbox.put((0, error))
            return
        self._inbox.put((0, local.group.size()))
        while True:
            call = self._calls.get()
            try:
                value = call.function(local, *call.arguments)
            except Exception as error:  # raised again where the call was made
                self._inbox.put((0, error))
            else:
                if call.reply:
                    self._inbox.put((0, value))
                del value  # it may be large, and the next call may take long to arrive

    def _accept(self, server: socket.socket, secret: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while len(self.links) < self.size - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connected, _ = server.accept()
                connected.settimeout(CONNECT_SECONDS)
                hello = json.loads(connected.makefile("rb", buffering=0).readline(NOTE_SIZE))
            except ValueError:
                continue  # not one of our ranks
            except OSError as error:
                missing = sorted({*range(1, self.size)} - {*self.links})
                raise BackendError(
                    f"Rank {missing[0]} of {self.size} did not reach rank 0 ({error}); its machine must be able to "
                    f"connect to {' or '.join(hosts_of_rank_0())}."
                ) from error
            if not hmac.compare_digest(str(hello.get("secret")), secret):
                continue
            if hello["version"] != __version__:
                raise BackendError(
                    f"Rank {hello['rank']} runs tempo-mlx {hello['version']} and rank 0 {__version__}; install the "
                    "same version everywhere."
                )
            self.links[hello["rank"]] = Link(connected)
            self._pids[hello["rank"]] = hello["pid"]
        for number, link in self.links.items():
            link.start(partial(self._received, number), partial(self._lost, number))

    def _received(self, rank: int, message: Any) -> None:
        if isinstance(message, CallFailed):
            self._lost(rank, f"failed: {message.reason}", False)
        else:
            self._inbox.put((rank, message))

    def _lost(self, rank: int, reason: str, stalled: bool) -> None:
        """End all ranks. A process on this machine that hangs is killed, or it would stay forever."""
        with self._failing:
            if self._closing or self.failure is not None:
                return
            self.failure = RankLostError(f"Rank {rank} {reason}; start all ranks again.")
        self._inbox.put((rank, self.failure))
        if stalled and self.links[rank].same_machine:
            os.kill(self._pids[rank], signal.SIGKILL)
        for link in self.links.values():
            with contextlib.suppress(OSError):  # gone as well
                link.send(Leave(1), patience=0.5)
            link.close()


def _forget(local: Local, numbers: list[int]) -> None:
    for number in numbers:
        del local.objects[number]


@dataclass(frozen=True)
class Reference:
    """Stands, in a call's arguments, for each rank's own object of this number."""

    number: int


class Shared:
    """Rank 0's handle of an object that every rank has its own of; they drop theirs when the handle goes."""

    def __init__(self, leader: Leader) -> None:
        self.leader, self.number = leader, leader.number()
        weakref.finalize(self, leader.forget, self.number).atexit = False

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object, or of one inside it ("model.finish"), on every rank; returns the result here."""
        return self.leader.run(_call, self.number, method, _sent(arguments))

    def tell(self, method: str, *arguments: Any) -> None:
        """Call it and do not wait."""
        self.leader.tell(_call, self.number, method, _sent(arguments))

    def give(self, result: Held, method: str, *arguments: Any) -> Held:
        """Call it without waiting; on each rank, its result becomes the object of `result`."""
        self.leader.tell(_call, self.number, method, _sent(arguments), result.number)
        return result


Held = TypeVar("Held", bound=Shared)


def _sent(arguments: tuple[Any, ...]) -> list[Any]:
    return [Reference(each.number) if isinstance(each, Shared) else each for each in arguments]


def _call(local: Local, number: int, method: str, arguments: list[Any], result: int | None = None) -> Any:
    found = [local.objects[each.number] if isinstance(each, Reference) else each for each in arguments]
    value = attrgetter(method)(local.objects[number])(*found)
    if result is not None:
        local.objects[result] = value
    return value


def follow() -> NoReturn:
    """The loop of every rank but 0: run rank 0's calls until it says to leave or is gone. Raises BackendError."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python cannot handle signals while MLX waits
    local = Local(join())
    me = local.group.rank()
    note = tell(local.group, None)
    link = Link(
        connect(note, {"secret": note["secret"], "rank": me, "pid": os.getpid(), "version": __version__})
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 decides when and how it ends
        signal.signal(number, signal.SIG_IGN)
    calls: queue.SimpleQueue[Call] = queue.SimpleQueue()

    def received(message: Call | Timeout | Leave) -> None:
        if isinstance(message, Leave):
            os._exit(message.code)
        if isinstance(message, Timeout):
            link.timeout = message.seconds
        else:
            calls.put(message)

    def lost(reason: str, stalled: bool) -> None:
        if me == 1:  # one message is enough
            print(f"Error: Rank 0 {reason}; the other ranks end.", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)

    link.start(received, lost)
    while True:
        call = calls.get()
        try:
            value = call.function(local, *call.arguments)
            if call.reply:
                link.send(value)
            del value  # as above
        except Exception as error:  # rank 0 reports it, and ends this rank
            link.send(CallFailed(f"{type(error).__name__}: {error}"))
            time.sleep(TIMEOUT)
            os._exit(1)
