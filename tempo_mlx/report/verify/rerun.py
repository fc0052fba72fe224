"""Two runs of the same settings, compared in everything that decoding decides."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tempo_mlx.report.run import Run
from tempo_mlx.report.verify.book import Tolerance
from tempo_mlx.report.verify.texts import is_spelled
from tempo_mlx.weights import Tokenizer

COMPARED = ("steps", "tree", "reasoning", "text", "final_text", "paths", "finish_reason")
SUMS = ("logprob", "score", "threshold", "value")  # log-probabilities, where they are no probabilities
EARLY_ENDS = ("cancelled", "timeout", "memory")
SHOWN = 20
_NUMBER = re.compile(r"\d+\.\d+")


@dataclass(frozen=True)
class Comparison:
    """largest: difference of a number. differences: a sentence for each thing that is not the same, the first ones."""

    largest: float
    differences: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.differences


def compare(run: Run, again: Run, tolerance: Tolerance, tokenizer: Tokenizer) -> Comparison:
    """run: as recorded. again: the same decoded once more, as far as that went."""
    one, other = run.to_dict(), again.to_dict()
    names = [n for n in COMPARED if n != "finish_reason" or run.finish_reason not in EARLY_ENDS]
    largest, sentences = 0.0, []
    if not is_spelled(run.prompt, tokenizer):
        sentences.append(
            f"The file says {run.prompt.text!r} as prompt.text, which is not the text of its tokens."
        )
    for name in names:
        for place, said, computed in unlike(name, one[name], other[name]):
            if not is_number(said) or not is_number(computed):
                sentences.append(_sentence(place, said, computed))
                continue
            size = abs(said - computed)
            largest = max(largest, size)
            if not size <= slack(place, tolerance, len(run.steps)):
                sentences.append(_sentence(place, said, computed))
    return Comparison(largest, tuple(sentences[:SHOWN]))


def slack(place: str, tolerance: Tolerance, steps: int) -> float:
    field = place.rsplit(".", 1)[-1]
    return 4.0 * tolerance.base * steps if field in SUMS else tolerance.worst


def unlike(place: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values of JSON are not equal: place, and both."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in sorted({*one, *other}):
            yield from unlike(f"{place}.{name}", one.get(name), other.get(name))
    elif isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            yield f"the number of {place}", f"{len(one)}", f"{len(other)}"
        for index, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from unlike(f"{place}[{index}]", a, b)
    elif place.endswith(".why") and isinstance(one, str) and isinstance(other, str):
        yield from _reasons(place, one, other)
    elif one != other:
        yield place, one, other


def _reasons(place: str, one: str, other: str) -> Iterator[tuple[str, Any, Any]]:
    """Reasons that hold numbers."""
    if _NUMBER.sub("", one) != _NUMBER.sub("", other):
        yield place, one, other
        return
    for a, b in zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True):
        if a != b:
            yield place, float(a), float(b)


def is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _sentence(place: str, said: object, computed: object) -> str:
    return f"The file says {said!r} as {place}; decoded again it is {computed!r}."
