"""Chat templates: programs in Jinja that come with a model, so they run in a sandbox and on a budget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tempo_mlx.errors import ModelError, PromptError

_BUDGET = 1 << 24  # characters written, rounds of loops and calls, together
_LARGEST = 1 << 22  # of one string, and of a number that could become one


class TemplateRefusal(jinja2.TemplateError):
    """The template called raise_exception: these messages are not for it."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the model wrote, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)`, without the names that lead to Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"chat templates cannot set {name!r}")
        super().__setitem__(name, value)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, and a meter: a template that loops or grows without end is stopped."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, finalize=self.metered,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )  # fmt: skip
        self.left = _BUDGET
        self.filters = {name: self._guarded(function) for name, function in self.filters.items()}
        self.filters["tojson"] = self._guarded(_tojson)
        self.filters["_rounds"] = self._rounds
        self.filters["_metered"] = self.metered
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "namespace": _Namespace,
        }

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise SecurityError("it needs too much work or text")

    def metered(self, value: Any) -> Any:
        """Charge for text; called on everything a template writes or joins."""
        if isinstance(value, str):
            self.spend(len(value))
        return value

    def _rounds(self, items: Any, weight: int) -> Iterator[Any]:
        for item in items:
            self.spend(weight)
            yield item

    def _guarded(self, function: Any) -> Any:
        """The filter, refusing huge widths and charging for what it returns."""

        def guarded(*arguments: Any, **named: Any) -> Any:
            self._check(arguments, named)
            return self.metered(function(*arguments, **named))

        for mark in ("jinja_pass_arg", "jinja_async_variant"):
            if (kind := getattr(function, mark, None)) is not None:
                setattr(guarded, mark, kind)
        return guarded

    def _check(self, arguments: Iterable[Any], named: Mapping[str, Any]) -> None:
        for value in (*arguments, *named.values()):
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise SecurityError("it uses a huge number")

    def call(self, context: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
        self.spend(64)
        self._check(arguments, named)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str) and getattr(function, "__name__", "") in ("format", "format_map"):
            raise SecurityError("it uses str.format")
        return self.metered(super().call(context, function, *arguments, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = _magnitude(left), _magnitude(right)
        text = isinstance(left, str) or isinstance(right, str)
        if (operator == "**" and max(sizes) > 64) or (operator == "*" and sizes[0] * sizes[1] > _LARGEST):
            raise SecurityError("it multiplies to something huge")
        if operator == "%" and text:
            raise SecurityError("it formats text with %")
        return self.metered(super().call_binop(context, operator, left, right))


def _magnitude(value: Any) -> float:
    """How long a text or list is, how large a number: what multiplying would multiply."""
    if isinstance(value, (str, list, tuple)):
        return len(value)
    return abs(value) if isinstance(value, (int, float)) else 1


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError("it indents by more than 16")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(message)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str) -> None:
        """Raises: ModelError if it is not a Jinja template."""
        self._environment = _Environment()
        try:
            tree = self._environment.parse(source)
            _meter(tree)
            self._code = self._environment.compile(tree)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise ModelError(
                f"The model's chat template is malformed ({_reason(error)}); use --raw."
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
        """The conversation as text. Raises: PromptError if it is refused, ModelError if this fails."""
        environment = self._environment
        environment.left = _BUDGET
        template = jinja2.Template.from_code(environment, self._code, environment.make_globals(None))
        values = {"tools": None, "documents": None, **settings, "messages": [dict(each) for each in messages]}
        try:
            return template.render(values)
        except TemplateRefusal as error:
            raise PromptError(
                f"The model's chat template refuses these messages: {_reason(error)}."
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError,
                RecursionError, MemoryError) as error:  # fmt: skip  # what a program in Jinja can end in
            raise ModelError(f"The model's chat template failed ({_reason(error)}); use --raw.") from None


def _meter(tree: jinja2.nodes.Template) -> None:
    """Charge every round of a loop for what it writes, and every joined text for its length."""
    for loop in tree.find_all(jinja2.nodes.For):
        weight = 16 + sum(len(data.data) for data in loop.find_all(jinja2.nodes.TemplateData))
        constant = jinja2.nodes.Const(weight)
        loop.iter = jinja2.nodes.Filter(loop.iter, "_rounds", [constant], [], None, None)
    for parent in list(tree.find_all(jinja2.nodes.Node)):
        for name, value in parent.iter_fields():
            if isinstance(value, jinja2.nodes.Concat):
                setattr(parent, name, jinja2.nodes.Filter(value, "_metered", [], [], None, None))
            elif isinstance(value, list):
                value[:] = [
                    jinja2.nodes.Filter(each, "_metered", [], [], None, None)
                    if isinstance(each, jinja2.nodes.Concat)
                    else each
                    for each in value
                ]


def _reason(error: BaseException) -> str:
    return ((str(error) or type(error).__name__).splitlines() or [""])[0][:200].rstrip(".")
