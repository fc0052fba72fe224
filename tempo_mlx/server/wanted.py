"""What a request of any of the tongues wants of the worker: settings, prompt, and how the answer is to be told.

OpenAI's bodies are what the others are translated into, so that there is one way to read a request.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import Request

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.server.context import Context, context, request_id
from tempo_mlx.server.engine import Engine, Ticket
from tempo_mlx.server.openai_bodies import ChatBody, Common, refused
from tempo_mlx.server.schemas import as_chat, explicit_settings
from tempo_mlx.server.tool_calls import tools_of

_ANY_DECODER = {
    "temperature",
    "seed",
    "stop",
    "max_tokens",
    "min_steps",
    "timeout",
    "template_variables",
    "enable_thinking",
}


def settings_of(body: Common, c: Context, max_tokens: int) -> dict[str, Any]:
    """Our settings for OpenAI's. Without `tempo` it is ordinary sampling, as OpenAI's users expect."""
    body.check()
    c.note_ignored(body.unknown())
    given: dict[str, Any] = explicit_settings(body.tempo) if body.tempo is not None else {}
    limit = c.config.max_tokens_limit
    asked = {
        "temperature": body.temperature,
        "seed": None if body.seed is not None and body.seed < 0 else body.seed,
        "stop": body.stop or None,
        "max_tokens": min(max_tokens, limit) if max_tokens >= 0 else None,
    }
    for name, value in asked.items():
        if value is not None:
            if name in given and name in body.model_fields_set:
                raise refused(f"{name} is given twice; leave it out of tempo.", name)
            given.setdefault(name, value)
    given.setdefault("max_tokens", limit)
    if isinstance(body, ChatBody) and (variables := body.variables()):
        given.setdefault("template_variables", variables)
        if body.thinks():
            given.setdefault("enable_thinking", True)
    tempered = given.get("temperature", 1.0) > 0
    if (texts := body.texts()) > 1:
        several(texts, given, tempered, c.config.max_rows_limit)
    elif not given.keys() - _ANY_DECODER:
        given["decoder"] = "plain"
    for name, value in body.controls().items():
        if name in given:
            raise refused(f"{name} is given twice; leave it out of tempo.", name)
        given[name] = value
    if "seed" not in c.ambient:
        given.setdefault("seed", secrets.randbelow(2**31))
    return given


def several(count: int, given: dict[str, Any], tempered: bool, limit: int) -> None:
    """The settings under which a decoder gives `count` texts: branches of a tree, unless another was named."""
    if count > limit:
        raise refused(f"n is {count}; this server allows up to {limit}.", "n")
    other = {"default_mode", "use_mcts"} & given.keys()
    width = None if other else DECODERS[given.get("decoder") or "tree"].texts
    if width is None:
        able = [name for name, spec in DECODERS.items() if spec.texts is not None]
        raise refused(f"n above 1 needs the decoder {', '.join(able[:-1])} or {able[-1]}.", "n")
    if width == "branches":
        given.setdefault("branch_choice", "sample" if tempered else "best")
        given.setdefault("threshold", 0.0)  # as many as were asked for, however certain the model is
    if given.setdefault(width, count) < count:
        raise refused(f"n is {count}, but tempo.{width} is {given[width]}.", "n")


Body = TypeVar("Body", bound=Common)


@dataclass(frozen=True)
class Asked:
    """A request that was understood."""

    request: Request
    engine: Engine
    config: GenerateConfig
    n: int
    logprobs: int | None
    phrases: bool
    lattice: bool

    @property
    def model(self) -> str:
        return self.engine.name

    @property
    def id(self) -> str:
        return request_id(self.request)

    def ticket(self, prompt: Mapping[str, Any]) -> Ticket:
        """prompt: what is to be continued, and what else is wanted of it (completions.py)."""
        names = ("config", "n", "logprobs", "phrases", "lattice")
        told = {name: getattr(self, name) for name in names}
        payload = {**NOTHING_MORE, **prompt, **told}
        return context(self.request).submit(self.request, self.engine, "completion", payload)


# What a request asks for unless it says otherwise (completions.py).
NOTHING_MORE: Mapping[str, Any] = {
    "suffix": "",
    "phrases": False,
    "lattice": False,
    "echo": False,
    "score_only": False,
    "tools": {},
    "call": [],
}


def asked(request: Request, body: Common, max_tokens: int, logprobs: int | None) -> Asked:
    """Raises ApiError for what cannot be done."""
    c = context(request)
    engine = c.models.named(body.model)
    given = settings_of(body, c, max_tokens)
    if isinstance(body, ChatBody):
        as_chat(given, "tempo")
    config = c.configuration(given)
    if logprobs is not None and not DECODERS[config.decoder].log_probs:
        raise refused(f"logprobs are not available with decoder {config.decoder}.", "logprobs")
    return Asked(
        request, engine, config, body.n, logprobs, phrases=body.tempo is not None, lattice=body.lattice
    )


def asked_chat(request: Request, body: ChatBody) -> tuple[Asked, dict[str, Any]]:
    """With its prompt. Raises ApiError."""
    if body.top_logprobs and not body.logprobs:
        raise refused("top_logprobs needs logprobs.", "top_logprobs")
    length = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if length == 0:
        raise refused("max_tokens is 0; ask for at least one token.", "max_tokens")
    tools = tools_of(body.tools) if body.tool_choice != "none" else {}
    prompt = {
        "messages": [message.for_template() for message in body.messages],
        "tools": tools,
        "call": body.must_call(),
    }
    return asked(request, body, length, body.top_logprobs if body.logprobs else None), prompt


def chat_ticket(request: Request, body: ChatBody) -> tuple[Asked, Ticket]:
    found, prompt = asked_chat(request, body)
    return found, found.ticket(prompt)


def as_body(kind: type[Body], fields: Mapping[str, Any], ignored: Iterable[str], request: Request) -> Body:
    """Another tongue's request in OpenAI's words. Raises RequestValidationError, ApiError.

    ignored: fields of its own that nobody reads.
    """
    context(request).note_ignored(ignored)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def arguments_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """Of a call, as values; none where the model wrote no JSON object."""
    try:
        value = json.loads(call["arguments"])
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
