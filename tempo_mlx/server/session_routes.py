"""/sessions: a run that is kept in the worker, to go back in and decide otherwise."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import Response

from tempo_mlx.server.context import ERRORS, EVENTS, JSON, answers, context, owner
from tempo_mlx.server.engine import Engine, Ticket
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.routes import generate_payload
from tempo_mlx.server.schemas import (
    BranchBody,
    ContinueBody,
    CreateBody,
    EmptyBody,
    PinBody,
    RunBody,
    SlotBody,
    check_imported,
)
from tempo_mlx.server.streaming import EventStream, last

router = APIRouter(prefix="/sessions", tags=["sessions"], responses=ERRORS)
reading = APIRouter(tags=["generate"], responses=ERRORS)

SessionId = Annotated[str, Path(max_length=64, description="The session's id.")]
STATE = answers("The session's state.", JSON)


def keeper(request: Request, session: str) -> Engine:
    """The engine whose session it is. Raises ApiError."""
    engine = context(request).models.of_session(session)
    if session in engine.lost_sessions:
        raise ApiError(410, "session_lost", "The session was lost when the model's process ended; import its run, or "
                       "create a new one.")  # fmt: skip
    if session in engine.sessions:
        engine.remember_session(session)
    return engine


def submit(
    request: Request, engine: Engine, action: str, session: str | None = None, **payload: Any
) -> Ticket:
    told = {"action": action, "session": session, "owner": owner(request), **payload}
    return context(request).submit(request, engine, "session", told)


async def perform(
    request: Request, engine: Engine, action: str, session: str | None = None, **payload: Any
) -> str:
    """The JSON an action ends with."""
    return (await last(engine, submit(request, engine, action, session, **payload), request)).data


async def edit(request: Request, action: str, session: str, **payload: Any) -> str:
    return await perform(request, keeper(request, session), action, session, **payload)


def answer(data: str, status: int = 200, **headers: str) -> Response:
    return Response(data, status, headers, media_type="application/json")


@router.post("", status_code=201, responses=answers("The new session's state.", JSON, status=201),
             summary="Create a session from a prompt and settings, or from a run")  # fmt: skip
async def create(body: CreateBody, request: Request) -> Response:
    models = context(request).models
    engine = (
        models.named(body.model) if body.model is not None or body.run is None else models.of_run(body.run)
    )
    id = "session-" + secrets.token_hex(8)
    payload = {"run": body.run}
    if body.run is None:
        payload |= generate_payload(request, body)
    else:
        check_imported(body.run, context(request).config.max_rows_limit)
    engine.remember_session(id)
    return answer(
        await perform(request, engine, "create", id, steps=limited(request, body.steps), **payload), 201
    )


@reading.post("/phrases", summary="The phrases of a run file", responses=answers("As asked.", JSON))
async def phrases(body: RunBody, request: Request) -> Response:
    return answer(await perform(request, context(request).models.ready, "phrases", run=body.run))


@router.get("", summary="The sessions there are", responses=answers("As asked.", JSON))
async def every(request: Request) -> Response:
    loaded = [engine for engine in context(request).models.engines.values() if engine.state == "ready"]
    lists = [json.loads(await perform(request, engine, "list"))["sessions"] for engine in loaded]
    return answer(json.dumps({"sessions": [session for each in lists for session in each]}))


@router.get("/{id}", responses=STATE, summary="A session's state")
async def state(id: SessionId, request: Request) -> Response:
    return answer(await edit(request, "state", id))


@router.delete("/{id}", status_code=204, response_class=Response, summary="Drop a session")
async def delete(id: SessionId, request: Request) -> Response:
    await edit(request, "delete", id)
    return Response(status_code=204)


@router.get("/{id}/run", summary="The run file of a session", responses=answers("As asked.", JSON))
async def run(id: SessionId, request: Request) -> Response:
    data = json.loads(await edit(request, "state", id))["run"]
    name = f'attachment; filename="{id}.json"'
    return answer(json.dumps(data, ensure_ascii=True), 200, **{"Content-Disposition": name})


@router.get("/{id}/steps/{step}", summary="One step: its members, why they are there, what each would say next",
            responses=answers("As asked.", JSON))  # fmt: skip
async def members(id: SessionId, step: Annotated[int, Path(ge=0, le=2**31)], request: Request) -> Response:
    return answer(await edit(request, "members", id, step=step))


@router.post(
    "/{id}/branch",
    responses=STATE,
    summary="Cut back to a step, and give it this one token, or it and those that follow",
)
async def branch(id: SessionId, body: BranchBody, request: Request) -> Response:
    return answer(await edit(request, "branch", id, **body.model_dump()))


@router.post("/{id}/pin", responses=STATE, summary="Spare a member from pruning, or no longer")
async def pin(id: SessionId, body: PinBody, request: Request) -> Response:
    return answer(await edit(request, "pin", id, slot=body.slot, pinned=body.pinned))


@router.post("/{id}/remove", responses=STATE, summary="Remove a member")
async def remove(id: SessionId, body: SlotBody, request: Request) -> Response:
    return answer(await edit(request, "remove", id, slot=body.slot))


@router.post("/{id}/undo", responses=STATE, summary="Undo the last change")
async def undo(id: SessionId, request: Request, body: EmptyBody | None = None) -> Response:
    return answer(await edit(request, "undo", id))


@router.post("/{id}/redo", responses=STATE, summary="Redo what was undone")
async def redo(id: SessionId, request: Request, body: EmptyBody | None = None) -> Response:
    return answer(await edit(request, "redo", id))


@router.post("/{id}/continue", responses=STATE, summary="Continue by some steps")
async def go_on(id: SessionId, body: ContinueBody, request: Request) -> Response:
    return answer(await edit(request, "continue", id, steps=limited(request, body.steps)))


@router.post(
    "/{id}/continue/stream",
    responses=answers("Server-sent events.", EVENTS),
    summary="Continue by some steps, one event a step, then the state",
)
async def go_on_stream(id: SessionId, body: ContinueBody, request: Request) -> Response:
    engine, steps = keeper(request, id), limited(request, body.steps)
    return EventStream(engine, submit(request, engine, "continue", id, steps=steps))


def limited(request: Request, steps: int) -> int:
    limit = context(request).config.max_tokens_limit
    if steps > limit:
        raise ApiError(
            422, "invalid_value", f"steps is {steps}; this server allows up to {limit} at a time.", "steps"
        )
    return steps
