"""OpenAI's newer route, /v1/responses, translated to and from what its chat asks the worker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Union

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tempo_mlx.server.context import ERRORS, EVENTS, JSON, answers
from tempo_mlx.server.engine import Ticket
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.openai_bodies import ChatBody, Length, Sent, Text, TextPart, refused
from tempo_mlx.server.protocol import Event
from tempo_mlx.server.streaming import EventStream, last, sse
from tempo_mlx.server.wanted import Asked, as_body, chat_ticket

router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERRORS)


class Item(Sent):
    """A message, a call of a function, or what came of it."""

    type: str = Field("message", max_length=100)
    role: str = Field("user", max_length=100)
    content: Union[Text, Annotated[list[TextPart], Field(max_length=1000)]] = ""  # noqa: UP007
    call_id: str = Field("", max_length=1000)
    name: str = Field("", max_length=1000)
    arguments: Text = "{}"
    output: Union[Text, Annotated[list[TextPart], Field(max_length=1000)]] = ""  # noqa: UP007

    def in_openais_words(self) -> dict[str, Any]:
        """As a message of a chat."""
        if self.type == "function_call":
            call = {"id": self.call_id, "function": {"name": self.name, "arguments": self.arguments}}
            return {"role": "assistant", "tool_calls": [call]}
        if self.type == "function_call_output":
            return {"role": "tool", "tool_call_id": self.call_id, "content": parts_of(self.output)}
        if self.type != "message":
            raise refused(
                "input holds an item that is no message and no function call; leave it out.", "input"
            )
        return {"role": self.role, "content": parts_of(self.content)}


class Reasoning(Sent):
    effort: Annotated[str, Field(max_length=20)] | None = None


class TextFormat(Sent):
    format: dict[str, Any] = Field({})


class ResponsesBody(Sent):
    model: str | None = Field(
        None, max_length=500, description="The model's name, as GET /v1/models gives it."
    )
    input: Union[Text, Annotated[list[Item], Field(min_length=1, max_length=10_000)]] = Field(  # noqa: UP007
        description="A text, or the items of a conversation."
    )
    instructions: Text = Field("", description="What goes before the conversation.")
    max_output_tokens: Length = Field(-1, description="Tokens to generate at most.")
    temperature: float | None = Field(None, ge=0, le=100, description="Divides the logits; 0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1, description="As in /v1/chat/completions.")
    stream: bool = Field(False, description="Send server-sent events while the text grows.")
    tools: Annotated[list[dict[str, Any]], Field(max_length=1000)] = Field([], description="Functions.")
    tool_choice: Union[str, dict[str, Any]] = Field("auto", description="auto, none, required or a function.")  # noqa: UP007
    text: TextFormat | None = Field(None, description="format: text, json_object or json_schema.")
    reasoning: Reasoning | None = Field(None, description="effort: a variable of the chat template.")
    previous_response_id: str | None = Field(None, max_length=1000, description="None: nothing is stored.")

    def in_openais_words(self) -> dict[str, Any]:
        """The body of a chat completion that asks for the same. Raises ApiError."""
        if self.previous_response_id is not None:
            raise refused("Nothing is stored here; send the conversation as input.", "previous_response_id")
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else [
            item.in_openais_words() for item in self.input if item.type != "reasoning"
        ]  # fmt: skip
        if any(tool.get("type") != "function" for tool in self.tools):
            raise refused("Tools are functions here; leave out the others.", "tools")
        form = {} if self.text is None else self.text.format
        if form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": form}
        return {
            "model": self.model,
            "messages": [
                *([{"role": "system", "content": self.instructions}] if self.instructions else []),
                *items,
            ],
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [{"type": "function", "function": tool} for tool in self.tools],
            "tool_choice": self.tool_choice,
            "response_format": form or None,
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
        }


def parts_of(content: str | list[TextPart]) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [part.model_dump() for part in content]


@router.post(
    "/responses",
    responses=answers("The response; server-sent events with stream.", {**JSON, **EVENTS}),
    summary="Continue a conversation, as OpenAI's newer clients ask for it",
)
async def responses(body: ResponsesBody, request: Request) -> Response:
    chat = as_body(ChatBody, body.in_openais_words(), body.unknown(), request)
    asked, ticket = chat_ticket(request, chat)
    if body.stream:
        return Events(asked, ticket)
    data = json.loads((await last(asked.engine, ticket, request)).data)
    items = list(items_of(asked.id, data["choices"][0]))
    return JSONResponse(response(asked, "completed", items, data))


def response(
    asked: Asked, status: str, items: list[dict[str, Any]], data: dict[str, Any] | None = None
) -> dict[str, Any]:
    """data: how it ended."""
    found: dict[str, Any] = {
        "id": f"resp_{asked.id}", "object": "response", "created_at": int(time.time()), "model": asked.model,
        "status": status, "output": items, "error": None, "incomplete_details": None, "parallel_tool_calls": True,
        "tools": [], "tool_choice": "auto", "metadata": {}, "usage": None, "tempo": {"seed": asked.config.seed},
    }  # fmt: skip
    if data is not None:
        if data["choices"][0]["finish_reason"] == "length":
            found |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        given, made = data["usage"]["prompt_tokens"], data["usage"]["completion_tokens"]
        found["usage"] = {
            "input_tokens": given, "output_tokens": made, "total_tokens": given + made,
            "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
        }  # fmt: skip
    return found


def items_of(id: str, choice: dict[str, Any], begun: bool = False) -> Iterator[dict[str, Any]]:
    """The message, and then the calls. begun: the message has been sent already, be it a blank."""
    if begun or choice["text"].strip() or not choice["calls"]:
        yield message(id, "completed", [part(choice["text"])])
    for call in choice["calls"]:
        yield {
            "id": f"fc_{call['id']}", "type": "function_call", "status": "completed", "call_id": call["id"],
            "name": call["name"], "arguments": call["arguments"],
        }  # fmt: skip


def message(id: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": f"msg_{id}", "type": "message", "role": "assistant", "status": status, "content": content}


def part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


class Events(EventStream):
    """One streamed response."""

    def __init__(self, asked: Asked, ticket: Ticket) -> None:
        super().__init__(asked.engine, ticket)
        self.asked = asked
        self.number = 0
        self.text = ""
        self.place = {"item_id": f"msg_{asked.id}", "output_index": 0, "content_index": 0}
        self.open = False  # the message

    def failed(self, error: ApiError) -> bytes:
        return self.said("error", **error.body(self.ticket.id)["error"])

    def beat(self) -> bytes:
        return b": heartbeat\n\n"

    def queued(self) -> Iterator[bytes]:
        yield from ()

    def said(self, kind: str, **more: Any) -> bytes:
        self.number += 1
        return sse(kind, json.dumps({"type": kind, "sequence_number": self.number - 1, **more}))

    def written(self, event: Event) -> Iterable[bytes]:
        data = json.loads(event.data)
        if event.name == "begin":
            for kind in ("created", "in_progress"):
                yield self.said(f"response.{kind}", response=response(self.asked, "in_progress", []))
        elif event.name == "delta":
            yield from self.piece(data["text"])
        else:
            yield from self.piece((data["rest"] or data["choices"][0])["text"])
            yield from self.end(data)

    def piece(self, text: str) -> Iterator[bytes]:
        if not text:
            return
        yield from self.begin()
        self.text += text
        yield self.said("response.output_text.delta", **self.place, delta=text, logprobs=[])

    def begin(self) -> Iterator[bytes]:
        """The message, if it has not begun."""
        if not self.open:
            self.open = True
            item = message(self.asked.id, "in_progress", [])
            yield self.said("response.output_item.added", output_index=0, item=item)
            yield self.said("response.content_part.added", **self.place, part=part(""))

    def end(self, data: dict[str, Any]) -> Iterator[bytes]:
        items = list(items_of(self.asked.id, data["choices"][0], self.open))
        if items[0]["type"] == "message":
            yield from self.begin()
            yield self.said("response.output_text.done", **self.place, text=self.text, logprobs=[])
            yield self.said("response.content_part.done", **self.place, part=part(self.text))
        for index, item in enumerate(items):
            if item["type"] == "function_call":
                begun = {**item, "status": "in_progress", "arguments": ""}
                yield self.said("response.output_item.added", output_index=index, item=begun)
                place = {"item_id": item["id"], "output_index": index}
                yield self.said("response.function_call_arguments.delta", **place, delta=item["arguments"])
                whole = {"arguments": item["arguments"], "name": item["name"]}
                yield self.said("response.function_call_arguments.done", **place, **whole)
            yield self.said("response.output_item.done", output_index=index, item=item)
        whole = response(self.asked, "completed", items, data)
        kind = "response.incomplete" if whole["status"] == "incomplete" else "response.completed"
        yield self.said(kind, response=whole)
