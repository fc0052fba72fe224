"""What commands share on the terminal: the two consoles, a progress bar, notices, interrupts."""

from __future__ import annotations

import gc
import io
import logging
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console

from tempo_mlx.report.safe import printable

NO_BREAK = "\u00a0"


def make_consoles(color: bool = True) -> tuple[Console, Console]:
    """(stdout, stderr). Nothing is highlighted or wrapped by rich on its own account."""
    how: dict[str, Any] = {
        "highlight": False,
        "no_color": None if color else True,
        "markup": False,
        "emoji": False,
    }
    wide = os.environ.get("COLUMNS", "")
    # rich would take the one for 80 columns wide, and the other at its word
    if os.environ.get("TERM", "").lower() in ("dumb", "unknown") or (wide.isdigit() and not int(wide)):
        how["width"], how["height"] = shutil.get_terminal_size()
    # Other programs' FORCE_COLOR makes no terminal of a pipe.
    out, err = (
        Console(file=file, force_terminal=None if file.isatty() else False, **how)
        for file in (sys.stdout, sys.stderr)
    )
    return out, err


def fill_closed_streams() -> bool:
    """Standard streams that the caller closed lead nowhere: a file that is opened later must not take their place.

    Returns whether standard output was one of them.
    """
    closed = sys.stdout is None
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    return closed


def discard_stdout() -> None:
    """Write nothing more: what is left in its buffer would be tried again when the program ends."""
    with suppress(OSError, ValueError):  # not a file of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tolerate_any_encoding() -> None:
    """Text that the terminal's encoding lacks is replaced instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def waiting(console: Console, what: str, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Say on a terminal what is being waited for, beside a spinner, until the function given is called, or the end."""
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield lambda: None
        return
    with console.status(what, spinner_style="dim") as status:
        yield status.stop


@contextmanager
def progress_bar(
    console: Console, what: str, quiet: bool = False, before: Callable[[], None] = lambda: None
) -> Iterator[Callable[[int, int | None], None]]:
    """A function of (bytes so far, bytes in all or None) that moves a bar, which its first call shows."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=quiet)
    task = None

    def move(done: int, total: int | None) -> None:
        nonlocal task
        if task is None:
            before()
            bar.start()
            task = bar.add_task(what, total=total)
        bar.update(task, completed=done, total=total)

    try:
        yield move
    finally:
        if task is not None:
            bar.stop()


@contextmanager
def short_collections() -> Iterator[None]:
    """Look for garbage among the newest objects alone: a search of all that a text is made of is a pause one sees."""
    before = gc.get_threshold()
    gc.set_threshold(before[0], 3, 1 << 30)  # the newest, four lots of them, and never all
    try:
        yield
    finally:
        gc.set_threshold(*before)


def notice_slow_blas(console: Console) -> None:
    """Say once why MLX is not on an optimised BLAS, unless that was asked for."""
    from tempo_mlx import blas

    if note := blas.slow():
        console.print(f"Note: {note}", soft_wrap=True)


def say(console: Console, text: str, style: str = "", indent: int = 0) -> None:
    """A sentence, on a line of its own; on a terminal it breaks between words, so that a path can be copied whole.

    indent: of its further lines.
    """
    if console.is_terminal:
        text = printable(text)
        how: dict[str, Any] = {
            "replace_whitespace": False,
            "break_long_words": False,
            "break_on_hyphens": False,
        }
        lines = (
            textwrap.fill(line, console.width, subsequent_indent=" " * indent, **how)
            for line in text.split("\n")
        )
        text = "\n".join(lines).replace(NO_BREAK, " ")
    console.print(text, style=style, soft_wrap=True)


def say_figures(console: Console, line: str) -> None:
    """A line of figures with bars between them, which is where it breaks on a narrow terminal."""
    parts = [
        part if len(part) > console.width - 2 else part.replace(" ", NO_BREAK) for part in line.split(" | ")
    ]
    text = f"{NO_BREAK}| ".join(parts) if console.is_terminal else line
    say(console, text, "dim")


def print_facts(console: Console, facts: Mapping[str, str], indent: str = "") -> None:
    """Names and values in two columns."""
    width = max(map(len, facts), default=0)
    under = min(len(indent) + width + 2, console.width // 2)
    for name, value in facts.items():
        line = f"{indent}{name:<{width}}  {value}"
        if " " in value:
            say(console, line, indent=under)
        else:
            console.print(printable(line), soft_wrap=True)


def write_text(console: Console, text: str) -> None:
    """Write text as it is, at once; on a terminal without control characters."""
    console.file.write(printable(text) if console.is_terminal else text)
    console.file.flush()


def write_data(console: Console, text: str) -> None:
    """Write JSON or a page, which are UTF-8 wherever they go, whatever the locale says of texts."""
    if console.is_terminal or not isinstance(console.file, io.TextIOWrapper):
        write_text(console, text)
        return
    console.file.flush()
    console.file.buffer.write(text.encode())
    console.file.buffer.flush()


def log_to_stderr(verbose: bool, debug: bool) -> None:
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("tempo_mlx").setLevel(level)


class Interrupts:
    """Ctrl-C and SIGTERM as a question to ask between steps; the second one ends the program at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None] = {}

    def reason(self) -> str | None:
        return "cancelled" if self.signal else None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it; 0 without one."""
        return 128 + self.signal if self.signal else 0

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of what a script leaves in the background
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
