"""Answers on a terminal: a line each, with its share and a bar; then what is left.

Canberra      71%  ██████████████▏
Sydney        18%  ███▌
9 others       3%
not looked at  8%
"""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tempo_mlx.report.answers import Answers
from tempo_mlx.report.safe import isolated
from tempo_mlx.report.styles import MARK_STYLE

LINES = 10  # answers that have a line of their own
LEAST = 0.005  # share of one that has
CELLS = 20  # of a bar of 100%; half as many on a narrow terminal
NARROW = 60
ROWS = 3  # of an answer
CUT = "…"  # what is left out
EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(share: float, cells: int = CELLS) -> str:
    """So many of the cells, to an eighth of one."""
    eighths = round(8 * cells * share)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def share(mass: float) -> str:
    return f"{mass:.0%}" if mass >= LEAST or mass == 0.0 else "<1%"


def bars(answers: Answers, width: int) -> RenderableType:
    """width: of the terminal; long answers are cut after a few lines, and the best is shown whole above."""
    cells = CELLS if width >= NARROW else CELLS // 2
    room = max(width - cells - 10, 16)
    table = Table.grid(padding=(0, 1))
    table.add_column(overflow="fold", max_width=room)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    own = [answer for answer in answers if answer.lower >= LEAST][:LINES] or list(answers)[:1]
    for answer in own:
        mass = answer.lower
        table.add_row(wrapped(answer.text, room), share(mass), Text(bar(mass, cells), "cyan"))
    if rest := list(answers)[len(own) :]:
        others = f"{len(rest)} other answer{'s' * (len(rest) > 1)}"
        table.add_row(Text(others, MARK_STYLE), share(sum(answer.lower for answer in rest)), "")
    unseen = Text(bar(answers.unseen, cells), MARK_STYLE)
    table.add_row(Text("not looked at", MARK_STYLE), share(answers.unseen), unseen)
    best = answers.best
    cut = best is not None and ("\n" in best.text.strip() or wrapped(best.text, room).plain.endswith(CUT))
    return Group(Text(isolated(best.text.strip()) + "\n"), table) if best is not None and cut else table


def wrapped(text: str, room: int) -> Text:
    """As much of a text as fits into a few lines, each of which may run from right to left."""
    lines = broken(" ".join(text.split()), room)
    if len(lines) > ROWS:
        lines = [*lines[: ROWS - 1], f"{broken(lines[ROWS - 1], room - 2)[0]} {CUT}"]
    return Text("\n".join(map(isolated, lines)) or "(nothing)")


def broken(text: str, room: int) -> list[str]:
    """In lines of so many cells, of which some characters take two."""
    return [line.plain.rstrip() for line in Text(text).wrap(Console(), room)]
