"""Runs side by side: each decodes on a call stack of its own, and their passes are made as one.

A pass of many rows takes little longer than one of few, so that eight runs take far less than eight times as long;
each gets what it would get by itself, within rounding (tempo_mlx/model/together.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from tempo_mlx.model.forward import Around, Ask, Forward, Model
from tempo_mlx.model.together import together
from tempo_mlx.model.transformer import Transformer
from tempo_mlx.server.seats import groups

Result = TypeVar("Result")


class Waiting(Around):
    """A model whose passes wait until they can be made with others'. The prompt's passes do not wait."""

    def forward(self, tokens: Any, positions: Any, bias: Any, cache: Any, **options: Any) -> Forward:
        if bias is None or options.get("logits", "all") != "all" or options.get("attention"):
            return self.model.forward(tokens, positions, bias, cache, **options)
        runner = getcurrent().parent
        assert runner is not None
        answer: Forward = runner.switch(Ask(tokens, positions, bias, cache))
        return answer


def side_by_side(
    model: Transformer, works: Iterable[Callable[[Model], Result]], most: int
) -> Iterator[Result]:
    """What each work returns, as they end; `most` are under way at once."""
    works = iter(works)
    asked: dict[greenlet, Ask] = {}
    while True:
        ended: list[Result] = []

        def go_on(stack: greenlet, value: Any, ended: list[Result] = ended) -> None:
            said = stack.switch(value)
            if stack.dead:
                ended.append(said)
            else:
                asked[stack] = said

        for work in islice(works, most - len(asked)):
            go_on(greenlet(work), Waiting(model))
        if not ended and not asked:
            return
        waiting, asks = list(asked), list(asked.values())
        asked.clear()
        answers = [answer for group in groups(asks) for answer in together(model, group)]
        for stack, answer in zip(waiting, answers, strict=True):
            go_on(stack, answer)
        yield from ended
