"""From recorded lines to figures. Every interval is 95%, by a bootstrap over problems; differences are paired."""

from __future__ import annotations

import ast
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

import numpy as np

from benchmarks.studies import bootstrap
from benchmarks.tasks.arms import ARMS, TEXTS
from benchmarks.tasks.running import Record
from tempo_mlx.report.answers import By

DRAWN = (
    "nucleus",
    "min-p",
    "arithmetic",
)  # whose texts come in no order: pass@k is the mean over all k of them
Score = Callable[[str, Record], float]


@dataclass(frozen=True)
class Value:
    """A figure and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pass_at(k: int) -> Score:
    """Whether one of k texts is right: of texts in order the first k, of drawn ones the mean over any k of them."""

    def score(arm: str, record: Record) -> float:
        right = record["right"][:TEXTS]
        if arm not in DRAWN or len(right) < k:
            return float(any(right[:k]))
        wrong = len(right) - sum(right)
        return 1.0 - math.comb(wrong, k) / math.comb(len(right), k)

    return score


def weights_of(record: Record, by_mass: bool) -> list[float]:
    """By mass texts count as probable as they are, each once; else each text is a vote."""
    logprobs = record["logprobs"]
    if not by_mass or None in logprobs:
        return [1.0] * len(logprobs)
    seen: set[str] = set()
    weights = []
    for text, logprob in zip(record["texts"], logprobs, strict=False):
        weights.append(0.0 if text in seen else math.exp(logprob))
        seen.add(text)
    return weights


def vote(record: Record, by_mass: bool, what: By | None = None) -> tuple[int, float]:
    """The text whose answer has the most votes, of equals the first; and the share of the votes. what: it answers; as
    was recorded unless given."""
    answers = record["answers"] if what is None else [what(text) for text in record["texts"]]
    weights = weights_of(record, by_mass)
    votes: dict[str, float] = defaultdict(float)
    for answer, weight in zip(answers, weights, strict=False):
        if answer is not None:
            votes[answer] += weight
    if not votes or not sum(votes.values()):
        return 0, 0.0
    best = max(votes, key=lambda answer: votes[answer])
    return answers.index(best), votes[best] / (sum(weights) or 1.0)


def majority(by_mass: bool, what: By | None = None) -> Score:
    return lambda arm, record: float(record["right"][vote(record, by_mass, what)[0]])


def best_mean(arm: str, record: Record) -> float:
    """The text of the best mean log-probability a token."""
    if None in record["logprobs"]:
        return float(record["right"][0])
    means = [a / max(b, 1) for a, b in zip(record["logprobs"], record["tokens"], strict=True)][:TEXTS]
    return float(record["right"][means.index(max(means))])


def verified(arm: str, record: Record) -> float:
    """The first text that does what the problem shows; where none does, or nothing is shown, the first."""
    shown = record["shown"]
    at = shown[:TEXTS].index(True) if shown and True in shown[:TEXTS] else 0
    return float(record["right"][at])


def different(arm: str, record: Record) -> float:
    return float(len(set(record["texts"][:TEXTS])))


def programs(arm: str, record: Record) -> float:
    """How many of the texts are different programs."""
    return float(len({program_of(text) for text in record["texts"][:TEXTS]}))


def characters(arm: str, record: Record) -> float:
    return float(np.mean([len(text) for text in record["texts"][:TEXTS]]))


def program_of(body: str) -> str:
    """What the body of a function does, whatever it calls its own names and says beside; as it stands if it is no
    Python."""
    try:
        tree = ast.parse(f"def f():\n{body}")
    except (SyntaxError, ValueError):
        return body.strip()
    nodes = list(ast.walk(tree))
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Name) and node.id in own:
            node.id = names.setdefault(node.id, f"name{len(names)}")
        if isinstance(
            each := getattr(node, "body", None), list
        ):  # a string alone says something, and does nothing
            node.body = [line for line in each if not (isinstance(line, ast.Expr) and said(line.value))]
    return ast.dump(tree)


def said(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def shared(arm: str, record: Record) -> float:
    """The mean share of a text, from its start, that one before it has too: how late they part."""
    texts = record["texts"][:TEXTS]
    shares = [
        max(len(commonprefix([text, other])) for other in texts[:at]) / max(1, len(text))  # noqa: RUF071
        for at, text in enumerate(texts)
        if at
    ]
    return float(np.mean(shares)) if shares else 0.0


def measured(scores: Sequence[float]) -> Value:
    values = np.asarray(scores, float)
    return Value(*bootstrap(lambda index: float(values[index].mean()), len(values)))


def of(arm: str, records: Mapping[str, Record], score: Score) -> Value:
    return measured([score(arm, record) for record in records.values()])


def difference(one: str, other: str, found: Mapping[str, Mapping[str, Record]], score: Score) -> Value:
    """Of two arms, on the problems that both have."""
    both = sorted(found[one].keys() & found[other].keys())
    return measured([score(one, found[one][p]) - score(other, found[other][p]) for p in both])


def auroc(confidences: Sequence[float], right: Sequence[bool]) -> float:
    """How often a right answer has the greater confidence of a right and a wrong one; of equals half."""
    yes = [c for c, r in zip(confidences, right, strict=True) if r]
    no = [c for c, r in zip(confidences, right, strict=True) if not r]
    if not yes or not no:
        return math.nan
    wins = np.subtract.outer(yes, no)
    return float(((wins > 0) + 0.5 * (wins == 0)).mean())


def confidence(record: Record, by_mass: bool) -> tuple[float, bool]:
    """Of the answer chosen: its mass, or the share of the texts that agree; and whether it is right."""
    at, share = vote(record, by_mass)
    if by_mass:
        weights = weights_of(record, True)
        share = sum(w for w, a in zip(weights, record["answers"], strict=False) if a == record["answers"][at])
    return share, bool(record["right"][at])


def label(arm: str) -> str:
    return next((each.said for each in ARMS if each.name == arm), arm)
