"""Interleaved timing: cases take turns, so that a busy moment of the machine hits all of them equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

SETTLE = 0.01  # seconds, for the previous case's threads to go to sleep


@dataclass(frozen=True)
class Timing:
    """Seconds of many runs of one case. The lower quartile is compared, as noise only adds time."""

    samples: tuple[float, ...]

    @property
    def quartile(self) -> float:
        return float(np.quantile(self.samples, 0.25))

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def spread(self) -> float:
        """Interquartile range relative to the median."""
        low, high = np.quantile(self.samples, [0.25, 0.75])
        return float((high - low) / self.median)


def stopwatch(work: Callable[[], object]) -> float:
    """Time `work`, in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(
    cases: Mapping[str, Callable[[], float]], rounds: int, *, repeats: int = 1, warm_up: bool = True
) -> dict[str, Timing]:
    """Run each case `rounds` times `repeats`, in turns; a case returns the seconds it took.

    Every turn begins with a pause and, with `warm_up`, an uncounted run, as the previous case has filled the CPU caches
    with its own weights.
    """
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            time.sleep(SETTLE)
            if warm_up:
                case()
            samples[name] += [case() for _ in range(repeats)]
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def ratio(timings: Mapping[str, Timing], one: str, other: str) -> float | None:
    """Lower quartile of one relative to the other's; None if the other was not timed."""
    return timings[one].quartile / timings[other].quartile if other in timings else None
