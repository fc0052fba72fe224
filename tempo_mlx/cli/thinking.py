"""Printing a run that thinks: the reasoning goes to stderr, the answer to stdout, both while they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console

from tempo_mlx.cli.console import write_text
from tempo_mlx.decode.step import Step
from tempo_mlx.decode.thinking import Splitter
from tempo_mlx.report.stops import inline_stream
from tempo_mlx.report.terminal import printable
from tempo_mlx.report.text import Piece, Tokenizer


class ThinkingPrinter:
    """Settled inline text, taken apart by `splitter`."""

    def __init__(
        self,
        out: Console,
        err: Console,
        tokenizer: Tokenizer,
        splitter: Splitter,
        *,
        window: int | None,
        stop: Sequence[str] = (),
    ) -> None:
        self._out, self._err = out, err
        self._stream = inline_stream(tokenizer, stop, window=window)
        self._splitter = splitter
        self._reasoned = False

    def add(self, step: Step) -> None:
        self._print(*self._splitter.add(_text(self._stream.add(step))))

    def finish(self) -> None:
        self._print(*self._splitter.add(_text(self._stream.finish())))
        self._print(*self._splitter.finish())
        write_text(self._out, "\n")

    def _print(self, reasoning: str, answer: str) -> None:
        if reasoning:
            self._reasoned = True
            self._err.print(printable(reasoning), style="dim", end="", soft_wrap=True)
        if answer and self._reasoned:
            self._reasoned = False
            self._err.print("\n")
        write_text(self._out, answer)


def _text(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)
