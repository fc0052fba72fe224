"""/sessions: a run that is kept in the worker, to go back in and decide otherwise."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import Response

from tempo_mlx.server.context import ERRORS, EVENTS, JSON, answers, context, owner
from tempo_mlx.server.engine import Ticket
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
)
from tempo_mlx.server.streaming import EventStream, last

router = APIRouter(prefix="/sessions", tags=["sessions"], responses=ERRORS)
reading = APIRouter(tags=["generate"], responses=ERRORS)

SessionId = Annotated[str, Path(max_length=64, description="The session's id.")]
STATE = answers("The session's state.", JSON)


def submit(request: Request, action: str, session: str | None = None, **payload: Any) -> Ticket:
    c = context(request)
    if session is not None and session in c.engine.lost_sessions:
        raise ApiError(410, "session_lost", "The session was lost when the model's process was restarted; import its "
                       "run, or create a new one.")  # fmt: skip
    return c.submit(
        request, "session", {"action": action, "session": session, "owner": owner(request), **payload}
    )


async def perform(request: Request, action: str, session: str | None = None, **payload: Any) -> str:
    """The JSON an action ends with."""
    ticket = submit(request, action, session, **payload)
    return (await last(context(request).engine, ticket, request)).data


def answer(data: str, status: int = 200, **headers: str) -> Response:
    return Response(data, status, headers, media_type="application/json")


@router.post("", status_code=201, responses=answers("The new session's state.", JSON, status=201),
             summary="Create a session from a prompt and settings, or from a run")  # fmt: skip
async def create(body: CreateBody, request: Request) -> Response:
    engine = context(request).engine
    id = "session-" + secrets.token_hex(8)
    payload = {"run": body.run, **({} if body.run is not None else generate_payload(request, body))}
    engine.remember_session(id)
    return answer(await perform(request, "create", id, steps=body.steps, **payload), 201)


@reading.post("/phrases", summary="The phrases of a run file", responses=answers("As asked.", JSON))
async def phrases(body: RunBody, request: Request) -> Response:
    return answer(await perform(request, "phrases", run=body.run))


@router.get("", summary="The sessions there are", responses=answers("As asked.", JSON))
async def every(request: Request) -> Response:
    return answer(await perform(request, "list"))


@router.get("/{id}", responses=STATE, summary="A session's state")
async def state(id: SessionId, request: Request) -> Response:
    return answer(await perform(request, "state", id))


@router.delete("/{id}", status_code=204, response_class=Response, summary="Drop a session")
async def delete(id: SessionId, request: Request) -> Response:
    await perform(request, "delete", id)
    return Response(status_code=204)


@router.get("/{id}/run", summary="The run file of a session", responses=answers("As asked.", JSON))
async def run(id: SessionId, request: Request) -> Response:
    data = json.loads(await perform(request, "state", id))["run"]
    name = f'attachment; filename="{id}.json"'
    return answer(json.dumps(data, ensure_ascii=True), 200, **{"Content-Disposition": name})


@router.get("/{id}/steps/{step}", summary="One step: its members, why they are there, what each would say next",
            responses=answers("As asked.", JSON))  # fmt: skip
async def members(id: SessionId, step: Annotated[int, Path(ge=0, le=2**31)], request: Request) -> Response:
    return answer(await perform(request, "members", id, step=step))


@router.post(
    "/{id}/branch",
    responses=STATE,
    summary="Cut back to a step, and give it this one token, or it and those that follow",
)
async def branch(id: SessionId, body: BranchBody, request: Request) -> Response:
    return answer(await perform(request, "branch", id, **body.model_dump()))


@router.post("/{id}/pin", responses=STATE, summary="Spare a member from pruning, or no longer")
async def pin(id: SessionId, body: PinBody, request: Request) -> Response:
    return answer(await perform(request, "pin", id, slot=body.slot, pinned=body.pinned))


@router.post("/{id}/remove", responses=STATE, summary="Remove a member")
async def remove(id: SessionId, body: SlotBody, request: Request) -> Response:
    return answer(await perform(request, "remove", id, slot=body.slot))


@router.post("/{id}/undo", responses=STATE, summary="Undo the last change")
async def undo(id: SessionId, request: Request, body: EmptyBody | None = None) -> Response:
    return answer(await perform(request, "undo", id))


@router.post("/{id}/redo", responses=STATE, summary="Redo what was undone")
async def redo(id: SessionId, request: Request, body: EmptyBody | None = None) -> Response:
    return answer(await perform(request, "redo", id))


@router.post("/{id}/continue", responses=STATE, summary="Continue by some steps")
async def go_on(id: SessionId, body: ContinueBody, request: Request) -> Response:
    return answer(await perform(request, "continue", id, steps=limited(request, body.steps)))


@router.post(
    "/{id}/continue/stream",
    responses=answers("Server-sent events.", EVENTS),
    summary="Continue by some steps, one event a step, then the state",
)
async def go_on_stream(id: SessionId, body: ContinueBody, request: Request) -> Response:
    return EventStream(
        context(request).engine, submit(request, "continue", id, steps=limited(request, body.steps))
    )


def limited(request: Request, steps: int) -> int:
    limit = context(request).config.max_tokens_limit
    if steps > limit:
        raise ApiError(
            422, "invalid_value", f"steps is {steps}; this server allows up to {limit} at a time.", "steps"
        )
    return steps
