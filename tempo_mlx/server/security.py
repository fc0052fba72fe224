"""What every request must pass: request id, Host, Origin, key, rate, body size and type; and security headers.

A plain ASGI middleware, so that streams and disconnects pass through unchanged.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from typing import Any

from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.metrics import Metrics
from tempo_mlx.server.settings import ServerConfig

log = logging.getLogger("tempo_mlx.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
HOST = re.compile(
    r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/@\[\]]+))(?::[0-9]{1,5})?"
)  # an address in brackets, or a name
BODY_SECONDS = 30.0  # how long a client may take to send its body
KEYED_PATHS = (
    "/generate",
    "/ask",
    "/sessions",
    "/requests",
    "/v1",
    "/api",
    "/settings",
    "/metrics",
)  # those that need a key
UNKNOWN_KEY = ""
UNLIMITED = ("/health", "/metrics")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.keys = [_digest(key) for key in config.all_keys()]
        self.rates = config.rates()
        self.limiter = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        id = asked if REQUEST_ID.fullmatch(asked) else "req-" + secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["request_id"] = id
        begun, status = time.perf_counter(), 0
        # HEAD is GET without the body, which the connection leaves out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def guarded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(MutableHeaders(scope=message), scope, id, headers.get("origin", ""))
            await send(message)

        try:
            self._check_host(headers)
            self._check_origin(headers)
            state["owner"] = owner = self._check_key(scope, headers)
            await self._check_rate(scope, owner or None)
            if owner == UNKNOWN_KEY:  # failed keys count against the client's address
                raise ApiError(401, "invalid_api_key", "A valid API key is needed: Authorization: Bearer KEY.",
                               headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
            body = await self._read_body(scope, headers, receive)
        except ApiError as error:
            await respond(guarded_send, error, id, scope["path"])
        else:
            await self.app(inner, _replay(body, receive), guarded_send)
        finally:
            route = getattr(inner.get("route"), "path", None) or "other"
            self.metrics.responses.labels(route, str(status)).inc()
            if scope["path"] not in UNLIMITED or status >= 400:
                line = {
                    "request_id": id,
                    "method": scope["method"],
                    "path": scope["path"][:200],
                    "status": status,
                }
                log.info("request", extra={**line, "seconds": round(time.perf_counter() - begun, 4)})

    def _add_headers(self, headers: MutableHeaders, scope: Scope, id: str, origin: str) -> None:
        headers["X-Request-ID"] = id
        for name, value in HEADERS.items():
            headers.setdefault(name, value)
        if not scope["path"].startswith("/assets/"):
            headers.setdefault("Cache-Control", "no-store")
        if origin in self.config.cors_origins:  # so that errors are readable there too
            headers["Access-Control-Allow-Origin"] = origin
            headers.add_vary_header("Origin")
        if scope["scheme"] == "https":
            headers.setdefault("Strict-Transport-Security", "max-age=31536000")

    def _check_host(self, headers: Headers) -> None:
        """Against DNS rebinding: such a page still sends its own host name."""
        match = HOST.fullmatch(headers.get("host", ""))
        if match is None or not self.config.answers_to(match[1] or match[2]):
            raise ApiError(403, "host_not_allowed", "This server does not answer to that host name; "
                           "allow it with --allowed-hosts.")  # fmt: skip

    def _check_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if not all(self.config.accepts_origin(origin, host) for origin in headers.getlist("origin")):
            raise ApiError(403, "origin_not_allowed", "Requests from that web origin are not accepted; "
                           "allow it with --cors-origins.")  # fmt: skip

    def _check_key(self, scope: Scope, headers: Headers) -> str | None:
        """Who asks: a digest of the key, UNKNOWN_KEY, or None where no key is needed."""
        if not self.keys or not _needs_key(scope["path"]) or scope["method"] == "OPTIONS":
            return None
        scheme, _, value = headers.get("authorization", "").partition(" ")
        key = value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        given = _digest(key)
        matches = [
            hmac.compare_digest(given, known) for known in self.keys
        ]  # compare with all, for constant time
        return given.hex()[:16] if any(matches) else UNKNOWN_KEY

    async def _check_rate(self, scope: Scope, owner: str | None) -> None:
        if not self.rates or scope["path"] in UNLIMITED or not _needs_key(scope["path"]):
            return
        who = owner or (scope["client"][0] if scope.get("client") else "unknown")
        for rate in self.rates:
            if not await self.limiter.hit(rate, who):
                reset, _ = await self.limiter.get_window_stats(rate, who)
                wait = max(1, round(reset - time.time()))
                raise ApiError(429, "rate_limited", f"Too many requests; the limit is {rate}. Try again in {wait} s.",
                               headers={"Retry-After": str(wait)})  # fmt: skip

    async def _read_body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        """The whole body, within the limit of size and time. Raises ApiError (408, 413, 415)."""
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return b""
        limit = self.config.max_body_bytes
        declared = headers.get("content-length", "")
        if declared.isdigit() and (len(declared) > 15 or int(declared) > limit):
            raise _too_large(limit)
        try:
            body = await asyncio.wait_for(_collect(receive, limit), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, "body_timeout", "The request body did not arrive in time.") from None
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if body and kind != "application/json":
            raise ApiError(415, "unsupported_media_type", "Send JSON, with Content-Type: application/json.")
        return body


async def _collect(receive: Receive, limit: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        more = message.get("more_body", False)  # absent when the client has disconnected
    return b"".join(parts)


async def respond(send: Send, error: ApiError, request_id: str, path: str) -> None:
    """An error as a whole response."""
    body = error.encoded(request_id, path)
    headers: list[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
    ]
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was already read, then the connection's own messages (its end)."""
    given = False

    async def replay() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _needs_key(path: str) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in KEYED_PATHS)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"The request body is larger than {limit} bytes.")
