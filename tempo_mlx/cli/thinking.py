"""Printing a run that thinks: the reasoning goes to stderr, the answer to stdout, both while they come."""

from __future__ import annotations

from rich.console import Console

from tempo_mlx.decode.step import Step
from tempo_mlx.decode.thinking import Splitter
from tempo_mlx.report.styles import Bit, isolated, raw
from tempo_mlx.report.terminal import Lines
from tempo_mlx.report.views import View


class ThinkingPrinter:
    """Settled text, taken apart by `splitter`."""

    def __init__(self, out: Console, err: Console, view: View, splitter: Splitter) -> None:
        self._err = err
        self._answer = Lines(out)
        self._view = view
        self._splitter = splitter
        self._reasoned = False

    def add(self, step: Step) -> None:
        self._print(*self._splitter.add(raw(self._view.add(step))))

    def finish(self) -> None:
        self._print(*self._splitter.add(raw(self._view.finish())))
        self._print(*self._splitter.finish())
        self._answer.end()

    def _print(self, reasoning: str, answer: str) -> None:
        if reasoning:
            self._reasoned = True
            self._err.print(isolated(reasoning), style="dim", end="", soft_wrap=True)
        if answer and self._reasoned:
            self._reasoned = False
            self._err.print("\n")
        if answer:
            self._answer.write([Bit(answer)])
