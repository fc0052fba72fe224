"""The OpenAI routes: models, completions, chat completions. Anything that speaks to OpenAI can speak to this.

What clients send is taken as they mean it (openai_bodies.py); what we cannot do is refused by name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tempo_mlx._version import __version__
from tempo_mlx.server.context import ERRORS, EVENTS, JSON, Context, answers, context
from tempo_mlx.server.engine import Engine, Ticket
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.openai_bodies import ChatBody, Common, CompletionBody, refused
from tempo_mlx.server.protocol import Event
from tempo_mlx.server.streaming import EventStream, last, sse
from tempo_mlx.server.wanted import Asked, asked, asked_chat

router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERRORS)


@dataclass(frozen=True)
class Shape:
    """How one of the two kinds of answer is written."""

    id: str
    model: str
    chat: bool
    created: int
    seed: int  # given or drawn: with it, the answer can be had again

    def head(self, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": f"tempo-mlx-{__version__}-seed-{self.seed}", "tempo": {"seed": self.seed},
        }  # fmt: skip

    def choice(self, index: int, choice: dict[str, Any], scored: bool) -> dict[str, Any]:
        """A whole choice of an answer that is not streamed."""
        logprobs = self.logprobs(choice["tokens"], 0) if scored else None
        base = {"index": index, "finish_reason": choice["finish_reason"], "logprobs": logprobs}
        base |= beside(choice)
        if not self.chat:
            return {**base, "text": choice["text"]}
        message = {"role": "assistant", "content": choice["text"], "refusal": None}
        if choice["calls"]:
            message |= {"content": choice["text"].strip() or None, "tool_calls": called(choice["calls"])}
        if choice["reasoning"] is not None:
            message["reasoning_content"] = choice["reasoning"]
        return {**base, "message": message}

    def piece(self, index: int, text: str | None, tokens: list[Any] | None, offset: int, *, first: bool = False,
              reasoning: str | None = None, finish: str | None = None) -> dict[str, Any]:  # fmt: skip
        """A choice of a chunk."""
        logprobs = self.logprobs(tokens, offset) if tokens else None
        base = {"index": index, "finish_reason": finish, "logprobs": logprobs}
        if not self.chat:
            return {**base, "text": text or ""}
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text is not None:
            delta["content"] = text
        if reasoning is not None:
            delta["reasoning_content"] = reasoning
        return {**base, "delta": delta}

    def logprobs(self, tokens: list[Any], offset: int) -> dict[str, Any]:
        if self.chat:
            return {"content": chat_logprobs(tokens), "refusal": None}
        offsets = []
        for token in tokens:
            before, own = token["said"]
            offsets.append(offset + before)
            offset += before + own
        return {
            "tokens": [spelled(t["bytes"]) for t in tokens],
            "token_logprobs": [t["logprob"] for t in tokens],
            "top_logprobs": [
                None if t["top"] is None else {spelled(o): p for o, p in reversed(t["top"])} for t in tokens
            ],
            "text_offset": offsets,
        }


def beside(choice: dict[str, Any]) -> dict[str, Any]:
    """What OpenAI's choices do not have."""
    found = {name: choice[name] for name in ("phrases", "run") if name in choice}
    return {"tempo": found} if found else {}


def chat_logprobs(tokens: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            **_scored(token["bytes"], token["logprob"]),
            "top_logprobs": [_scored(*other) for other in token["top"]],
        }
        for token in tokens
    ]


def called(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of tools, in OpenAI's shape."""
    return [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for call in calls
    ]


def _scored(token: list[int], logprob: float) -> dict[str, Any]:
    return {"token": spelled(token), "logprob": logprob, "bytes": token}


def spelled(token: list[int]) -> str:
    """A token's bytes as text; those that are part of a character, as OpenAI's own server spells them."""
    try:
        return bytes(token).decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


class Chunks(EventStream):
    """One streamed answer, as OpenAI's chunks."""

    def __init__(self, engine: Engine, ticket: Ticket, shape: Shape, n: int, usage: bool) -> None:
        super().__init__(engine, ticket)
        self.shape, self.n, self.usage = shape, n, usage
        self.offset = 0

    def failed(self, error: ApiError) -> bytes:
        return sse(None, json.dumps(error.body(self.ticket.id)))

    def beat(self) -> bytes:
        return b": heartbeat\n\n"

    def queued(self) -> Iterator[bytes]:
        """OpenAI has no word for it."""
        yield from ()

    def written(self, event: Event) -> Iterable[bytes]:
        data = json.loads(event.data)
        shape = self.shape
        if event.name == "begin":
            if shape.chat:
                for index in range(self.n):
                    yield self.chunk([shape.piece(index, "", None, 0, first=True)])
        elif event.name == "delta":
            yield from self.pieces(0, data)
        else:
            for index, choice in enumerate(data["choices"]):
                if data["rest"] is None:
                    self.offset = 0
                yield from self.pieces(index, data["rest"] or choice)
                end = shape.piece(index, None if shape.chat else "", None, 0, finish=choice["finish_reason"])
                yield self.chunk([{**end, **beside(choice)}])
            if self.usage:
                yield self.chunk([], usage=total(data["usage"]))
            yield b"data: [DONE]\n\n"

    def pieces(self, index: int, data: dict[str, Any]) -> Iterable[bytes]:
        """New reasoning (chat only), and new text with its tokens."""
        if data["reasoning"] and self.shape.chat:
            yield self.chunk([self.shape.piece(index, None, None, 0, reasoning=data["reasoning"])])
        if data["text"] or data["tokens"]:
            piece = self.shape.piece(index, data["text"], data["tokens"], self.offset)
            self.offset += sum(sum(token["said"]) for token in data["tokens"])
            yield self.chunk([piece])

        calls = [{"index": place, **call} for place, call in enumerate(called(data.get("calls", ())))]
        if calls and self.shape.chat:
            piece = self.shape.piece(index, None, None, 0)
            piece["delta"]["tool_calls"] = calls
            yield self.chunk([piece])

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return sse(None, json.dumps({**self.shape.head(chunk=True), "choices": choices, **more}))


def total(usage: dict[str, int]) -> dict[str, int]:
    return {**usage, "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"]}


@router.get("/models", summary="The models served")
async def models(request: Request) -> dict[str, Any]:
    c = context(request)
    return {"object": "list", "data": [model_card(c, engine) for engine in c.models.engines.values()]}


@router.get("/models/{id:path}", summary="A model served")
async def model(id: Annotated[str, Path(max_length=500)], request: Request) -> dict[str, Any]:
    c = context(request)
    return model_card(c, c.models.named(id))


def model_card(c: Context, engine: Engine) -> dict[str, Any]:
    """`tempo`: whether it is loaded, what is known of it, and the memory of its process."""
    ready, beat = engine.ready, engine.beat
    known = {
        "default": engine is c.models.default,
        "state": engine.state,
        "family": ready.model.get("family") if ready else None,
        "context_length": ready.context_length if ready else None,
        "chat": ready.has_chat_template if ready else None,
        "memory_bytes": beat.memory_bytes if beat else None,
        "sessions": engine.kept_sessions,
    }
    card = {"id": engine.name, "object": "model", "created": int(c.started), "owned_by": "tempo-mlx"}
    return {**card, "tempo": known}


ANSWER = answers("The completion; server-sent events with stream.", {**JSON, **EVENTS})


@router.post("/completions", responses=ANSWER, summary="Continue a prompt")
async def completions(body: CompletionBody, request: Request) -> Response:
    if body.best_of is not None and body.best_of < body.n:
        raise refused(
            f"best_of is {body.best_of}, fewer than n ({body.n}); ask for at least as many.", "best_of"
        )
    if body.max_tokens == 0 and (not body.echo or body.stream or body.n > 1):
        raise refused(
            "max_tokens is 0; ask for a token, or for one prompt with echo and without stream.", "max_tokens"
        )
    prompts = (
        body.prompt
        if isinstance(body.prompt, list) and isinstance(body.prompt[0], (str, list))
        else [body.prompt]
    )
    more = {"suffix": body.suffix, "echo": body.echo, "score_only": body.max_tokens == 0}
    length = 1 if more["score_only"] else body.max_tokens
    wanted = [{**more, "prompt": prompt} for prompt in prompts]
    return await complete(asked(request, body, length, body.logprobs), body, wanted)


@router.post("/chat/completions", responses=ANSWER, summary="Continue a conversation")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    wanted, prompt = asked_chat(request, body)
    return await complete(wanted, body, [prompt])


async def complete(understood: Asked, body: Common, prompts: list[dict[str, Any]]) -> Response:
    """prompts: of each what is to be continued, and what else is wanted (completions.py)."""
    chat, engine = isinstance(body, ChatBody), understood.engine
    name = ("chatcmpl-" if chat else "cmpl-") + understood.id
    shape = Shape(name, understood.model, chat, int(time.time()), understood.config.seed)
    if body.stream:
        if len(prompts) > 1:
            raise refused("stream takes one prompt at a time.", "prompt")
        usage = body.stream_options is not None and body.stream_options.include_usage
        return Chunks(engine, understood.ticket(prompts[0]), shape, body.n, usage)
    choices, counts = [], {"prompt_tokens": 0, "completion_tokens": 0}
    for prompt in prompts:
        data = json.loads((await last(engine, understood.ticket(prompt), understood.request)).data)
        choices += data["choices"]
        counts = {name: counts[name] + data["usage"][name] for name in counts}
    return JSONResponse(
        {
            **shape.head(chunk=False),
            "choices": [
                shape.choice(i, choice, understood.logprobs is not None) for i, choice in enumerate(choices)
            ],
            "usage": total(counts),
        }
    )
