"""Ollama's routes: chat, generate, and what tells its clients which model there is."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from typing import Annotated, Any, Union

from fastapi import APIRouter
from pydantic import AliasChoices, BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tempo_mlx._version import __version__
from tempo_mlx.server.context import JSON, Context, answers, context, errors
from tempo_mlx.server.engine import Engine, Ticket
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.openai import chat_logprobs
from tempo_mlx.server.openai_bodies import ChatBody, CompletionBody, Sent, Text, refused
from tempo_mlx.server.protocol import Event
from tempo_mlx.server.schemas import OllamaErrorBody
from tempo_mlx.server.streaming import EventStream, last
from tempo_mlx.server.wanted import Asked, arguments_of, as_body, asked, chat_ticket

router = APIRouter(prefix="/api", tags=["Ollama"], responses=errors(OllamaErrorBody))

# Options whose names are OpenAI's, too.
OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "stop", "repeat_penalty", "presence_penalty",
    "frequency_penalty", "mirostat",
)  # fmt: skip
LINES: dict[str, Any] = {"application/x-ndjson": {"schema": {"type": "object"}}}
ANSWER = answers("One object, or without stream: false a line for every piece of text.", {**JSON, **LINES})


def seconds_of(value: Any) -> Any:
    """Ollama's durations, such as 300, "300", "5m" or "1h30m", in seconds; negative ones are without end."""
    if not isinstance(value, str):
        return math.inf if isinstance(value, int | float) and value < 0 else value
    sign, parts = value.startswith("-"), re.findall(r"(\d*\.?\d+)(ms|[hms]?)", value)
    if not parts or "".join(number + unit for number, unit in parts) != value.lstrip("-"):
        raise ValueError("is no duration; write seconds, or a text such as 5m")
    units = {"h": 3600, "m": 60, "s": 1, "": 1, "ms": 0.001}
    return math.inf if sign else sum(float(number) * units[unit] for number, unit in parts)


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=True), BeforeValidator(seconds_of)]


class Call(Sent):
    function: dict[str, Any]


class Message(Sent):
    role: str = Field(max_length=100)
    content: Text = ""
    thinking: Text = ""
    images: list[Any] = Field([])
    tool_calls: Annotated[list[Call], Field(max_length=1000)] = Field([])
    tool_name: str | None = Field(None, max_length=1000)

    def in_openais_words(self) -> dict[str, Any]:
        if self.images:
            raise refused("Messages are text here: leave out images.", "messages")
        message: dict[str, Any] = {"role": self.role, "content": self.content, "name": self.tool_name}
        message["tool_calls"] = [{"function": call.function} for call in self.tool_calls]
        return {**message, "reasoning_content": self.thinking or None}


class Options(Sent):
    """Of a run. Those of loading a model, such as num_ctx, do nothing here."""

    num_predict: int | None = Field(
        None, description="Tokens to generate at most; -1: as many as there may be."
    )

    def in_openais_words(self) -> dict[str, Any]:
        given = {name: value for name, value in (self.model_extra or {}).items() if name in OPTIONS}
        length = self.num_predict if self.num_predict is not None and self.num_predict >= 0 else -1
        return {**given, "max_tokens": length}


class Common(Sent):
    model: str | None = Field(
        None,
        max_length=500,
        description="As GET /api/tags names it.",
        validation_alias=AliasChoices("model", "name"),
    )
    stream: bool = Field(True, description="Send a line for every piece of text.")
    options: Options | None = Field(None, description="Settings of the run, under Ollama's names.")
    format: Union[str, dict[str, Any]] = Field("", description="json, or a JSON schema.")  # noqa: UP007
    logprobs: bool = Field(False, description="Report the log-probability of each token.")
    top_logprobs: int = Field(0, ge=0, le=20, description="And so many alternatives; needs logprobs.")
    keep_alive: Seconds | None = Field(
        None,
        description="How long the model stays loaded after this: seconds, or a text such as 5m; -1: always.",
    )
    think: Union[bool, str] = Field(False, description="Reason first, where the model can.")  # noqa: UP007

    def shared(self) -> dict[str, Any]:
        """What chat and generate have in common, in OpenAI's words."""
        words: dict[str, Any] = {
            **(self.options or Options.model_validate({})).in_openais_words(),
            "model": plain_name(self.model),
        }
        if self.format == "json":
            words["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            words["json_schema"] = self.format
        elif self.format:
            raise refused("format is a text other than json; give json, or a JSON schema.", "format")
        return words

    def of_chat(self) -> dict[str, Any]:
        """What else a conversation asks for: variables of its template, log-probabilities."""
        words: dict[str, Any] = {"logprobs": self.logprobs, "top_logprobs": self.top_logprobs}
        if self.think:
            words["chat_template_kwargs"] = {"enable_thinking": True}
        return {**words, "reasoning_effort": self.think} if isinstance(self.think, str) else words


class OllamaChat(Common):
    messages: Annotated[list[Message], Field(max_length=10_000)] = Field(
        [],
        description="The conversation; without one the model is loaded, or with a keep_alive of 0 unloaded.",
    )
    tools: Annotated[list[dict[str, Any]], Field(max_length=1000)] = Field(
        [], description="Functions that the model may call."
    )


class OllamaGenerate(Common):
    prompt: Text = Field(
        "",
        description="What is to be answered; with raw, or suffix, continued; without it, as chat without messages.",
    )
    suffix: Text = Field("", description="What follows the text that is wanted.")
    system: Text = Field("", description="What goes before the prompt.")
    raw: bool = Field(False, description="Without the chat template.")
    images: list[Any] = Field([], max_length=0, description="None.")
    template: str = Field("", max_length=0, description="None: the model's own is used.")


class Named(Sent):
    model: str | None = Field(None, max_length=500, validation_alias=AliasChoices("model", "name"))


def plain_name(name: str | None) -> str | None:
    return None if name is None else name.removesuffix(":latest")


@router.post("/chat", responses=ANSWER, summary="Continue a conversation, as Ollama's clients ask for it")
async def chat(body: OllamaChat, request: Request) -> Response:
    if not body.messages:
        engine = context(request).models.named(plain_name(body.model))
        message = {"role": "assistant", "content": ""}
        return JSONResponse({**head(engine), "message": message, **await loaded(engine, body.keep_alive)})
    words = {**body.shared(), **body.of_chat(), "tools": body.tools}
    words["messages"] = [message.in_openais_words() for message in body.messages]
    found, ticket = chat_ticket(request, as_body(ChatBody, words, body.unknown(), request))
    return await answer(Lines(found, ticket, chat=True), body)


@router.post("/generate", responses=ANSWER, summary="Answer or continue a prompt")
async def generate(body: OllamaGenerate, request: Request) -> Response:
    engine = context(request).models.named(plain_name(body.model))
    if not body.prompt:
        return JSONResponse({**head(engine), "response": "", **await loaded(engine, body.keep_alive)})
    words = body.shared()
    if body.raw or body.suffix or not (await engine.awake()).has_chat_template:
        completion = as_body(CompletionBody, {**words, "prompt": body.prompt}, body.unknown(), request)
        found = asked(
            request, completion, completion.max_tokens, body.top_logprobs if body.logprobs else None
        )
        ticket = found.ticket({"prompt": body.prompt, "suffix": body.suffix})
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        words |= {**body.of_chat(), "messages": [*system, {"role": "user", "content": body.prompt}]}
        found, ticket = chat_ticket(request, as_body(ChatBody, words, body.unknown(), request))
    return await answer(Lines(found, ticket, chat=False), body)


async def loaded(engine: Engine, keep_alive: float | None) -> dict[str, Any]:
    """The end of a request without a prompt: with a keep_alive of 0 the model is unloaded (once it is idle), else
    loaded.
    """
    if keep_alive != 0:
        await engine.awake()
    elif engine.idle:
        engine.unload()
    if keep_alive is not None:
        engine.keep_alive = keep_alive
    return {"done": True, "done_reason": "unload" if keep_alive == 0 else "load"}


@router.get("/tags", summary="The models served")
async def tags(request: Request) -> dict[str, Any]:
    c = context(request)
    return {"models": [card(c, engine) for engine in c.models.engines.values()]}


@router.get("/ps", summary="The models that are loaded")
async def ps(request: Request) -> dict[str, Any]:
    c = context(request)
    every = [(engine, engine.beat) for engine in c.models.engines.values() if engine.state == "ready"]
    return {"models": [{**card(c, each), "size": beat.memory_bytes if beat else 0} for each, beat in every]}


@router.post("/show", summary="What the model is")
async def show(body: Named, request: Request) -> dict[str, Any]:
    c = context(request)
    engine = c.models.named(plain_name(body.model))
    ready = engine.ready  # clients ask this of every model, so that it must not load them
    length = {"general.architecture": "tempo", "tempo.context_length": ready.context_length} if ready else {}
    return {
        **card(c, engine),
        "capabilities": ["completion"],
        "model_info": length,
        "parameters": "",
        "template": "",
    }


@router.get("/version", summary="The version of tempo-mlx")
async def version() -> dict[str, str]:
    return {"version": __version__}


def card(c: Context, engine: Engine) -> dict[str, Any]:
    info = engine.ready.model if engine.ready else {}
    details = {
        "format": "",
        "family": str(info.get("family", "")),
        "quantization_level": str(info.get("quantization", "")),
    }
    return {
        "name": engine.name,
        "model": engine.name,
        "modified_at": stamp(c.started),
        "size": 0,
        "digest": str(info.get("sha256") or info.get("revision") or ""),
        "details": {**details, "parameter_size": "", "families": None, "parent_model": ""},
    }


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def head(engine: Engine) -> dict[str, Any]:
    return {"model": engine.name, "created_at": stamp(time.time())}


async def answer(lines: Lines, body: Common) -> Response:
    if body.keep_alive is not None:
        lines.engine.keep_alive = body.keep_alive
    if body.stream:
        return lines
    event = await last(lines.engine, lines.ticket, lines.asked.request)
    (choice,) = json.loads(event.data)["choices"]
    return JSONResponse({**lines.piece(choice), **lines.ending(json.loads(event.data))})


class Lines(EventStream):
    """One streamed answer: an object a line."""

    media_type = "application/x-ndjson"

    def __init__(self, asked: Asked, ticket: Ticket, chat: bool) -> None:
        super().__init__(asked.engine, ticket)
        self.asked, self.chat = asked, chat

    def failed(self, error: ApiError) -> bytes:
        return line({"error": error.message})

    def beat(self) -> bytes:
        return b"\n"

    def queued(self) -> Iterator[bytes]:
        yield from ()

    def written(self, event: Event) -> Iterable[bytes]:
        data = json.loads(event.data)
        if event.name == "delta" and (data["text"] or data["reasoning"] or data["tokens"]):
            yield line({**self.piece(data), "done": False})
        elif event.name == "end":
            rest = data["rest"] or data["choices"][0]
            if rest["text"] or rest["reasoning"] or rest["calls"] or rest["tokens"]:
                yield line({**self.piece(rest), "done": False})
            yield line({**self.piece({"text": "", "reasoning": None, "tokens": []}), **self.ending(data)})

    def piece(self, said: dict[str, Any]) -> dict[str, Any]:
        """Text, reasoning, calls and log-probabilities in Ollama's places."""
        thinking = {"thinking": said["reasoning"]} if said["reasoning"] else {}
        whole = {
            **head(self.engine),
            **({"logprobs": chat_logprobs(tokens)} if (tokens := said["tokens"]) else {}),
        }
        if not self.chat:
            return {**whole, "response": said["text"], **thinking}
        message = {"role": "assistant", "content": said["text"], **thinking}
        if calls := said.get("calls"):
            functions = [{"name": call["name"], "arguments": arguments_of(call)} for call in calls]
            message["tool_calls"] = [{"function": function} for function in functions]
        return {**whole, "message": message}

    def ending(self, data: dict[str, Any]) -> dict[str, Any]:
        reason = data["choices"][0]["finish_reason"]
        usage, spent = data["usage"], int((time.monotonic() - self.ticket.created) * 1e9)
        return {
            "done": True,
            "done_reason": "length" if reason == "length" else "stop",
            "total_duration": spent,
            "prompt_eval_count": usage["prompt_tokens"],
            "eval_count": usage["completion_tokens"],
        }


def line(data: dict[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"
