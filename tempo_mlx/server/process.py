"""A worker process and the pipe to it, which two threads read and write; the rest is the event loop's."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import queue
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler

from tempo_mlx.load_config import LoadConfig
from tempo_mlx.server.protocol import FromServer, FromWorker, Stop
from tempo_mlx.server.settings import ServerConfig
from tempo_mlx.server.worker import main


class WorkerProcess:
    """Begins at once. What it says goes to `receive`, and its end to `died`, each with this object."""

    def __init__(
        self,
        load: LoadConfig,
        config: ServerConfig,
        beside: int,
        receive: Callable[[FromWorker, WorkerProcess], None],
        died: Callable[[WorkerProcess], None],
    ) -> None:
        """beside: bytes that other workers hold."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._loop, self._receive, self._died = asyncio.get_running_loop(), receive, died
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._process = context.Process(
            target=main, args=(theirs, load, config, beside), name="tempo-mlx worker", daemon=True
        )
        self._process.start()
        theirs.close()  # so that the pipe closes when the worker dies
        threading.Thread(target=self._write, args=(ours,), name="to worker", daemon=True).start()
        threading.Thread(target=self._read, args=(ours,), name="from worker", daemon=True).start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: FromServer) -> None:
        """Raises RecursionError for what is nested too deeply; the thread that writes would end by it."""
        self._outbox.put(bytes(ForkingPickler.dumps(message)))

    def kill(self) -> None:
        self._process.kill()

    def bury(self) -> int | None:
        """Let go of a worker that died: its exit code."""
        self._outbox.put(None)
        self._process.join(1.0)
        return self._process.exitcode

    async def end(self) -> None:
        """Ask it to end, then kill it."""
        self.send(Stop())
        self._outbox.put(None)
        await asyncio.to_thread(self._process.join, 2.0)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join, 5.0)

    def _read(self, connection: Connection) -> None:
        """Thread: pass the worker's messages to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop has closed
            try:
                while True:
                    self._loop.call_soon_threadsafe(self._receive, connection.recv(), self)
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(self._died, self)

    def _write(self, connection: Connection) -> None:
        """Thread: send the outbox, so that a full pipe never blocks the event loop."""
        with contextlib.suppress(OSError):  # the worker is dead: the reader reports it
            while (message := self._outbox.get()) is not None:
                connection.send_bytes(message)
