"""The page a benchmark writes: every table, floor and goal, including missed ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tempo_mlx.bench.results import COLUMNS, Result, cells, floor_line, markdown_table

FIRST = "texts"  # the suite whose picture comes first
NEWCOMERS = (
    "How long does a step take, and what do several tokens at once cost? Where most of the time goes into reading the "
    "model's weights, once for each pass, several rows take little longer than one. In the pictures each line is a "
    "program, lower is faster, and the dotted line is the least that this machine could need."
)


def page(
    path: Path,
    results: Sequence[Result],
    environment: Mapping[str, Any],
    quick: bool,
    plots: Mapping[str, Path],
    equal: Mapping[str, float],
) -> str:
    """Markdown, to be kept in the repository or attached to an issue."""
    known = [result.load_average for result in results if result.load_average is not None]
    loads = f"{min(known):.2f} to {max(known):.2f}" if known else "unknown"
    differences = ", ".join(f"{name} {size:.1e}" for name, size in equal.items()) or "nobody else took part"
    command = "tempo-mlx bench --quick" if quick else "tempo-mlx bench"
    parts = [
        "# Speed",
        NEWCOMERS,
        *([picture(path, plots[FIRST], "The time of several texts, by how many")] if FIRST in plots else []),
        f"Written by `{command}`; not edited. All of it without --quick takes an hour on two cores. Times are lower "
        "quartiles of interleaved runs in one process (load, memory and startup: one process a run), after warm-up; "
        "spread is the distance between the quartiles over the median. Load average, this work's own two threads "
        f"included: {loads}.",
        f"Equal work was checked first; largest difference of a logit to tempo-mlx: {differences}.",
        markdown_table(
            ("what", "value"),
            [(name, str(value)) for name, value in environment.items() if value is not None],
        ),
    ]
    goals = [
        (result.suite, goal.what, f"{goal.value:.2f}", f"{goal.bound:g}", "yes" if goal.holds else "**no**")
        for result in results
        for goal in result.goals
    ]
    if goals:
        parts += [
            "## Goals",
            "The bounds are for the reference machine (2 cores, Linux, float32); elsewhere they are for orientation.",
            markdown_table(("suite", "what", "measured", "at most", "holds"), goals),
        ]
    for result in results:
        parts += [
            f"## {result.suite}",
            result.about,
            markdown_table(COLUMNS, [cells(row) for row in result.rows]),
        ]
        parts += [line for line in (floor_line(result), *result.notes) if line]
        if result.suite in plots and result.suite != FIRST:
            parts.append(picture(path, plots[result.suite], result.suite))
    return "\n\n".join(parts) + "\n"


def picture(path: Path, plot: Path, words: str) -> str:
    return f"![{words}]({Path(os.path.relpath(plot, path.resolve().parent)).as_posix()})"
