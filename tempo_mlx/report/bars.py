"""Answers on a terminal: a line each, with its share and a bar; then what is left.

Canberra      71%  ██████████████▏
Sydney        18%  ███▌
9 others       3%
not looked at  8%
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tempo_mlx.report.answers import Answers
from tempo_mlx.report.styles import MARK_STYLE, isolated

LINES = 10  # answers that have a line of their own
LEAST = 0.005  # share of one that has
CELLS = 20  # of a bar of 100%
EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(share: float) -> str:
    """So many cells, to an eighth of one."""
    eighths = round(8 * CELLS * share)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def share(mass: float) -> str:
    return f"{mass:.0%}" if mass >= LEAST or mass == 0.0 else "<1%"


def bars(answers: Answers, width: int) -> RenderableType:
    """width: of the terminal; longer answers are cut, and the best is shown whole above."""
    room = max(width - CELLS - 10, 12)
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=room)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    own = [answer for answer in answers if answer.lower >= LEAST][:LINES] or list(answers)[:1]
    for answer in own:
        table.add_row(isolated(one_line(answer.text)), share(answer.lower), Text(bar(answer.lower), "cyan"))
    if rest := list(answers)[len(own) :]:
        others = f"{len(rest)} other answer{'s' * (len(rest) > 1)}"
        table.add_row(Text(others, MARK_STYLE), share(sum(answer.lower for answer in rest)), "")
    table.add_row(
        Text("not looked at", MARK_STYLE), share(answers.unseen), Text(bar(answers.unseen), MARK_STYLE)
    )
    best = answers.best
    long = best is not None and (len(best.text) > room or "\n" in best.text.strip())
    return Group(Text(isolated(best.text.strip()) + "\n"), table) if best is not None and long else table


def one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"
