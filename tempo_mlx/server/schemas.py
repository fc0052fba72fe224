"""Request bodies. Fields, defaults, ranges and explanations come from the settings table (tempo_mlx/config.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, create_model, model_validator

from tempo_mlx.config import USES, GenerateConfig
from tempo_mlx.decode.constraint import check_grammar
from tempo_mlx.errors import ConfigError
from tempo_mlx.resolution import ANSWER_TOKENS, ASKED, PRESETS, SWITCHES, Shortcuts, resolve
from tempo_mlx.server.errors import ApiError
from tempo_mlx.settings import Setting, by_audience, settings_of

MODEL = "As GET /v1/models names it; the first of those served, unless given."
PROMPT = "The text to continue; with chat on, the user's message."
MESSAGES = "A conversation, instead of a prompt; implies chat."
WIDE = (
    "max_parallel_tokens",
    "branches",
    "best_of",
    "beam_width",
    "paths",
    "mcts_simulations",
    "rows",
)  # what makes a step costly
LONGEST_TEXT = 20_000_000  # characters; the limit on the body is what counts


class Body(BaseModel):
    """Strict: no field is unknown, none is converted from another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(Body):
    role: Literal["system", "user", "assistant"] = Field(description="Who says it.")
    content: str = Field(max_length=LONGEST_TEXT, description="What is said.")


def setting_field(setting: Setting) -> tuple[Any, Any]:
    """A setting as annotation and field of a pydantic model."""
    row = setting.row
    one: Any
    if setting.kind is str:
        one = Literal[setting.choices] if setting.choices else Annotated[str, Field(max_length=100_000)]
    elif setting.kind is bool:
        one = bool
    else:
        one = Annotated[setting.kind, Field(ge=row.minimum, le=row.maximum, gt=row.above, lt=row.below)]
        if setting.choices:
            one = Union[one, Literal[setting.choices]]  # noqa: UP007
    if setting.many:
        one = Annotated[list[one], Field(max_length=1024)]
        if setting.kind is str:
            one = Union[one, Annotated[str, Field(max_length=100_000)]]  # noqa: UP007
    if row.pairs:
        one = Union[one, Annotated[dict[str, Any], Field(max_length=1024)]]  # noqa: UP007
    if row.names_file:
        one = Union[one, dict[str, Any]]  # noqa: UP007
    if setting.optional:
        one = Optional[one]  # noqa: UP045
    default = list(setting.default) if isinstance(setting.default, tuple) else setting.default
    used = "" if row.decoders is None else f" Used by: {', '.join(row.decoders)}."
    spelled = [alias.lstrip("-").replace("-", "_") for alias in row.aliases if alias.startswith("--")]
    return one, Field(
        default,
        description=f"{row.help} Default: {setting.default_text}.{used}",
        validation_alias=AliasChoices(setting.name, *spelled) if spelled else None,
    )


SETTINGS: Mapping[str, Setting] = {**settings_of(GenerateConfig), **settings_of(Shortcuts)}
_FIELDS: dict[str, Any] = {name: setting_field(setting) for name, setting in SETTINGS.items()}
Settings: type[Body] = create_model("Settings", __base__=Body, **_FIELDS)
Settings.__doc__ = "Any setting of a run; what is left out has its default."


class ForModel(Body):
    model: str | None = Field(None, max_length=500, description=MODEL)


class Prompted(ForModel):
    prompt: str | None = Field(None, max_length=LONGEST_TEXT, description=PROMPT)
    messages: list[Message] | None = Field(None, min_length=1, max_length=1000, description=MESSAGES)

    @model_validator(mode="after")
    def one_prompt(self) -> Prompted:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


GenerateBody: Any = create_model("GenerateBody", __base__=(Prompted, Settings))


class Asked(Prompted):
    by: Literal["text", "number"] = Field(
        "text", description="Texts with the same words, or the same last number, are one answer."
    )
    answer_regex: str | None = Field(
        None,
        max_length=1000,
        description="Texts in which this finds the same (its first group) are one answer.",
    )


def asked_field(name: str) -> tuple[Any, Any]:
    """A setting that has another default where a question is asked."""
    setting = SETTINGS[name]
    return setting_field(replace(setting, default=ASKED[name], row=replace(setting.row, default_text=None)))


_ASKED_FIELDS: dict[str, Any] = {name: asked_field(name) for name in ASKED}
AskBody: Any = create_model("AskBody", __base__=(Asked, Settings), **_ASKED_FIELDS)


class Created(ForModel):
    prompt: str | None = Field(None, max_length=LONGEST_TEXT, description=PROMPT)
    messages: list[Message] | None = Field(None, min_length=1, max_length=1000, description=MESSAGES)
    run: dict[str, Any] | None = Field(
        None, description="A run file to go on with, instead of prompt and settings."
    )
    steps: int = Field(0, ge=0, le=1_000_000, description="Steps to take at once.")

    @model_validator(mode="after")
    def one_source(self) -> Created:
        given = [value for value in (self.prompt, self.messages, self.run) if value is not None]
        if len(given) != 1:
            raise ValueError("give one of prompt, messages and run")
        if self.run is not None and self.model_fields_set - {"run", "steps", "prompt", "messages", "model"}:
            raise ValueError("a run brings its own settings; leave the others out")
        return self


CreateBody: Any = create_model("CreateBody", __base__=(Created, Settings))


class BranchBody(Body):
    step: int = Field(ge=0, le=2**31, description="Step to cut back to.")
    token_id: int = Field(ge=0, le=2**31, description="The one token that step is to have.")
    then: list[Annotated[int, Field(ge=0, le=2**31)]] = Field(
        [], max_length=100, description="The one token each of the steps that follow is to have."
    )


class SlotBody(Body):
    slot: int = Field(ge=0, le=2**31, description="Slot of the member.")


class PinBody(SlotBody):
    pinned: bool = Field(True, description="Whether the member is spared by pruning from now on.")


class ContinueBody(Body):
    steps: int = Field(ge=1, le=1_000_000, description="Steps to continue by, at most.")


class RunBody(Body):
    run: dict[str, Any] = Field(description="A run file.")


class EmptyBody(Body):
    pass


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str
    request_id: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class OllamaErrorBody(ErrorDetail):
    """The message in Ollama's place, beside it what ours say."""

    error: str


def explicit_settings(body: BaseModel) -> dict[str, Any]:
    """The settings a request gave, by field name."""
    return {name: getattr(body, name) for name in body.model_fields_set if name in SETTINGS}


def as_chat(given: dict[str, Any], param: str) -> None:
    """Settings for a conversation. Raises ApiError: it says itself that it is one, and what its system message is."""
    if given.get("chat") is False or "system" in given:
        sentence = "messages bring their own chat and system message; leave out chat and system."
        raise ApiError(422, "invalid_value", sentence, param)
    given["chat"] = True


def configuration(
    given: Mapping[str, Any], ambient: Mapping[str, Any], max_tokens: int, max_rows: int
) -> GenerateConfig:
    """The configuration that follows from a request, within the server's limits. Raises ApiError (422)."""
    if GenerateConfig.max_tokens > max_tokens:
        ambient = {"max_tokens": max_tokens, **ambient}
    try:
        config = resolve(given, ambient)
        check_grammar(config)
    except ConfigError as error:
        raise ApiError(422, "invalid_value", str(error), _named(str(error))) from error
    check_limits(given, {"max_tokens": max_tokens} | dict.fromkeys(WIDE, max_rows))
    return config


def check_limits(given: Mapping[str, Any], limits: Mapping[str, int]) -> None:
    """Raises ApiError (422)."""
    for name, limit in limits.items():
        value = given.get(name)
        if isinstance(value, int) and value > limit:
            message = f"{name} is {value}; this server allows up to {limit}."
            raise ApiError(422, "invalid_value", message, name)


def check_imported(run: Mapping[str, Any], max_rows: int) -> None:
    """A run file has all settings: those that differ from the defaults were given. Raises ApiError (422)."""
    config = run.get("config")
    if isinstance(config, dict):
        check_limits(config, {n: max_rows for n in WIDE if config.get(n) != SETTINGS[n].default})


def _named(message: str) -> str | None:
    """The setting a message is about: it comes first."""
    word = message.split(" ", 1)[0]
    return word if word in SETTINGS else None


def settings_table() -> dict[str, Any]:
    """What the page's form follows: it is given the table and the rules in it, and has none of its own."""
    shown = by_audience(settings_of(GenerateConfig).values())
    return {
        "presets": {name: dict(values) for name, values in PRESETS.items()},
        "shortcuts": {name: asdict(switch) for name, switch in SWITCHES.items()},
        "ask": dict(ASKED),
        "decoders": list(USES),
        "answer_tokens": ANSWER_TOKENS,
        "groups": list(dict.fromkeys(setting.row.group for setting in shown)),
        "settings": [describe(setting) for setting in shown],
    }


def describe(setting: Setting) -> dict[str, Any]:
    """A setting for GET /settings."""
    row = setting.row
    names = {bool: "boolean", int: "integer", float: "number", str: "string"}
    return {
        "name": setting.name,
        "group": row.group,
        "audience": row.audience,
        "help": row.help,
        "type": names[setting.kind],
        "many": setting.many,
        "optional": setting.optional,
        "default": list(setting.default) if isinstance(setting.default, tuple) else setting.default,
        "default_text": setting.default_text,
        "minimum": row.minimum,
        "maximum": row.maximum,
        "above": row.above,
        "below": row.below,
        "choices": list(setting.choices),
        "values_text": setting.values_text,
        "aliases": list(row.aliases),
        "decoders": None if row.decoders is None else list(row.decoders),
        "needs": None if row.needs is None else {k: list(v) for k, v in row.needs.items()},
        "implies": list(row.implies),
    }
