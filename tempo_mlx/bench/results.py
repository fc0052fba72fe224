"""The results of a suite, as a table, JSON lines and the page show them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tempo_mlx.bench.timing import Timing
from tempo_mlx.files import write_atomic

MLX_LM = "mlx-lm"  # the usual reference


@dataclass(frozen=True)
class Measurement:
    """One contender on one case. value: the lower quartile, in `unit`. ratio: to `reference` on the same case."""

    case: str
    contender: str
    unit: str
    value: float
    median: float
    spread: float
    runs: int
    ratio: float | None = None
    reference: str | None = None

    @classmethod
    def of(
        cls, case: str, contender: str, timing: Timing, beside: tuple[str, Timing] | None = None
    ) -> Measurement:
        """In milliseconds; `beside`: the reference of the ratio, by name."""
        name, other = beside or (None, None)
        ratio = None if other is None else timing.quartile / other.quartile
        quartile, median = timing.quartile * 1e3, timing.median * 1e3
        return cls(case, contender, "ms", quartile, median, timing.spread, len(timing.samples), ratio, name)


@dataclass(frozen=True)
class Goal:
    """A figure of merit and the bound that the project set for the reference machine."""

    what: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value <= self.bound


@dataclass
class Result:
    """One suite. floor: the theoretical minimum, in the rows' unit, with the reason in words. load_average: of the
    machine during the measurement.
    """

    suite: str
    about: str
    rows: list[Measurement] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    floor: float | None = None
    floor_is: str = ""
    notes: list[str] = field(default_factory=list)
    load_average: float | None = None

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Result:
        """The inverse of `asdict`."""
        rows, goals = (
            [kind(**each) for each in stored[name]] for kind, name in ((Measurement, "rows"), (Goal, "goals"))
        )
        return cls(**{**stored, "rows": rows, "goals": goals})

    def value(self, case: str, contender: str) -> float | None:
        return next((row.value for row in self.rows if (row.case, row.contender) == (case, contender)), None)

    def add(self, case: str, timings: Mapping[str, Timing], reference: str = MLX_LM) -> None:
        """All contenders on one case, compared with the reference, or with the first if that does not take part."""
        reference = reference if reference in timings else next(iter(timings))
        for name, timing in timings.items():
            beside = None if name == reference else (reference, timings[reference])
            self.rows.append(Measurement.of(case, name, timing, beside))

    def reads(self, size: float, what: str, bandwidth: float) -> None:
        """Set the floor to the time of reading `size` bytes once."""
        self.floor = 1e3 * size / bandwidth
        self.floor_is = f"{size / 1e6:.0f} MB of {what}, read once at {bandwidth / 1e9:.1f} GB/s"

    def goal(self, what: str, value: float | None, bound: float) -> None:
        """Add a figure with its bound, if it was measured."""
        if value is not None:
            self.goals.append(Goal(what, value, bound))


COLUMNS = ("case", "contender", "lower quartile", "median", "spread", "ratio")


def cells(row: Measurement) -> tuple[str, ...]:
    """A row as text, in the order of COLUMNS."""
    digits = 0 if row.value >= 1000 else 1 if row.value >= 10 else 2
    value, median = (f"{number:.{digits}f} {row.unit}" for number in (row.value, row.median))
    ratio = "" if row.ratio is None else f"{row.ratio:.2f} x {row.reference}"
    return row.case, row.contender, value, median, f"{row.spread:.0%}", ratio


def floor_line(result: Result) -> str | None:
    if result.floor is None:
        return None
    return f"Floor: {result.floor:.1f} {result.rows[0].unit if result.rows else 'ms'} ({result.floor_is})."


def read_results(path: Path, conditions: Mapping[str, Any]) -> dict[str, Result]:
    """The results in a file, by suite, if measured under the same conditions; otherwise none."""
    try:
        stored = json.loads(path.read_text("utf-8"))
        if stored["conditions"] == dict(conditions):
            return {each["suite"]: Result.from_dict(each) for each in stored["suites"]}
    except (OSError, ValueError, LookupError, TypeError):
        pass  # nothing to continue from
    return {}


def write_results(path: Path, conditions: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write what `read_results` reads."""
    suites = [asdict(result) for result in results]
    write_atomic(path, json.dumps({"conditions": dict(conditions), "suites": suites}, indent=1) + "\n")


def to_json(result: Result, environment: Mapping[str, Any]) -> list[str]:
    """One self-contained line per row."""
    shared = {"floor": result.floor, "environment": dict(environment)}
    return [json.dumps({"benchmark": result.suite, **asdict(row), **shared}) for row in result.rows]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as needed, whatever the terminal."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in (header, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
