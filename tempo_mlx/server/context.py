"""What all routes share: settings, engine, metrics, and submitting a request."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from tempo_mlx.config import GenerateConfig
from tempo_mlx.server.engine import Engine, Ticket
from tempo_mlx.server.metrics import Metrics
from tempo_mlx.server.models import Models
from tempo_mlx.server.protocol import Kind
from tempo_mlx.server.schemas import ErrorBody, configuration
from tempo_mlx.server.settings import ServerConfig

log = logging.getLogger("tempo_mlx.server")

MOST_NOTED = 1000

STATUSES = {
    400: "Malformed, or a prompt that cannot be used.", 401: "The API key is missing or wrong.",
    403: "The host or the web origin is not accepted.", 404: "There is no such thing.",
    405: "The method is not for this route.", 408: "The body did not arrive in time.",
    409: "It contradicts the present state.", 410: "It is gone: expired, or lost with the worker.",
    413: "The body is too large.", 415: "The body is not JSON.", 422: "A field is unknown or has a wrong value.",
    429: "Too many requests; see Retry-After.", 500: "An error of the server.",
    503: "Loading, shutting down, or the queue is full; see Retry-After.",
    504: "The time was up before anything was done.",
}  # fmt: skip


def errors(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What every route may answer, for the documentation."""
    return {status: {"model": body, "description": text} for status, text in STATUSES.items()}


ERRORS = errors(ErrorBody)
JSON: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "required": ["data"],
            "properties": {name: {"type": "string"} for name in ("event", "data", "id")},
        }
    }
}


def answers(description: str, content: dict[str, Any], status: int = 200) -> dict[int | str, dict[str, Any]]:
    """What a route may answer, for the documentation."""
    return {status: {"description": description, "content": content}}


@dataclass
class Context:
    config: ServerConfig
    ambient: Mapping[str, Any]  # generation settings from the environment: defaults of every request
    metrics: Metrics
    models: Models
    started: float = field(default_factory=time.time)
    ignored: set[str] = field(default_factory=set)  # fields of requests, as far as they were logged

    def note_ignored(self, fields: Iterable[str]) -> None:
        """Log each field once that requests bring and nothing here reads."""
        for name in fields:
            if name not in self.ignored and len(name) <= 100 and len(self.ignored) < MOST_NOTED:
                self.ignored.add(name)
                log.info("request field ignored", extra={"field": name})

    def configuration(self, given: Mapping[str, Any]) -> GenerateConfig:
        return configuration(given, self.ambient, self.config.max_tokens_limit, self.config.max_rows_limit)

    def submit(self, request: Request, engine: Engine, kind: Kind, payload: dict[str, Any]) -> Ticket:
        if self.config.log_prompts and (payload.get("prompt") or payload.get("messages")):
            text = json.dumps(payload.get("prompt") or payload.get("messages"))
            log.info("prompt", extra={"request_id": request_id(request), "prompt": text})
        return engine.submit(kind, payload, id=request_id(request), owner=owner(request))


def context(request: Request) -> Context:
    found: Context = request.app.state.context
    return found


def request_id(request: Request) -> str:
    id: str = request.scope["state"]["request_id"]
    return id


def owner(request: Request) -> str | None:
    who: str | None = request.scope["state"]["owner"]
    return who
