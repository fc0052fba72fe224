"""Our own routes: generation, settings, cancellation, health, metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tempo_mlx._version import __version__
from tempo_mlx.asking import asked, chat_of, check_choices, way_of
from tempo_mlx.config import GenerateConfig, as_dict
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.errors import ConfigError
from tempo_mlx.resolution import ANSWER_TOKENS, resolve
from tempo_mlx.server.context import ERRORS, EVENTS, JSON, Context, answers, context, owner
from tempo_mlx.server.engine import Engine, Ticket
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.schemas import MODEL, AskBody, GenerateBody, as_chat, explicit_settings, settings_table
from tempo_mlx.server.streaming import EventStream, last

router = APIRouter(responses=ERRORS)

ModelName = Annotated[str | None, Query(max_length=500, description=MODEL)]


def generate_payload(request: Request, body: Any) -> dict[str, Any]:
    """Prompt and configuration of a body, checked against the limits."""
    given = explicit_settings(body)
    if body.messages is not None:
        as_chat(given, "messages")
    messages = None if body.messages is None else [m.model_dump() for m in body.messages]
    return {"prompt": body.prompt, "messages": messages, "config": context(request).configuration(given)}


@router.post(
    "/generate",
    tags=["generate"],
    responses=answers("The run file, version 1.", JSON),
    summary="Decode, and return the run",
)
async def generate(body: GenerateBody, request: Request) -> Response:
    c = context(request)
    engine = c.models.named(body.model)
    ticket = c.submit(request, engine, "generate", generate_payload(request, body))
    return Response((await last(engine, ticket, request)).data, media_type="application/json")


@router.post(
    "/generate/stream",
    tags=["generate"],
    responses=answers("Server-sent events.", EVENTS),
    summary="Decode, one event a step, then the run",
)
async def generate_stream(body: GenerateBody, request: Request) -> Response:
    c = context(request)
    engine = c.models.named(body.model)
    return EventStream(engine, c.submit(request, engine, "generate", generate_payload(request, body)))


def asked_here(c: Context, template: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """With a question's defaults, where the environment says nothing else, and within this server's limit."""
    settings = asked(template, given)
    for name in settings.keys() - given.keys() - {"decoder"}:
        if name in c.ambient:
            del settings[name]
        elif name == "max_tokens":
            settings[name] = min(settings[name], c.config.max_tokens_limit)
    return settings


async def asking(request: Request, body: Any) -> tuple[Engine, Ticket]:
    """A question of a body, checked against the limits, on its way to the model that it names."""
    c = context(request)
    engine = c.models.named(body.model)
    template = bool((await engine.awake()).has_chat_template)
    given = explicit_settings(body)
    if body.messages is not None:
        as_chat(given, "messages")
    choices = given.pop("choices", None)
    try:
        way_of(body.by, body.answer_regex)
        if choices:
            check_choices(body.by, body.answer_regex, resolve(given), given)
        settings = {**chat_of(template), **given} if choices else asked_here(c, template, given)
    except ConfigError as error:
        raise ApiError(422, "invalid_value", str(error)) from error
    config = c.configuration(settings)
    if not choices and DECODERS[config.decoder].lattice:
        raise ApiError(
            422, "invalid_value", f"The {config.decoder} decoder gives no texts to ask.", "decoder"
        )
    messages = None if body.messages is None else [m.model_dump() for m in body.messages]
    payload = {"prompt": body.prompt, "messages": messages, "config": config, "choices": choices}
    payload |= {"by": body.by, "answer_regex": body.answer_regex}
    return engine, c.submit(request, engine, "ask", payload)


@router.post(
    "/ask",
    tags=["generate"],
    responses=answers("The answers with bounds of their probabilities, their texts, and the run.", JSON),
    summary="Ask: which answers the model holds, and how probable each is",
)
async def ask(body: AskBody, request: Request) -> Response:
    engine, ticket = await asking(request, body)
    return Response((await last(engine, ticket, request)).data, media_type="application/json")


@router.post(
    "/ask/stream",
    tags=["generate"],
    responses=answers("Server-sent events.", EVENTS),
    summary="Ask, and see the answers come: one event a step, and one whenever there are more",
)
async def ask_stream(body: AskBody, request: Request) -> Response:
    return EventStream(*await asking(request, body))


@router.delete("/requests/{id}", tags=["generate"], summary="Cancel a request; it ends with what it has")
async def cancel(id: Annotated[str, Path(max_length=64)], request: Request) -> dict[str, Any]:
    found = context(request).models.find(id, owner(request))
    if found is None:
        raise ApiError(404, "request_not_found", "There is no such request in flight.", "id")
    engine, ticket = found
    engine.cancel(ticket)
    return {"id": id, "cancelled": True}


@router.get("/settings", tags=["server"], summary="Every setting of a run: default, range, explanation")
async def settings(request: Request, model: ModelName = None) -> dict[str, Any]:
    c = context(request)
    engine = c.models.named(model)
    ready, config = engine.ready, c.config
    try:
        defaults = as_dict(c.configuration({}))
    except ApiError:
        defaults = as_dict(GenerateConfig())
    return {
        "model": engine.name,
        "context_length": ready.context_length if ready else None,
        "chat": ready.has_chat_template if ready else None,
        "defaults": defaults,
        "limits": {
            "max_prompt_tokens": config.max_prompt_tokens or (ready.context_length - 1 if ready else None),
            "max_tokens": config.max_tokens_limit,
            "max_rows": config.max_rows_limit,
            "max_body_bytes": config.max_body_bytes,
            "queue_size": config.queue_size,
            "request_timeout": config.request_timeout,
        },
        "session_decoders": [
            spec.name for spec in DECODERS.values() if spec.editable and config.max_sessions
        ],
        **settings_table(),
        # An answer as long as this server allows, as /ask has it.
        "answer_tokens": min(ANSWER_TOKENS, config.max_tokens_limit),
        "ask": asked_here(c, False, {}),
    }


@router.get(
    "/health",
    tags=["server"],
    responses=answers("Not able to serve.", JSON, status=503),
    summary="Whether the model can be used; no key needed",
)
async def health(request: Request) -> JSONResponse:
    c = context(request)
    engine = c.models.default
    status = await engine.probe()
    beat = engine.beat
    return JSONResponse(
        {
            "status": status,
            "model": engine.name,
            "models": {each.name: each.state for each in c.models.engines.values()},
            "version": __version__,
            "uptime_seconds": round(time.time() - c.started, 1),
            "running": c.models.running,
            "waiting": c.models.waiting,
            "sessions": sum(beat.sessions for beat in c.models.beats),
            "worker": {
                "pid": engine.pid,
                "restarts": engine.restarts,
                "heartbeat_age_seconds": round(time.monotonic() - engine.beat_at, 3),
                "last_forward_age_seconds": round(beat.last_forward_age, 3) if beat else None,
            },
        },
        200 if status == "ok" else 503,
    )


@router.get("/metrics", tags=["server"], summary="Prometheus metrics", response_class=Response,
            responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})  # fmt: skip
async def metrics(request: Request) -> Response:
    c = context(request)
    c.metrics.measure(c.models.running, c.models.waiting, c.models.beats)
    return Response(c.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
