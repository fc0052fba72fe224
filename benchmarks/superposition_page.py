"""docs/superposition.md and its pictures: every number of it is computed here from the recorded lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.plots import begin_figure, draw_by_step, save_figure
from benchmarks.quality.summary import Value
from benchmarks.studies import Record, bootstrap, read_records
from benchmarks.superposition import BINS, DRAWN, LATTICES, MOST_TEXTS, SPELLED, STUDIES, TOKENS, Case
from tempo_mlx.arrays import Floats, Ints
from tempo_mlx.bench.results import markdown_table

Lines = Mapping[str, Sequence[Record]]  # by case
HEAD = f"""Written by `python -m benchmarks.superposition report`; not edited.

A row of a lattice sees several pasts at once, so the probabilities it records are not those of one text. This page says
how far off they are. The yardstick is the model's own exact distribution after each text alone, in one pass over a
tree; the prompts have no continuations written by people, so nothing here says whether the model itself is right.
Every lattice has a fixed length (the end of the text is put off), and nothing is removed from it. Figures in brackets
are 95% intervals, by a bootstrap over prompts (BCa, widened where prompts are few). n: prompts, of six kinds in turn.
Up to every set, {DRAWN} texts are drawn along the edges of the lattice so far, each as often as the lattice itself
says, and without regard to what comes after. `attend`, `threshold`, `at most` (tokens in a set) are the settings;
lineage, 0.1 and 8 are the defaults."""
DEFAULTS, WIDEST, ALL = Case(), Case(threshold=0.03), Case(attend="all")
LONGEST, LONGEST_WIDE = Case(tokens=8), Case(threshold=0.03, tokens=8)
FEWEST = 5  # prompts of a mean over some of the steps
GROUPS = ((1, 1), (2, 2), (3, 4), (5, 8))  # widths
RECORDED = {"edges": "edge P(j given i)", "sets": "probability of the set"}


def write_page(out: Path, page: Path) -> None:
    """The page, and its pictures in images/ beside it; a section for every model there are results of."""
    parts = ["# What a lattice's probabilities are worth", HEAD]
    models = {
        folder.name: read_results(folder) for folder in sorted(out.iterdir()) if (folder / "about.json").exists()
    }  # fmt: skip
    parts += ["## In short"]
    for model, found in models.items():
        parts += [f"{model}:", "\n".join(f"- {line}" for line in in_short(found))]
    for model, found in models.items():
        about = json.loads((out / model / "about.json").read_text("utf-8"))
        images = page.resolve().parent / "images"
        draw_rows(found["rows"], images / f"superposition-{model}-rows.svg")
        draw_calibration(found, images / f"superposition-{model}-calibration.svg")
        draw_texts(found["texts"], images / f"superposition-{model}-texts.svg")
        parts += [f"## {model}", ", ".join(f"{key} {value}" for key, value in about.items() if value) + "."]
        parts += [*rows_section(found["rows"], model), *calibration_section(found, model)]
        parts += texts_section(found["texts"], model)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", "utf-8")


def read_results(folder: Path) -> dict[str, Lines]:
    """By study and case, in the order of the cases."""
    found: dict[str, Lines] = {}
    for study, (_, cases) in STUDIES.items():
        lines = read_records(folder / f"{study}.jsonl")
        by_case = {name: [line for line in lines if line["case"] == name] for name in cases}
        found[study] = {name: each for name, each in by_case.items() if each}
    return found


# Figures


def value(statistic: Callable[[Ints], Any], samples: int) -> Value:
    with np.errstate(invalid="ignore", divide="ignore"):
        return Value(*bootstrap(statistic, samples))


def column(lines: Sequence[Record], *names: str) -> Floats:
    """What each line has under a name, or under one within another."""
    found: Sequence[Any] = lines
    for name in names:
        found = [each[name] for each in found]
    return np.array(found, float)


def mean(values: Floats) -> Value:
    """Of all numbers (prompts, ...); each prompt has as many."""
    return value(lambda index: values[index].mean(), len(values))


def small(found: Value) -> str:
    return f"{found.value:.2g} [{found.low:.2g}, {found.high:.2g}]"


def times(over: Floats, under: Floats) -> Value:
    """Geometric mean of the prompts' ratios."""
    logs = np.log(over / under)
    return value(lambda index: np.exp(logs[index].mean()), len(logs))


def said_of_scored(lines: Sequence[Record]) -> Floats:
    """What the edges say of the texts that were scored, which `mass` is of."""
    return column(lines, "said") * column(lines, "scored")


def after_width(lines: Sequence[Record], measure: str, low: int, high: int) -> Value | None:
    """Mean over the rows that follow a set of so many tokens; None where few prompts have any."""
    values, before = column(lines, measure)[:, 1:], column(lines, "widths")[:, :-2]
    inside = (before >= low) & (before <= high)
    if inside.any(axis=1).sum() < FEWEST:
        return None
    sums, counts = np.where(inside, values, 0.0).sum(axis=1), inside.sum(axis=1)
    return value(lambda index: sums[index].sum() / counts[index].sum(), len(lines))


def calibration_error(sums: Floats) -> float:
    """Over bins, weighted by their pairs: how far the mean recorded is from the mean exact. sums (BINS, 4)."""
    return float(np.abs(sums[:, 1] - sums[:, 2]).sum() / sums[:, 0].sum())


def of_pairs(lines: Sequence[Record], what: str, statistic: Callable[[Floats], Any]) -> Value:
    """A statistic of the bins (BINS, 4) of all prompts together."""
    sums = column(lines, what)
    return value(lambda index: statistic(sums[index].sum(axis=0)), len(lines))


def ratio(over: int, under: int) -> Callable[[Floats], float]:
    """Of two columns' sums, over all bins."""
    return lambda sums: float(sums[:, over].sum() / sums[:, under].sum())


def too_high(sums: Floats) -> float:
    return float((sums[:, 1] - sums[:, 2]).sum() / sums[:, 0].sum())


def side(difference: Value, more: str, less: str, neither: str) -> str:
    return more if difference.low > 0 else less if difference.high < 0 else neither


# In short


def in_short(found: Mapping[str, Lines]) -> Iterator[str]:
    rows, plain, texts = found["rows"], found["plain"]["plain"], found["texts"]
    yield (
        f"**Rows.** At the defaults a row is {far(rows, DEFAULTS)} from the exact distribution (KL divergence, and "
        "total variation: the probability that lies elsewhere). In sets of up to 8 at threshold 0.03 it is "
        f"{far(rows, WIDEST)}; with every member at full strength (attend all), at the defaults' threshold, "
        f"{far(rows, ALL)}."
    )
    for what, name in (("edges", "edge"), ("sets", "probability in its set")):
        yield calibration_in_short(rows[DEFAULTS.name], what, name)
    yield (
        "**Control.** The probabilities that plain decoding records are those of a fresh score to within "
        f"{column(plain, 'worst').max():.0e}, with a calibration error of "
        f"{of_pairs(plain, 'sets', calibration_error).value:.0e}."
    )
    for case in (LONGEST, LONGEST_WIDE):
        yield texts_in_short(texts[case.name], case)


def far(rows: Lines, case: Case) -> str:
    kl, tv = (mean(column(rows[case.name], measure)[:, 1:]) for measure in ("kl", "tv"))
    return f"{kl} nats and {tv}"


def calibration_in_short(lines: Sequence[Record], what: str, name: str) -> str:
    recorded, exact = (of_pairs(lines, what, ratio(at, 0)).value for at in (1, 2))
    error, apart, gap = (of_pairs(lines, what, each) for each in (calibration_error, ratio(3, 0), too_high))
    tendency = side(
        gap, "too high", "too low", "neither too high nor too low on average, as far as can be told"
    )
    return (
        f"**Calibration.** A token whose {name} is recorded as {DEFAULTS.threshold:g} or more has {recorded:.3f} "
        f"recorded on average, and {exact:.3f} by the model itself: {tendency} ({gap}). The calibration error is "
        f"{error}; one by one they are {apart} apart. {averages(error, apart)}"
    )


def averages(error: Value, apart: Value) -> str:
    """Whether the probabilities are right on average, where single ones are not."""
    if error.high < apart.low:
        return "So they hold better over many texts than for each one."
    return "So they hold no better over many texts than for each one, as far as can be told."


def texts_in_short(lines: Sequence[Record], case: Case) -> str:
    mass, tree = column(lines, "mass"), column(lines, "tree", "mass")
    said = said_of_scored(lines)
    count, others = (np.median(column(lines, *where)) for where in (("texts",), ("tree", "texts")))
    return (
        f"**Texts.** Those of {case.tokens} tokens that a lattice spells at threshold {case.threshold:g} (median "
        f"{count:.0f}) hold {small(mean(mass))} of the exact probability of all texts, {times(mass, said)} times what "
        f"its edges say. What an exact tree knows after as many rows (median {others:.0f} texts) holds "
        f"{small(mean(tree))}; the lattice's hold {times(mass, tree)} times as much, and more on "
        f"{(mass > tree).sum()} of {len(lines)} prompts."
    )


# Sections


def settings_of(case: Case) -> list[str]:
    return [case.attend, f"{case.threshold:g}", str(case.max_parallel_tokens)]


def rows_section(rows: Lines, model: str) -> list[str]:
    by_step, by_width = [], []
    for name, lines in rows.items():
        head = settings_of(LATTICES[name])
        width = f"{column(lines, 'widths').mean():.2f}"
        cells = []
        for measure in ("kl", "tv"):
            values = column(lines, measure)[:, 1:]
            half = values.shape[1] // 2
            cells += [str(mean(part)) for part in (values, values[:, :half], values[:, half:])]
            grouped = (after_width(lines, measure, *group) for group in GROUPS)
            by_width.append(
                [*head, measure.upper(), *("-" if each is None else str(each) for each in grouped)]
            )
        by_step.append([*head, str(len(lines)), width, *cells])
    exact = max(column(lines, "tv")[:, 0].max() for lines in rows.values())
    names = [
        "one" if low == high == 1 else f"{low}" if low == high else f"{low} to {high}" for low, high in GROUPS
    ]
    return [
        "### Rows beside exact distributions",
        f"{TOKENS} steps. KL(exact || row) in nats, and total variation (TV, 0 to 1), mean over texts and steps; the "
        "halves are of the steps, and the picture averages three neighbouring ones. Rows of the first set see nothing "
        f"but the prompt, so they are exact and not counted (measured: a total variation of at most {exact:.0e}).",
        f"![By step](images/superposition-{model}-rows.svg)",
        markdown_table(
            ("attend", "threshold", "at most", "n", "mean width", "KL", "first half", "second half", "TV",
             "first half", "second half"), by_step,
        ),
        "By the width of the set before the row's own, the last in which it sees several tokens at once, where "
        f"{FEWEST} prompts or more have such a row:",
        markdown_table(("attend", "threshold", "at most", "", *names), by_width),
    ]  # fmt: skip


def calibration_section(found: Mapping[str, Lines], model: str) -> list[str]:
    rows = []
    for name, lines in found["rows"].items():
        for what, label in RECORDED.items():
            rows.append([*settings_of(LATTICES[name]), label, *calibration_cells(lines, what)])
    rows.append(["plain", "-", "1", "token drawn", *calibration_cells(found["plain"]["plain"], "sets")])
    return [
        "### Is a token of probability p one that the model would say with probability p?",
        "After each text that is drawn, every member of the next set counts once if what is recorded of it is at least "
        "the threshold. Recorded is either the edge from the text's newest token to the member, or the member's "
        "probability in its set, a mixture over all rows before it. Exact: what the model gives it after that text "
        f"alone. Calibration error (ECE): pairs are put into {BINS} bins by what is recorded; of each bin the mean "
        "recorded less the mean exact, without its sign, weighted by the bin's pairs. One by one: the mean difference "
        "of single pairs without its sign, so that nothing cancels. Plain: every token drawn at temperature 1, beside "
        "a fresh score of its text.",
        f"![Reliability](images/superposition-{model}-calibration.svg)",
        markdown_table(
            ("attend", "threshold", "at most", "recorded", "pairs", "mean recorded", "mean exact", "ECE", "one by one"),
            rows,
        ),
        "The bins of the defaults:",
        markdown_table(
            ("recorded", *(f"{what}: {part}" for what in RECORDED for part in ("pairs", "recorded", "exact"))),
            list(bins_of(found["rows"][DEFAULTS.name])),
        ),
    ]  # fmt: skip


def calibration_cells(lines: Sequence[Record], what: str) -> list[str]:
    pairs = column(lines, what)[:, :, 0].sum()
    recorded = of_pairs(lines, what, ratio(1, 0)).value
    values = (of_pairs(lines, what, each) for each in (ratio(2, 0), calibration_error, ratio(3, 0)))
    return [f"{pairs:.0f}", f"{recorded:.3f}", *map(str, values)]


def reliability(lines: Sequence[Record], what: str, number: int) -> tuple[float, float, Value]:
    """Of a bin: pairs, mean recorded, mean exact."""

    def part(at: int) -> Callable[[Floats], Any]:
        return lambda sums: sums[number, at] / sums[number, 0]

    pairs = column(lines, what)[:, number, 0].sum()
    recorded = column(lines, what)[:, number, 1].sum() / max(pairs, 1.0)
    return pairs, recorded, of_pairs(lines, what, part(2)) if pairs else Value(np.nan, np.nan, np.nan)


def bins_of(lines: Sequence[Record]) -> Iterator[list[str]]:
    for number in range(BINS):
        cells = []
        for what in RECORDED:
            pairs, recorded, exact = reliability(lines, what, number)
            cells += [f"{pairs:.0f}", f"{recorded:.3f}", str(exact)] if pairs else ["0", "-", "-"]
        if any(cell not in ("0", "-") for cell in cells):
            yield [f"{number / BINS:g} to {(number + 1) / BINS:g}", *cells]


def texts_section(texts: Lines, model: str) -> list[str]:
    rows = []
    for name, lines in texts.items():
        case = SPELLED[name]
        mass, tree = column(lines, "mass"), column(lines, "tree", "mass")
        said = said_of_scored(lines)
        scored = sum(line["texts"] <= MOST_TEXTS for line in lines)
        rows.append([
            f"{case.threshold:g}", str(case.tokens), str(len(lines)), f"{column(lines, 'rows').mean():.1f}",
            f"{np.median(column(lines, 'texts')):.0f}", str(scored), small(mean(mass)), str(times(mass, said)),
            f"{column(lines, 'tree', 'rows').mean():.1f}", f"{np.median(column(lines, 'tree', 'texts')):.0f}",
            small(mean(tree)), str(times(mass, tree)), f"{(mass > tree).sum()} of {len(lines)}",
            small(mean(column(lines, "tree", "greedy"))),
        ])  # fmt: skip
    least = min(line["scored"] for lines in texts.values() for line in lines)
    each = [
        [line["prompt"], str(line["rows"]), str(line["texts"]), f"{line['said']:.2g}", f"{line['mass']:.2g}",
         str(line["tree"]["rows"]), str(line["tree"]["texts"]), f"{line['tree']['mass']:.2g}"]
        for line in texts[LONGEST.name]
    ]  # fmt: skip
    return [
        "### How much the texts of a lattice hold",
        "A lattice spells one text for every choice of a member from each of its sets. Mass: the exact probability of "
        "those texts together, each scored alone, mean over prompts; said: what the lattice's edges say of them. "
        f"Ratios: geometric means over prompts, whose masses differ a thousandfold. Of more than {MOST_TEXTS} texts "
        f"the best by the edges are scored, which have at least {least:.3f} of what is said; the mass is then a lower "
        "bound. "
        "Scored: prompts of which all were. The tree is `--decoder enumerate` at the lattice's threshold, best first, "
        "a row a pass, stopped after as many rows as the lattice ran (it may need fewer); what it knows of the token "
        "after its last rows counts, as the lattice's last set does. Greedy: the tree's first text alone. Texts: "
        "median. A lattice takes a pass a step, the tree one a row. A tree that opens its rows in another order may "
        "hold more.",
        f"![Mass, prompt by prompt](images/superposition-{model}-texts.svg)",
        markdown_table(
            ("threshold", "tokens", "n", "rows", "texts", "scored", "mass", "mass / said", "tree: rows", "tree: texts",
             "tree: mass", "mass / tree's", "more on", "greedy"), rows,
        ),
        f"Prompt by prompt, {LONGEST.tokens} tokens at threshold {LONGEST.threshold:g}:",
        markdown_table(("prompt", "rows", "texts", "said", "mass", "tree: rows", "tree: texts", "tree: mass"), each),
    ]  # fmt: skip


# Pictures


def draw_rows(rows: Lines, path: Path) -> None:
    figure, panels = begin_figure((9.6, 3.8), columns=2)
    for axes, measure, label in zip(
        panels, ("kl", "tv"), ("KL(exact || row), nats", "total variation"), strict=True
    ):
        for name, lines in rows.items():
            draw_by_step(axes, column(lines, measure), label_of(name))
        axes.set(xlabel="step", ylabel=label, ylim=(0, None), xticks=range(0, TOKENS, 4))
    panels[0].legend(fontsize=7, frameon=False)
    save_figure(figure, path)


def label_of(name: str) -> str:
    case = LATTICES[name]
    return f"{case.attend}, {case.threshold:g}, at most {case.max_parallel_tokens}"


def draw_calibration(found: Mapping[str, Lines], path: Path) -> None:
    """Points of bins, the larger the more of the pairs they hold; on the diagonal what is recorded is exact."""
    figure, panels = begin_figure((9.6, 4.6), columns=2)
    for axes, (what, label) in zip(panels, RECORDED.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
        for case in (DEFAULTS, WIDEST, ALL):
            draw_bins(axes, found["rows"][case.name], what, label_of(case.name))
        draw_bins(axes, found["plain"]["plain"], "sets", "plain, the control")
        axes.set(xlabel=f"recorded: {label}", ylabel="exact, mean", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panels[0].legend(fontsize=7, frameon=False, loc="upper left")
    save_figure(figure, path)


def draw_bins(axes: Any, lines: Sequence[Record], what: str, label: str) -> None:
    bins = [bin_ for bin_ in (reliability(lines, what, number) for number in range(BINS)) if bin_[0]]
    pairs, across = np.array([bin_[0] for bin_ in bins]), [bin_[1] for bin_ in bins]
    up = np.array([(bin_[2].value, bin_[2].low, bin_[2].high) for bin_ in bins])
    (line, *_) = axes.errorbar(
        across,
        up[:, 0],
        yerr=[up[:, 0] - up[:, 1], up[:, 2] - up[:, 0]],
        linewidth=0.8,
        elinewidth=0.7,
        label=label,
    )
    axes.scatter(
        across, up[:, 0], s=8 + 160 * pairs / pairs.sum(), color=line.get_color(), alpha=0.7, linewidth=0
    )


def draw_texts(texts: Lines, path: Path) -> None:
    """A point a prompt: above the diagonal the lattice's texts hold more."""
    figure, axes = begin_figure((5.2, 4.8))
    low = 1.0
    for name, lines in texts.items():
        case = SPELLED[name]
        across, up = column(lines, "tree", "mass"), column(lines, "mass")
        axes.scatter(across, up, s=16, alpha=0.7, label=f"threshold {case.threshold:g}, {case.tokens} tokens")
        low = min(low, across.min(), up.min())
    axes.plot([low, 1], [low, 1], color="0.7", linewidth=0.8, linestyle="--")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="exact mass of the tree's texts",
        ylabel="of the lattice's, at as many rows",
    )
    axes.legend(fontsize=7, frameon=False)
    save_figure(figure, path)
