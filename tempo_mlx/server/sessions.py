"""The sessions a worker keeps, and what can be asked of them: each request is one action on one editable run."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from tempo_mlx.decode.prefill import Interrupt
from tempo_mlx.decode.step import Step
from tempo_mlx.decode.width import with_measured_width
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.run import Run
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.events import Output, StepEvents, phrase_records
from tempo_mlx.server.prompts import check_length, read_prompt
from tempo_mlx.server.settings import ServerConfig
from tempo_mlx.sessions.editable import EditableRun
from tempo_mlx.sessions.imports import read_run
from tempo_mlx.task import Task

REMEMBERED = 1000  # ids of sessions that are gone, to say so


@dataclass
class Kept:
    """A session: an editable run, whose it is and who uses it."""

    id: str
    owner: str | None
    run: EditableRun
    created: float = field(default_factory=time.time)
    used: float = field(default_factory=time.time)
    busy: bool = False


class Sessions:
    def __init__(self, loaded: LoadedModel, config: ServerConfig) -> None:
        self.loaded, self.config = loaded, config
        self.kept: OrderedDict[str, Kept] = OrderedDict()  # least recently used first
        self.expired: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.kept)

    def cache_slots(self) -> int:
        return sum(len(session.run.arena.cache) for session in self.kept.values())

    def expire(self) -> None:
        """Drop sessions that nobody has used for their time."""
        oldest = time.time() - self.config.session_ttl
        for session in [s for s in self.kept.values() if s.used < oldest and not s.busy]:
            self._drop(session)

    def perform(
        self, payload: dict[str, Any], id: str, interrupted: Interrupt
    ) -> Generator[Output | None, None, None]:
        """One action. The last output is the session's new state, or what was asked for."""
        action, owner = payload["action"], payload["owner"]
        if action == "create":
            run = yield from self._create(payload, interrupted)
            session = Kept(payload["session"], owner, run)
            self._keep(session)
            yield from self._extend(session, payload["steps"], interrupted)
            return
        if action == "list":
            mine = [self._summary(s) for s in self.kept.values() if s.owner == owner]
            yield Output("sessions", {"sessions": mine}, last=True)
            return
        if action == "phrases":
            found = Run.from_json(json.dumps(payload["run"])).phrases
            yield Output("phrases", {"phrases": phrase_records(found)}, last=True)
            return
        session = self._find(payload["session"], owner)
        run = session.run
        if action == "continue":
            yield from self._extend(session, payload["steps"], interrupted)
        elif action == "members":
            yield Output("members", run.members(payload["step"]), last=True)
        elif action == "delete":
            del self.kept[session.id]
            yield Output("deleted", None, last=True)
        else:
            {
                "state": lambda: None,
                "branch": lambda: run.branch(payload["step"], payload["token_id"], payload["then"]),
                "pin": lambda: run.pin(payload["slot"], payload["pinned"]),
                "remove": lambda: run.remove(payload["slot"]),
                "undo": run.step_back,
                "redo": run.step_forward,
            }[action]()
            yield self._state(session)

    def _times(self, session: Kept) -> dict[str, Any]:
        expires = session.used + self.config.session_ttl
        return {"id": session.id, "created_at": session.created, "expires_at": expires}

    def _state(self, session: Kept) -> Output:
        state = {**self._times(session), "busy": session.busy, **session.run.describe()}
        return Output("session", state, last=True)

    def _summary(self, session: Kept) -> dict[str, Any]:
        run = session.run
        return {**self._times(session), "steps": len(run.tempo.steps), "text": run.task.prompt.text[:80]}

    def _find(self, id: str, owner: str | None) -> Kept:
        if id in self.expired:
            raise ApiError(
                410, "session_expired", f"Session {id} has expired; create a new one, or import its run."
            )
        if id not in self.kept or self.kept[id].owner != owner:
            raise ApiError(404, "session_not_found", f"There is no session {id}.")
        session = self.kept[id]
        if session.busy:
            raise ApiError(
                409, "conflict", f"Session {id} is busy with another request; wait, or cancel that one."
            )
        session.used = time.time()
        self.kept.move_to_end(id)
        return session

    def _keep(self, session: Kept) -> None:
        while len(self.kept) >= self.config.max_sessions:
            idle = next((s for s in self.kept.values() if not s.busy), None)
            if idle is None:
                raise ApiError(503, "too_many_sessions", "Every session is busy, and no more are allowed; try later.",
                               headers={"Retry-After": "5"})  # fmt: skip
            self._drop(idle)
        self.kept[session.id] = session

    def _drop(self, session: Kept) -> None:
        del self.kept[session.id]
        self.expired[session.id] = None
        if len(self.expired) > REMEMBERED:
            self.expired.popitem(last=False)

    def _extend(self, session: Kept, steps: int, interrupted: Interrupt) -> Iterator[Output]:
        run, session.busy = session.run, True
        try:
            events = StepEvents(run.task, run.tempo.steps)
            for step in run.extend(steps, interrupted) if steps else ():
                yield events.event(step, len(run.arena.cache))
        finally:
            session.busy, session.used = False, time.time()
        yield self._state(session)

    def _create(self, payload: dict[str, Any], interrupted: Interrupt) -> Generator[None, None, EditableRun]:
        """Run the prompt, and for an imported run the recorded sets."""
        if self.config.max_sessions == 0:
            raise ApiError(
                403, "sessions_off", "This server keeps no sessions; start it with --max-sessions 8."
            )
        loaded = self.loaded
        steps: list[Step] = []
        if payload["run"] is not None:
            config, prompt, steps = read_run(payload["run"], loaded.model)
            check_length(loaded, prompt, self.config.max_prompt_tokens)
        else:
            config = with_measured_width(payload["config"], loaded.model)
            prompt = read_prompt(loaded, payload, config, self.config.max_prompt_tokens)
        run = EditableRun(Task(loaded, prompt, config), self.config.session_slots, interrupted)
        yield from run.take_over(steps, interrupted)
        return run
