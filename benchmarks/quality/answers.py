"""What the page says before its tables: the questions answered in figures, the targets, the original's claim."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.arms import TEXTS
from benchmarks.quality.prompts import KINDS
from benchmarks.quality.running import QUARTERS, THINNED
from benchmarks.quality.summary import (
    Entry,
    Statistic,
    Value,
    mean,
    measured,
    paired,
    perplexity,
    quarter,
    ratio,
)

Entries = Mapping[str, Entry]
distinct_2 = mean("distinct_2")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(title: str, text: str, *tables: str) -> list[str]:
    return [f"## {title}", text, *tables]


@dataclass(frozen=True)
class Claim:
    """What was to be reached: the measured value is to be at most (or at least) the bound. prompts: that it is of.
    says: the same as a sentence.
    """

    what: str
    value: Value
    bound: float
    at_least: bool = False
    prompts: int = 0
    when: str = ""
    says: str = ""

    @property
    def verdict(self) -> str:
        side = 1 if self.at_least else -1
        low, value, high = (
            side * (number - self.bound) for number in (self.value.low, self.value.value, self.value.high)
        )
        if min(low, high) >= 0:
            return "yes"
        if max(low, high) < 0:
            return "**no**"
        return f"{'yes' if value >= 0 else 'no'}, but the interval reaches beyond"

    @property
    def target(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


def answers(tests: Entries, fives: Entries) -> list[str]:
    """The questions the page is there for, each answered in a line of figures; those without results are left out."""
    lines: list[str] = []
    if {"beam", "nucleus"} <= set(fives):
        true = [entry.label for entry in fives.values() if is_claimed(entry, fives) != "**no**"]
        lines.append(
            '"2 to 3 times more diverse than beam search at no worse perplexity than nucleus sampling" holds for '
            f"{listed(true)}, and for no other decoder here."
        )
    base = tests.get("lineage: best")
    if base is not None:
        rules = [(rule, tests.get(f"attend-{rule}: best")) for rule in ("best", "weighted", "all")]
        lines.append(
            "What a row should see of earlier sets: perplexity of the best path, times that under lineage: "
            + listed(
                [f"{rule} {ratio(entry, base, perplexity)}" for rule, entry in rules if entry is not None]
            )
            + "."
        )
        cuts = [(name, tests.get(f"{name}: best")) for name in STEPS]
        lines.append(
            "Widths and thresholds: the same, times that of the defaults (threshold 0.1, at most 8), and the members "
            "a step: "
            + listed(
                [
                    f"{entry.label.partition(':')[0]} {ratio(entry, base, perplexity)} at {of_width(entry):.2f}"
                    for _, entry in cuts
                    if entry is not None
                ]
            )
            + f"; the defaults have {of_width(base):.2f}."
        )
    thinned = [tests.get(f"lineage: thinned: {signal}") for signal in ("posterior", "probability")]
    if thinned[0] is not None and thinned[1] is not None:
        lines.append(
            "Which pruning signal: at equal width, random paths have under posterior "
            f"{ratio(thinned[0], thinned[1], perplexity)} times the perplexity they have under probability."
        )
    if base is not None and "greedy" in tests:
        lines.append(
            breaks(
                "the best path of a lattice, perplexity times greedy's",
                base,
                tests["greedy"],
                perplexity,
                max,
            )
        )
    if {"branches", "beam"} <= set(tests):
        lines.append(
            breaks("branches, distinct-2 times beam's", tests["branches"], tests["beam"], distinct_2, min)
        )
    return ["## In short", "\n".join(f"- {line}" for line in lines)] if lines else []


STEPS = ("threshold-0.2", "threshold-0.05", "width-2", "width-4")


def of_width(entry: Entry) -> float:
    return mean("width")(entry, slice(None))


def breaks(what: str, one: Entry, other: Entry, statistic: Statistic, worst: Any) -> str:
    """The worst kind of prompt, and for perplexity the last quarter of the text beside the first."""
    by_kind = {
        kind: ratio(one.of_kind(kind), other.of_kind(kind), statistic)
        for kind in KINDS
        if len(one.of_kind(kind)) and len(other.of_kind(kind))
    }
    kind = worst(by_kind, key=lambda kind: by_kind[kind].value)
    text = (
        f"Where it breaks: {what}, is worst on {kind} prompts, {by_kind[kind]} (n {len(one.of_kind(kind))})"
    )
    if statistic is perplexity:
        ends = [ratio(quarter(one, part), quarter(other, part), perplexity) for part in (0, QUARTERS - 1)]
        text += f"; in the first quarter of the text it is {ends[0]}, in the last {ends[1]}"
    return text + "."


def listed(items: Sequence[str]) -> str:
    """a; b; c, since names hold commas; "none" of nothing."""
    return "; ".join(items) or "none"


@dataclass(frozen=True)
class Target:
    """A claim before it is measured: the statistic of `one`, times that of `other` where there is another. when: it was
    written down, before or after results of its decoders were first seen. says: what it comes to, {} being the bound.
    """

    what: str
    says: str
    one: str
    other: str | None
    statistic: Statistic
    bound: float
    at_least: bool = False
    when: str = "before"

    def claim(self, tests: Entries) -> Claim | None:
        """None where there are no results of it."""
        if self.one not in tests or (self.other is not None and self.other not in tests):
            return None
        entry = tests[self.one]
        if self.other is None:
            value = measured(entry, self.statistic)
        else:
            value = ratio(entry, tests[self.other], self.statistic)
            entry, _ = paired(entry, tests[self.other])
        return Claim(
            self.what,
            value,
            self.bound,
            self.at_least,
            len(entry),
            self.when,
            self.says.format(f"{self.bound:g}"),
        )


OF_EIGHT = "branches, diversity 1, best of 8"
TARGETS = (
    Target("branches: distinct-2, times beam's", "branches have at least {} times beam search's different bigrams",
           "branches", "beam", distinct_2, 2.2, True),
    Target("branches: perplexity, times greedy's", "branches have at most {} times greedy's perplexity",
           "branches", "greedy", perplexity, 1.1),
    Target("branches, sampled: distinct-2, times beam's",
           "sampled branches have at least {} times beam search's different bigrams",
           "branches-sample", "beam", distinct_2, 2.8, True),
    Target("branches, sampled: perplexity, times nucleus'",
           "sampled branches have at most {} times the perplexity of nucleus sampling",
           "branches-sample", "nucleus", perplexity, 0.6),
    Target("lattice, best path: perplexity, times greedy's",
           "a lattice's best path has at most {} times greedy's perplexity",
           "lineage: best", "greedy", perplexity, 1.05),
    Target("lattice: rows a step", "a lattice runs at most {} rows a step",
           "lineage: best", None, mean("width"), 2.5),
    Target(f"random paths, {THINNED:.0%} removed: perplexity by posterior, times by probability",
           f"where {THINNED:.0%} of the members that could go are removed by posterior, random paths have at most {{}} "
           "times the perplexity that removal by probability leaves",
           "lineage: thinned: posterior", "lineage: thinned: probability", perplexity, 0.5),
    Target(f"{OF_EIGHT}: distinct-2, times diverse beam's",
           "the best five of eight branches have no fewer different bigrams than diverse beam search",
           "branches-5-of-8", "diverse-beam-1", distinct_2, 1.0, True, "after"),
    Target(f"{OF_EIGHT}: perplexity, times diverse beam's",
           "the best five of eight branches have no higher perplexity than diverse beam search",
           "branches-5-of-8", "diverse-beam-1", perplexity, 1.0, when="after"),
    Target("lattice, best path: perplexity, times that of attend all",
           "a lattice's best path has no higher perplexity than where every row sees every member",
           "lineage: best", "attend-all: best", perplexity, 1.0, when="after"),
)  # fmt: skip


def claims(tests: Entries) -> list[Claim]:
    """Those there are results of."""
    found = (target.claim(tests) for target in TARGETS)
    return [claim for claim in found if claim is not None]


def targets(found: Sequence[Claim]) -> list[str]:
    rows = [[claim.what, str(claim.value), claim.target, claim.verdict, claim.when] for claim in found]
    return section(
        "Targets",
        "Set: whether a target was written down before or after results of its decoders were first seen. Those set "
        "afterwards say what was found, and are no test of a prediction.",
        markdown(("what", "measured", "target", "reached", "set"), rows),
    )


RIVALS = (
    ("branches-sample", "threshold"),
    ("branches", "diverse-beam-1"),
    ("branches-5-of-8", "diverse-beam-1"),
    ("branches-5-of-8", "diverse-beam-5-of-8"),
    ("lineage: best", "beam"),
    ("lineage: best", "beam-2: first"),
)  # ours, and what does nearest to the same
# What other models judge: those, and what the claims about the best path of a lattice are about.
JUDGED = (*RIVALS, ("lineage: best", "greedy"), ("lineage: best", "attend-all: best"))


def beside(tests: Entries) -> str | None:
    """Each decoder of ours beside its nearest rival, on the prompts both were run on; None without results of both."""
    rows = []
    for ours, theirs in RIVALS:
        if ours not in tests or theirs not in tests:
            continue
        one, other = paired(tests[ours], tests[theirs])
        several = one.texts == other.texts == TEXTS
        costs = (f"{ratio(one, other, mean(cost)).value:.2f}" for cost in ("passes", "rows"))
        rows.append(
            [one.label, other.label, str(len(one)), str(ratio(one, other, perplexity)),
             str(ratio(one, other, distinct_2)) if several else "-", *costs]
        )  # fmt: skip
    header = ("decoder", "beside", "n", "perplexity", "distinct-2", "passes", "rows")
    return markdown(header, rows) if rows else None


def against_us(tests: Entries) -> list[str]:
    """What speaks against."""
    table = beside(tests)
    if table is None:
        return []
    return section(
        "What speaks against",
        "Each decoder of ours beside the one that does nearest to the same, paired, on the prompts both were run on "
        "(n), with one seed. Sampled branches hardly differ from ordinary sampling among tokens of p >= 0.1; branches "
        "find fewer bigrams than diverse beam search; best of 8 runs more rows than the diverse beam search it beats, "
        "and is level with the best five of eight groups of diverse beam search. Settings of both were chosen on other "
        "prompts (What was tried). Beam search takes as many passes as a lattice, with five beams 2.6 times its rows, "
        "and the model likes its texts better than the lattice's best path.",
        table,
    )


def verdict(fives: Entries) -> list[str]:
    """Is "2 to 3 times more diverse than beam search at no worse perplexity than nucleus sampling" true?"""
    if not {"beam", "nucleus"} <= set(fives):
        return []
    rows = [
        [
            entry.label,
            str(ratio(entry, fives["beam"], distinct_2)),
            str(ratio(entry, fives["nucleus"], perplexity)),
            is_claimed(entry, fives),
        ]
        for name, entry in fives.items()
        if name not in ("beam", "nucleus")
    ]
    return section(
        '"2 to 3 times more diverse than beam search at no worse perplexity than nucleus sampling"',
        "The original's claim, put to every decoder with five texts: distinct-2 at least twice beam's, perplexity "
        "at most that of nucleus 0.9. What passes is no proof of merit: sampling that is held back passes too; the "
        "picture shows who gives more diversity at the same perplexity.",
        markdown(("decoder", "distinct-2, times beam's", "perplexity, times nucleus'", "true"), rows),
    )


def is_claimed(entry: Entry, fives: Entries) -> str:
    """Whether the claim is true of a decoder, and surely so."""
    more = Claim("", ratio(entry, fives["beam"], distinct_2), 2.0, at_least=True)
    worse = Claim("", ratio(entry, fives["nucleus"], perplexity), 1.0)
    verdicts = {more.verdict, worse.verdict}
    if entry.label in (fives["beam"].label, fives["nucleus"].label) or "**no**" in verdicts:
        return "**no**"
    return "yes" if verdicts == {"yes"} else "yes, but an interval reaches beyond"
