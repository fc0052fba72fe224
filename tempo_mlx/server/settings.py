"""What `serve` can be told: addresses, limits, keys, logging. The same kind of table as tempo_mlx/config.py."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from tempo_mlx.errors import ConfigError
from tempo_mlx.load_config import DEFAULT_MODEL, LoadConfig
from tempo_mlx.settings import Checked, row

if TYPE_CHECKING:
    from limits import RateLimitItem

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


def _network(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Network", help, **rest)


def _limit(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Server limits", help, **rest)


def _room(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Server limits", help, "study", **rest)


def _access(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Access", help, **rest)


@dataclass(frozen=True)
class Pace:
    """Seconds that nobody has to set, but tests."""

    head: float = 20  # a connection may take to ask for something
    heartbeat: float = 15  # between signs of life in a stream
    worker_timeout: float = 120  # without a sign of life, after which the worker is restarted
    probe_after: float = 30  # of idleness, after which /health runs a real forward pass


# fmt: off
@dataclass(frozen=True)
class ServedModels(Checked):
    """The models of a server; each is a LoadConfig with the other settings as given."""

    model: tuple[str, ...] = row(
        (DEFAULT_MODEL,), "Input", "Model, as for generate; several times for several. The first is loaded at once, "
        "others when a request names them.",
        environment=("MODEL_PATH",), aliases=("-m",), default_text=DEFAULT_MODEL,
    )


@dataclass(frozen=True)
class ServerConfig(Checked):
    """Settings of the server itself; what models it serves are LoadConfigs."""

    host: str = _network("127.0.0.1", "Address to listen on; 0.0.0.0 is every interface.")
    port: int = _network(
        8000, "Port to listen on; 0 picks a free one.", minimum=0, maximum=65535, environment=("API_PORT",),
    )
    frontend_port: int = _network(
        5173, "Port of the page's development server on this machine, whose requests are accepted.",
        audience="study", minimum=1, maximum=65535, environment=("FRONTEND_PORT",),
    )
    model_alias: str | None = _network(None, "Name under which the model is served.", default_text="the model's own")
    allowed_hosts: tuple[str, ...] = _network(
        (), "Host names the server answers to, besides localhost and IP addresses.",
    )
    cors_origins: tuple[str, ...] = _network((), "Web origins whose pages may read answers (CORS).")
    behind_proxy: bool = _network(False, "Trust X-Forwarded-For and X-Forwarded-Proto of a proxy on this machine.")

    api_keys: tuple[str, ...] = _access((), "API keys; a request must carry one of them.")
    api_key_file: str | None = _access(None, "File with one API key a line.")
    rate_limit: str | None = _access(
        None, "Most requests per key or address, such as 60/minute or 5/second;1000/day.",
    )

    concurrency: int = _limit(8, "Requests decoded at the same time.", minimum=1, maximum=64)
    queue_size: int = _room(32, "Requests that may wait; more are refused with 503.", minimum=0, maximum=10_000)
    request_timeout: float = _limit(
        600, "Seconds a request may take; what was generated is kept.", above=0, maximum=1e6,
    )
    max_prompt_tokens: int | None = _limit(
        None, "Longest prompt accepted.", minimum=1, maximum=2**31 - 1, default_text="the model's context",
    )
    max_tokens_limit: int = _limit(4096, "Most logical steps a request may ask for.", minimum=1, maximum=1_000_000)
    max_rows_limit: int = _room(32, "Widest set, most branches, beams or paths a request may ask for.",
                                minimum=1, maximum=256)
    max_body_mb: float = _room(8.0, "Largest request body in MB.", above=0, maximum=1024)
    max_connections: int = _room(
        1024, "Connections open at once, as far as the limit on open files allows; the longest idle one goes first.",
        minimum=1, maximum=100_000,
    )
    keep_alive: float | None = _limit(
        None, "Seconds after which an unused model is unloaded, unless it keeps sessions; a request loads it again.",
        minimum=0, maximum=1e7, default_text="as long as there is memory",
    )
    max_sessions: int = _room(8, "Sessions kept; the least recently used goes first.", minimum=0, maximum=1024)
    session_ttl: float = _room(3600, "Seconds after which an unused session goes.", above=0, maximum=1e7)
    session_slots: int = _room(16_384, "Most cache rows one session may hold, dropped alternatives included.",
                               minimum=16, maximum=2**24)
    shutdown_timeout: float = _room(
        10, "Seconds that requests in flight get to finish at shutdown.", minimum=0, maximum=3600,
    )

    log_level: Literal["debug", "info", "warning", "error"] = row(
        "info", "Logging", "Least severity that is logged.", environment=("LOG_LEVEL",),
    )
    log_format: Literal["text", "json"] = row("text", "Logging", "One line of text, or one JSON object, a record.")
    log_prompts: bool = row(False, "Logging", "Log prompts too; they may be private.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rates()
        self.all_keys()
        for origin in self.cors_origins:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
                raise ConfigError(f"cors_origins holds {origin!r}; write scheme and host only, such as https://app.example.")
        for name in self.allowed_hosts:
            if not name or any(c in name for c in "/:*@ "):
                raise ConfigError(f"allowed_hosts holds {name!r}; write plain host names, such as tempo.example.")
        if any(not key.isascii() or not key.strip() for key in self.api_keys):
            raise ConfigError("api_keys holds an empty key or one with characters other than ASCII; choose another.")
    # fmt: on

    def rates(self) -> list[RateLimitItem]:
        """The rate limits; [] for none."""
        if self.rate_limit is None:
            return []
        from limits import parse_many

        try:
            return parse_many(self.rate_limit)
        except ValueError:
            raise ConfigError(
                f"rate_limit is {self.rate_limit!r}; write a number and a time, such as 60/minute."
            ) from None

    def all_keys(self) -> tuple[str, ...]:
        """All API keys, those of the file included. Raises ConfigError when the file cannot be used."""
        given = tuple(key.strip() for key in self.api_keys)  # as a header carries them
        if self.api_key_file is None:
            return given
        try:
            lines = Path(self.api_key_file).read_text("ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read api_key_file {self.api_key_file}: {error}.") from error
        keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
        if not keys:
            raise ConfigError(f"api_key_file {self.api_key_file} holds no key; write one a line.")
        return given + keys

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1_000_000)

    def answers_to(self, host: str) -> bool:
        """Whether a Host header's name is ours. Rebinding attacks need a name: plain addresses are safe."""
        host = host.lower().rstrip(".")
        named = {name.lower() for name in (*LOOPBACK_HOSTS, *self.allowed_hosts, self.host)}
        return host in named or _is_address(host)

    def accepts_origin(self, origin: str, host: str) -> bool:
        """Whether a page of `origin` may send us requests: our own page, the development server, a CORS origin."""
        if origin in self.cors_origins:
            return True
        try:
            parts = urlsplit(origin)
        except ValueError:  # half an address
            return False
        if parts.scheme not in ("http", "https"):
            return False
        own = parts.netloc.lower() == host.lower()
        return own or (parts.hostname in LOOPBACK_HOSTS and parts.netloc.endswith(f":{self.frontend_port}"))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def model_name(load: LoadConfig, config: ServerConfig) -> str:
    """The name under which the model is served. Never a path: that would tell what is on this machine."""
    if config.model_alias is not None:
        return config.model_alias
    path = Path(load.model)
    return path.name if path.is_absolute() or path.suffix == ".gguf" or path.exists() else load.model
