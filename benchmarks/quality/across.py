"""What the page says of several models together: which claims hold where, and what they think of each other's texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.quality import arms as table
from benchmarks.quality.answers import JUDGED, Claim, claims, distinct_2, listed, markdown, section
from benchmarks.quality.results import Rated, Results
from benchmarks.quality.summary import Value, mean, measured, perplexity
from benchmarks.studies import bootstrap
from tempo_mlx.arrays import Floats

Claims = Mapping[str, Sequence[Claim]]  # of each model, by its name


@dataclass(frozen=True)
class Judgement:
    """Two readings of one model under another: nats per byte of ours and theirs, and the difference, paired."""

    judge: str
    writer: str
    ours: str
    theirs: str
    prompts: int
    each: tuple[float, float]
    difference: Value

    @property
    def verdict(self) -> str:
        if self.difference.high < 0:
            return "better"
        return "worse" if self.difference.low > 0 else "undecided"


def beside_each_other(models: Sequence[Results]) -> list[str]:
    """All sections that are about several models."""
    judgements = [judgement for model in models for judgement in judge(model)]
    by_model = dict(zip(names_of(models), (model.claims for model in models), strict=True))
    return [
        *what_holds(by_model, judgements),
        *section(
            "Across models",
            "The claims, with their bounds; each cell says what was measured, its interval, and the number of prompts.",
            claims_table(by_model),
        ),
        *judged(judgements),
        *longer(models),
        *luck(models),
    ]


def names_of(models: Sequence[Results]) -> list[str]:
    """Short ones, unless two are the same model stored in two ways."""
    short = [model.short for model in models]
    return [name if short.count(name) == 1 else model.name for name, model in zip(short, models, strict=True)]


# What holds

WORDS = {
    "yes": "yes on",
    "**no**": "no on",
}  # for verdicts; of all others an interval reaches beyond its bound
UNSURE = "undecided on"
LEAST = 8  # prompts of a verdict


def what_holds(by_model: Claims, judgements: Sequence[Judgement]) -> list[str]:
    groups: dict[str, list[str]] = {"every model": [], "some": [], "none": []}
    for row in rows_of(by_model).values():
        words = {name: WORDS.get(claim.verdict, UNSURE) for name, claim in row.items()}
        claim = next(iter(row.values())).says
        if set(words.values()) == {"yes on"}:
            asked = "" if len(words) == len(by_model) else f" (asked of {listed(list(words))})"
            groups["every model"].append(claim + asked)
        else:
            models = {
                word: [name for name in words if words[name] == word] for word in ("yes on", UNSURE, "no on")
            }
            which = "; ".join(f"{word} {', '.join(names)}" for word, names in models.items() if names)
            groups["some" if models["yes on"] else "none"].append(f"{claim}: {which}")
    lines = [
        f"- Measured on {', '.join(by_model)}. A claim holds on a model where its whole interval is on the right side "
        "of the bound, and fails where it is on the wrong side; it is asked of those that have results of it. The "
        "table below has the numbers of prompts.",
        *(f"- On {group}:{points(found)}" for group, found in groups.items()),
    ]
    if judgements:
        lines.append(
            "- Other models as judges, of which texts take fewer nats a byte, ours or theirs: for each writer and "
            f"judge the prompts of a verdict.{points(tally(judgements))}"
        )
    return section("What holds", "\n".join(lines))


def points(found: Sequence[str]) -> str:
    """A list in a list."""
    return "".join(f"\n  - {each}" for each in found) or " none."


def rows_of(by_model: Claims) -> dict[str, dict[str, Claim]]:
    """By claim and model, in the order of the claims."""
    found: dict[str, dict[str, Claim]] = {}
    for name, measured_claims in by_model.items():
        for claim in measured_claims:
            found.setdefault(claim.what, {})[name] = claim
    return found


def bounded(claim: Claim) -> str:
    return f"{claim.what} ({claim.target})"


def tally(judgements: Sequence[Judgement]) -> list[str]:
    """For each pair the prompts of the judgements by which ours is better, worse, or neither."""
    pairs: dict[tuple[str, str], dict[str, list[int]]] = {}
    for each in judgements:
        if each.prompts >= LEAST:
            pairs.setdefault((each.ours, each.theirs), {}).setdefault(each.verdict, []).append(each.prompts)
    return [
        f"{ours}, beside {theirs}: "
        + "; ".join(
            f"{word} (n {', '.join(map(str, verdicts[word]))})"
            for word in ("better", "worse", "undecided")
            if word in verdicts
        )
        for (ours, theirs), verdicts in pairs.items()
    ]


def claims_table(by_model: Claims) -> str:
    rows = [
        [bounded(next(iter(row.values()))), *(cell(row.get(name)) for name in by_model)]
        for row in rows_of(by_model).values()
    ]
    return markdown(("claim", *by_model), rows)


def cell(claim: Claim | None) -> str:
    return "-" if claim is None else f"{claim.value}, n {claim.prompts}"


# Judges


def judge(model: Results) -> Iterator[Judgement]:
    """All judges of a model's texts, on the prompts that both readings of a pair were judged on."""
    for name, rated in model.judged():
        for ours, theirs in JUDGED:
            if ours in rated and theirs in rated:
                one, other = sums(rated[ours], rated[theirs])
                yield Judgement(
                    name, model.name, model.tests[ours].label, model.tests[theirs].label, len(one),
                    (per_byte(one), per_byte(other)), difference(one, other),
                )  # fmt: skip


def sums(one: Rated, other: Rated) -> tuple[Floats, Floats]:
    """(n, 2) each: nats and bytes of the prompts that both have."""
    shared = [prompt for prompt in one if prompt in other]
    return np.array([one[prompt] for prompt in shared]), np.array([other[prompt] for prompt in shared])


def per_byte(rated: Floats) -> float:
    return float(rated[:, 0].sum() / rated[:, 1].sum())


def difference(one: Floats, other: Floats) -> Value:
    return Value(*bootstrap(lambda index: per_byte(one[index]) - per_byte(other[index]), len(one)))


def judged(judgements: Sequence[Judgement]) -> list[str]:
    by: dict[tuple[str, str], list[Judgement]] = {}
    for each in judgements:
        by.setdefault((each.judge, each.writer), []).append(each)
    parts = []
    for (name, writer), found in by.items():
        rows = [
            [str(each.prompts), each.ours, each.theirs, *(f"{value:.3f}" for value in each.each),
             str(each.difference)]
            for each in found
        ]  # fmt: skip
        parts += [
            f"{name} of the texts of {writer}:",
            markdown(("n", "ours", "beside", "nats a byte", "beside's", "difference"), rows),
        ]
    if not parts:
        return []
    return section(
        "Judged by other models",
        "Negative log-probability of the recorded texts under another model, which reads them with its own tokenizer, "
        "in nats a byte of UTF-8, since tokens of two models are of different lengths. A difference below 0 speaks for "
        "ours.",
        *parts,
    )


# Longer texts, and luck


def longer(models: Sequence[Results]) -> list[str]:
    rows = [
        [name, entry.label, str(len(entry)), str(measured(entry, mean("length"))),
         str(measured(entry, perplexity)), str(measured(entry, distinct_2)) if entry.texts > 1 else "-"]
        for name, model in zip(names_of(models), models, strict=True)
        for entry in model.long.values() if "distinct_2" in entry.numbers
    ]  # fmt: skip
    if not rows:
        return []
    return section(
        "Longer texts, ended by the model",
        "Of at most 128 tokens, the token that ends a text included. Perplexity is over all tokens. distinct-2 is over "
        "all bigrams of a prompt's texts, none of which is cut: longer texts repeat more, so that decoders whose "
        "lengths differ do not compare by it alone.",
        markdown(("model", "decoder", "n", "tokens of a text", "perplexity", "distinct-2"), rows),
        "The claims, of these texts:",
        claims_table(
            {
                name: claims(model.long)
                for name, model in zip(names_of(models), models, strict=True)
                if model.long
            }
        ),
    )


def luck(models: Sequence[Results]) -> list[str]:
    rows = []
    for name, model in zip(names_of(models), models, strict=True):
        for arm in table.DRAWING:
            by_seed = model.drawn(arm)
            if len(by_seed) < 2:
                continue
            shared = set.intersection(*(set(entry.prompts) for entry in by_seed.values()))
            for seed, entry in by_seed.items():
                same = entry.take([i for i, prompt in enumerate(entry.prompts) if prompt in shared])
                rows.append(
                    [name, entry.label, str(seed), str(len(same)), str(measured(same, perplexity)),
                     str(measured(same, distinct_2))]
                )  # fmt: skip
    if not rows:
        return []
    return section(
        "How much is luck",
        "Decoders that draw, with further seeds, on the prompts that all seeds of a decoder were run on.",
        markdown(("model", "decoder", "seed", "n", "perplexity", "distinct-2"), rows),
    )
