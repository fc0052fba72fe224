"""docs/quality.md: every number of it is computed here from the recorded lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import arms as table
from benchmarks.quality import plots
from benchmarks.quality.across import beside_each_other
from benchmarks.quality.answers import (
    Entries,
    against_us,
    answers,
    beside,
    distinct_2,
    markdown,
    section,
    targets,
    verdict,
)
from benchmarks.quality.arms import LATTICE, TEXTS
from benchmarks.quality.prompts import KINDS, read_prompts
from benchmarks.quality.results import Results, read_results
from benchmarks.quality.running import QUARTERS, THINNED
from benchmarks.quality.summary import (
    Entry,
    Value,
    mean,
    measured,
    perplexity,
    quarter,
    ratio,
    read_divergence,
)

FULL = "smollm2-135m"  # the model whose tables are all shown, where there are results of it
DIVERSE = "diverse-beam-1"
OURS = {arm.name for arm in table.TUNING if {"branches", "paths"} & set(arm.settings)}
NEWCOMERS = (
    "How good are the texts, and how different from each other? *Perplexity* says how much a text surprises the model "
    "itself (1: not at all), *distinct-2* how many of the pairs of tokens in five texts are not repeats. In the "
    "picture the best place is up and to the left: branches (green) and diverse beam search (red) are close together "
    "there, while beam search says nearly the same five times, and free sampling (yellow) is different because it is "
    "odd."
)


def write_page(out: Path, kind: str, page: Path) -> None:
    """The page over all models that have results of this kind, and its pictures in images/ beside it."""
    models = read_results(out, kind)
    models.sort(key=lambda model: model.name != FULL)
    first, *others = models
    images = page.resolve().parent / "images"
    fives = five_of(first.tests)
    parts: list[str] = ["# Quality", NEWCOMERS]
    if fives:
        plots.front(fives, images / "quality-front.svg", "Five texts a prompt, test prompts, 95% intervals")
        parts.append("![Diversity against perplexity](images/quality-front.svg)")
    parts += [
        "Written by `python -m benchmarks.quality`; not edited. Figures in brackets are 95% intervals.",
        *beside_each_other(models),
        *in_full(first, fives, images),
    ]
    for model in others:
        parts += in_short(model)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", "utf-8")


def five_of(tests: Entries) -> dict[str, Entry]:
    return {
        name: entry for name, entry in tests.items() if entry.texts == TEXTS and "distinct_2" in entry.numbers
    }


def in_full(model: Results, fives: Entries, images: Path) -> list[str]:
    tests, kl = model.tests, read_divergence(model.folder / "divergence.jsonl")
    parts = [
        f"## {model.name} in full",
        *conditions(model),
        *answers(tests, fives),
        *targets(model.claims),
        *against_us(tests),
        *verdict(fives),
        *five_texts(fives),
        *against(fives),
        *budgets(tests, *model.prices),
        *domination(fives, tests),
        *lattices(tests),
        *pruning(tests),
    ]
    if kl:
        plots.divergence(kl, images / "quality-divergence.svg")
        parts += divergences(kl)
    return [*parts, *kinds(tests), *lengths(tests), *tuning(model.tried)]


def in_short(model: Results) -> list[str]:
    """Another model: its tables have no headings, which the first one's have."""
    entry, rivals = next(iter(model.tests.values())), beside(model.tests)
    parts = [
        f"## Texts of {model.name}",
        f"Every text has exactly {entry.numbers['length'][0]:.0f} tokens; n: prompts, of the same test prompts.",
        model.facts,
        "Five texts:",
        five_table(five_of(model.tests)),
    ]
    if rivals is not None:
        parts += ["Each decoder of ours beside the one that does nearest to the same:", rivals]
    return parts


# What was measured, and what it says


def conditions(model: Results) -> list[str]:
    prompts = read_prompts("test")
    entry = next(iter(model.tests.values()))
    return [
        f"{len(KINDS)} kinds of prompts, {len(prompts)} for test and {len(read_prompts('tuning'))} for tuning, written "
        "for this; settings are chosen on the latter, and only tables that say so show them. Every text has exactly "
        f"{entry.numbers['length'][0]:.0f} tokens (the end of the text is put off). Perplexity is of the texts under "
        "the model itself, each read alone, over all tokens together. distinct-n: different n-grams of tokens over all "
        "n-grams of the five texts of a prompt, mean over prompts. Intervals: 95%, by a bootstrap over prompts (BCa, "
        "widened where prompts are few); comparisons are paired. Each stands for itself: of twenty that are read "
        "together one is expected to miss. n: prompts. Measured again with 0.2.0, which scores fewer readings: "
        "lattice, 5 paths.",
        model.facts,
    ]


COLUMNS = {
    "distinct-1": "distinct_1",
    "distinct-2": "distinct_2",
    "distinct-3": "distinct_3",
    "self-BLEU": "self_bleu",
    "edit distance": "edit",
    "Vendi": "vendi",
    "repetition": "repetition",
    "unique": "unique",
}


def five_table(fives: Entries) -> str:
    rows = [
        [entry.label, str(len(entry)), str(measured(entry, perplexity)),
         *(str(measured(entry, mean(name))) for name in COLUMNS.values())]
        for entry in fives.values()
    ]  # fmt: skip
    return markdown(("decoder", "n", "perplexity", *COLUMNS), rows)


def five_texts(fives: Entries) -> list[str]:
    return section(
        "Five texts",
        "self-BLEU: BLEU-4 of each text against the others (sacrebleu). Edit distance: mean over pairs, share of the "
        "length (rapidfuzz). Vendi: how many of the five seem different, with the cosine of counts of 1- and 2-grams "
        "as kernel. Repetition: share of a text's 3-grams that it had before.",
        five_table(fives),
    )


def against(fives: Entries) -> list[str]:
    """Ratios to beam and nucleus; an interval without 1 is a difference."""
    if not {"beam", "nucleus"} <= set(fives):
        return []
    rows = [
        [entry.label, *(str(ratio(entry, fives[other], statistic))
                        for other in ("beam", "nucleus") for statistic in (distinct_2, perplexity))]
        for name, entry in fives.items() if name not in ("beam", "nucleus")
    ]  # fmt: skip
    header = (
        "decoder",
        "distinct-2 / beam",
        "perplexity / beam",
        "distinct-2 / nucleus",
        "perplexity / nucleus",
    )
    return ["Paired, against beam search and nucleus sampling (an interval without 1 is a difference):",
            markdown(header, rows)]  # fmt: skip


def budgets(tests: Entries, prices: Mapping[str, float], source: str) -> list[str]:
    unit, priced = tests.get("branches"), bool(prices)
    if unit is None:
        return []
    costs = {"passes": "pass", "rows": "row", **({"seconds": "second"} if priced else {})}
    rows = []
    for entry in tests.values():
        if "distinct_2" not in entry.numbers:
            continue
        grams = (
            mean("distinct_2")(entry, slice(None)) * entry.texts * (entry.tokens[0].sum() / entry.texts - 1)
        )
        cost = {name: mean(name)(entry, slice(None)) for name in (*costs, "seconds", "cpu_seconds")}
        base = {name: ratio(unit, entry, mean(name)).value for name in costs}
        rows.append(
            [entry.label, str(len(entry)), f"{cost['passes']:.0f}", f"{cost['rows']:.0f}",
             *("-" if np.isnan(cost[name]) else f"{cost[name]:.2f}" for name in ("seconds", "cpu_seconds")),
             *(f"{entry.texts * base[name]:.1f}" for name in costs),
             *(f"{grams / cost[name]:.2f}" for name in costs)]
        )  # fmt: skip
    return section(
        "The same budget",
        "Forward passes and rows of a run (prompt left out; re-scoring of paths counted). Seconds: the passes, each "
        f"priced by its rows, without neighbours: {source}. CPU seconds are of the runs themselves, whatever else the "
        "machine did; - where several were run at once. Texts: how many this decoder gives in the passes, "
        "rows or seconds of one run of five branches. Different 2-grams: what a pass, row or second buys.",
        markdown(
            ("decoder", "n", "passes", "rows", "seconds", "CPU seconds",
             *(f"texts for the same {name}" for name in costs), *(f"2-grams a {one}" for one in costs.values())),
            rows,
        ),
    )  # fmt: skip


def domination(fives: Entries, tests: Entries) -> list[str]:
    """Every decoder of ours against every diverse beam."""
    rows = []
    for name, entry in fives.items():
        if plots.family(name) != "ours":
            continue
        for other in (other for key, other in fives.items() if key.startswith("diverse")):
            more, less = ratio(entry, other, distinct_2), ratio(entry, other, perplexity)
            better, cheaper = more.value > 1, less.value < 1
            sure = more.low > 1 and less.high < 1
            word = "**dominates**" if sure else "dominates, not surely" if better and cheaper else "-"
            if not better and not cheaper:
                word = "is dominated"
            rows.append([entry.label, other.label, str(more), str(less), word])
    if not rows:
        return []
    return section(
        "Beside diverse beam search",
        "More diverse and better liked by the model at once is to dominate; surely, when both intervals lie beyond 1. "
        "Best of 8: eight texts are followed in the same passes, five are kept, one by one that with the highest "
        "log-probability and a nat for every pair of tokens not said yet. Diverse beam search with that selection "
        "shows how much of it is the selection's.",
        markdown(("decoder", "against", "distinct-2, ratio", "perplexity, ratio", ""), rows),
    )


def lattices(tests: Entries) -> list[str]:
    """One factor at a time: what the readings of a lattice are worth."""
    names = ["lineage", *(arm.name for arm in table.STUDIES)]
    base = tests.get("lineage: best")
    if base is None or "greedy" not in tests:
        return []
    rows = []
    for name in names:
        readings = [tests.get(f"{name}: {reading}") for reading in LATTICE]
        best = readings[0]
        if best is None:
            continue
        label = "the defaults (lineage, mix, 0.1, 8)" if name == "lineage" else best.label.partition(":")[0]
        rows.append(
            [label, str(len(best)), f"{mean('width')(best, slice(None)):.2f}",
             *(str(measured(entry, perplexity)) for entry in readings if entry is not None),
             str(ratio(best, tests["greedy"], perplexity)),
             "-" if name == "lineage" else str(ratio(best, base, perplexity))]
        )  # fmt: skip
    return section(
        "Lattices",
        "One factor changed at a time. Best: the most probable path. Drawn: paths drawn along the edges. Random: a "
        "member of each set, drawn uniformly, edges ignored. Width: members left a step. Ratios: best paths, paired.",
        markdown(("lattice", "n", "width", *LATTICE, "best / greedy", "best / defaults' best"), rows),
    )


def pruning(tests: Entries) -> list[str]:
    names = ("lineage: random", "lineage: thinned: probability", "lineage: thinned: posterior")
    if not set(names) <= set(tests):
        return []
    rows = [[tests[name].label, str(measured(tests[name], perplexity))] for name in names]
    return section(
        "Pruning",
        f"Of every lattice of the defaults {THINNED:.0%} of the members that could go (one stays a set) are removed "
        "afterwards, lowest scores first: equal widths, so that the signals alone differ. Random paths, n "
        f"{len(tests[names[0]])}. Attention and random removal, hindsight and removal while decoding are compared by "
        "`python -m benchmarks.pruning_ablation`.",
        markdown(("paths", "perplexity"), rows),
    )


def divergences(kl: Mapping[tuple[str, int], Any]) -> list[str]:
    from benchmarks.studies import bootstrap

    def cell(values: Any) -> str:
        return str(Value(*bootstrap(lambda index: float(values[index].mean()), len(values))))

    rows = []
    for (attend, cap), result in kl.items():
        row, half = result["row"], result["row"].shape[1] // 2
        rows.append([attend, str(cap), f"{result['width'].mean():.2f}", cell(row[:, :half]), cell(row[:, half:]),
                     cell(result["mixture"])])  # fmt: skip
    count = len(next(iter(kl.values()))["row"])
    return section(
        "What superposition costs",
        "KL divergence, in nats, of a lattice's row from the exact distribution after the same path alone, mean over "
        f"paths drawn along the edges; n {count}. Branches have 0 by construction. Mixture: of the mean of the "
        "distributions over the paths, where what belongs to single paths cancels.",
        "![KL by step](images/quality-divergence.svg)",
        markdown(("attend", "cap", "mean width", "first half", "second half", "mixture"), rows),
    )


SHOWN = ("greedy", "beam", DIVERSE, "nucleus", "branches", "branches-sample", "lineage: best")


def kinds(tests: Entries) -> list[str]:
    shown = [
        tests[name] for name in SHOWN if name in tests and all(len(tests[name].of_kind(k)) for k in KINDS)
    ]
    if not shown:
        return []
    tables = []
    for what, statistic in (("perplexity", perplexity), ("distinct-2", distinct_2)):
        chosen = [entry for entry in shown if what == "perplexity" or entry.texts == TEXTS]
        rows = [
            [kind, *(str(measured(entry.of_kind(kind), statistic)) for entry in chosen)] for kind in KINDS
        ]
        tables.append(markdown((what, *(entry.label for entry in chosen)), rows))
    return section("By kind of prompt", f"n {len(shown[0].of_kind(KINDS[0]))} of each.", *tables)


def lengths(tests: Entries) -> list[str]:
    shown = [tests[name] for name in SHOWN if name in tests]
    rows = [
        [entry.label, *(str(measured(quarter(entry, part), perplexity)) for part in range(QUARTERS))]
        for entry in shown
    ]
    return section(
        "By length",
        "Perplexity of each quarter of the texts, from the first to the last.",
        markdown(("decoder", *(f"quarter {part + 1}" for part in range(QUARTERS))), rows),
    )


def tuning(tried: Entries) -> list[str]:
    fives = {name: entry for name, entry in tried.items() if entry.texts == TEXTS}
    if not {"beam", "greedy", "nucleus", DIVERSE} <= set(tried):
        return []
    rows = [
        [entry.label, str(len(entry)), str(measured(entry, perplexity)), str(measured(entry, distinct_2)),
         str(ratio(entry, tried["beam"], distinct_2)), str(ratio(entry, tried["greedy"], perplexity)),
         *("-" if name == DIVERSE else str(ratio(entry, tried[DIVERSE], statistic))
           for statistic in (distinct_2, perplexity))]
        for name, entry in fives.items()
    ]  # fmt: skip
    length = int(tried["greedy"].tokens[0].sum())
    header = ("decoder", "n", "perplexity", "distinct-2", "distinct-2 / beam", "perplexity / greedy",
              "distinct-2 / diverse beam 1", "perplexity / diverse beam 1")  # fmt: skip
    return section(
        "What was tried",
        f"On tuning prompts, which no other table shows; texts of {length} tokens. Settings of branches and lattices: "
        f"{len(OURS & set(fives))}, of what they are held against: "
        f"{len(set(fives) - OURS)}.",
        markdown(header, rows),
    )
