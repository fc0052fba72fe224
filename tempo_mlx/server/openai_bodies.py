"""What OpenAI's clients send: the bodies of completions and of chat completions, and our settings in them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Union

from pydantic import Field

from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.schemas import LONGEST_TEXT, Body, Settings

MOST_PROMPTS = 16
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
TokenId = Annotated[int, Field(ge=0, le=2**31)]


class StreamOptions(Body):
    include_usage: bool = Field(False, description="Send the usage in a last chunk.")
    include_obfuscation: Literal[False] | None = Field(None, description="Not supported.")


class NamedSchema(Body):
    name: str = Field("", max_length=200, description="Ignored.")
    description: Text | None = Field(None, description="Ignored.")
    schema_: dict[str, Any] = Field(alias="schema", description="A JSON schema.")
    strict: bool | None = Field(None, description="The schema is always kept to.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = Field(None, description="Of type json_schema.")

    def schema_text(self) -> str | None:
        """The setting json_schema."""
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise refused(
                f"response_format of type {self.type} with json_schema, or without.", "response_format"
            )
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return '{"type": "object"}' if self.type == "json_object" else None


class Common(Body):
    model: str = Field(max_length=500, description="The model's name, as GET /v1/models gives it.")
    stream: bool | None = Field(False, description="Send the text as server-sent events while it grows.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    n: int | None = Field(
        1, ge=1, le=256, description="How many completions; more than one are branches of one tree."
    )
    temperature: float | None = Field(1.0, ge=0, le=100, description="Divides the logits; 0 is greedy.")
    top_p: float | None = Field(
        1.0, gt=0, le=1, description="Sample from the fewest tokens that have this probability."
    )
    stop: Union[Annotated[list[str], Field(max_length=16)], str, None] = Field(  # noqa: UP007
        None, description="Texts that end the completion."
    )
    seed: int | None = Field(
        None, ge=0, le=2**63 - 1, description="Seed of everything random; 42 unless given."
    )
    user: Annotated[str, Field(max_length=1000)] | None = Field(None, description="Ignored.")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None,
        description="Lower the logits of tokens among the last ones by this, for each time they are there.",
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="Lower the logits of tokens among the last ones by this."
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="Divide the logits of tokens among the last ones by this."
    )
    logit_bias: dict[str, float] | None = Field(
        None, max_length=1024, description="What to add to the logits of tokens, by their ids."
    )
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = Field(
        None, description="Sample from so many best tokens; 0 or -1: from all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Sample from tokens with at least this share of the best one's probability."
    )
    response_format: ResponseFormat | None = Field(
        None, description="Text, any JSON object (json_object), or JSON of a schema (json_schema)."
    )
    regex: Text | None = Field(None, description="The text matches this regular expression.")
    choices: Annotated[list[Text], Field(min_length=1, max_length=1024)] | None = Field(
        None, description="The text is one of these."
    )
    tempo: Settings | None = Field(  # type: ignore[valid-type]
        None,
        description="TEMPO settings; with any of them the decoder is superposed unless they name another.",
    )


class CompletionBody(Common):
    prompt: Union[  # noqa: UP007
        Text,
        Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)],
        Annotated[list[TokenId], Field(min_length=1, max_length=10_000_000)],
        Annotated[list[list[TokenId]], Field(min_length=1, max_length=MOST_PROMPTS)],
    ] = Field(description="Text, or token ids; or a list of them.")
    max_tokens: int | None = Field(16, ge=1, le=1_000_000, description="Tokens to generate at most.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Report so many alternatives of each token.")
    echo: Literal[False] | None = Field(None, description="Only false.")
    best_of: int | None = Field(None, ge=1, le=256, description="Only equal to n.")
    suffix: Literal[""] | None = Field(None, description="Only empty.")


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Union[Text, Annotated[list[TextPart], Field(max_length=1000)]]  # noqa: UP007
    name: str | None = Field(None, max_length=200, description="Ignored.")

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(Common):
    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=1000, description="The conversation.")
    ]
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="Tokens to generate at most.")
    max_completion_tokens: int | None = Field(
        None, ge=1, le=1_000_000, description="Another name for max_tokens."
    )
    logprobs: bool | None = Field(False, description="Report the log-probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="And so many alternatives; needs logprobs."
    )
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="Only none.")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="There are no tools.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    metadata: dict[str, str] | None = Field(None, description="Ignored.")
    reasoning_effort: Annotated[str, Field(max_length=20)] | None = Field(
        None, description="A variable of the chat template; models that do not know it ignore it."
    )
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=50)] | None = Field(
        None, description="Further variables of the chat template."
    )

    def variables(self) -> list[str]:
        """Those of the chat template, as the setting template_variables has them."""
        own = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return [
            f"{name}={json.dumps(value)}"
            for name, value in {**own, **(self.chat_template_kwargs or {})}.items()
        ]

    def thinks(self) -> bool:
        return (self.chat_template_kwargs or {}).get("enable_thinking") is True


def refused(message: str, param: str) -> ApiError:
    return ApiError(400, "invalid_value", message, param)
