"""How the processes of one run find each other, and each one's connection to rank 0."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempo_mlx.errors import BackendError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from tempo_mlx.mlx import mx

TIMEOUT = 30.0  # seconds, unless set otherwise
BEAT_SECONDS = 1.0
CONNECT_SECONDS = 10.0
NOTE_SIZE = 1024  # bytes of the note that rank 0 sends over MLX


class Link:
    """One connection: objects in both directions, and a heartbeat every second.

    received(object) and lost(reason) are called from the link's own thread; `lost` once, and nothing after it.
    """

    def __init__(self, connected: socket.socket) -> None:
        from multiprocessing.connection import Connection

        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.settimeout(None)
        self.socket = connected
        self.connection: Connection = Connection(os.dup(connected.fileno()))
        self.timeout = TIMEOUT
        self._lock = threading.Lock()

    def start(self, received: Callable[[Any], None], lost: Callable[[str, bool], None]) -> None:
        threading.Thread(target=self._read, args=(received, lost), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, message: Any, patience: float = -1) -> None:
        """Raises OSError when the other side is gone."""
        if self._lock.acquire(timeout=patience):
            try:
                self.connection.send(message)
            finally:
                self._lock.release()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes threads that wait on it

    @property
    def same_machine(self) -> bool:
        return bool(self.socket.getpeername()[0] == self.socket.getsockname()[0])

    def _read(self, received: Callable[[Any], None], lost: Callable[[str, bool], None]) -> None:
        try:
            while self.connection.poll(self.timeout):
                message = self.connection.recv()
                if message is not None:
                    received(message)
        except (EOFError, OSError):
            lost("has ended", False)
        else:
            lost(f"gave no sign of life for {self.timeout:g} seconds", True)

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # `_read` notices and reports it
            while True:
                self.send(None)
                time.sleep(BEAT_SECONDS)


def join() -> mx.distributed.Group:
    """MLX's group of all ranks."""
    from tempo_mlx.mlx import mx

    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"The ranks could not be connected: {error}; are all of them running?") from error
    if group.size() > 1 and is_local(hosts_of_rank_0()[0]):
        _wait_in_the_kernel()
    return group


def tell(group: mx.distributed.Group, note: dict[str, Any] | None) -> dict[str, Any]:
    """Broadcast rank 0's note to every rank."""
    import numpy as np

    from tempo_mlx.mlx import mx

    data = np.zeros(NOTE_SIZE, np.int32)
    if note is not None:
        text = json.dumps(note).encode()
        data[: len(text)] = list(text)
    shared = mx.distributed.all_sum(mx.array(data), group=group, stream=mx.cpu)
    told: dict[str, Any] = json.loads(bytes(np.array(shared).tolist()).rstrip(b"\0"))
    return told


def connect(note: dict[str, Any], hello: dict[str, Any]) -> socket.socket:
    problem: OSError | None = None
    for host in note["hosts"]:
        try:
            connected = socket.create_connection((host, note["port"]), CONNECT_SECONDS)
            connected.sendall(json.dumps(hello).encode() + b"\n")
            return connected
        except OSError as error:
            problem = error
    raise BackendError(f"Rank 0 cannot be reached at {' or '.join(note['hosts'])}: {problem}.")


def addresses() -> list[str]:
    """host:port of MLX's ring connections, rank 0's first; empty with other backends."""
    try:
        ranks = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        return [address for each in ranks for address in each]
    except (KeyError, OSError, ValueError):
        return []


def hosts_of_rank_0() -> list[str]:
    """Where rank 0 may be reached, most likely first: MLX's settings, then the host name."""
    named = [os.environ.get(name, "") for name in ("MLX_JACCL_COORDINATOR", "NCCL_HOST_IP")]
    known = [address.rpartition(":")[0] or address for address in (*addresses()[:1], *named) if address]
    return [*known, socket.gethostname()]


def is_local(host: str) -> bool:
    return host == "localhost" or host.startswith("127.")


def _wait_in_the_kernel() -> None:
    """Let MLX's ring block in the kernel where all ranks share one machine's cores.

    Its threads poll their sockets without a pause; four ranks on two cores then spend 70 ms on a sum, and 5 ms
    where the kernel wakes them.
    """
    ports = {int(address.rpartition(":")[2]) for address in addresses()}
    for descriptor in map(int, os.listdir("/dev/fd")):  # noqa: PTH208 (names are wanted, not paths)
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
        except OSError:
            continue  # closed since: the descriptor that listed the directory
        with socket.socket(fileno=os.dup(descriptor)) as end:
            if end.family == socket.AF_INET and {_port(end.getsockname), _port(end.getpeername)} & ports:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 1000))  # 1 ms
                os.set_blocking(descriptor, True)


def _port(name: Callable[[], Any]) -> int | None:
    try:
        return int(name()[1])
    except OSError:
        return None  # not connected
