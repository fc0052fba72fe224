"""Nothing is left put off: MLX computes what was put off in the thread that did so, and in no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tempo_mlx.mlx import mx


def settle(*parts: Any) -> None:
    """Compute every array in these parts of a model, however deep."""
    mx.eval(list(arrays_in(parts)))


def arrays_in(part: Any) -> Iterator[mx.array]:
    """Every array of a part, and of what it is made of; what several share, as often."""
    if isinstance(part, mx.array):
        yield part
    elif isinstance(part, (list, tuple)):
        for each in part:
            yield from arrays_in(each)
    elif isinstance(part, dict):
        yield from arrays_in(list(part.values()))
    elif type(part).__module__.startswith(("tempo_mlx.model.", "tempo_mlx.ranks.")):
        yield from arrays_in(list(vars(part).values()))
