"""What a rank holds and what a pass costs when a model is spread over several: measured, beside a model of it.

    python -m benchmarks.scale [--model NAME] [--ranks 1,2,4]          all ranks on this machine
    mlx.launch --hostfile hosts.json -- python -m benchmarks.scale     one row, of these machines and their links

Prints a table, then one JSON line. A pass has 1 or 8 rows after 64 slots, medians. `sum` and `gather` are MLX's
collectives alone, of the sizes that such a pass has; `order` is a call on all ranks that does nothing. The model says

    pass(n) = pass(1) x the largest shard's part of the weights + sums x sum + gather + order

`--predict` evaluates it for links and memory given by hand, in place of measuring.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies import versions

CONTEXT, ROWS, REPEATS = 64, (1, 8), 15


def collectives(local: Any, rows: int, hidden: int, vocabulary: int) -> tuple[float, float]:
    """Seconds of one sum of (rows, hidden) and of one gather of the logits."""
    from tempo_mlx.model._mlx import mx

    x, y = mx.zeros((rows, hidden)), mx.zeros((1, rows, vocabulary // local.group.size()))

    def add() -> None:
        mx.eval(mx.distributed.all_sum(x, group=local.group))

    def gather() -> None:
        mx.eval(mx.distributed.all_gather(y, group=local.group))

    return median(add, 60), median(gather, REPEATS)


def nothing(local: Any) -> None:
    pass


def median(work: Callable[[], object], repeats: int = REPEATS) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def measure(model: str) -> dict[str, Any]:
    """The row of the ranks that this process is one of; returns on rank 0 only."""
    import tempo_mlx
    from tempo_mlx.model._mlx import mx
    from tempo_mlx.model.parallel import ParallelModel

    loaded = tempo_mlx.load(model, device="cpu")
    a, leader = loaded.model.architecture, loaded.leader
    cache = loaded.model.new_cache()
    loaded.model.forward(np.arange(CONTEXT), np.arange(CONTEXT), None, cache, logits="none")
    if isinstance(loaded.model, ParallelModel):
        held = [
            now - part
            for (now, _), part in zip(loaded.model.memory(), caches(loaded.model, cache), strict=True)
        ]
        peaks = [peak for _, peak in loaded.model.memory()]
    else:
        held, peaks = [mx.get_active_memory() - cache.nbytes], [mx.get_peak_memory()]
    row: dict[str, Any] = {
        "ranks": len(held),
        "versions": versions(loaded.model.info),
        "weights_mb": [each / 1e6 for each in held],
        "peak_mb": [each / 1e6 for each in peaks],
        "sums": 2 * a.num_hidden_layers + 1,
        "order": 0.0,
        **{name: {} for name in ("passes", "sum", "gather")},
    }
    for rows in ROWS:

        def run(rows: int = rows) -> None:
            loaded.model.forward(np.arange(rows), np.full(rows, CONTEXT), None, cache)
            cache.truncate(CONTEXT)

        row["passes"][rows] = median(run)
        if leader is not None:
            row["sum"][rows], row["gather"][rows] = leader.run(collectives, rows, a.hidden_size, a.vocab_size)
    if leader is not None:
        row["order"] = median(lambda: leader.run(nothing), 60)
    return row


def caches(model: Any, cache: Any) -> list[int]:
    from tempo_mlx.model.parallel import _nbytes

    sizes: list[int] = model.leader.run_all(_nbytes, cache.number)
    return sizes


def predicted(row: dict[str, Any], one: dict[str, Any], rows: int) -> float:
    """Seconds of a pass, from one process's and the links."""
    share = max(row["weights_mb"]) / one["weights_mb"][0]
    alone: float = one["passes"][rows] * share
    return (
        alone
        if row["ranks"] == 1
        else alone + row["sums"] * row["sum"][rows] + row["gather"][rows] + row["order"]
    )


def local_rows(model: str, ranks: list[int]) -> list[dict[str, Any]]:
    rows = []
    for count in ranks:
        command = [sys.executable, "-m", "benchmarks.scale", "--model", model, "--here"]
        if count > 1:
            launcher = [
                str(Path(sys.executable).parent / "mlx.launch"),
                "-n",
                str(count),
                "--backend",
                "ring",
                "--",
            ]
            command = [*launcher, *command]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode or not done.stdout.strip():
            sys.exit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1], object_hook=_numbered))
    return rows


def _numbered(table: dict[str, Any]) -> dict[Any, Any]:
    """JSON's keys are texts."""
    return {int(key) if key.isdigit() else key: value for key, value in table.items()}


def table(rows: list[dict[str, Any]]) -> str:
    one = rows[0]
    lines = [
        "| ranks | weights, largest shard | peak, largest | rows | sum | gather | order | pass, measured | the model |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        weights, peak = max(row["weights_mb"]), max(row["peak_mb"])
        held = f"{weights:.0f} MB ({weights / one['weights_mb'][0]:.1%})"
        most = f"{peak:.0f} MB ({peak / one['weights_mb'][0]:.1%})"
        for number in ROWS:
            links = [
                f"{1e3 * row[name][number]:.2f} ms" if row[name] else "" for name in ("sum", "gather")
            ] + [f"{1e3 * row['order']:.2f} ms" if row["order"] else ""]
            model = (
                f"{1e3 * predicted(row, one, number):.1f} ms"
                if row["ranks"] > 1 and one["ranks"] == 1
                else ""
            )
            cells = [row["ranks"], held, most, number, *links, f"{1e3 * row['passes'][number]:.1f} ms", model]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def predict(gigabytes: float, bandwidth: float, layers: int, hidden: int, message: float, link: float) -> str:
    """Milliseconds of a pass of 8 rows on 1, 2 and 4 machines. bandwidth, link: GB/s; message: microseconds."""
    cells = []
    for ranks in (1, 2, 4):
        messages = (2 * layers + 1) * 2 * (ranks - 1) + ranks - 1
        octets = (2 * layers + 1) * 2 * (ranks - 1) / ranks * 8 * hidden * 2
        seconds = gigabytes / bandwidth / ranks + messages * message * 1e-6 + octets / link / 1e9
        cells.append(f"{1e3 * seconds:.1f} ms")
    return " | ".join(cells)


MACHINE = 400.0  # GB/s that a Max chip reads memory at, as Apple says
MODELS = [("8B, 4 bits", 4.5, 32, 4096), ("70B, 4 bits", 40.0, 80, 8192)]
LINKS = [
    ("10 Gbit Ethernet, 150 us", 150.0, 1.1),
    ("Thunderbolt, TCP, 60 us", 60.0, 4.0),
    ("Thunderbolt 5, RDMA, 10 us", 10.0, 6.0),
]


def predictions() -> str:
    lines = ["| model | link, assumed | 1 machine | 2 | 4 |", "|---|---|---|---|---|"]
    for name, gigabytes, layers, hidden in MODELS:
        for link, message, speed in LINKS:
            lines.append(
                f"| {name} | {link} | {predict(gigabytes, MACHINE, layers, hidden, message, speed)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--predict", action="store_true", help="print the model's table for assumed links")
    parser.add_argument(
        "--here", action="store_true", help="measure this process's ranks, and print one JSON line"
    )
    options = parser.parse_args()

    from tempo_mlx.model.ranks import rank

    if options.predict:
        print(predictions())
    elif options.here:
        print(json.dumps(measure(options.model)), flush=True)
    elif rank() is not None:
        row = measure(options.model)
        print(table([row]))
    else:
        rows = local_rows(options.model, [int(part) for part in options.ranks.split(",")])
        print(table(rows))
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
