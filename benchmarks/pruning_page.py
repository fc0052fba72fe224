"""The page of the pruning ablation: tables and plots of what pruning_ablation.py measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tempo_mlx.bench.results import markdown_table


def write_page(path: Path, summaries: dict[str, dict[str, Any]], *settings: Any) -> None:
    """The page, and its plots in images/ beside it. settings: see `page`."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    for attend, summary in summaries.items():
        plot(summary, path.parent / "images" / f"pruning-{attend}.png")
    path.write_text(page(summaries, *settings))


def page(summaries: dict[str, dict[str, Any]], model: str, tokens: int, threshold: float, seeds: int) -> str:
    """Tables of each rule of attention, in Markdown."""

    def cell(values: Sequence[float]) -> str:
        return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"

    lines = [
        "# Pruning ablation",
        f"Written by `python -m benchmarks.pruning_ablation`; not edited. Model {model}, {tokens} "
        f"steps, threshold {threshold}, {seeds} seeds; in brackets: 95%, bootstrap over prompts. What "
        "is measured is said at the top of that file; what follows from it is in [pruning.md](pruning.md).",
    ]
    for attend, summary in summaries.items():
        ratio, concordance, removed = (
            summary[name] for name in ("posterior_to_probability_at_0.6", "concordance", "removed")
        )
        lines += [
            f"## `--attend {attend}`",
            f"{summary['prompts']} prompts, mean width {summary['mean_width']}, {summary['pairs']} pairs of members. "
            "Random paths with 60% removed, perplexity after posterior over that after probability: "
            f"{cell(ratio)} (target: at most 0.5).",
            "**Concordance with exact hindsight** (0.5 is chance)",
            markdown_table(
                ("signal", "of the next tokens", "of member and next tokens"),
                [
                    (name, *(cell(concordance[kind][name]) for kind in ("continuation", "both")))
                    for name in concordance["both"]
                ],
            ),
        ]
        for kind in ("random", "best"):
            none = cell(removed["none"]["0"][kind])
            lines += [
                f"**Perplexity of {kind} paths** under the full model, at an equal share removed (nothing: {none})",
                markdown_table(
                    ("signal", *(f"{float(share):.0%}" for share in removed["posterior"])),
                    [
                        (name, *(cell(figures[kind]) for figures in shares.values()))
                        for name, shares in removed.items()
                        if name != "none"
                    ],
                ),
            ]
        lines += [
            f"![Perplexity of random paths by share removed](images/pruning-{attend}.png)",
            "**Online**: each rule removes members while decoding",
            markdown_table(
                ("rule", "removed", "width left", "random paths", "best path"),
                [
                    (
                        name,
                        f"{row['removed']:.0%}",
                        f"{row['width']:.2f}",
                        cell(row["random"]),
                        cell(row["best"]),
                    )
                    for name, row in summary["online"].items()
                ],
            ),
        ]
    return "\n\n".join(lines) + "\n"


def plot(summary: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in ("posterior", "probability", "random", "attention"):
        removed = {**summary["removed"]["none"], **summary["removed"][name]}
        shares, values = (
            list(map(float, removed)),
            np.array([figures["random"] for figures in removed.values()]),
        )
        (line,) = axes.plot(shares, values[:, 0], marker="o", label=name)
        axes.fill_between(shares, values[:, 1], values[:, 2], alpha=0.15, color=line.get_color())
    axes.set(
        xlabel="share of the removable members removed",
        ylabel="perplexity of random paths, full model",
        yscale="log",
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
