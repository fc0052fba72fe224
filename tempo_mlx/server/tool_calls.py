"""Calls of tools in what a model says, in the words that its chat template taught it.

Hermes, Qwen   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, or <function=...><parameter=...> in it
Llama          {"name": ..., "parameters": {...}}, with or without <|python_tag|>
Mistral        [TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]name[ARGS]{...}
Gemma          <start_function_call>call:name{key:<escape>text<escape>}, since Gemma 4 <|tool_call>call:name{...}
harmony        <|channel|>commentary to=functions.name ...<|message|>{...}
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempo_mlx.decode.constraint import LAYOUT

Tools = Mapping[str, Mapping[str, Any]]  # by name: the JSON schema of the arguments
Found = Iterable[tuple[str, Any]]  # name and arguments

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.S)
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|\Z)", re.S)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.S)
_MISTRAL = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
_GEMMA = re.compile(r"call:([\w.-]+)(\{.*?\})(?:<tool_call\|>|<end_function_call>|\Z)", re.S)
_HARMONY = re.compile(r"to=functions\.([\w.-]+).*?<\|message\|>(.*?)(?:<\|call\|>|<\|end\|>|\Z)", re.S)


@dataclass(frozen=True)
class Style:
    """opens: what a call may begin with. read: the calls of a text from there on. forced: what a call stands between
    and what it calls its arguments, where they are JSON, so that a grammar can ask for one.
    """

    opens: tuple[str, ...]
    read: Callable[[str, Tools], Found]
    forced: tuple[str, str, str] | None = None


def tools_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """OpenAI's list by name."""
    functions = [tool.get("function", tool) for tool in tools]
    return {
        str(each.get("name")): each.get("parameters") or {} for each in functions if isinstance(each, Mapping)
    }


def style_of(templates: Iterable[str]) -> Style:
    whole = "\n".join(templates)
    return next((style for word, style in _STYLES.items() if word in whole), _STYLES["<tool_call>"])


def calls_in(text: str, style: Style, tools: Tools) -> tuple[str, list[dict[str, Any]]]:
    """What a text says beside its calls, and the calls. A text that is nothing but JSON may be one in any style."""
    start = min((at for at in map(text.find, style.opens) if at >= 0), default=None)
    found = [] if start is None else list(style.read(text[start:], tools))
    if not found:
        start, found = 0, [call for call in _bare(text, tools) if call[0] in tools]
    if not found:
        return text, []
    return text[:start], [
        {
            "id": secrets.token_hex(5)[:9],  # Mistral's templates want nine letters
            "name": name,
            "arguments": given if isinstance(given, str) else json.dumps(given, ensure_ascii=False),
        }
        for name, given in found
    ]


class Withheld:
    """Lets a growing text through up to where a call begins, or may."""

    def __init__(self, style: Style) -> None:
        self._opens, self._held, self._fresh = style.opens, "", True

    def add(self, text: str) -> str:
        self._held += text
        if self._fresh and (not self._held.strip() or self._held.lstrip()[0] in "{["):
            return ""
        self._fresh = False
        starts = [at for at in map(self._held.find, self._opens) if at >= 0]
        if starts:
            certain = min(starts)
        else:
            certain = len(self._held) - max(
                n for mark in self._opens for n in range(len(mark)) if self._held.endswith(mark[:n])
            )
        said, self._held = self._held[:certain], self._held[certain:]
        return said


def forced_grammar(style: Style, tools: Tools) -> str | None:
    """A Lark grammar of one call of one of these; None where the style's calls are not plain JSON."""
    if style.forced is None:
        return None
    before, after, key = style.forced
    kinds = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, key: schema or {"type": "object"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for name, schema in tools.items()
    ]
    parts = [json.dumps(before), "call", json.dumps(after)] if before else ["call"]
    return f"start: {' '.join(parts)}\ncall: %json {json.dumps({'x-guidance': LAYOUT, 'anyOf': kinds})}\n"


def _json(text: str) -> Any:
    """The value; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _named(value: Any) -> Iterator[tuple[str, Any]]:
    """The calls that a JSON value, or a list of them, spells."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict) and isinstance(each.get("name"), str):
            yield each["name"], each.get("arguments", each.get("parameters", {}))


def _bare(text: str, tools: Tools) -> Found:
    plain = text.strip().removeprefix("<|python_tag|>").strip()
    found = list(_named(_json(plain)))
    return found or [call for part in plain.split(";") for call in _named(_json(part))]


def _tagged(text: str, tools: Tools) -> Found:
    for body in _TAGGED.findall(text):
        yield from _named(_json(body))
        for name, rest in _FUNCTION.findall(body):
            types = tools.get(name, {}).get("properties") or {}
            yield name, {key: _typed(value, types.get(key)) for key, value in _PARAMETER.findall(rest)}


def _typed(value: str, schema: Any) -> Any:
    """A parameter that is written without quotes: text where the schema says so, and where it is no JSON."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return value
    found = _json(value)
    return value if found is None and value.strip() != "null" else found


def _mistral(text: str, tools: Tools) -> Found:
    decoder = json.JSONDecoder()
    for part in re.split(r"(?=\[TOOL_CALLS\])", text):
        match = _MISTRAL.match(part)
        rest = part[match.end() :] if match else part.removeprefix("[TOOL_CALLS]").lstrip()
        try:
            value, _ = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            continue
        yield from [(match[1], value)] if match else _named(value)


def _gemma(text: str, tools: Tools) -> Found:
    for name, body in _GEMMA.findall(text):
        parts = re.split(r'<escape>|<\|"\|>', body)  # every second one is a text
        parts[::2] = [re.sub(r"([{,]\s*)([A-Za-z_][\w-]*)\s*:", r'\1"\2":', part) for part in parts[::2]]
        parts[1::2] = [json.dumps(part) for part in parts[1::2]]
        value = _json("".join(parts))
        if isinstance(value, dict):
            yield name, value


def _harmony(text: str, tools: Tools) -> Found:
    yield from _HARMONY.findall(text)


_COMMENTARY = "<|start|>assistant<|channel|>commentary to="
# By a word that only templates of the style hold; the last is every other one's.
_STYLES: Mapping[str, Style] = {
    "<|channel|>": Style(
        (
            f"<|end|>{_COMMENTARY}", _COMMENTARY, "<|channel|>commentary to=",
            "<|end|><|start|>assistant to=functions.", "<|start|>assistant to=functions.", " to=functions.",
        ),
        _harmony,
    ),
    "[TOOL_CALLS]": Style(("[TOOL_CALLS]",), _mistral),
    "<|tool_call>": Style(("<|tool_call>",), _gemma),
    "<start_function_call>": Style(("<start_function_call>",), _gemma),
    "<|python_tag|>": Style(("<|python_tag|>",), _bare, ("", "", "parameters")),
    "ipython": Style(("<|python_tag|>",), _bare, ("", "", "parameters")),
    "<tool_call>": Style(("<tool_call>",), _tagged, ("<tool_call>\n", "\n</tool_call>", "arguments")),
}  # fmt: skip
