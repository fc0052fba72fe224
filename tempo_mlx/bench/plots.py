"""The plots of a benchmark, as SVG and PNG. Needs matplotlib (the extra [bench])."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tempo_mlx.bench.results import Result

COLORS = {
    "tempo-mlx": "#0b6e4f",
    "tempo-mlx, file as it is": "#0b6e4f",
    "tempo-mlx (torch)": "#7fb7a0",
    "mlx-lm": "#c1554d",
    "transformers": "#d9a441",
    "llama.cpp": "#3c6fb0",
    "llama.cpp, file as it is": "#3c6fb0",
}
SIZE = (6.4, 3.6)  # inches


def available() -> bool:
    return find_spec("matplotlib") is not None


def draw(results: Sequence[Result], directory: Path) -> dict[str, Path]:
    """Draw a plot for every suite, as SVG and PNG; returns the SVG files by suite."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tempo-mlx"
    from matplotlib import pyplot

    files = {}
    for result in results:
        plot = PLOTS.get(result.suite, _bars)
        figure, axes = pyplot.subplots(figsize=SIZE)
        plot(result, axes)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        path = directory / f"{result.suite}.svg"
        figure.savefig(path, metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=160)
        pyplot.close(figure)
        files[result.suite] = path
    return files


def _bars(result: Result, axes: Any) -> None:
    labels = [
        row.case if row.contender in row.case else f"{row.case}, {row.contender}" for row in result.rows
    ]
    places = range(len(labels), 0, -1)
    colors = [COLORS.get(row.contender, "#888888") for row in result.rows]
    axes.barh(places, [row.value for row in result.rows], color=colors)
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.set_xlabel(result.rows[0].unit if result.rows else "")
    if result.floor is not None:
        axes.axvline(result.floor, color="#555555", linewidth=1, linestyle=":")


def _curve(pattern: str, label: str) -> Callable[[Result, Any], None]:
    """One line per contender over the number in the case's name."""

    def plot(result: Result, axes: Any) -> None:
        series: dict[str, list[tuple[int, float]]] = {}
        for row in result.rows:
            if (found := re.fullmatch(pattern, row.case)) is not None:
                kind = found.group(2) if len(found.groups()) > 1 and found.group(2) else ""
                series.setdefault(row.contender + kind, []).append((int(found.group(1)), row.value))
        for name, points in series.items():
            color = COLORS.get(name, COLORS.get(name.split(",")[0], "#888888"))
            dashes = "--" if "," in name else "-"
            axes.plot(*zip(*sorted(points), strict=True), dashes, marker=".", color=color, label=name)
        if result.floor is not None:
            axes.axhline(result.floor, color="#555555", linewidth=1, linestyle=":", label="floor")
        axes.set(xlabel=label, ylabel="ms", ylim=(0, None))
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return plot


PLOTS: dict[str, Callable[[Result, Any], None]] = {
    "texts": _curve(r"(\d+) texts?", "texts of one prompt, at once"),
    "rows": _curve(r"(\d+) rows?(, products alone)?", "rows"),
    "context": _curve(r"(\d+) slots", "slots of context"),
    "prefill": _curve(r"(\d+) tokens", "tokens of prompt"),
}
