"""Anthropic's route: /v1/messages, translated to and from what OpenAI's chat asks the worker."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tempo_mlx.server.context import ERRORS, EVENTS, JSON, answers
from tempo_mlx.server.engine import Engine, Ticket
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.openai_bodies import ChatBody, Length, Sent, Text, refused
from tempo_mlx.server.protocol import Event
from tempo_mlx.server.streaming import EventStream, last, sse
from tempo_mlx.server.wanted import arguments_of, as_body, chat_ticket

router = APIRouter(prefix="/v1", tags=["Anthropic"], responses=ERRORS)

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Block(Sent):
    """A part of a message: text, thinking, a call of a tool, or what came of it."""

    type: str = Field("text", max_length=100)
    text: Text = ""
    thinking: Text = ""
    id: str = Field("", max_length=1000)
    name: str = Field("", max_length=1000)
    input: dict[str, Any] = Field({})
    tool_use_id: str = Field("", max_length=1000)
    content: Union[Text, list[Block]] = ""  # noqa: UP007


Content = Union[Text, Annotated[list[Block], Field(max_length=10_000)]]  # noqa: UP007


class Turn(Sent):
    role: Literal["user", "assistant", "system"]
    content: Content = ""


class Tool(Sent):
    name: str = Field(max_length=1000)
    description: Text = ""
    input_schema: dict[str, Any] = Field({})


class ToolChoice(Sent):
    type: Literal["auto", "any", "tool", "none"]
    name: str = Field("", max_length=1000)


class Thinking(Sent):
    type: str = Field("enabled", max_length=100)


class OutputFormat(Sent):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Sent):
    format: OutputFormat | None = None


class MessagesBody(Sent):
    model: str | None = Field(
        None, max_length=500, description="The model's name, as GET /v1/models gives it."
    )
    messages: Annotated[list[Turn], Field(min_length=1, max_length=10_000)] = Field(
        description="The conversation; a last one of the assistant is the beginning of the answer."
    )
    max_tokens: Length = Field(-1, description="Tokens to generate at most.")
    system: Content = Field("", description="What goes before the conversation.")
    stop_sequences: Annotated[list[str], Field(max_length=1024)] = Field([], description="Texts that end it.")
    temperature: float | None = Field(None, ge=0, le=100, description="Divides the logits; 0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1, description="As in /v1/chat/completions.")
    top_k: int | None = Field(None, ge=-1, le=1_000_000, description="As in /v1/chat/completions.")
    stream: bool = Field(False, description="Send server-sent events while the text grows.")
    tools: Annotated[list[Tool], Field(max_length=1000)] = Field([], description="For the chat template.")
    tool_choice: ToolChoice | None = Field(None, description="auto, any, none, or a tool by its name.")
    output_config: OutputConfig | None = Field(
        None, description="A format of type json_schema: the text is such JSON."
    )
    thinking: Thinking | None = Field(None, description="enabled: reason first, where the model can.")

    def in_openais_words(self) -> dict[str, Any]:
        """The body of a chat completion that asks for the same."""
        system = [{"role": "system", "content": text_of(self.system)}] if self.system else []
        choice = self.tool_choice
        thinks = self.thinking is not None and self.thinking.type != "disabled"
        form = None if self.output_config is None else self.output_config.format
        return {
            "model": self.model,
            "messages": [*system, *(message for turn in self.messages for message in messages_of(turn))],
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "json_schema": None if form is None else form.schema_,
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": each.name,
                        "description": each.description,
                        "parameters": each.input_schema,
                    },
                }
                for each in self.tools
            ],
            "tool_choice": None
            if choice is None
            else CHOICES.get(choice.type, {"type": "function", "function": {"name": choice.name}}),
            "chat_template_kwargs": {"enable_thinking": True} if thinks else None,
        }


def text_of(content: str | list[Block]) -> str:
    """Raises ApiError for what is no text."""
    if isinstance(content, str):
        return content
    if any(block.type not in ("text", "tool_reference") for block in content):
        raise refused("Messages are text here: leave out images and files.", "messages")
    return "".join(block.text for block in content)


def messages_of(turn: Turn) -> Iterator[dict[str, Any]]:
    """What came of calls is a message of its own with OpenAI, and goes first."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
        return
    blocks, rest = turn.content, list[Block]()
    calls, thoughts = list[dict[str, Any]](), ""
    for block in blocks:
        if block.type == "tool_result":
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": text_of(block.content)}
        elif block.type == "tool_use":
            calls.append(
                {
                    "id": block.id,
                    "type": "function",
                    "function": {"name": block.name, "arguments": block.input},
                }
            )
        elif block.type in ("thinking", "redacted_thinking"):
            thoughts += block.thinking
        else:
            rest.append(block)
    if rest or calls or thoughts or not blocks:
        message = {"role": turn.role, "content": text_of(rest), "tool_calls": calls}
        yield {**message, **({"reasoning_content": thoughts} if thoughts else {})}


@router.post(
    "/messages",
    responses=answers("The message; server-sent events with stream.", {**JSON, **EVENTS}),
    summary="Continue a conversation, as Anthropic's clients ask for it",
)
async def messages(body: MessagesBody, request: Request) -> Response:
    chat = as_body(ChatBody, body.in_openais_words(), body.unknown(), request)
    asked, ticket = chat_ticket(request, chat)
    id = f"msg_{asked.id}"
    if body.stream:
        return Events(asked.engine, ticket, id, asked.model)
    data = json.loads((await last(asked.engine, ticket, request)).data)
    (choice,) = data["choices"]
    content: list[dict[str, Any]] = []
    if choice["reasoning"]:
        content.append({"type": "thinking", "thinking": choice["reasoning"], "signature": ""})
    if choice["text"].strip() or not choice["calls"]:
        content.append({"type": "text", "text": choice["text"]})
    content += [
        {"type": "tool_use", "id": call["id"], "name": call["name"], "input": arguments_of(call)}
        for call in choice["calls"]
    ]
    return JSONResponse(
        {**head(id, asked.model), **ending(choice), "content": content, "usage": usage(data["usage"])}
    )


def head(id: str, model: str) -> dict[str, Any]:
    return {"id": id, "type": "message", "role": "assistant", "model": model}


def ending(choice: dict[str, Any]) -> dict[str, Any]:
    reason, stop = choice["finish_reason"], choice["stop"]
    if reason == "stop" and stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": REASONS[reason], "stop_sequence": None}


def usage(counts: dict[str, int]) -> dict[str, int]:
    return {"input_tokens": counts["prompt_tokens"], "output_tokens": counts["completion_tokens"]}


class Events(EventStream):
    """One streamed message: blocks that begin, grow and end."""

    def __init__(self, engine: Engine, ticket: Ticket, id: str, model: str) -> None:
        super().__init__(engine, ticket)
        self.head = head(id, model)
        self.kind, self.block = "", -1  # of the block that is open

    def failed(self, error: ApiError) -> bytes:
        return sse("error", json.dumps({"type": "error", **error.body(self.ticket.id)}))

    def beat(self) -> bytes:
        return said("ping")

    def queued(self) -> Iterator[bytes]:
        yield from ()

    def written(self, event: Event) -> Iterable[bytes]:
        data = json.loads(event.data)
        if event.name == "begin":
            begun: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
            counts = {"input_tokens": data["prompt_tokens"], "output_tokens": 0}
            yield said("message_start", message={**self.head, **begun, "usage": counts})
        elif event.name == "delta":
            yield from self.pieces(data)
        else:
            (choice,) = data["choices"]
            yield from self.pieces(data["rest"] or choice)
            for call in choice["calls"]:
                block = {"type": "tool_use", "id": call["id"], "name": call["name"], "input": {}}
                yield from self.open("tool_use", block)
                yield self.delta({"type": "input_json_delta", "partial_json": call["arguments"]})
            yield from self.close()
            yield said("message_delta", delta=ending(choice), usage=usage(data["usage"]))
            yield said("message_stop")

    def pieces(self, data: dict[str, Any]) -> Iterator[bytes]:
        for kind, text in (("thinking", data["reasoning"]), ("text", data["text"])):
            if text:
                if self.kind != kind:
                    yield from self.open(kind, {"type": kind, kind: ""})
                yield self.delta({"type": f"{kind}_delta", kind: text})

    def open(self, kind: str, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self.close()
        self.kind, self.block = kind, self.block + 1
        yield said("content_block_start", index=self.block, content_block=block)

    def delta(self, delta: dict[str, Any]) -> bytes:
        return said("content_block_delta", index=self.block, delta=delta)

    def close(self) -> Iterator[bytes]:
        if self.kind:
            self.kind = ""
            yield said("content_block_stop", index=self.block)


def said(kind: str, **more: Any) -> bytes:
    return sse(kind, json.dumps({"type": kind, **more}))
