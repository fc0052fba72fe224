"""The one shape of every error the server sends: OpenAI's, with our sentence in it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

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
    """Raised anywhere in the server; becomes the response (or, in a stream, the last event)."""

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

    def encoded(self, request_id: str | None) -> bytes:
        """The body as JSON bytes; ASCII, so that no text a client sent can break it."""
        return json.dumps(self.body(request_id)).encode("ascii")
