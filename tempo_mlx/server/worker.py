"""The worker process: owns the model, and lets requests go on in turns.

A request is an iterator of outputs on a call stack of its own (a greenlet), which it leaves when it has an output, when
it asks for a forward pass that can be made together with others' (seats.py), and between two pieces of its prompt. In a
round every request has a turn, prompts have a little time, and what was asked for is run as one pass.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempo_mlx.decode.prefill import Interrupted
from tempo_mlx.errors import MemoryLimitError, RankLostError, TempoError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.model.forward import Ask, Forward
from tempo_mlx.server.errors import ApiError, nested_too_deeply, translate
from tempo_mlx.server.events import Output
from tempo_mlx.server.logs import configure
from tempo_mlx.server.protocol import (
    Beat,
    Cancel,
    Event,
    Failed,
    FromServer,
    FromWorker,
    Probe,
    Problem,
    Stop,
    Submit,
)
from tempo_mlx.server.settings import ServerConfig, model_name
from tempo_mlx.server.stacks import Job, pause

if TYPE_CHECKING:
    from tempo_mlx.server.jobs import Jobs

log = logging.getLogger("tempo_mlx.worker")

IDLE_SECONDS = 0.5  # longest wait for a message, and so the longest pause between two beats
BEAT_SECONDS = 0.25
PROMPT_SECONDS = 0.1  # of a round, and a piece more: so long others wait for new ones


def main(connection: Connection, load: LoadConfig, config: ServerConfig, beside: int) -> None:
    """Entry of the spawned process: load the model, then serve until told to stop or the server is gone.

    beside: bytes that other workers hold.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes of the terminal; the server decides
    configure(config.log_level, config.log_format)
    from tempo_mlx.loading import load_model
    from tempo_mlx.server.jobs import Jobs

    try:
        loaded = load_model(load, beside=beside)
    except TempoError as error:
        connection.send(Failed(str(error), error.exit_code, isinstance(error, MemoryLimitError)))
        return
    loaded.model.info["id"] = model_name(load, config)  # it may have been a path, which clients must not see
    jobs = Jobs(loaded, config)
    jobs.probe()
    try:
        connection.send(jobs.ready())
        Worker(connection, jobs).run()
    except RankLostError as error:  # the model is incomplete, for good
        connection.send(Failed(str(error), error.exit_code))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the server is gone


class Worker:
    def __init__(self, connection: Connection, jobs: Jobs) -> None:
        self.connection, self.work = connection, jobs
        self.jobs: dict[str, Job] = {}
        self.stopping = False
        self.last_forward = time.monotonic()
        self.last_beat = 0.0

    def run(self) -> None:
        while not self.stopping:
            self.receive(0.0 if self.jobs else IDLE_SECONDS)
            self.round()
            self.work.check_ranks()
            self.work.sessions.expire()
            self.beat()

    def round(self) -> None:
        """A turn for each request, time for prompts, and one pass of what is asked for."""
        for job in list(self.jobs.values()):
            if job.asked is None and not job.gave_way:
                self.turn(job)
                self.receive(0.0)
        self.run_prompts()
        asks = [(job, job.asked) for job in self.jobs.values() if job.asked is not None]
        answers = self.work.seats.answer([asked for _, asked in asks])
        for (job, _), (answer, job.together) in zip(asks, answers, strict=True):
            self.turn(job, answer)
            self.receive(0.0)

    def run_prompts(self) -> None:
        """Piece by piece, the shortest first; what has been cancelled before them all."""
        end = time.monotonic() + PROMPT_SECONDS
        while waiting := [job for job in self.jobs.values() if job.gave_way]:
            self.turn(min(waiting, key=lambda job: (job.reason is None, job.size)))
            self.receive(0.0)
            if time.monotonic() > end:
                return

    def receive(self, patience: float) -> None:
        """Handle all pending messages; wait for the first for at most `patience` seconds."""
        while self.connection.poll(patience):
            self.handle(self.connection.recv())
            patience = 0.0

    def handle(self, message: FromServer) -> None:
        if isinstance(message, Submit):
            job = Job(message.id, prompt_size(message.payload))
            job.begin(
                self.work.start(message.kind, message.payload, message.id, lambda: self.interrupted(job))
            )
            self.jobs[message.id] = job
        elif isinstance(message, Cancel):
            if message.id in self.jobs:
                self.jobs[message.id].reason = message.reason
        elif isinstance(message, Probe):
            if not self.jobs:
                self.work.probe()
                self.last_forward = time.monotonic()
            self.beat(now=True)
        elif isinstance(message, Stop):
            self.stopping = True

    def turn(self, job: Job, answer: Forward | None = None) -> None:
        """Let a request go on until it leaves its stack. answer: to what it asked for."""
        message: Event | Problem | None = None
        try:
            reply = job.stack.switch(answer)
            job.asked = reply if isinstance(reply, Ask) else None
            job.gave_way = reply is None
            if isinstance(reply, Output):
                message = event(job, reply)
        except (TempoError, ApiError) as error:
            message = problem(job.id, error)
        except Interrupted as stop:  # what was made so far is nothing by itself
            sentence = f"The request ended ({stop}) before there was an answer."
            message = Problem(job.id, 504 if str(stop) == "timeout" else 409, str(stop), sentence)
        except RecursionError:
            message = problem(job.id, nested_too_deeply())
        except Exception:  # must not end the other requests; the traceback is logged
            log.exception("request failed", extra={"request_id": job.id})
            sentence = "The request failed inside the server; see its log."
            message = Problem(job.id, 500, "internal_error", sentence)
        self.last_forward = time.monotonic()
        if message is None:
            return
        self.send(message)
        if isinstance(message, Problem) or message.last:
            del self.jobs[job.id]
            job.outputs.close()  # breaks a reference cycle through `interrupted` that holds the cache

    def interrupted(self, job: Job) -> str | None:
        """Called by a decoder, on its request's stack, between two chunks of a prompt and between two steps."""
        self.last_forward = time.monotonic()
        if not job.started:
            pause()
        return "cancelled" if self.stopping else job.reason

    def beat(self, now: bool = False) -> None:
        moment = time.monotonic()
        if now or moment - self.last_beat >= BEAT_SECONDS:
            self.last_beat = moment
            self.send(
                Beat(
                    moment - self.last_forward,
                    resident_bytes(),
                    len(self.work.sessions),
                    self.work.cache_slots(),
                )
            )

    def send(self, message: FromWorker) -> None:
        self.connection.send(message)


def prompt_size(payload: Mapping[str, Any]) -> int:
    """Characters (or tokens) of a request's prompt; shorter prompts may overtake longer ones."""
    texts = [message["content"] for message in payload.get("messages") or ()]
    return len(payload.get("prompt") or "") + sum(map(len, texts))


def event(job: Job, output: Output) -> Event:
    job.started = job.started or output.step is not None
    stats = {**output.stats, "together": job.together} if output.stats else {}
    return Event(job.id, output.name, encode(output.data), output.last, output.step, stats)


def encode(data: object) -> str:
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def problem(id: str, error: TempoError | ApiError) -> Problem:
    """An error as the client sees it."""
    if isinstance(error, TempoError):
        error = translate(error)
    return Problem(id, error.status, error.code, error.message, error.param)


def resident_bytes() -> int:
    """Memory of this process; on macOS its peak, as there is nothing better without a dependency."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
