"""The pictures of the page, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.summary import Entry, Floats, mean, measured, perplexity
from benchmarks.studies import bootstrap

OURS = ("branches", "sample-", "best-5", "lineage")
FAMILIES = {"ours": "#0b6e4f", "search": "#c1554d", "sampling": "#d9a441"}


def front(entries: Mapping[str, Entry], path: Path, title: str) -> None:
    """Diversity against perplexity with intervals: up is more different, left is better liked by the model."""
    figure, axes = begin_figure((8.4, 4.8))
    points = {}
    for name, entry in entries.items():
        across, up = measured(entry, perplexity), measured(entry, mean("distinct_2"))
        points[entry.label] = (across.value, up.value, FAMILIES[family(name)])
        axes.errorbar(
            across.value, up.value, marker="o", markersize=4, color=FAMILIES[family(name)], elinewidth=0.7, alpha=0.85,
            xerr=[[across.value - across.low], [across.high - across.value]],
            yerr=[[up.value - up.low], [up.high - up.value]],
        )  # fmt: skip
    axes.set(xscale="log", xlabel="perplexity under the model (log scale)", ylabel="distinct-2 of five texts")
    ticks = [
        t for t in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20) if axes.get_xlim()[0] < t < axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title(title, fontsize=9)
    _labels(axes, points)
    save_figure(figure, path)


def _labels(axes: Any, points: Mapping[str, tuple[float, float, str]]) -> None:
    """Names in a column beside the plot, in the order of their points and joined to them, none over another."""
    low, high = axes.get_ylim()
    place = high
    for label, (x, y, color) in sorted(points.items(), key=lambda item: -item[1][1]):
        place = min(y, place - 0.045 * (high - low))
        axes.annotate(
            label, (x, y), xytext=(1.02, place), textcoords=axes.get_yaxis_transform(), fontsize=7.5, va="center",
            color=color, arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.4, "alpha": 0.6},
        )  # fmt: skip


def family(name: str) -> str:
    if name.startswith(OURS):
        return "ours"
    return "search" if "beam" in name else "sampling"


def divergence(results: Mapping[tuple[str, int], Mapping[str, Floats]], path: Path) -> None:
    """KL by step: the rules at the largest width, and lineage at every width."""
    figure, (left, right) = begin_figure((9, 3.6), columns=2)
    widest = max(cap for _, cap in results)
    for (attend, cap), result in results.items():
        if cap == widest:
            draw_by_step(left, result["row"], attend)
        if attend == "lineage":
            draw_by_step(right, result["row"], f"mean width {result['width'].mean():.1f}")
    for axes, title in (
        (left, f"by rule, sets of at most {widest}"),
        (right, "lineage, by width of the sets"),
    ):
        axes.set(xlabel="step", yscale="log")
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7, frameon=False)
    left.set_ylabel("KL(exact || superposed), nats")
    save_figure(figure, path)


def draw_by_step(axes: Any, values: Floats, label: str) -> None:
    """Means over prompts of three neighbouring steps, with their interval; values (prompts, steps)."""
    kernel = np.ones(3) / 3
    smooth = np.array([np.convolve(row, kernel, mode="valid") for row in values])
    middle, low, high = bootstrap(lambda index: smooth[index].mean(axis=0), len(smooth))
    steps = np.arange(2, 2 + len(middle))
    (line,) = axes.plot(steps, middle, label=label)
    axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color())


def begin_figure(size: tuple[float, float], columns: int = 1) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tempo-mlx"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=size)
    for each in np.atleast_1d(axes):
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=160)
    pyplot.close(figure)
