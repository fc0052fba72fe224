"""What a step spends on the lattice: appending a set, its attention bias, its posterior, beside the forward pass.

    python -m benchmarks.bookkeeping [--model NAME] [--width 4]

Prints a table over lattice sizes (the share of the step; the growth from one size to the next), then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from benchmarks.studies import versions
from tempo_mlx import load
from tempo_mlx.lattice import Lattice

SIZES = (500, 1000, 2000, 4000)
REPEATS = 20


def lattice_of(slots: int, width: int, random: np.random.Generator) -> Lattice:
    """A lattice of about `slots` slots in sets of `width`, after a prompt of 50."""
    lattice = Lattice(50)
    lattice.append(random.dirichlet(np.ones(width)), None)
    while lattice.size < slots:
        lattice.append(random.dirichlet(np.ones(width)), random.dirichlet(np.ones(width), size=width).T)
    return lattice


def median_ms(samples: list[float]) -> float:
    return float(np.median(samples)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--width", type=int, default=4)
    options = parser.parse_args()
    model, random, rows = load(options.model).model, np.random.default_rng(0), []
    print(f"{'slots':>6} {'lattice ms':>11} {'step ms':>9} {'share':>7}")
    for size in SIZES:
        lattice = lattice_of(size, options.width, random)
        cache = model.new_cache()
        for start in range(0, lattice.size, 512):
            count = min(512, lattice.size - start)
            model.forward(np.ones(count, int), np.arange(start, start + count), None, cache, logits="none")
        kept, steps, books = len(cache), [], []
        for _ in range(REPEATS):
            posterior = random.dirichlet(np.ones(options.width), size=options.width).T
            start = time.perf_counter()
            lattice.append(np.full(options.width, 1 / options.width), posterior)
            bias = lattice.bias("lineage")
            lattice.posterior()
            books.append(time.perf_counter() - start)
            rows_bias = np.concatenate([bias[:, :kept], bias[:, -options.width :]], axis=1)
            start = time.perf_counter()
            model.forward(np.ones(options.width, int), np.full(options.width, 5000), rows_bias, cache)
            steps.append(time.perf_counter() - start)
            cache.truncate(kept)
        row = {"slots": size, "lattice_ms": median_ms(books), "step_ms": median_ms(steps)}
        row["share"] = row["lattice_ms"] / row["step_ms"]
        rows.append(row)
        print(f"{size:6} {row['lattice_ms']:11.3f} {row['step_ms']:9.1f} {row['share']:7.2%}")
    result = {
        "benchmark": "bookkeeping",
        "width": options.width,
        "rows": rows,
        "versions": versions(model.info),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
