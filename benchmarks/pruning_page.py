"""The page of the pruning ablation: figures, tables and plots of what pruning_ablation.py measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies import bootstrap, read_records, runtime
from tempo_mlx.bench.results import markdown_table

HEADINGS = {
    "continuation": "of the next tokens",
    "other pairs": "of these, pairs without the best path's member",
    "outsider": "of a continuation that no member wrote",
    "both": "of member and next tokens",
}


def write_page(path: Path, folder: Path) -> None:
    """The page over all results of a folder, and its plots in images/ beside it."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    about = json.loads((folder / "about.json").read_text("utf-8"))
    results = {
        file.stem: read_records(file)[: about["prompts"]]
        for file in sorted(folder.glob("*.jsonl"), reverse=True)
    }
    summaries = {attend: summarise(records) for attend, records in results.items()}
    for attend, summary in summaries.items():
        plot(summary, path.parent / "images" / f"pruning-{attend}.png")
    took = runtime(record for records in results.values() for record in records)
    path.write_text(page(summaries, about, took), "utf-8")


def page(summaries: dict[str, dict[str, Any]], about: dict[str, Any], took: str) -> str:
    """Tables of each rule of attention, in Markdown."""

    def cell(values: Sequence[float]) -> str:
        return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"

    lines = [
        "# Pruning ablation",
        f"Written by `python -m benchmarks.pruning_ablation`, {took}; not edited. Model {about['id']}, "
        f"{about['tokens']} steps, threshold {about['threshold']}, {about['seeds']} seeds; in brackets: 95%, bootstrap "
        "over prompts. What is measured is said at the top of that file; what follows from it is in "
        "[pruning.md](pruning.md).",
    ]
    for attend, summary in summaries.items():
        ratio, concordance, removed = (
            summary[name] for name in ("posterior_to_probability_at_0.6", "concordance", "removed")
        )
        lines += [
            f"## `--attend {attend}`",
            f"{summary['prompts']} prompts, mean width {summary['mean_width']}. "
            "Random paths with 60% removed, perplexity after posterior over that after probability: "
            f"{cell(ratio)} (target: at most 0.5).",
            "**Concordance with hindsight** (0.5 is chance; in the heading: pairs). The best path's tokens, which the "
            "first, second and last column look back from, were written by its own member; the third asks which member "
            "could stand in the place of another token, so that one with a meaning of its own ranks low.",
            markdown_table(
                ("signal", *(f"{said} ({summary['pairs'][kind]})" for kind, said in HEADINGS.items())),
                [
                    (name, *(cell(concordance[kind][name]) for kind in HEADINGS))
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


# All prompts


def totals(pairs: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """pairs: for each prompt, [log-probability, tokens] of paths -> their sums (prompts, 2)."""
    return np.array([np.sum(prompt, axis=0) for prompt in pairs])


def perplexity(sums: np.ndarray, index: np.ndarray) -> float:
    """exp of the mean negative log-probability per token over the prompts of `index`."""
    log_probability, tokens = sums[index].sum(axis=0)
    return float(np.exp(-log_probability / tokens))


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every figure with its interval."""
    count = len(results)

    def interval(statistic: Any) -> list[float]:
        return [round(float(value), 4) for value in bootstrap(statistic, count)]

    def perplexities(select: Any) -> dict[str, list[float]]:
        sums = {kind: totals([select(result)[kind] for result in results]) for kind in ("random", "best")}
        return {kind: interval(lambda index, s=s: perplexity(s, index)) for kind, s in sums.items()}

    pairs = {
        kind: {name: np.array([r["concordance"][kind][name] for r in results]) for name in by_signal}
        for kind, by_signal in results[0]["concordance"].items()
    }
    summary: dict[str, Any] = {
        "prompts": count,
        "mean_width": round(float(np.mean([width for r in results for width in r["widths"]])), 3),
        "pairs": {kind: int(by_signal["posterior"][:, 1].sum()) for kind, by_signal in pairs.items()},
        "concordance": {
            kind: {
                name: interval(lambda index, p=p: p[index, 0].sum() / p[index, 1].sum())
                for name, p in by_signal.items()
            }
            for kind, by_signal in pairs.items()
        },
    }
    summary["removed"] = {
        name: {share: perplexities(lambda r, n=name, s=share: r["removed"][n][s]) for share in shares_}
        for name, shares_ in results[0]["removed"].items()
    }
    posterior, probability = (
        totals([r["removed"][name]["0.6"]["random"] for r in results])
        for name in ("posterior", "probability")
    )
    summary["posterior_to_probability_at_0.6"] = interval(
        lambda index: perplexity(posterior, index) / perplexity(probability, index)
    )
    summary["online"] = {}
    for name in results[0]["online"]:
        rows = [result["online"][name] for result in results]
        members, removed, sets = (sum(row[key] for row in rows) for key in ("members", "removed", "sets"))
        summary["online"][name] = {
            "width": round((members - removed) / sets, 3),
            "removed": round(removed / members, 3),
            **perplexities(lambda r, n=name: r["online"][n]),
        }
    return summary
