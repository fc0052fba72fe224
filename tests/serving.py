"""A real server on a real (tiny) model, in a process of its own, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent


@dataclass
class Served:
    """A running server. `lines`: what it wrote to stderr so far."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=settings.pop("timeout", 60), **settings)

    def get(self, path: str, **rest: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **rest)

    def post(self, path: str, body: Any = None, **rest: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **rest)

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/health").json()
        return found

    def wait_until(self, condition: Any, seconds: float = 60.0) -> dict[str, Any]:
        """Poll /health until `condition(health)`; fails after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            health = self.health()
            if condition(health):
                return health
            assert time.monotonic() < end, f"never so: {health}\n{self.log[-2000:]}"
            time.sleep(0.02)

    def metric(self, name: str) -> float:
        """A metric without labels, or the sum over its labels."""
        pattern = re.compile(rf"^{name}(?:\{{.*\}})? (\S+)$", re.M)
        return sum(float(value) for value in pattern.findall(self.get("/metrics").text))


PACED = """
import json, sys
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.server.serve import serve
from tempo_mlx.server.settings import Pace, ServerConfig
model, settings, pace = json.loads(sys.argv[1])
announce = lambda url: print(f"Serving on {url}", file=sys.stderr, flush=True)
serve([LoadConfig(model=model)], ServerConfig(port=0, **settings), {}, announce, Pace(**pace))
"""


@contextlib.contextmanager
def serving(
    model: Path | str,
    *flags: str,
    env: dict[str, str] | None = None,
    pace: dict[str, float] | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """Start `tempo-mlx serve` on a free port, wait until it is ready, stop it in the end.

    pace: what the command has no flags for, see Pace; beside it `settings` takes the place of flags.
    """
    command = [sys.executable, "-m", "tempo_mlx", "serve", "--model", str(model), "--port", "0", *flags]
    if pace is not None:
        command = [sys.executable, "-c", PACED, json.dumps([str(model), settings, pace])]
    with tempfile.TemporaryDirectory() as empty:  # no .env of whoever runs the tests
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            cwd=empty,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        )
        assert process.stderr is not None
        lines: list[str] = []
        try:
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"Serving on (http://\S+)", line):
                    break
            else:
                raise AssertionError(f"the server ended: {''.join(lines)}")
            threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
            served = Served(process, found[1].replace("localhost", "127.0.0.1"), lines)
            served.wait_until(lambda health: health["status"] == "ok", 60)
            yield served
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise


def with_context(model: Path, positions: int, home: Path) -> Path:
    """A copy of a model directory whose context is longer (rotary positions have no table to outgrow)."""
    copy = home / f"{model.name}-{positions}"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    config["max_position_embeddings"] = positions
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The server-sent events in the lines of a response: (name, data)."""
    name, data = "message", ""
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            data = line[6:]
        elif not line and data:
            yield name, data if data == "[DONE]" else json.loads(data)
            name, data = "message", ""


def stream(served: Served, path: str, body: Any, **rest: Any) -> list[tuple[str, Any]]:
    """All events of a streamed answer but heartbeats, which come whenever nothing else does for a while."""
    with served.client(**rest) as client, client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return [event for event in events(response.iter_lines()) if event[0] != "heartbeat"]


def named(found: Sequence[tuple[str, Any]], name: str) -> list[Any]:
    return [data for kind, data in found if kind == name]
