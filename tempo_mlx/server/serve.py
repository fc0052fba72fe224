"""Run the server: uvicorn, with a shutdown that lets requests finish first."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import uvicorn

from tempo_mlx.errors import ModelError, OutputError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.server.app import create_app
from tempo_mlx.server.connections import ACCEPTED_AT_ONCE, Connections, most_connections
from tempo_mlx.server.context import Context
from tempo_mlx.server.logs import configuration, configure
from tempo_mlx.server.settings import Pace, ServerConfig


class Server(uvicorn.Server):
    """uvicorn's server; at shutdown it refuses new requests and lets those in flight finish."""

    context: Context

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.context.models.default.on_failure = self._give_up

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain = asyncio.ensure_future(self.context.models.drain(self.context.config.shutdown_timeout))
        await super().shutdown(sockets)
        await drain

    def _give_up(self) -> None:
        """The model cannot be loaded, so there is nothing to serve."""
        self.should_exit = True


def serve(
    loads: Sequence[LoadConfig],
    config: ServerConfig,
    ambient: Mapping[str, Any],
    announce: Callable[[str], None] = lambda url: None,
    pace: Pace | None = None,
) -> None:
    """Serve these models until interrupted. `announce` is called with the address once it is bound.

    Raises OutputError when the address cannot be bound, ModelError when the first model cannot be loaded, ConfigError
    when the models cannot be served together.
    """
    configure(config.log_level, config.log_format)
    pace = pace or Pace()
    app = create_app(loads, config, ambient, pace)
    context: Context = app.state.context
    listening = bind(config.host, config.port)
    server = Server(
        uvicorn.Config(
            app,
            http=cast(Any, Connections(most_connections(config.max_connections), pace.head)),
            backlog=ACCEPTED_AT_ONCE,
            log_config=configuration(config.log_level, config.log_format),
            access_log=False,
            server_header=False,
            proxy_headers=config.behind_proxy,
            timeout_graceful_shutdown=int(config.shutdown_timeout) + 5,
            timeout_keep_alive=15,
            h11_max_incomplete_event_size=64 * 1024,
            ws="none",
        )
    )
    server.context = context
    address, port = listening.getsockname()[:2]
    announce(url_of(address, port))
    with listening:
        server.run([listening])
    first = context.models.default
    if first.failure is not None and not first.on_demand:
        raise Failure(first.failure.message, first.failure.exit_code)


def url_of(address: str, port: int) -> str:
    """What a browser on this machine opens."""
    if address in ("127.0.0.1", "::1", "0.0.0.0", "::"):
        return f"http://localhost:{port}"
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


class Failure(ModelError):
    """The model could not be loaded, or was lost; carries the worker's exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OutputError if the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(512)
    except OSError as error:
        raise OutputError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}; choose another --port or --host."
        ) from error
    return listening
