"""Reading a JSON object that may hold anything: every field has its type, none is missing, none is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tempo_mlx.errors import RunFileError

T = TypeVar("T")


class Fields:
    """One JSON object, taken apart by name. `where` is its place in the file, for messages.

    Every method raises RunFileError for a field that is missing or of another type; None is accepted only
    from the `maybe_` methods. `done` refuses fields that nobody asked for.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise RunFileError(f"{where or 'The run file'} must be a JSON object, not {_kind(value)}.")
        self._values = dict(value)
        self.where = where

    def take(self, name: str) -> object:
        if name not in self._values:
            raise RunFileError(f"The run file lacks {self.path(name)}.")
        return self._values.pop(name)

    def has(self, name: str) -> bool:
        return name in self._values

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise self._wrong(name, "text", value)
        return value

    def maybe_text(self, name: str) -> str | None:
        return self._maybe(name, self.text)

    def integer(self, name: str) -> int:
        return as_integer(self.take(name), self.path(name))

    def maybe_integer(self, name: str) -> int | None:
        return self._maybe(name, self.integer)

    def number(self, name: str) -> float:
        return as_number(self.take(name), self.path(name))

    def maybe_number(self, name: str) -> float | None:
        return self._maybe(name, self.number)

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def array(self, name: str) -> list[Any]:
        return as_array(self.take(name), self.path(name))

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.take(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "a JSON object", value)
        return value

    def objects(self, name: str) -> list[Fields]:
        return [Fields(item, f"{self.path(name)}[{index}]") for index, item in enumerate(self.array(name))]

    def done(self) -> None:
        if self._values:
            raise RunFileError(f"The run file holds an unknown field, {self.path(min(self._values))}.")

    def _maybe(self, name: str, read: Callable[[str], T]) -> T | None:
        if name in self._values and self._values[name] is None:
            del self._values[name]
            return None
        return read(name)

    def _wrong(self, name: str, wanted: str, value: object) -> RunFileError:
        return RunFileError(f"In the run file, {self.path(name)} must be {wanted}, not {_kind(value)}.")


def as_integer(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RunFileError(f"In the run file, {where} must be a whole number from 0, not {_kind(value)}.")
    return value


def as_number(value: object, where: str) -> float:
    """A finite float. An integer too large for one is refused like infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RunFileError(f"In the run file, {where} must be a number, not {_kind(value)}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RunFileError(f"In the run file, {where} must be a finite number, not {number}.")
    return number


def as_array(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise RunFileError(f"In the run file, {where} must be a list, not {_kind(value)}.")
    return value


def copy_plain(value: object, where: str) -> Any:
    """A JSON copy of nested mappings, sequences, text, numbers and None; NaN and all else is refused."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return as_number(value, where)
    if isinstance(value, Mapping):
        return {str(key): copy_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copy_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise RunFileError(f"{where} cannot be written to a run file: it is {_kind(value)}.")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)[:40]
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return f"a {type(value).__name__}"
