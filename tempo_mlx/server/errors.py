"""The shape of all errors that the server sends: OpenAI's, with our message, and others on the routes of others."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tempo_mlx.errors import (
    ArgumentError,
    ConfigError,
    ConflictError,
    DeviceError,
    MemoryLimitError,
    ModelError,
    NotInRunError,
    NumbersError,
    PromptError,
    RunFileError,
    SessionError,
    TempoError,
)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    410: "not_found_error",
    429: "rate_limit_error",
}


@dataclass
class ApiError(Exception):
    """Raised anywhere in the server; becomes the response, or the last event of a stream."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self, request_id: str | None) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                "request_id": request_id,
            }
        }

    def encoded(self, request_id: str | None, path: str) -> bytes:
        """The body as clients of this path read it, as ASCII JSON, so that no text from a client can break it."""
        body = self.body(request_id)
        if path.startswith("/api/"):
            body = {**body["error"], "error": self.message}
        elif path.startswith("/v1/messages"):
            body = {"type": "error", **body}
        return json.dumps(body).encode("ascii")


# What each of our errors is to a client: the first class that fits. Status, code, and the parameter at fault.
STATUSES: tuple[tuple[type[TempoError], int, str, str | None], ...] = (
    (PromptError, 400, "invalid_prompt", "prompt"),
    (ConfigError, 422, "invalid_value", None),
    (ArgumentError, 422, "invalid_value", None),
    (RunFileError, 422, "invalid_run", "run"),
    (ModelError, 400, "model_error", None),
    (MemoryLimitError, 409, "memory", None),
    (DeviceError, 503, "device_failed", None),
    (NumbersError, 500, "not_finite", None),
    (ConflictError, 409, "conflict", None),
    (NotInRunError, 404, "not_found", None),
    (TempoError, 500, "internal_error", None),
)


def nested_too_deeply() -> ApiError:
    """Of values that Python's own limit on nesting keeps from being read, written or handed on."""
    return ApiError(400, "invalid_value", "The request is nested too deeply; send values with fewer levels.")


def translate(error: TempoError) -> ApiError:
    """How an error of ours is shown to the client."""
    message = str(error)
    _, status, code, param = next(row for row in STATUSES if isinstance(error, row[0]))
    if isinstance(error, PromptError) and "context" in message:
        code = "context_length_exceeded"
    return ApiError(status, code, message, error.argument if isinstance(error, SessionError) else param)
