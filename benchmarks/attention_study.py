"""Do members of parallel sets receive less attention than single tokens?

    python -m benchmarks.attention_study [--quick] [--page docs/attention.md]

The original project's open question: it reported 40 to 60% less from one prompt. Here a lattice per prompt and
rule is decoded without pruning, and the attention every row pays to every earlier generated slot is recorded per
layer (mean over heads and over the rows of a set). Compared are, at the same distance in steps:

- a member of a set of two or more ("member"), and the whole set, summed over its members ("set"),
- with a token that is alone in its set ("single").

Ratios are over distances 1 .. --distance, weighted by how many sets were seen at each, so that recency cancels.

Sets of several arise where the model is uncertain, so their tokens might receive less attention in ordinary
decoding too. Control: the best path of the lineage lattice, run alone; its token at a place where the lattice had
a set of several, against its other tokens.

Results are kept, a line a prompt, in --out and are not computed again; how long they take stands on the page.
Intervals: 95%, bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tempo_mlx
from benchmarks.studies import Record, bootstrap, describe, prompts, read_records, runtime, studied, versions
from tempo_mlx.bench.results import markdown_table
from tempo_mlx.decode.paths import best_paths, layers_of, token_ids
from tempo_mlx.decode.prefill import never, prefill
from tempo_mlx.decode.step import Step
from tempo_mlx.model.forward import Forward

CONDITIONS: dict[str, dict[str, Any]] = {
    "all, isolated": {"attend": "all"},
    "all, siblings visible": {"attend": "all", "allow_intraset_token_visibility": True},
    "weighted": {"attend": "weighted"},
    "lineage": {"attend": "lineage"},
}
CONTROL = "control: best path alone"
ORIGINAL = 13  # the first prompts of the list are the original study's
KINDS = ("single", "member", "set")
KEPT = "prompts.jsonl"
DIGITS = 4  # of what is kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=len(prompts()))
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--distance", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention_study"))
    parser.add_argument("--page", type=Path, help="write tables and plot as a page of Markdown")
    parser.add_argument("--quick", action="store_true", help="4 prompts, 24 tokens")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.tokens = 4, 24
        options.out /= "quick"
    loaded = tempo_mlx.load(options.model)
    folder = options.out / Path(loaded.model.info["id"]).name
    given = ("prompts", "tokens", "threshold", "distance")
    describe(folder, {**{name: getattr(options, name) for name in given}, **versions(loaded.model.info)})
    texts = prompts(options.prompts)
    keys = [f"{index:03d}" for index in range(len(texts))]
    results = studied(folder / KEPT, keys, lambda key: study(loaded, texts[int(key)], options))
    for group, figures in by_group(results).items():
        show(group, figures)
    if options.page:
        write_page(options.page, folder)


def by_group(results: Sequence[Record]) -> dict[str, dict[str, Any]]:
    groups = {"all prompts": results}
    if len(results) > ORIGINAL:
        groups["the original's prompts"] = results[:ORIGINAL]
    return {group: summarise(chosen) for group, chosen in groups.items()}


# One prompt


class Recording:
    """A model that keeps the attention (layers, S) of every pass, mean over heads and rows."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.architecture, self.info = model.architecture, model.info
        self.new_cache, self.embeddings = model.new_cache, model.embeddings
        self.masses: list[np.ndarray] = []

    def forward(self, *arguments: Any, **options: Any) -> Forward:
        out: Forward = self.model.forward(*arguments, **{**options, "attention": True})
        self.masses.append(out.attention_mass)
        return out


def study(loaded: tempo_mlx.LoadedModel, prompt: str, options: argparse.Namespace) -> dict[str, Any]:
    """For each condition and kind: attention summed over occurrences (layers, distances), and their number."""
    result: dict[str, Any] = {"prompt": prompt, "conditions": {}}
    for name, settings in CONDITIONS.items():
        model = Recording(loaded.model)
        decoding = tempo_mlx.stream(
            tempo_mlx.LoadedModel(model, loaded.tokenizer),
            prompt,
            max_tokens=options.tokens,
            min_steps=options.tokens,
            threshold=options.threshold,
            **settings,
        )
        steps = list(decoding)
        prompt_ids = decoding.prompt.token_ids
        columns = [sorted(member.slot for member in step.tokens) for step in steps]
        masses = model.masses[-(len(steps) - 1) :]  # of sets 0 .. the last but one, which was not run
        result["conditions"][name] = tally(masses, columns, [len(c) > 1 for c in columns], options.distance)
        if name == "lineage":
            result["conditions"][CONTROL] = control(loaded.model, prompt_ids, steps, options.distance)
    return result


def control(model: Any, prompt_ids: Sequence[int], steps: Sequence[Step], distance: int) -> dict[str, Any]:
    """Ordinary decoding of the best path: its tokens at the places of sets of several count as members."""
    layers = layers_of(steps)
    best = token_ids(layers, best_paths(layers)[0])
    cache = model.new_cache()
    prefill(model, prompt_ids, cache, never)
    start = len(prompt_ids)
    rows = len(best) - 1
    out = model.forward(best[:-1], np.arange(start, start + rows), None, cache, attention="rows")
    masses = [out.attention_mass[:, row] for row in range(rows)]  # (layers, S) each
    columns = [[start + index] for index in range(len(best))]
    return tally(masses, columns, [len(step.tokens) > 1 for step in steps], distance)


def tally(
    masses: Sequence[np.ndarray], columns: Sequence[Sequence[int]], several: Sequence[bool], distance: int
) -> dict[str, Any]:
    """masses: of each set's pass, over all slots up to its own. columns: the slots of each set."""
    layers = masses[0].shape[0]
    sums = {kind: np.zeros((layers, distance)) for kind in KINDS}
    counts = {kind: np.zeros(distance) for kind in KINDS}
    for newest, mass in enumerate(masses):
        for earlier in range(max(0, newest - distance), newest):
            received = mass[:, columns[earlier]]  # (layers, members)
            place = newest - earlier - 1
            kinds = {"member": received.mean(axis=1), "set": received.sum(axis=1)}
            for kind, value in kinds.items() if several[earlier] else [("single", received[:, 0])]:
                sums[kind][:, place] += value
                counts[kind][place] += 1
    return {
        kind: {
            "sum": [[float(f"{value:.{DIGITS}g}") for value in layer] for layer in sums[kind]],
            "count": counts[kind].astype(int).tolist(),
        }
        for kind in KINDS
    }


# All prompts


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Attention to a member, and to a whole set, relative to a single token: over all layers and per layer."""
    summary: dict[str, Any] = {"prompts": len(results)}
    for name in [*CONDITIONS, CONTROL]:
        sums, counts = (
            {kind: np.array([r["conditions"][name][kind][key] for r in results]) for kind in KINDS}
            for key in ("sum", "count")
        )
        summary[name] = {}
        for kind in ("member", "set") if name != CONTROL else ("member",):

            def ratios(
                index: np.ndarray, kind: str = kind, sums: dict = sums, counts: dict = counts
            ) -> np.ndarray:
                """Per layer, and over all layers as the last entry."""
                total = {k: sums[k][index].sum(axis=0) for k in (kind, "single")}  # (layers, distances)
                seen = {k: counts[k][index].sum(axis=0) for k in (kind, "single")}
                usable = (seen[kind] > 0) & (seen["single"] > 0)
                weights = seen[kind][usable]
                one = (total[kind][:, usable] / seen[kind][usable]) @ weights
                other = (total["single"][:, usable] / seen["single"][usable]) @ weights
                with np.errstate(
                    divide="ignore", invalid="ignore"
                ):  # a draw of prompts without single tokens
                    return np.append(one / other, one.sum() / other.sum())

            value, low, high = (np.round(part, 4).tolist() for part in bootstrap(ratios, len(results)))
            summary[name][kind] = {
                "overall": [value[-1], low[-1], high[-1]],
                "layers": [list(entry) for entry in zip(value[:-1], low[:-1], high[:-1], strict=True)],
            }
    return summary


def show(group: str, summary: dict[str, Any]) -> None:
    print(f"{group} ({summary['prompts']}): attention relative to a single token at the same distance")
    for name in [*CONDITIONS, CONTROL]:
        for kind, figures in summary[name].items():
            value, low, high = figures["overall"]
            layers = np.array(figures["layers"])
            print(
                f"  {name:26}{kind:8}{value:6.2f} [{low:.2f}, {high:.2f}]   layers {layers[:, 0].min():.2f} to "
                f"{layers[:, 0].max():.2f}; clearly less in {int((layers[:, 2] < 1).sum())}, clearly more in "
                f"{int((layers[:, 1] > 1).sum())} of {len(layers)}"
            )
    print()


def write_page(path: Path, folder: Path) -> None:
    """The page over the results of a folder, and its plot in images/ beside it."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    about = json.loads((folder / "about.json").read_text("utf-8"))
    results = read_records(folder / KEPT)[: about["prompts"]]
    summary = by_group(results)
    plot(summary["all prompts"], path.parent / "images" / "attention-layers.png")
    path.write_text(page(summary, about, runtime(results)), "utf-8")


def page(summary: dict[str, dict[str, Any]], about: dict[str, Any], took: str) -> str:
    """Tables in Markdown."""
    lines = [
        "# Do members of parallel sets receive less attention?",
        f"Written by `python -m benchmarks.attention_study`, {took}; not edited. Model {about['id']}, "
        f"{about['tokens']} steps, threshold {about['threshold']}, nothing removed; distances 1 to "
        f"{about['distance']}. Numbers are "
        "attention received relative to a single token at the same distance, mean over layers; in brackets: 95%, "
        "bootstrap over prompts. How it is counted is said at the top of that file; the answer in words is in "
        "[pruning.md](pruning.md).",
    ]
    for group, figures in summary.items():
        rows = []
        for name in [*CONDITIONS, CONTROL]:
            for kind, found in figures[name].items():
                value, low, high = found["overall"]
                layers = np.array(found["layers"])
                rows.append(
                    (
                        name,
                        {"member": "one member", "set": "whole set"}[kind]
                        if name != CONTROL
                        else "the token there",
                        f"{value:.2f} [{low:.2f}, {high:.2f}]",
                        f"{layers[:, 0].min():.2f} to {layers[:, 0].max():.2f}",
                        f"{int((layers[:, 2] < 1).sum())} / {int((layers[:, 1] > 1).sum())} of {len(layers)}",
                    )
                )
        header = ("rule", "of what", "all layers", "layers from, to", "layers clearly less / clearly more")
        lines += [f"## {group[0].upper()}{group[1:]} ({figures['prompts']})", markdown_table(header, rows)]
    lines.append("![Attention by layer](images/attention-layers.png)")
    return "\n\n".join(lines) + "\n"


def plot(summary: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for panel, kind, title in zip(
        axes, ("member", "set"), ("one member", "a whole set (sum of its members)"), strict=True
    ):
        for name in [*CONDITIONS, CONTROL]:
            figures = summary[name].get(kind, summary[name]["member"])
            value, low, high = np.array(figures["layers"]).T
            layers = np.arange(len(value))
            (line,) = panel.plot(layers, value, label=name, linestyle="--" if name == CONTROL else "-")
            panel.fill_between(layers, low, high, alpha=0.12, color=line.get_color())
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set(title=title, xlabel="layer")
    axes[0].set_ylabel("attention received / that of a single token")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
