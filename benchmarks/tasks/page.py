"""docs/tasks.md and its picture, out of the recorded lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.studies import bootstrap, read_records
from benchmarks.tasks.arms import ARMS, TEXTS
from benchmarks.tasks.running import Record
from benchmarks.tasks.summary import (
    Score,
    Value,
    auroc,
    best_mean,
    characters,
    confidence,
    difference,
    different,
    label,
    majority,
    of,
    pass_at,
    program_of,
    programs,
    shared,
    verified,
)

Found = Mapping[str, Mapping[str, Record]]  # by arm, by problem
NAMES = {
    "humaneval": ("HumanEval", "Programs, solved where the hidden tests pass"),
    "questions": ("Short questions", "150 of our own (benchmarks/tasks/questions.jsonl)"),
    "gsm8k": ("GSM8K", "100 problems after three worked ones of ours: sums, right by the last number"),
}  # fmt: skip
HEAD = """# Tasks: do several texts help?

Written by `python -m benchmarks.tasks report` out of [the recorded runs](../benchmarks/results/tasks); `python -m
benchmarks.tasks --help` says how to run them. Every figure has its 95% interval by a bootstrap over problems (BCa);
differences are paired. Each stands for itself: of twenty that are read together one is expected to miss. Rows and
passes are a problem's mean, the prompt left out; seconds are those of the first ten problems, one by one, on a machine
that did nothing else. pass@1 is the first text's, of samples the mean over all of them; pass@8 asks whether one of
eight is right; maj@8 takes the answer most texts give, or the program most are, by mass each text counts by its
probability; best mean is the text of the best mean log-probability a token; checked is the first text that passes the
examples which the problem itself shows. As many rows as an arm took give k of nucleus sampling's 8 texts, at most all
of them. Programs differ if more than their variables' names, comments and layout does. Every eighth problem of
HumanEval (8th, 16th, ...) was also used for tuning.
"""


def write_page(out: Path, page: Path) -> str:
    parts = [HEAD]
    folders = [each for each in out.glob("*/*") if each.name in NAMES]
    for folder in sorted(folders, key=lambda each: (each.parent.name, [*NAMES].index(each.name))):
        found, missing = whole(read(folder))
        if found:
            parts += section(folder, found, read(folder.with_name(f"{folder.name}-timing")), page)
            parts += [f"\nLeft out until they are measured on all problems: {missing}."] if missing else []
    page.write_text("\n".join(parts) + "\n", "utf-8")
    return f"Wrote {page}."


def read(folder: Path) -> Found:
    order = [arm.name for arm in ARMS]
    files = [path for path in folder.glob("*.jsonl") if path.stem in order]
    files.sort(key=lambda path: order.index(path.stem))
    return {path.stem: {record["problem"]: record for record in read_records(path)} for path in files}


def whole(found: Found) -> tuple[Found, str]:
    """The arms measured on all problems; and how far the others are, which ended their short problems first."""
    most = max((len(records) for records in found.values()), default=0)
    missing = [
        f"{label(arm)} ({len(records)} of {most})" for arm, records in found.items() if len(records) < most
    ]
    return {arm: records for arm, records in found.items() if len(records) == most}, ", ".join(missing)


def section(folder: Path, found: Found, timed: Found, page: Path) -> Iterator[str]:
    task = folder.name
    title, what_it_is = NAMES[task]
    yield f"\n## {title}: {folder.parent.name}\n\n{what_it_is}.\n"
    columns: dict[str, Score] = {"pass@1": pass_at(1), f"pass@{TEXTS}": pass_at(TEXTS)}
    what = program_of if task == "humaneval" else None
    columns |= {"maj@8": majority(False, what), "maj@8 by mass": majority(True, what)}
    columns["best mean"] = best_mean
    if task == "humaneval":
        columns["checked"] = verified
    yield "\n".join(table(found, timed, columns))
    if {"nucleus", "greedy"} <= found.keys():
        yield "\n" + "\n".join(differences(found, columns))
    if task == "humaneval":
        yield "\n" + "\n".join(likeness(found))
    if task == "questions":
        yield "\n" + "\n".join(certainty(found))
    picture = f"tasks-{folder.parent.name}-{task}.svg"
    (page.parent / "images").mkdir(exist_ok=True)
    draw(found, page.parent / "images" / picture, f"{folder.parent.name}, {task}")
    yield f"\n![pass@k over rows](images/{picture})"


def table(found: Found, timed: Found, columns: Mapping[str, Score]) -> Iterator[str]:
    yield f"| | problems | {' | '.join(columns)} | texts | rows | passes | seconds |"
    yield "|---" * (len(columns) + 6) + "|"
    for arm, records in found.items():
        figures = " | ".join(str(of(arm, records, score)) for score in columns.values())
        texts, rows, passes = (
            float(np.mean(each))
            for each in (
                [len(set(record["texts"])) for record in records.values()],
                [record["rows"] for record in records.values()],
                [record["passes"] for record in records.values()],
            )
        )
        seconds = [record["seconds"] for record in timed.get(arm, {}).values()]
        said = f"{texts:.1f} | {rows:.0f} | {passes:.0f} | {f'{np.mean(seconds):.1f} ' if seconds else ''}"
        yield f"| {label(arm)} | {len(records)} | {figures} | {said}|"


def differences(found: Found, columns: Mapping[str, Score]) -> Iterator[str]:
    *_, final = columns
    heads = " | ".join(columns)
    yield (
        f"| less nucleus sampling's, on the same problems | {heads} | pass@{TEXTS} less its pass@k at as many rows "
        f"| pass@1 less greedy's | maj@8 less greedy's pass@1 | {final} less greedy's pass@1 |"
    )
    yield "|---" * (len(columns) + 5) + "|"
    for arm in found:
        cells = [str(difference(arm, "nucleus", found, score)) for score in columns.values()]
        k = texts_for(rows_of(found[arm]), found)
        cells.append(f"{against(arm, pass_at(TEXTS), 'nucleus', pass_at(k), found)} (k = {k})")
        cells += [
            str(against(arm, score, "greedy", pass_at(1), found))
            for score in (pass_at(1), columns["maj@8"], columns[final])
        ]
        yield f"| {label(arm)} | {' | '.join(cells)} |"


def texts_for(rows: float, found: Found) -> int:
    """How many of eight nucleus samples take so many rows, rounded; at least one, at most all."""
    return max(1, min(TEXTS, round(TEXTS * rows / rows_of(found["nucleus"]))))


def rows_of(records: Mapping[str, Record]) -> float:
    return float(np.mean([record["rows"] for record in records.values()]))


def against(arm: str, score: Score, other: str, its: Score, found: Found) -> Value:
    """One arm by one score less another by another, on the same problems."""
    return difference(arm, other, found, lambda name, record: (its if name == other else score)(name, record))


def likeness(found: Found) -> Iterator[str]:
    """Why several texts help more or less than as many others."""
    columns = {
        "different texts": different, "different programs": programs, "characters a text": characters,
        "share of a text that one before it has": shared,
    }  # fmt: skip
    yield f"| how different eight texts are | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for arm, records in found.items():
        if arm != "greedy":
            means = [
                float(np.mean([score(arm, each) for each in records.values()])) for score in columns.values()
            ]
            yield f"| {label(arm)} | {means[0]:.2f} | {means[1]:.2f} | {means[2]:.0f} | {means[3]:.2f} |"


def certainty(found: Found) -> Iterator[str]:
    """AUROC of what an arm knows about its answer, and less what agreement knows about that of nucleus samples."""
    yield "| does it know when it is right? | AUROC | less agreement of nucleus samples | right | rows | passes |"
    yield "|---" * 6 + "|"
    problems = sorted(found["greedy"])
    usual = [confidence(found["nucleus"][problem], False) for problem in problems]
    for arm, records in found.items():
        if arm == "greedy":
            continue
        for by_mass in (False, True):
            pairs = [confidence(records[problem], by_mass) for problem in problems]
            right = sum(each for _, each in pairs) / len(pairs)
            costs = [
                float(np.mean([record[name] for record in records.values()])) for name in ("rows", "passes")
            ]
            by = "mass of the answer" if by_mass else "share of the texts"
            more = knowing(pairs, usual)
            figures = f"{knowing(pairs)} | {more} | {right:.3f} | {costs[0]:.0f} | {costs[1]:.0f}"
            yield f"| {label(arm)}, {by} | {figures} |"


def knowing(pairs: Sequence[tuple[float, bool]], others: Sequence[tuple[float, bool]] | None = None) -> Value:
    """AUROC of confidences of answers that are right or not; less that of others, about the same problems."""
    kinds = [[np.array(each) for each in zip(*known, strict=True)] for known in (pairs, others) if known]

    def score(index: np.ndarray) -> float:
        first, *rest = (auroc(sure[index], right[index]) for sure, right in kinds)
        return first - sum(rest)

    return Value(*bootstrap(score, len(pairs)))


def draw(found: Found, path: Path, title: str) -> None:
    """pass@k, k from 1 to all, over the rows that so many texts took."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tasks"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.6, 4.4), layout="constrained")
    for arm, records in found.items():
        rows = rows_of(records)
        counts = [1] if arm == "greedy" else list(range(1, TEXTS + 1))
        values = [of(arm, records, pass_at(k)).value for k in counts]
        across = [rows * k / counts[-1] for k in counts]
        axes.plot(across, values, marker="o", markersize=3, linewidth=1, label=label(arm))
    axes.set(xlabel="rows a problem (of k of 8 texts: k/8 of them)", ylabel="pass@k", title=title)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
