"""From recorded lines to figures with intervals. Every interval is 95%, by a bootstrap over prompts.

Two arms are compared on the prompts both were run on, drawn again together (a paired bootstrap).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.quality.arms import TEXTS, Arm
from benchmarks.quality.metrics import diversity
from benchmarks.quality.prices import price
from benchmarks.quality.running import file_of, in_quarters, length_of, words_of
from benchmarks.studies import Record, bootstrap, read_records
from tempo_mlx.arrays import Floats, Ints
from tempo_mlx.weights import Tokenizer

Index = Ints | slice
Statistic = Callable[["Entry", Index], float]  # of the prompts of an index array


@dataclass(frozen=True)
class Value:
    """A figure and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 3 if max(abs(self.value), abs(self.high)) < 1 else 2 if self.high < 100 else 0
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Entry:
    """One reading of one arm: arrays over its prompts. nats (n, quarters): summed over the reading's texts."""

    label: str
    prompts: tuple[str, ...]
    texts: int
    nats: Floats
    tokens: Floats  # (n, quarters)
    numbers: dict[str, Floats]  # (n,) each: measures of diversity, passes, rows, seconds ...

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, index: Sequence[int] | Ints) -> Entry:
        numbers = {name: values[index] for name, values in self.numbers.items()}
        names = tuple(self.prompts[i] for i in index)
        return Entry(self.label, names, self.texts, self.nats[index], self.tokens[index], numbers)

    def of_kind(self, kind: str) -> Entry:
        return self.take([i for i, name in enumerate(self.prompts) if name.startswith(kind)])


def read_entries(
    folder: Path,
    arms: Sequence[Arm],
    tokenizer: Callable[[], Tokenizer],
    prices: dict[str, float],
    *,
    seed: int = 0,
    whole: bool = False,
) -> dict[str, Entry]:
    """All readings there are results of, by `of_reading` of their arm. tokenizer: of `words_of`; whole: `diversity`."""
    entries = {}
    for arm in arms:
        records = read_records(file_of(folder, arm, seed))
        for reading in arm.readings if records else ():
            label = of_reading(arm.label, reading)
            entry = make_entry(label, records, reading, tokenizer, prices, whole)
            entries[of_reading(arm.name, reading)] = entry
    return entries


def of_reading(arm: str, reading: str) -> str:
    """`arm` for what the decoder gives, else `arm: reading`."""
    return arm if reading == "texts" else f"{arm}: {reading}"


def make_entry(
    label: str,
    records: Sequence[Record],
    reading: str,
    tokenizer: Callable[[], Tokenizer],
    prices: dict[str, float],
    whole: bool,
) -> Entry:
    texts = [record["readings"][reading] for record in records]
    wanted = TEXTS if max(map(len, texts)) > 1 else 1  # what a decoder of several lacks counts as repeated
    lengths = [
        [length_of(text, record) for text in each] for each, record in zip(texts, records, strict=True)
    ]
    rows = [{int(k): n for k, n in record["passes"].items()} for record in records]
    numbers = {
        "length": [np.mean(each) for each in lengths],
        "passes": [sum(each.values()) for each in rows],
        "rows": [sum(k * n for k, n in each.items()) for each in rows],
        "seconds": [price(record["passes"], prices) if prices else np.nan for record in records],
        "cpu_seconds": [np.nan if (took := record["cpu_seconds"]) is None else took for record in records],
        "width": [record["width"] for record in records],
    }
    if all("ids" in text for each in texts for text in each):
        measured = []
        for each in texts:
            words = [words_of(text, tokenizer) for text in each]
            measured.append(diversity([text["ids"] for text in each], words, wanted, whole=whole))
        numbers |= {name: [each[name] for each in measured] for name in measured[0]}
    return Entry(
        label,
        tuple(record["prompt"] for record in records),
        wanted,
        np.array([np.sum([text["nats"] for text in each], axis=0) for each in texts]),
        np.array([np.sum([in_quarters(length) for length in each], axis=0) for each in lengths], float),
        {name: np.array(values, float) for name, values in numbers.items()},
    )


def perplexity(entry: Entry, index: Index = slice(None)) -> float:
    """exp of the mean negative log-probability per token, over all tokens of all prompts together."""
    return float(np.exp(entry.nats[index].sum() / entry.tokens[index].sum()))


def mean(name: str) -> Statistic:
    return lambda entry, index=slice(None): float(entry.numbers[name][index].mean())


def measured(entry: Entry, statistic: Statistic) -> Value:
    return Value(*bootstrap(lambda index: statistic(entry, index), len(entry)))


def ratio(one: Entry, other: Entry, statistic: Statistic) -> Value:
    """The statistic of one over that of the other, on the prompts they share."""
    one, other = paired(one, other)
    return Value(*bootstrap(lambda index: statistic(one, index) / statistic(other, index), len(one)))


def paired(one: Entry, other: Entry) -> tuple[Entry, Entry]:
    shared = [name for name in one.prompts if name in set(other.prompts)]
    if not shared:
        raise ValueError(f"{one.label} and {other.label} have no prompt in common")
    first, second = ([entry.prompts.index(name) for name in shared] for entry in (one, other))
    return one.take(first), other.take(second)


def quarter(entry: Entry, part: int) -> Entry:
    """One quarter of the texts only, as far as perplexity goes."""
    chosen = slice(part, part + 1)
    return Entry(
        entry.label, entry.prompts, entry.texts, entry.nats[:, chosen], entry.tokens[:, chosen], entry.numbers
    )


def read_divergence(path: Path) -> dict[tuple[str, int], dict[str, Floats]]:
    """By rule and cap: `row` and `mixture` (prompts, steps), `width` (prompts,)."""
    by: dict[tuple[str, int], list[Record]] = {}
    for line in read_records(path):
        by.setdefault((line["attend"], line["cap"]), []).append(line)
    return {
        key: {name: np.array([line[name] for line in lines]) for name in ("row", "mixture", "width")}
        for key, lines in by.items()
    }


def read_prices(folder: Path) -> tuple[dict[str, float], str]:
    """Seconds of a pass by its rows, and where they come from; nothing before they were measured."""
    path = folder / "prices.json"
    found = json.loads(path.read_text()) if path.exists() else {"seconds": {}, "source": "not priced"}
    return found["seconds"], found["source"]
