"""The sessions a worker keeps, and what can be asked of them: each request is one action on one session."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from typing import Any

from tempo_mlx.decode import thinking
from tempo_mlx.decode.prefill import Interrupted as PromptInterrupted
from tempo_mlx.decode.pruning import make_rule
from tempo_mlx.decode.step import Step
from tempo_mlx.decode.tempo import Tempo
from tempo_mlx.decode.width import with_measured_width
from tempo_mlx.loading import LoadedModel
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.events import Output, StepEvents
from tempo_mlx.server.observe import Arena
from tempo_mlx.server.prompts import read_prompt
from tempo_mlx.server.replay import enter_set, learn, read_run, remove_recorded, run_set
from tempo_mlx.server.session import DECODERS, Session, State
from tempo_mlx.server.settings import ServerConfig

Interrupted = Callable[[], str | None]
REMEMBERED = 1000  # ids of sessions that are gone, to say so


class Sessions:
    def __init__(self, loaded: LoadedModel, config: ServerConfig) -> None:
        self.loaded, self.config = loaded, config
        self.kept: OrderedDict[str, Session] = OrderedDict()  # least recently used first
        self.owners: dict[str, str | None] = {}
        self.expired: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.kept)

    def cache_slots(self) -> int:
        return sum(len(session.arena.cache) for session in self.kept.values())

    def expire(self) -> None:
        """Drop sessions that nobody has used for their time."""
        oldest = time.time() - self.config.session_ttl
        for session in [s for s in self.kept.values() if s.used < oldest and not s.busy]:
            self._drop(session)

    def perform(
        self, payload: dict[str, Any], id: str, interrupted: Interrupted
    ) -> Generator[Output | None, None, None]:
        """One action. The last output is the session's new state, or what was asked for."""
        action, owner = payload["action"], payload["owner"]
        if action == "create":
            session = yield from self._create(payload, interrupted)
            self._keep(session, owner)
            yield from self._extend(session, payload["steps"], interrupted)
            return
        if action == "list":
            mine = [s for s in self.kept.values() if self.owners[s.id] == owner]
            yield Output("sessions", {"sessions": [self._summary(s) for s in mine]}, last=True)
            return
        session = self._find(payload["session"], owner)
        if action == "continue":
            yield from self._extend(session, payload["steps"], interrupted)
        elif action == "members":
            yield Output("members", session.members(payload["step"]), last=True)
        elif action == "delete":
            del self.kept[session.id], self.owners[session.id]
            yield Output("deleted", None, last=True)
        else:
            {
                "state": lambda: None,
                "branch": lambda: session.branch(payload["step"], payload["token_id"]),
                "pin": lambda: session.pin(payload["slot"], payload["pinned"]),
                "remove": lambda: session.remove(payload["slot"]),
                "undo": session.step_back,
                "redo": session.step_forward,
            }[action]()
            yield self._state(session)

    def _state(self, session: Session) -> Output:
        return Output("session", session.describe(self.config.session_ttl), last=True)

    def _summary(self, session: Session) -> dict[str, Any]:
        return {
            "id": session.id,
            "created_at": session.created,
            "expires_at": session.used + self.config.session_ttl,
            "steps": len(session.tempo.steps),
            "text": session.prompt.text[:80],
        }

    def _find(self, id: str, owner: str | None) -> Session:
        if id in self.expired:
            raise ApiError(
                410, "session_expired", f"Session {id} has expired; create a new one, or import its run."
            )
        if id not in self.kept or self.owners[id] != owner:
            raise ApiError(404, "session_not_found", f"There is no session {id}.")
        session = self.kept[id]
        if session.busy:
            raise ApiError(
                409, "conflict", f"Session {id} is busy with another request; wait, or cancel that one."
            )
        session.used = time.time()
        self.kept.move_to_end(id)
        return session

    def _keep(self, session: Session, owner: str | None) -> None:
        while len(self.kept) >= self.config.max_sessions:
            idle = next((s for s in self.kept.values() if not s.busy), None)
            if idle is None:
                raise ApiError(503, "too_many_sessions", "Every session is busy, and no more are allowed; try later.",
                               headers={"Retry-After": "5"})  # fmt: skip
            self._drop(idle)
        self.kept[session.id], self.owners[session.id] = session, owner

    def _drop(self, session: Session) -> None:
        del self.kept[session.id], self.owners[session.id]
        self.expired[session.id] = None
        if len(self.expired) > REMEMBERED:
            self.expired.popitem(last=False)

    def _extend(self, session: Session, steps: int, interrupted: Interrupted) -> Iterator[Output]:
        session.busy = True
        try:
            events = StepEvents(self.loaded.tokenizer, session.tempo.steps)
            for step in session.extend(steps, interrupted) if steps else ():
                yield events.event(step, len(session.arena.cache))
        finally:
            session.busy = False
        yield self._state(session)

    def _create(self, payload: dict[str, Any], interrupted: Interrupted) -> Generator[None, None, Session]:
        """Run the prompt, and for an imported run the recorded sets."""
        if self.config.max_sessions == 0:
            raise ApiError(
                403, "sessions_off", "This server keeps no sessions; start it with --max-sessions 8."
            )
        loaded = self.loaded
        steps: list[Step] = []
        if payload["run"] is not None:
            config, prompt, steps = read_run(payload["run"], loaded.model)
        else:
            config = with_measured_width(payload["config"], loaded.model)
            prompt = read_prompt(loaded, payload, config, self.config.max_prompt_tokens)
        if config.decoder not in DECODERS:
            kinds = " or ".join(DECODERS)
            raise ApiError(
                422, "invalid_value", f"Sessions need decoder {kinds}, not {config.decoder}.", "decoder"
            )
        if config.early_exit:
            raise ApiError(
                422,
                "invalid_value",
                "Sessions go through the whole model; leave out early_exit.",
                "early_exit",
            )
        guide = None
        if config.thinking_budget is not None:
            opened = thinking.is_open(prompt.text)
            guide = thinking.Budget(loaded.tokenizer, config.thinking_budget, opened)
        arena = Arena(loaded.model, self.config.session_slots, config.temperature)
        begun = time.perf_counter()
        try:
            tempo = Tempo(
                arena,
                prompt.token_ids,
                config,
                eos_ids=loaded.tokenizer.eos_ids,
                interrupted=interrupted,
                guide=guide,
            )
        except PromptInterrupted as stop:
            raise ApiError(504 if str(stop) == "timeout" else 409, str(stop),
                           "The session was not created: its prompt was interrupted.") from None  # fmt: skip
        learn(tempo)
        first, seconds = tempo.log_probs, time.perf_counter() - begun
        for step in steps:
            if reason := interrupted():
                raise ApiError(409, reason, "The session was not created: its import was interrupted.")
            enter_set(tempo, step)
            was_run = step is not steps[-1] or any(
                m.removed_after == step.step for s in steps for m in s.tokens
            )
            if tempo.waiting and was_run:
                run_set(tempo)
                learn(tempo)
                remove_recorded(tempo, steps)
            yield None
        return Session(payload["session"], prompt, config, arena, loaded.tokenizer,
                       State("", tempo, frozenset()), first, make_rule(config), prefill_seconds=seconds)  # fmt: skip
