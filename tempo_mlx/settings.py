"""The machinery of the settings table: one `Setting` per field of a configuration dataclass.

Type, choices and default come from the field itself; `row` adds what a reader needs to know: group, help,
range, other spellings, which decoders use it and what else must be set for it to matter. Command line,
environment, files, HTTP schema and reference docs are all generated from here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tempo_mlx.errors import ConfigError
from tempo_mlx.files import read_text

Needs = Mapping[str, tuple[object, ...]]
Audience = Literal["everyday", "study", "ablation"]
AUDIENCES: tuple[Audience, ...] = get_args(Audience)


@dataclass(frozen=True)
class Row:
    """What a field's annotation cannot say.

    `needs`: other settings and the values under which this one counts; no values: the other one must be on.
    `implies`: which of them (or `decoder`) get the first such value where this one is given and they are not.
    """

    group: str
    help: str
    audience: Audience = "everyday"
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None  # exclusive lower bound
    below: float | None = None  # exclusive upper bound
    aliases: tuple[str, ...] = ()  # further flags; for a boolean, "/--x" is one that switches it off
    environment: tuple[str, ...] = ()  # names besides TEMPO_<NAME>, which beats them
    decoders: tuple[str, ...] | None = None  # None: all
    needs: Needs | None = None
    implies: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # of a field whose values are a table's names
    pairs: bool = False  # its texts are NAME=VALUE, and a mapping will do
    commas: bool = False  # several texts may be written as one, with commas between
    names_file: bool = False  # written on a command line it is a file, whose text is meant
    default_text: str | None = None  # how docs and --help write a default that is not a plain value


def row(default: object, group: str, help: str, audience: Audience = "everyday", **rest: Any) -> Any:
    """A dataclass field that carries a `Row`."""
    return field(default=default, metadata={"row": Row(group, help, audience, **rest)})


@dataclass(frozen=True)
class Setting:
    """One line of the table. `kind` is the type of a single value; `many`: the value is a tuple of them."""

    name: str
    kind: type
    many: bool
    optional: bool
    choices: tuple[Any, ...]  # the values allowed; with `open`, words allowed besides
    open: bool  # other values than `choices` are allowed
    default: Any
    row: Row

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def environment(self) -> tuple[str, ...]:
        """Environment names, the strongest first."""
        return (f"TEMPO_{self.name.upper()}", *self.row.environment)

    @property
    def default_text(self) -> str:
        if self.row.default_text is not None:
            return self.row.default_text
        if self.default is None or self.default == ():
            return "none"
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return str(self.default)

    @property
    def writes_none(self) -> bool:
        """Whether the word none stands for no value: not where any text is one."""
        any_text = self.open and self.kind is str and not self.row.names_file
        return self.optional and self.kind is not bool and not any_text

    @property
    def values_text(self) -> str:
        """The values allowed, for people: `mix, last or mean`, `a whole number from 1 to 8, or auto`."""
        if self.kind is bool:
            return "true or false"
        none = ("none",) if self.writes_none else ()
        if not self.open:
            names = [*map(str, self.choices), *none]
            return " or ".join([", ".join(names[:-1]), names[-1]])
        if self.kind is str:
            return "text"
        noun = {(int, False): "a whole number", (int, True): "whole numbers",
                (float, False): "a number", (float, True): "numbers"}[self.kind, self.many]  # fmt: skip
        r, bounds = self.row, []
        bounds += [f"from {_number(r.minimum)}"] if r.minimum is not None else []
        bounds += [f"above {_number(r.above)}"] if r.above is not None else []
        to = "up to" if r.minimum is None else "to"
        bounds += [f"{to} {_number(r.maximum)}"] if r.maximum is not None else []
        below = "and below" if bounds else "below"
        bounds += [f"{below} {_number(r.below)}"] if r.below is not None else []
        words = " or ".join((*self.choices, *none))
        return " ".join([noun, *bounds]) + (f", or {words}" if words else "")

    def parse(self, text: str, source: str | None = None) -> Any:
        """The value written as `text` on a command line or in the environment, checked."""
        source = source or self.flag
        if self.kind is bool:
            words = {"1": True, "true": True, "yes": True, "on": True,
                     "0": False, "false": False, "no": False, "off": False}  # fmt: skip
            if text.strip().lower() not in words:
                raise ConfigError(f"{source} is {shown(text)}; write true or false.")
            return words[text.strip().lower()]
        if text == "none" and self.writes_none:
            return None
        if self.row.names_file:
            return self.check(read_text(text, self.name), source)
        if self.many and self.kind is str:
            return self.check(self._strings(text, source), source)
        if self.many:
            parts = [part.strip() for part in text.split(",") if part.strip()]
            return self.check(tuple(self._number(part, source) for part in parts), source)
        return self.check(text if self.kind is str else self._number(text.strip(), source), source)

    def _strings(self, text: str, source: str) -> tuple[str, ...]:
        """One string, or a JSON list of them."""
        if not text.startswith("["):
            return tuple(text.split(",")) if self.row.commas else (text,)
        try:
            return tuple(json.loads(text))
        except ValueError as error:
            raise ConfigError(
                f'{source} is {shown(text)}; write one text, or a JSON list such as ["a", "b"].'
            ) from error

    def _number(self, text: str, source: str) -> object:
        if text in self.choices:
            return text
        try:
            return int(text) if self.kind is int else float(text)
        except ValueError as error:
            raise ConfigError(f"{source} is {shown(text)}; choose {self.values_text}.") from error

    def check(self, value: object, source: str | None = None) -> Any:
        """`value` as this setting stores it (whole numbers for a float become floats, lists become tuples).

        Raises ConfigError, naming `source` (the flag unless told), when the type or the range is wrong.
        """
        source = source or self.name
        if value is None and self.optional:
            return None
        if self.row.names_file and isinstance(value, Mapping):
            value = json.dumps(value)
        if not self.many:
            return self._check_one(value, source)
        if self.kind is str and isinstance(value, str):
            value = (value,)
        if self.row.pairs and isinstance(value, Mapping):
            value = [f"{name}={json.dumps(item)}" for name, item in value.items()]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{source} is {shown(value)}; a list is needed: {self.values_text}.")
        return tuple(self._check_one(item, source) for item in value)

    def _check_one(self, value: object, source: str) -> Any:
        wrong = ConfigError(f"{source} is {shown(value)}; choose {self.values_text}.")
        if isinstance(value, str | Integral) and not isinstance(value, bool) and value in self.choices:
            return self.choices[self.choices.index(value)]
        if self.kind is bool:
            if not isinstance(value, bool):
                raise wrong
            return value
        if not self.open or (self.kind is str and not isinstance(value, str)):
            raise wrong
        if isinstance(value, str):
            if self.kind is not str or "\0" in value:
                raise wrong
            return value
        wanted = Integral if self.kind is int else Real
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise wrong
        try:
            number = self.kind(value)
        except OverflowError:
            raise wrong from None
        r = self.row
        if (
            (self.kind is float and not math.isfinite(number))
            or (r.minimum is not None and number < r.minimum)
            or (r.maximum is not None and number > r.maximum)
            or (r.above is not None and number <= r.above)
            or (r.below is not None and number >= r.below)
        ):
            raise wrong
        return number


def settings_of(config: type) -> Mapping[str, Setting]:
    """The table of a configuration dataclass, by field name, in the order of its fields."""
    return _table(config)


@cache
def _table(config: type) -> Mapping[str, Setting]:
    hints = get_type_hints(config)
    return types.MappingProxyType({f.name: _setting(f, hints[f.name]) for f in dataclasses.fields(config)})


def _setting(f: dataclasses.Field[Any], hint: Any) -> Setting:
    parts = list(_union(hint))
    optional = type(None) in parts
    many = any(get_origin(part) is tuple for part in parts)
    kinds: list[type] = []
    choices: tuple[Any, ...] = f.metadata["row"].choices
    for part in parts:
        if get_origin(part) is tuple:
            kinds.append(get_args(part)[0])
        elif get_origin(part) is Literal:
            choices = get_args(part)
        elif part is not type(None) and not choices:
            kinds.append(part)
    kind = kinds[0] if kinds else type(choices[0])
    return Setting(f.name, kind, many, optional, choices, bool(kinds), f.default, f.metadata["row"])


def without_effect(settings: Mapping[str, Setting], name: str, values: Mapping[str, Any]) -> str | None:
    """Why a setting has no effect among `values` (others at their defaults), in a sentence."""
    row = settings[name].row
    decoder = values.get("decoder", settings["decoder"].default)
    if row.decoders is not None and decoder not in row.decoders:
        able = " or ".join(row.decoders)
        return f"{name} has no effect with the {decoder} decoder; leave it out, or choose --decoder {able}."
    for other, allowed in (row.needs or {}).items():
        decoders = settings[other].row.decoders
        if decoders is not None and decoder not in decoders:
            continue
        value = values.get(other, settings[other].default)
        if not met(settings[other], value, allowed):
            return f"{name} has no effect {_missing(settings[other], value, allowed)}."
    return None


def met(other: Setting, value: object, allowed: tuple[object, ...]) -> bool:
    """Whether `value` of the setting `other` is what one that needs it asks for: one of those allowed, or "on"."""
    return value in allowed if allowed else value != other.default


def _missing(other: Setting, value: object, allowed: tuple[object, ...]) -> str:
    if allowed in ((False,), (None,)):
        return f"beside {other.name}; leave one of them out"
    wanted = " ".join([other.flag, " or ".join(map(str, allowed or other.choices))]).strip()
    if not allowed or value is None:
        return f"without {other.name}; add {wanted}, or leave it out"
    return f"with {other.name} {value}; choose {wanted}, or leave it out"


def by_audience(settings: Iterable[Setting]) -> list[Setting]:
    """In the order of help, docs and page: what everyone uses first, what is for experiments last."""
    return sorted(settings, key=lambda setting: AUDIENCES.index(setting.row.audience))


def _number(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _union(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        yield from get_args(hint)
    else:
        yield hint


def spellings(settings: Mapping[str, Setting]) -> dict[str, tuple[str, bool]]:
    """Every name a settings file or the API may use: name -> (field, whether it negates the field)."""
    names = {name: (name, False) for name in settings}
    for setting in settings.values():
        for alias in setting.row.aliases:
            if not alias.lstrip("/").startswith("--"):
                continue  # a letter, for the command line alone
            names[alias.lstrip("/-").replace("-", "_")] = (setting.name, alias.startswith("/"))
    return names


def canonical(given: Mapping[str, Any], settings: Mapping[str, Setting]) -> dict[str, Any]:
    """`given` under the names of the fields, checked. Raises ConfigError: an unknown or doubled key."""
    names, result = spellings(settings), {}
    for key, value in given.items():
        if key not in names:
            raise ConfigError(f"{key} is not a setting; {suggestion(key, names)}")
        name, negated = names[key]
        if name in result:
            raise ConfigError(f"{name} is given twice, once as {key}; give it once.")
        checked = settings[name].check(value, key)
        result[name] = not checked if negated else checked
    return result


def suggestion(key: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, names, 1)
    return f"did you mean {near[0]}?" if near else "docs/settings.md lists all."


def shown(value: object) -> str:
    """`value` for an error message: its repr, short and on one line."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"
    text = repr(value)
    text = " ".join(text.split()) if "\n" in text else text  # of numpy's tables
    return text if len(text) <= 80 else text[:77] + "..."


class Checked:
    """Base of the configuration dataclasses: construction checks every field against its row."""

    def __post_init__(self) -> None:
        for name, setting in settings_of(type(self)).items():
            object.__setattr__(self, name, setting.check(getattr(self, name)))
