"""What a pass of so many rows takes on an idle machine: with it, passes become seconds that no neighbour disturbs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64, 128, 256, 512)
SLOTS = 40  # of context: what the runs hold on average


def measure_prices(model: Any, rounds: int = 5) -> dict[int, float]:
    """Seconds of a pass by its rows: the median of `rounds`, the sizes taking turns."""
    cache = model.new_cache()
    model.forward(np.arange(SLOTS), np.arange(SLOTS), None, cache, logits="none")
    taken: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(rounds + 1):  # the first warms up
        for rows in ROWS:
            bias = np.zeros((rows, SLOTS + rows), np.float32)
            start = time.perf_counter()
            model.forward(np.arange(rows), np.full(rows, SLOTS), bias, cache)
            taken[rows].append(time.perf_counter() - start)
            cache.truncate(SLOTS)
    return {rows: round(float(np.median(seconds[1:])), 5) for rows, seconds in taken.items()}


def price(passes: Mapping[str, int], prices: Mapping[str, float]) -> float:
    """Seconds of passes by their rows, sizes between the measured ones interpolated."""
    known = sorted((int(rows), seconds) for rows, seconds in prices.items())
    sizes, seconds = zip(*known, strict=True)
    return float(sum(count * np.interp(int(rows), sizes, seconds) for rows, count in passes.items()))
