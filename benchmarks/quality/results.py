"""What there is of one model in its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import arms as table
from benchmarks.quality.answers import Claim, Entries, claims, markdown
from benchmarks.quality.running import file_of
from benchmarks.quality.summary import Entry, of_reading, read_entries, read_prices
from benchmarks.studies import read_records
from tempo_mlx.weights import Tokenizer, open_checkpoint

Rated = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Results:
    """Each part is read once it is asked for; what there are no results of is empty."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.parent.name

    @property
    def short(self) -> str:
        """The name without what it was trained and stored as."""
        return re.sub(r"-(instruct|q\d\w*)(?=-|$)", "", self.name, flags=re.IGNORECASE)

    @cached_property
    def about(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "about.json").read_text("utf-8"))
        return found

    @property
    def facts(self) -> str:
        """As a table."""
        rows = [(key, str(value)) for key, value in self.about.items() if value is not None]
        return markdown(("what", "value"), rows)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return open_checkpoint(self.about["id"]).tokenizer()

    def tokenizer(self) -> Tokenizer:
        """For texts that were kept as ids alone."""
        return self._tokenizer

    @cached_property
    def prices(self) -> tuple[dict[str, float], str]:
        return read_prices(self.folder)

    def entries(self, stage: str, arms: Sequence[table.Arm], **how: Any) -> Entries:
        return read_entries(self.folder / stage, arms, self.tokenizer, self.prices[0], **how)

    @cached_property
    def tests(self) -> Entries:
        return self.entries("test", (*table.MAIN, *table.STUDIES))

    @cached_property
    def long(self) -> Entries:
        return self.entries("long", table.LONG, whole=True)

    @cached_property
    def tried(self) -> Entries:
        return self.entries("tuning", table.TUNING)

    @cached_property
    def claims(self) -> list[Claim]:
        return claims(self.tests)

    def drawn(self, arm: table.Arm) -> dict[int, Entry]:
        """The texts of an arm by seed, 0 first."""
        folder = self.folder / "test"
        further = [int(path.stem.rpartition("-")[2]) for path in folder.glob(file_of(folder, arm, "*").name)]
        found = {seed: self.entries("test", (arm,), seed=seed) for seed in (0, *sorted(further))}
        return {seed: entries[arm.name] for seed, entries in found.items() if entries}

    def judged(self) -> Iterator[tuple[str, dict[str, Rated]]]:
        """Every judge of its texts, and what it made of them: of each reading, by prompt, nats and bytes."""
        for folder in sorted((self.folder / "judge").glob("*")):
            rated: dict[str, Rated] = {}
            for arm in (*table.MAIN, *table.STUDIES):
                for line in read_records(file_of(folder, arm)):
                    for reading, texts in line["readings"].items():
                        nats, _, size = np.sum(texts, axis=0)
                        rated.setdefault(of_reading(arm.name, reading), {})[line["prompt"]] = nats, size
            yield folder.name, rated


def read_results(out: Path, kind: str) -> list[Results]:
    """Of every model whose texts were measured, by name."""
    folders = sorted(out.glob(f"*/{kind}"))
    return [Results(folder) for folder in folders if any((folder / "test").glob("*.jsonl"))]


def folder_name(model: str) -> str:
    """A model's: its file's, its directory's, or the last part of its name."""
    return Path(model).name.removesuffix(".gguf")
