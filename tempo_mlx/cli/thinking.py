"""Printing a run that thinks: the reasoning goes to stderr, the answer to stdout, both while they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console

from tempo_mlx.decode.step import Step
from tempo_mlx.decode.thinking import Splitter
from tempo_mlx.report.safe import isolated
from tempo_mlx.report.styles import Bit, raw
from tempo_mlx.report.terminal import Lines
from tempo_mlx.report.views import View


class ThinkingPrinter:
    """Settled text, taken apart by `splitter`: of the reasoning its best reading, of the answer also the others."""

    def __init__(self, out: Console, err: Console, view: View, splitter: Splitter) -> None:
        self._err = err
        self._answer = Lines(out)
        self._view = view
        self._splitter = splitter
        self._reasoned = False

    def add(self, step: Step) -> None:
        self._split(self._view.add(step))

    def finish(self) -> None:
        self._split(self._view.finish())
        reasoning, answer = self._splitter.finish()
        self._print(reasoning, [Bit(answer)])
        self._answer.end()

    def _split(self, bits: Iterable[Bit]) -> None:
        for _, group in groupby(bits, lambda bit: id(bit.fork)):
            shown = list(group)
            fork = shown[0].fork
            reasoning, answer = self._splitter.add(raw(shown) if fork is None else fork.text)
            self._print(reasoning, shown if fork is not None and answer == fork.text else [Bit(answer)])

    def _print(self, reasoning: str, answer: Sequence[Bit]) -> None:
        if reasoning:
            self._reasoned = True
            self._err.print(isolated(reasoning), style="dim", end="", soft_wrap=True)
        if raw(answer):
            if self._reasoned:
                self._reasoned = False
                self._err.print("\n")
            self._answer.write(answer)
