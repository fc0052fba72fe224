"""Connections that ask for nothing, or for a head without a body."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

from tempo_mlx.server.connections import most_connections
from tests.serving import Served, serving
from tests.twins import twin

FEW = 256  # files
HEAD = 3.0  # seconds


@contextlib.contextmanager
def few_files() -> Iterator[None]:
    """For processes that are started meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with contextlib.ExitStack() as stack:
        with few_files():
            served = stack.enter_context(serving(twin("llama"), pace={"head": HEAD}))
        yield served


def connect(server: Served) -> socket.socket:
    address = urlsplit(server.url)
    assert address.hostname is not None
    return socket.create_connection((address.hostname, address.port or 80), timeout=30)


def test_idle_connections_leave_room(server: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(server))
        begun = time.monotonic()
        assert server.get("/health").status_code == 200
        assert time.monotonic() - begun < 10
    assert "Too many open files" not in server.log


@pytest.mark.parametrize(
    "said", [b"", b"GET /health HTTP/1.1\r\nHost: local"], ids=["nothing", "half a head"]
)
def test_a_connection_must_ask_for_something(said: bytes, server: Served) -> None:
    with connect(server) as silent:
        silent.sendall(said)
        begun = time.monotonic()
        assert silent.recv(100) == b""
        assert HEAD - 1 < time.monotonic() - begun < 25


def test_an_answer_may_take_longer(server: Served) -> None:
    body = {"prompt": "Hello", "max_tokens": 4000, "min_steps": 4000, "timeout": HEAD + 1}
    assert server.post("/generate", body).json()["finish_reason"] in ("timeout", "length")


@pytest.mark.parametrize("path", ["/health", "/", "/v1/models"])
def test_a_head_is_that_of_get(path: str, server: Served) -> None:
    with server.client() as client:
        head, whole = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == whole.headers["content-type"]
        assert client.head("/generate").status_code == 405


def test_connections_leave_room_for_files() -> None:
    with few_files():
        assert most_connections(1000) == FEW - 128
        assert most_connections(5) == 5
