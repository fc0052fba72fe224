"""Records from outside: one description, a dataclass, reads them strictly, writes them and says what is wrong.

Reading takes types as they are: true is no 1, "1" is no 1, NaN is no number. Every field must be there and no other
may, whatever default the class has for those who build it in code; only fields in `may_lack` can be left out, and are
left out where they are None.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, ClassVar, get_type_hints

from pydantic import (
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from tempo_mlx.errors import TempoError

Text = Annotated[str, Strict()]
Whole = Annotated[int, Strict(), Field(ge=0)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]  # an integer is one, too
Switch = Annotated[bool, Strict()]
Object = Mapping[str, Any]  # JSON of any shape


class Record:
    """Base of a frozen dataclass whose fields, in their order, are those of a JSON object.

    A field is `name: Annotated[kind, "what it means"]`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    may_lack: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        record: Any = handler.resolve_ref_schema(schema)
        for entry in record["schema"]["fields"]:
            if entry["name"] in cls.may_lack:  # left out or given; never null
                entry["schema"]["schema"] = entry["schema"]["schema"]["schema"]
            elif entry["schema"]["type"] == "default":
                entry["schema"] = entry["schema"]["schema"]
            if entry["schema"]["type"] == "tuple":
                entry["schema"]["fail_fast"] = True
        names = frozenset(entry["name"] for entry in record["schema"]["fields"])

        def refuse_unknown(value: object) -> object:
            """Once, however many there are; pydantic would keep a fault for each."""
            if isinstance(value, dict) and not names.issuperset(value):
                raise PydanticCustomError("unknown_field", "", {"name": min(set(value) - names)})
            return value

        record["schema"] = core_schema.no_info_before_validator_function(refuse_unknown, record["schema"])
        return schema

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """In the order of the file, each field with the plain text of its annotation as description."""
        reference = handler(core)
        schema = handler.resolve_ref_schema(reference)
        found, hints = schema["properties"], get_type_hints(cls, include_extras=True)
        names = [name for name in hints if name in found]
        schema["description"] = (inspect.getdoc(cls) or "").partition("\n")[0]
        schema["required"] = [name for name in names if name not in cls.may_lack]
        schema["properties"] = {}
        for name in names:
            (text,) = (extra for extra in hints[name].__metadata__ if isinstance(extra, str))
            schema["properties"][name] = {**tidy(found[name]), "description": text}
        return reference


def tidy(schema: JsonSchemaValue) -> JsonSchemaValue:
    """Without what goes without saying, which versions of pydantic say differently."""
    said = {"title": schema.get("title"), "default": None, "additionalProperties": True}
    result = {key: value for key, value in schema.items() if key not in said or value != said[key]}
    return {**result, "anyOf": [tidy(kind) for kind in schema["anyOf"]]} if "anyOf" in schema else result


def as_list(named_tuple: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
    """The schema of a named tuple that stands in the file as a list of its values."""
    values = tuple(get_type_hints(named_tuple, include_extras=True).values())
    listed = handler.generate_schema(tuple.__class_getitem__(values))
    return core_schema.no_info_after_validator_function(named_tuple._make, listed)


@cache
def names_of(kind: Any) -> tuple[str, ...]:
    """The fields of a record, in the order of the file."""
    return tuple(field.name for field in fields(kind))


def as_object(record: Any) -> dict[str, Any]:
    """A record as a JSON object whose values may be records; without what is left out."""
    values = {name: getattr(record, name) for name in names_of(record.__class__)}
    for name in record.may_lack:
        if values[name] is None:
            del values[name]
    return values


def plain(value: Any) -> Any:
    """A record as dicts, lists, text, numbers and None all through."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Record):
        value = as_object(value)
    return {name: plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def copy_json(value: object, error: type[TempoError], where: str) -> Any:
    """A copy of nested mappings, sequences, text, numbers and None; raises `error` for NaN and all that is no JSON."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        if not is_unicode(value):
            raise error(f"In {where} there is text that is not valid Unicode.")
        return value
    if isinstance(value, float):
        return read(Number, value, error, where=where)
    if isinstance(value, Mapping):
        return {
            copy_json(str(key), error, where): copy_json(item, error, f"{where}.{key}")
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [copy_json(item, error, f"{where}[{index}]") for index, item in enumerate(value)]
    raise error(f"{where} cannot be written to a file: it is {kind_of(value)}.")


def is_unicode(text: str) -> bool:
    """Lone surrogates are no text: they cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read(kind: Any, value: object, error: type[TempoError], file: str = "run file", where: str = "") -> Any:
    """`value` (what json.loads gives) as a `kind`. Raises `error`: one sentence that names the place in the file."""
    try:
        return adapter(kind).validate_python(value)
    except ValidationError as problem:
        raise error(sentence(problem, file, where)) from None


def sentence(problem: ValidationError, file: str, where: str = "") -> str:
    """The first thing that is wrong, in our own words."""
    try:
        errors = problem.errors(include_url=False)
    except UnicodeEncodeError:
        return f"The {file} holds a field whose name is not valid Unicode."
    first = errors[0]
    kind, place, value = first["type"], first["loc"], first["input"]
    if kind == "unknown_field":
        place = (*place, first["ctx"]["name"])
    path = where
    for part in place:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    if kind == "too_long":
        return f"In the {file}, {path} must be a list of {first['ctx']['max_length']}, not of {len(value)}."
    if kind == "missing" and isinstance(place[-1], int):
        length = len(value) + sum(error["loc"][:-1] == place[:-1] for error in errors)
        return f"In the {file}, {path[: path.rindex('[')]} must be a list of {length}, not of {len(value)}."
    if kind == "missing":
        return f"The {file} lacks {path}."
    if kind == "unknown_field":
        return f"The {file} holds an unknown field, {path}."
    if kind == "float_type" and isinstance(value, int) and not isinstance(value, bool):
        kind = "finite_number"  # too large for a float
    return f"In the {file}, {path or 'it'} must be {WANTED.get(kind, 'valid')}, not {kind_of(value)}."


WANTED = {
    "int_type": "a whole number from 0",
    "greater_than_equal": "a whole number from 0",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a JSON object",
    "dataclass_type": "a JSON object",
}


def kind_of(value: object) -> str:
    """What a JSON value is, short enough for a sentence."""
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
