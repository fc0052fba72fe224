"""A run on a terminal while it grows, and everywhere else.

On a terminal the newest lines are redrawn in place, since what has not settled may change; full lines of settled text
are printed once, above them, and scroll away like any text. On one that cannot go back (TERM=dumb) and in a pipe or a
file, text is printed as far as it has settled.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from tempo_mlx.decode.step import Step
from tempo_mlx.report.safe import isolated, printable
from tempo_mlx.report.styles import Bit, drawn, raw
from tempo_mlx.report.text import Tokenizer, texts_along, visible_whitespace
from tempo_mlx.report.views import View

REFRESH_SECONDS = 0.05
WORD_BEGINS = re.compile(r"(?<=\s)(?=\S)")


class Printer(Protocol):
    """Takes the steps as they are decoded; `finish` (always called, also after Ctrl-C) prints the rest."""

    def add(self, step: Step) -> None: ...
    def finish(self) -> None: ...


def make_printer(
    out: Console, err: Console, view: View, *, prompt: str = "", prompt_length: int, status: bool = True
) -> Printer:
    """The printer that suits `out`: live where it is a terminal that can go back, plain otherwise.

    prompt: shown dim before the text on a terminal; prompt_length: its slots.
    status: also show a line of steps/s, width and what the cache holds while decoding, where a terminal is there
    that the text does not go to, or that is redrawn anyway.
    """
    line = StatusLine(prompt_length)
    if is_live(out):
        return LivePrinter(out, view, prompt, line if status else None)
    watched = status and err.is_terminal and not err.is_dumb_terminal and not out.is_terminal
    return PlainPrinter(out, err if watched else None, view, line, prompt if out.is_terminal else "")


def make_branch_printer(
    out: Console, tokenizer: Tokenizer, *, prompt_length: int, status: bool = True
) -> Printer | None:
    """For decoders whose steps hold several texts: the texts growing on a live terminal, else nothing to do."""
    return (
        BranchPrinter(out, tokenizer, StatusLine(prompt_length) if status else None) if is_live(out) else None
    )


def is_live(out: Console) -> bool:
    """Whether what was drawn can be drawn again."""
    return out.is_terminal and not out.is_dumb_terminal


class StatusLine:
    """Steps/s, how many tokens share the newest place, and how many the cache holds, from the steps seen."""

    def __init__(self, prompt_length: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = 0.0
        self._rate = 0.0
        self._steps = 0
        self._width = 0
        self._slots = prompt_length

    def add(self, step: Step) -> None:
        self._steps += 1
        if self._steps == 1:
            self._start = self._clock()
        else:
            self._rate = (self._steps - 1) / max(self._clock() - self._start, 1e-9)
        self._width = len(step.tokens)
        self._slots += sum(token.slot is not None for token in step.tokens) - len(step.removed)

    def text(self) -> Text:
        rate = f"{self._rate:.1f} steps/s" if self._steps > 1 else "... steps/s"
        width = f"{self._width} token{'s' * (self._width != 1)} at once"
        line = f"step {self._steps} | {rate} | {width} | {self._slots} in the cache"
        return Text(line, "dim", no_wrap=True, overflow="ellipsis")


def _live(console: Console, content: RenderableType) -> Live:
    """Redrawn by us alone. A warning on the same terminal goes above it; a redirected stderr is untouched."""
    same = sys.stderr.isatty()
    return Live(
        content,
        console=console,
        auto_refresh=False,
        transient=True,
        vertical_overflow="crop",
        redirect_stdout=False,
        redirect_stderr=same,
    )


class PlainPrinter:
    """Settled text only, nothing redrawn. `watch`: a terminal other than `out` that may show the status."""

    def __init__(
        self, out: Console, watch: Console | None, view: View, status: StatusLine, prompt: str = ""
    ) -> None:
        self._status = status
        self._view = view
        self._lines = Lines(out)
        self._lines.write([Bit(prompt, "dim")])
        self._live = _live(watch, "") if watch else None
        if self._live:
            self._live.start()

    def add(self, step: Step) -> None:
        self._lines.write(self._view.add(step))
        self._status.add(step)
        if self._live:
            self._live.update(self._status.text(), refresh=True)

    def finish(self) -> None:
        if self._live:
            self._live.stop()
        self._lines.write(self._view.finish())
        self._lines.end()


class Lines:
    """Text written as it comes: as it stands into a pipe, in lines broken at words on a terminal."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._column = 0
        self._word = Text()  # may still grow

    def write(self, bits: Iterable[Bit]) -> None:
        if not self._out.is_terminal:
            self._out.file.write(raw(bits))
            self._out.file.flush()
            return
        text = self._word.append_text(drawn(bits))
        *whole, self._word = text.divide([match.start() for match in WORD_BEGINS.finditer(text.plain)])
        for word in whole:
            self._place(word)

    def end(self) -> None:
        """No more follows."""
        self._place(self._word)
        self._out.file.write("\n")
        self._out.file.flush()
        self._column, self._word = 0, Text()

    def _place(self, word: Text) -> None:
        """A word and the blanks after it, on a line of its own where the last has no room for it."""
        length = cell_len(word.plain.rstrip())
        turn = "\n" if self._column and self._column + length > self._out.width else ""
        self._column = (0 if turn else self._column) + word.cell_len
        if "\n" in word.plain:
            self._column = cell_len(word.plain.rpartition("\n")[2])
        self._out.print(Text(turn).append_text(word), end="", soft_wrap=True)


class LivePrinter:
    """Redraws the lines that may still change; prints the others once, above."""

    def __init__(self, out: Console, view: View, prompt: str, status: StatusLine | None) -> None:
        self._out = out
        self._view = view
        self._status = status
        self._tail = Text().append(printable(prompt), "dim")  # settled text of the line not full yet
        self._drawn = -REFRESH_SECONDS
        self._open = True
        self._live = _live(out, self)
        self._live.start()

    def add(self, step: Step) -> None:
        self._tail.append_text(drawn(self._view.add(step)))
        if self._status:
            self._status.add(step)
        full = self._take_full_lines()
        now = time.monotonic()
        if full:  # printing redraws the region below
            self._out.print(Group(*full), overflow="ignore", crop=False)
        elif now - self._drawn >= REFRESH_SECONDS:
            self._live.refresh()
        else:
            return
        self._drawn = now

    def finish(self) -> None:
        try:
            rest = drawn(
                self._view.finish()
            )  # takes a while after a long stretch: what is drawn stays till then
        finally:
            self._open = False
            self._live.stop()
        self._out.print(self._tail.append_text(rest))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line in progress, what is pending, and the status; their end, where the terminal is low."""
        if not self._open:
            return
        room = max(console.height - 2, 1)
        yield from self._wrap(self._tail.copy().append_text(drawn(self._view.pending())))[-room:]
        if self._status:
            yield self._status.text()

    def _take_full_lines(self) -> list[Text]:
        *full, self._tail = self._wrap(self._tail)
        return full

    def _wrap(self, text: Text) -> Sequence[Text]:
        return list(text.wrap(self._out, self._out.width)) or [Text()]


BULLET = "· "  # of a text that grows: its number comes at the end, when all are put in order


class BranchPrinter:
    """The texts of a tree while they grow, one line each, ended ones dim. Leaves nothing: the run has the texts."""

    def __init__(self, out: Console, tokenizer: Tokenizer, status: StatusLine | None) -> None:
        self._tokenizer = tokenizer
        self._status = status
        self._growing: dict[
            int, tuple[int, list[int]]
        ] = {}  # slot of the newest token: branch, the text's tokens
        self._ended: list[tuple[int, list[int]]] = []
        self._drawn = -REFRESH_SECONDS
        self._live = _live(out, self)
        self._live.start()

    def add(self, step: Step) -> None:
        before, self._growing = self._growing, {}
        for token in step.tokens:
            ids = before[token.parents[0].slot][1] if token.parents else []
            line = (token.branch or 0, [*ids, token.id])
            if token.slot is None:
                self._ended.append(line)
            else:
                self._growing[token.slot] = line
        if self._status:
            self._status.add(step)
        if time.monotonic() - self._drawn >= REFRESH_SECONDS:
            self._drawn = time.monotonic()
            self._live.refresh()

    def finish(self) -> None:
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The growing texts and the latest ended ones, as many as there is room for, by branch; each one's end."""
        room = max(console.height - 2, 1)
        ended = self._ended[-max(room - len(self._growing), 0) :] if room > len(self._growing) else []
        lines = [(*line, "") for line in self._growing.values()] + [(*line, "dim") for line in ended]
        for _, ids, style in sorted(lines)[:room]:
            text = visible_whitespace("".join(texts_along(ids[-console.width :], self._tokenizer)))
            end = Text(isolated(text), style)
            if (excess := end.cell_len - (console.width - len(BULLET))) > 0:
                space = end.plain.find(" ", excess + 1)  # a word is shown whole, where there is another
                end = Text("…", style).append_text(end[space if space >= 0 else excess + 1 :])
            yield Text(BULLET, "dim", no_wrap=True).append_text(end)
        if self._status:
            yield self._status.text()
