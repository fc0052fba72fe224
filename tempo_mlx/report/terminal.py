"""The inline text on a terminal: alternatives coloured by probability, pruned ones struck through, live.

On a colour terminal the newest lines are redrawn in place at each step, since a removal changes sets chosen
earlier; lines that no removal can reach any more are printed once, above them, and scroll away like any text.
Everywhere else (a pipe, a file, --no-color, NO_COLOR) the text is plain and printed as far as it has settled.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from tempo_mlx.decode.paths import is_usable
from tempo_mlx.decode.step import Step
from tempo_mlx.report.run import Run
from tempo_mlx.report.stops import inline_stream
from tempo_mlx.report.text import (
    InlineStream,
    Label,
    Piece,
    Tokenizer,
    pieces,
    texts_along,
    visible_whitespace,
)

REFRESH_SECONDS = 0.05
SHADES = ((0.6, "green"), (0.3, "cyan"), (0.15, "yellow"), (0.05, "magenta"), (0.0, "red"))  # least, colour
REMOVED_STYLE = "strike dim"
MARK_STYLE = "dim"


class Printer(Protocol):
    """Takes the steps as they are decoded; `finish` (always called, also after Ctrl-C) prints the rest."""

    def add(self, step: Step) -> None: ...
    def finish(self) -> None: ...


def make_printer(
    out: Console,
    err: Console,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    prompt_length: int,
    window: int | None,
    label: Label | None = None,
    status: bool = True,
    stop: Sequence[str] = (),
) -> Printer:
    """The printer that suits `out`: live where it is a colour terminal, plain otherwise.

    prompt: shown dim before the text on a live terminal; prompt_length: its slots; window: see InlineStream;
    stop: strings before which the text ends.
    status: also show a line of tokens/s, set width and lattice size while decoding, where a terminal is there
    that the text does not go to, or that is redrawn anyway.
    """
    stream = inline_stream(tokenizer, stop, window=window, removed=is_live(out), label=label)
    line = StatusLine(prompt_length)
    if is_live(out):
        return LivePrinter(out, stream, prompt, line if status else None)
    watched = status and err.is_terminal and not err.is_dumb_terminal and not out.is_terminal
    return PlainPrinter(out, err if watched else None, stream, line)


def make_branch_printer(
    out: Console, tokenizer: Tokenizer, *, prompt_length: int, status: bool = True
) -> Printer | None:
    """For decoders whose steps hold several texts: the texts growing on a colour terminal, else nothing to do."""
    return (
        BranchPrinter(out, tokenizer, StatusLine(prompt_length) if status else None) if is_live(out) else None
    )


def is_live(out: Console) -> bool:
    """Whether what was drawn can be drawn again, in colour."""
    return out.is_terminal and not out.no_color and not out.is_dumb_terminal


class StatusLine:
    """Tokens/s, width and lattice size, from the steps seen."""

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
        rate = f"{self._rate:.1f} tokens/s" if self._steps > 1 else "... tokens/s"
        line = f"step {self._steps} | {rate} | set width {self._width} | {self._slots} slots"
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
        self,
        out: Console,
        watch: Console | None,
        stream: InlineStream,
        status: StatusLine,
    ) -> None:
        self._out = out
        self._status = status
        self._stream = stream
        self._live = _live(watch, "") if watch else None
        if self._live:
            self._live.start()

    def add(self, step: Step) -> None:
        self._write(self._stream.add(step))
        self._status.add(step)
        if self._live:
            self._live.update(self._status.text(), refresh=True)

    def finish(self) -> None:
        if self._live:
            self._live.stop()
        self._write([*self._stream.finish(), Piece("\n")])

    def _write(self, new: Iterable[Piece]) -> None:
        text = "".join(piece.text for piece in new)
        self._out.file.write(printable(text) if self._out.is_terminal else text)
        self._out.file.flush()


class LivePrinter:
    """Redraws the lines that may still change; prints the others once, above."""

    def __init__(
        self,
        out: Console,
        stream: InlineStream,
        prompt: str,
        status: StatusLine | None,
    ) -> None:
        self._out = out
        self._stream = stream
        self._status = status
        self._tail = Text().append(printable(prompt), "dim")  # settled text of the line not full yet
        self._drawn = -REFRESH_SECONDS
        self._open = True
        self._live = _live(out, self)
        self._live.start()

    def add(self, step: Step) -> None:
        self._tail.append_text(styled(self._stream.add(step)))
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
        self._open = False
        self._live.stop()
        self._out.print(self._tail.append_text(styled(self._stream.finish())))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line in progress, what is pending, and the status; their end, where the terminal is low."""
        if not self._open:
            return
        room = max(console.height - 2, 1)
        yield from self._wrap(self._tail.copy().append_text(styled(self._stream.pending())))[-room:]
        if self._status:
            yield self._status.text()

    def _take_full_lines(self) -> list[Text]:
        *full, self._tail = self._wrap(self._tail)
        return full

    def _wrap(self, text: Text) -> Sequence[Text]:
        return list(text.wrap(self._out, self._out.width)) or [Text()]


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
        for branch, ids, style in sorted(lines)[:room]:
            number = f"{branch}. "
            text = visible_whitespace("".join(texts_along(ids[-console.width :], self._tokenizer)))
            end = Text(printable(text), style)
            if (excess := end.cell_len - (console.width - len(number))) > 0:
                end = Text("…", style).append_text(end[excess + 1 :])
            yield Text(number, "dim", no_wrap=True).append_text(end)
        if self._status:
            yield self._status.text()


def styled(stretch: Iterable[Piece]) -> Text:
    """Pieces as rich text. Members of a set with alternatives are coloured, a lone token is plain."""
    result = Text()
    marked = False
    for piece in stretch:
        if piece.token is None:
            marked = piece.text.endswith(("[", "/"))
            result.append(printable(piece.text), MARK_STYLE)
        elif not is_usable(piece.token):
            result.append(printable(piece.text), REMOVED_STYLE)
        elif piece.label:
            result.append(printable(piece.text), MARK_STYLE)
        else:
            result.append(printable(piece.text), shade(piece.token.probability) if marked else "")
    return result


def shade(probability: float) -> str:
    """The terminal's own colours, so that they suit a light and a dark background."""
    return next(colour for least, colour in SHADES if probability >= least)


def printable(text: str) -> str:
    """Control characters, which could drive the terminal, as visible symbols; line breaks and tabs stay."""
    return text.translate(_CONTROLS)


_CONTROLS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    0x7F: 0x2421,
}


def render_run(run: Run, label: Label | None = None) -> Text:
    """A finished run as coloured inline text, its prompt dim before it."""
    result = Text().append(printable(run.prompt.text), "dim")
    for step in run.steps:
        texts = [token.text for token in step.tokens]
        result.append_text(styled(pieces(step.tokens, texts, removed=True, label=label)))
    return result


def early_exit(section: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    """What the audit of a run says, and how many steps were run ahead, in a few words."""
    agreement, layers = section.get("agreement"), section.get("mean_layers")
    if section.get("lossless"):
        said = ["early exit, lossless"]
    elif agreement is not None:
        said = [f"{agreement:.1%} of audited early choices agreed"]
    elif any(item["left"] for item in section.get("exits", ())):
        said = ["early choices not audited"]
    else:
        said = ["nothing left early"]
    if layers is not None:
        said.append(f"{layers:.1f} layers a step")
    if ahead := section.get("accepted") or timing.get("early_exit_accepted"):
        said.append(f"{ahead} steps run ahead")
    return ", ".join(said)


def summary(run: Run) -> str:
    """One line for stderr: how long, how fast, how wide, and why it stopped."""
    steps = len(run.steps)
    members = sum(len(step.tokens) for step in run.steps)
    removed = sum(token.removed_after is not None for step in run.steps for token in step.tokens)
    parts = [f"{steps} steps"]
    rate = run.timing.get("tokens_per_second")
    if rate is not None:
        parts.append(f"{rate:.1f} tokens/s")
    parts.append(f"mean set width {members / steps:.2f}" if steps else "nothing generated")
    if removed:
        parts.append(f"{removed} of {members} members removed")
    if run.early_exit is not None:
        parts.append(early_exit(run.early_exit, run.timing))
    parts.append(f"stopped by {run.finish_reason}")
    return " | ".join(parts)
