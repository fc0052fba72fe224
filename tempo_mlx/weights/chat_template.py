"""Chat templates: programs in Jinja that come with a model, so they run in a sandbox and on a budget."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tempo_mlx.errors import ModelError, PromptError

_BUDGET = 1 << 23  # characters written or joined; rounds of loops, calls and list items count as some
_LARGEST = 1 << 22  # what one multiplication may come to

# All of Jinja's own but what has been a way out of the sandbox (attr), what differs from one time to the next
# (random), and what makes HTML (urlize, xmlattr).
_FILTERS = frozenset(
    "abs batch capitalize center count d default dictsort e escape filesizeformat first float forceescape format "  # noqa: SIM905
    "groupby indent int items join last length list lower map max min pprint reject rejectattr replace reverse round "
    "safe select selectattr slice sort string striptags sum title tojson trim truncate unique upper urlencode "
    "wordcount wordwrap".split()
)
# Those that write or read the whole of what they are given, and how much longer it may get.
_WRITING = {
    "tojson": 1, "string": 1, "join": 1, "replace": 1, "indent": 1, "trim": 1, "upper": 1, "lower": 1, "title": 1,
    "split": 1, "center": 1, "escape": 6, "e": 6, "forceescape": 6, "format": 1, "pprint": 8, "striptags": 1,
    "urlencode": 12, "wordcount": 1, "wordwrap": 2,
}  # fmt: skip
_SIZED = ("batch", "center", "slice", "wordwrap")  # a number says how much they write
_STRING_METHODS = frozenset(
    "capitalize count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric "  # noqa: SIM905
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex "
    "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper".split()
)
_WIDE = re.compile(r"\d{4}|\*|\{[^{}]*\{")  # in a format: a huge width, or one taken from an argument


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
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=self.metered,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self.left = _BUDGET
        filters = {name: function for name, function in self.filters.items() if name in _FILTERS}
        filters["tojson"] = _tojson
        self.filters = {name: self._guarded(name, function) for name, function in filters.items()}
        self.filters |= {"_rounds": self._rounds, "_metered": self.metered}
        self.globals = {
            "range": self.globals["range"],
            "dict": self.globals["dict"],
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "namespace": _Namespace,
            "cycler": jinja2.utils.Cycler,
            "joiner": jinja2.utils.Joiner,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _STRING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise SecurityError("it needs too much work or text")

    def metered(self, value: Any) -> Any:
        """Charge for text before it is written or joined; a list is charged for as the text it would make."""
        self.spend(_length(value, self.left))
        return value

    def _rounds(self, items: Any, weight: int) -> Iterator[Any]:
        for item in items:
            self.spend(weight)
            yield item

    def _guarded(self, name: str, function: Any) -> Any:
        """The filter, charged for what it will write."""
        passes = getattr(
            function, "jinja_pass_arg", None
        )  # its first argument is Jinja's, not the template's

        def guarded(*arguments: Any, **named: Any) -> Any:
            self._charge(name, [*arguments[0 if passes is None else 1 :], *named.values()])
            return function(*arguments, **named)

        for mark in ("jinja_pass_arg", "jinja_async_variant"):
            if (kind := getattr(function, mark, None)) is not None:
                setattr(guarded, mark, kind)
        return guarded

    def _charge(self, name: str, values: Sequence[Any]) -> None:
        """Spend what the filter or string method `name` will write; `values` start with what it works on."""
        first = values[0] if values else ""
        self.spend(_WRITING.get(name, 0) * _length(first, self.left))
        if name in _SIZED:
            self.spend(sum(abs(each) for each in values[1:] if isinstance(each, int)))
            marks = max((len(each) for each in values[1:] if isinstance(each, str)), default=0)
            self.spend(marks * _length(first, self.left))
        if name == "join" and len(values) > 1:  # either way round: list|join(text), text.join(list)
            self.spend(_length(values[1], self.left))
            counts = [len(each) for each in values[:2] if isinstance(each, (str, list, tuple, dict))]
            self.spend(counts[0] * counts[-1] if counts else 0)
        if name == "replace" and len(values) > 2:
            self.spend(str(first).count(str(values[1])) * len(str(values[2])))
        if name == "indent" and len(values) > 1:
            width = values[1] if isinstance(values[1], int) else len(str(values[1]))
            self.spend((str(first).count("\n") + 1) * max(0, width))
        if name == "format":
            if _WIDE.search(str(first)):
                raise SecurityError("it formats text to a huge width")
            widest = max((_length(each, self.left) for each in values[1:]), default=0)
            self.spend(len(re.findall("[{%]", str(first))) * widest)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def charged(*arguments: Any, **named: Any) -> Any:
            self._charge("format", [value.__self__, *arguments, *named.values()])
            return wrapped(*arguments, **named)

        return charged

    def call(self, context: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
        self.spend(256)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            self._charge(function.__name__, [owner, *arguments, *named.values()])
        return super().call(context, function, *arguments, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self._charge("format", [left, right])
        sizes = _magnitude(left), _magnitude(right)
        if (operator == "**" and max(sizes) > 64) or (operator == "*" and sizes[0] * sizes[1] > _LARGEST):
            raise SecurityError("it multiplies to something huge")
        result = super().call_binop(context, operator, left, right)
        self.spend(len(result) if isinstance(result, (str, list, tuple)) else 0)
        return result


def _length(value: Any, most: int) -> int:
    """About how long the text of `value` is; counting stops beyond `most`. What is held twice counts twice."""
    total, stack = 0, [value]
    while stack and total <= most:
        each = stack.pop()
        if isinstance(each, dict):
            stack += [*each, *each.values()]
            total += len(each)
        elif isinstance(each, (list, tuple)):
            stack += each
            total += len(each)
        total += len(each) if isinstance(each, str) else 8
    return total


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
        values = {
            "tools": None,
            "documents": None,
            **settings,
            "messages": [_stated(each) for each in messages],
        }
        try:
            return template.render(values)
        except TemplateRefusal as error:
            raise PromptError(
                f"The model's chat template refuses these messages: {_reason(error)}."
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError,
                RecursionError, MemoryError) as error:  # fmt: skip  # what a program in Jinja can end in
            raise ModelError(f"The model's chat template failed ({_reason(error)}); use --raw.") from None


def _stated(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message says, as transformers gives it to templates: no key whose value is None, which many write out, and
    its reasoning under the names that they read (Gpt-oss': `thinking`)."""
    found = {key: each for key, each in message.items() if each is not None}
    for key in ("reasoning_content", "thinking", "reasoning"):
        if key in found:
            return {"thinking": found[key], **found, "reasoning_content": found[key]}
    return found


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
