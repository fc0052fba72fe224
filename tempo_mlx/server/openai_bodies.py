"""What OpenAI's clients send: the bodies of completions and of chat completions, and our settings in them.

Lenient, as clients send more than anybody documents: a field that we do not know is ignored (and logged once), null is
a field left out, numbers may be spelled as text. Refused is only what is known to change the text and cannot be done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.schemas import LONGEST_TEXT, Settings
from tempo_mlx.server.tool_calls import tools_of

MOST_PROMPTS = 128
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
TokenId = Annotated[int, Field(ge=0, le=2**31)]
Length = Annotated[
    int, Field(ge=-1, le=2**53)
]  # of what is generated; -1, and what is beyond the limit: the limit

# Fields of other servers that change the text and have no counterpart here, with the values that ask for nothing.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "functions": ([],), "function_call": ("none", "auto"), "audio": (), "web_search_options": (),
    "structured_outputs": ({},), "grammar": ("",), "guided_grammar": ("",), "documents": ([],),
    "use_beam_search": (False,), "length_penalty": (1,), "ignore_eos": (False,), "stop_token_ids": ([],),
    "bad_words": ([],), "mirostat": (0,), "mirostat_mode": (0,), "tfs": (1,), "tfs_z": (1,), "top_a": (0,),
    "dry_multiplier": (0,), "xtc_probability": (0,), "dynatemp_range": (0,), "smoothing_factor": (0,),
}  # fmt: skip


class Sent(BaseModel):
    """A body, or a part of one, as clients write it. `model_extra`: what we do not know."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def given(cls, data: Any) -> Any:
        """Null means left out."""
        return (
            {name: each for name, each in data.items() if each is not None}
            if isinstance(data, dict)
            else data
        )

    def unknown(self) -> Iterator[str]:
        """The fields that are ignored, those of parts too."""
        yield from self.model_extra or ()
        for name in self.model_fields_set:
            value = getattr(self, name, None)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, Sent):
                    yield from (f"{name}.{field}" for field in part.unknown())


class StreamOptions(Sent):
    include_usage: bool = Field(False, description="Send the usage in a last chunk.")


class NamedSchema(Sent):
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema", description="A JSON schema.")


class ResponseFormat(Sent):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = Field(None, description="Of type json_schema.")
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema", description="Of type json_object.")

    def schema_text(self) -> str | None:
        """The setting json_schema."""
        if self.type == "text":
            return None
        if self.type == "json_schema" and self.json_schema is None:
            raise refused("response_format of type json_schema needs json_schema.", "response_format")
        return json.dumps(self.schema_ if self.json_schema is None else self.json_schema.schema_)


class Common(Sent):
    model: str | None = Field(
        None, max_length=500, description="The model's name, as GET /v1/models gives it."
    )
    stream: bool = Field(False, description="Send the text as server-sent events while it grows.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    n: int = Field(
        1, ge=1, le=256, description="How many completions; more than one are branches of one tree."
    )
    temperature: float | None = Field(
        None, ge=0, le=100, description="Divides the logits; 0 is greedy, 1 if left out."
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description="Sample from the fewest tokens that have this probability."
    )
    stop: Union[Annotated[list[str], Field(max_length=1024)], str, None] = Field(  # noqa: UP007
        None, description="Texts that end the completion."
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**63 - 1,
        description="Seed of everything random; drawn and reported unless given.",
    )
    min_tokens: int | None = Field(
        None, ge=0, le=1_000_000, description="Tokens before the completion may end."
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None,
        description="Lower the logits of tokens among the last ones by this, for each time they are there.",
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="Lower the logits of tokens among the last ones by this."
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None,
        description="Divide the logits of tokens among the last ones by this.",
        validation_alias=AliasChoices("repetition_penalty", "repeat_penalty", "rep_pen"),
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
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Sample from the tokens whose surprise is nearest to the expected one.",
        validation_alias=AliasChoices("typical_p", "typical"),
    )
    response_format: ResponseFormat | None = Field(
        None, description="Text, any JSON object (json_object), or JSON of a schema (json_schema)."
    )
    json_schema: Union[dict[str, Any], Text, None] = Field(  # noqa: UP007
        None,
        description="The text is JSON of this schema.",
        validation_alias=AliasChoices("json_schema", "guided_json"),
    )
    regex: Text | None = Field(
        None,
        description="The text matches this regular expression.",
        validation_alias=AliasChoices("regex", "guided_regex"),
    )
    choices: Annotated[list[Text], Field(min_length=1, max_length=1024)] | None = Field(
        None,
        description="The text is one of these.",
        validation_alias=AliasChoices("choices", "guided_choice"),
    )
    tempo: Settings | None = Field(  # type: ignore[valid-type]
        None,
        description="TEMPO settings; with any of them the decoder is superposed unless they name another.",
    )
    lattice: bool = Field(
        False, description="Give the run file, with every step, as tempo.run of the first choice."
    )

    @field_validator("stop")
    @classmethod
    def stops(cls, stop: list[str] | str | None) -> list[str]:
        return [text for text in ([stop] if isinstance(stop, str) else stop or ()) if text]

    def texts(self) -> int:
        """How many are to be found; the best n of them are given."""
        return self.n

    def check(self) -> None:
        """Raises ApiError for what would change the text and cannot be done."""
        for name, value in (self.model_extra or {}).items():
            if name in REFUSED and value not in REFUSED[name]:
                raise refused(f"{name} is not supported; leave it out.", name)

    def controls(self) -> dict[str, Any]:
        """What asks for something: our settings of the same names."""
        off: dict[str, tuple[Any, ...]] = {
            "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},),
            "top_p": (1,), "top_k": (-1, 0), "min_p": (0,), "typical_p": (1,), "regex": ("",), "choices": (),
        }  # fmt: skip
        values = {name: getattr(self, name) for name in off}
        given = {
            name: value for name, value in values.items() if value is not None and value not in off[name]
        }
        if given.get("top_p") == 0:
            given["top_p"] = 1e-6  # OpenAI's 0: the best token alone
        schema = None if self.response_format is None else self.response_format.schema_text()
        if self.json_schema:
            schema = self.json_schema if isinstance(self.json_schema, str) else json.dumps(self.json_schema)
        if schema is not None:
            given["json_schema"] = schema
        if self.min_tokens:
            given["min_steps"] = self.min_tokens
        return given


class CompletionBody(Common):
    prompt: Union[  # noqa: UP007
        Text,
        Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)],
        Annotated[list[TokenId], Field(min_length=1, max_length=10_000_000)],
        Annotated[list[list[TokenId]], Field(min_length=1, max_length=MOST_PROMPTS)],
    ] = Field(description="Text, or token ids; or a list of them.")
    max_tokens: Length = Field(16, description="Tokens to generate at most; -1: as many as there may be.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Report so many alternatives of each token.")
    echo: bool = Field(False, description="The prompt before the completion, with its log-probabilities.")
    best_of: int | None = Field(
        None, ge=1, le=256, description="Follow so many branches, and give the n best."
    )
    suffix: Text = Field("", description="What follows the text that is wanted, for models that fill in.")

    def texts(self) -> int:
        return max(self.best_of or 1, self.n)

    @field_validator("logprobs", mode="before")
    @classmethod
    def count(cls, logprobs: Any) -> Any:
        """Chat's spelling: false is none, true is that of the token itself."""
        return {False: None, True: 0}[logprobs] if isinstance(logprobs, bool) else logprobs


class TextPart(Sent):
    """text, or as other routes call it; an assistant's refusal is what it said."""

    type: str = Field("text", max_length=100)
    text: Text = Field("", validation_alias=AliasChoices("text", "refusal"))


class Function(Sent):
    name: str = Field(max_length=1000)
    arguments: Union[Text, dict[str, Any]] = Field("{}")  # noqa: UP007


class ToolCall(Sent):
    id: str | None = Field(None, max_length=1000)
    function: Function

    def for_template(self) -> dict[str, Any]:
        """Arguments as the values that templates expect; text that is no JSON stays as it is."""
        arguments: Any = self.function.arguments
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = self.function.arguments
        named = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id or "", "type": "function", "function": named}


class ChatMessage(Sent):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Union[Text, Annotated[list[TextPart], Field(max_length=1000)]] = ""  # noqa: UP007
    name: str | None = Field(None, max_length=1000, description="Of a tool; others are ignored.")
    tool_calls: Annotated[list[ToolCall], Field(max_length=1000)] = Field([])
    tool_call_id: str | None = Field(None, max_length=1000)
    reasoning_content: Text | None = Field(
        None, validation_alias=AliasChoices("reasoning_content", "reasoning")
    )

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        if any(part.type not in ("text", "input_text", "output_text", "refusal") for part in self.content):
            raise refused("Messages are text here: leave out images, audio and files.", "messages")
        return "".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, Any] = {"role": role, "content": self.text()}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if role == "tool":
            message |= {"name": self.name or "", "tool_call_id": self.tool_call_id or ""}
        return message


class ChatBody(Common):
    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=10_000, description="The conversation.")
    ]
    max_tokens: Length = Field(-1, description="Tokens to generate at most; -1: as many as there may be.")
    max_completion_tokens: Length | None = Field(None, description="Another name for max_tokens.")
    logprobs: bool = Field(False, description="Report the log-probability of each token.")
    top_logprobs: int = Field(0, ge=0, le=20, description="And so many alternatives; needs logprobs.")
    tools: Annotated[list[dict[str, Any]], Field(max_length=1000)] = Field(
        [], description="Functions that the model may call, for its chat template."
    )
    tool_choice: Union[Literal["none", "auto", "required"], dict[str, Any]] = Field(  # noqa: UP007
        "auto", description="none: as if there were no tools."
    )
    reasoning_effort: Annotated[str, Field(max_length=20)] | None = Field(
        None, description="A variable of the chat template; models that do not know it ignore it."
    )
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=50)] = Field(
        {}, description="Further variables of the chat template."
    )

    def must_call(self) -> list[str]:
        """The tools of which one must be called. Raises ApiError."""
        names = list(tools_of(self.tools))
        if isinstance(self.tool_choice, dict):
            function = self.tool_choice.get("function") or self.tool_choice
            name = function.get("name") if isinstance(function, dict) else None
            if name not in names:
                raise refused("tool_choice names no tool of tools.", "tool_choice")
            return [name]
        if self.tool_choice == "required" and not names:
            raise refused("tool_choice is required, and there are no tools.", "tool_choice")
        return names if self.tool_choice == "required" else []

    def variables(self) -> list[str]:
        """Those of the chat template, as the setting template_variables has them."""
        own = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        tools = {"tools": self.tools} if self.tools and self.tool_choice != "none" else {}
        return [
            f"{name}={json.dumps(value)}"
            for name, value in {**own, **tools, **self.chat_template_kwargs}.items()
        ]

    def thinks(self) -> bool:
        return self.chat_template_kwargs.get("enable_thinking") is True


def refused(message: str, param: str) -> ApiError:
    return ApiError(400, "invalid_value", message, param)
