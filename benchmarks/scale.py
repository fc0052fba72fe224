"""What a rank holds and what a pass costs when a model is spread over several: measured, beside a model of it.

    python -m benchmarks.scale [--model NAME] [--ranks 1,2,4]          all ranks on this machine
    mlx.launch --hostfile hosts.json -- python -m benchmarks.scale     one row, of these machines and their links

Prints a table; of this machine's ranks it also keeps what is behind it in --out and renews the tables of --page. Two
cores, the default model: a minute, and nothing else should run. A pass has 1 or 8 rows after 64 slots, medians. `sum`
and `gather` are MLX's collectives alone, of the sizes that such a pass has; `order` is a call on all ranks that does
nothing. The model says

    pass(n) = pass(1) x the largest shard's part of the weights + sums x sum + gather + order

where on one machine, whose memory and cores ranks share, pass(1) is that of n whole models beside each other. What it
leaves out is the wait for the slower rank at every sum. `--predict` evaluates it for links that others measured.
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

ROOT = Path(__file__).resolve().parent.parent
CONTEXT, ROWS, REPEATS = 64, (1, 8), 25


def collectives(local: Any, rows: int, hidden: int, vocabulary: int) -> tuple[float, float]:
    """Seconds of one sum of (rows, hidden) and of one gather of the logits."""
    from tempo_mlx.mlx import mx

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
    from tempo_mlx.mlx import mx
    from tempo_mlx.ranks.model import DistributedModel

    loaded = tempo_mlx.load(model, device="cpu")
    a, leader = loaded.model.architecture, loaded.leader
    cache = loaded.model.new_cache()
    loaded.model.forward(np.arange(CONTEXT), np.arange(CONTEXT), None, cache, logits="none")
    if isinstance(loaded.model, DistributedModel):
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
    from tempo_mlx.ranks.model import cache_bytes

    sizes: list[int] = model.leader.run_all(cache_bytes, cache.number)
    return sizes


def predicted(row: dict[str, Any], one: dict[str, Any], rows: int) -> float:
    """Seconds of a pass, from that of whole models and the links."""
    share = max(row["weights_mb"]) / one["weights_mb"][0]
    reading: float = row["beside"][rows] * share
    return reading + row["sums"] * row["sum"][rows] + row["gather"][rows] + row["order"]


def local_rows(model: str, counts: list[int]) -> list[dict[str, Any]]:
    """Ranks on this machine. `beside`: a pass of one process while as many others as there are ranks run theirs."""
    command = [sys.executable, "-m", "benchmarks.scale", "--model", model, "--here"]
    launcher = [str(Path(sys.executable).parent / "mlx.launch"), "--backend", "ring", "-n"]
    rows = []
    for count in counts:
        whole = [_start(command) for _ in range(count)]
        beside = [_result(process)["passes"] for process in whole]
        row = _result(_start(command if count == 1 else [*launcher, str(count), "--", *command]))
        row["beside"] = {number: float(np.median([each[number] for each in beside])) for number in ROWS}
        rows.append(row)
    return rows


def _start(command: list[str]) -> subprocess.Popen[str]:
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)


def _result(process: subprocess.Popen[str]) -> dict[Any, Any]:
    out, err = process.communicate()
    if process.returncode or not out.strip():
        sys.exit(err)
    found: dict[Any, Any] = json.loads(out.splitlines()[-1], object_hook=_numbered)
    return found


def _numbered(table: dict[str, Any]) -> dict[Any, Any]:
    """JSON's keys are texts."""
    return {int(key) if key.isdigit() else key: value for key, value in table.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """The first row is of one process, or the only one."""
    whole = rows[0]["weights_mb"][0] if rows[0]["ranks"] == 1 else None
    lines = [
        "| ranks | weights, largest shard | peak, largest | rows | n whole models | sum | gather | order | the model "
        "| pass |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for number in ROWS:
            cells = [
                row["ranks"],
                *(_share(max(row[name]), whole) for name in ("weights_mb", "peak_mb")),
                number,
            ]
            times = [row.get("beside", {}).get(number)]
            times += [row["sum"].get(number), row["gather"].get(number), row["order"] or None]
            times.append(predicted(row, rows[0], number) if whole and row["ranks"] > 1 else None)
            cells += [
                "" if each is None else f"{1e3 * each:.2f} ms" for each in (*times, row["passes"][number])
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _share(megabytes: float, whole: float | None) -> str:
    return f"{megabytes:.0f} MB" + (f" ({megabytes / whole:.1%})" if whole else "")


# What others measured, docs/scale.md says who: microseconds a message, GB/s, messages one after another in a sum.
LINKS = [
    ("TCP ring, 10 Gbit Ethernet", 150.0, 1.1, lambda ranks: 2 * (ranks - 1)),
    ("TCP ring, Thunderbolt", 190.0, 4.0, lambda ranks: 2 * (ranks - 1)),
    ("JACCL, Thunderbolt 5", 13.0, 6.7, lambda ranks: 2),
]
MEMORY = 400.0  # GB/s, of a Max chip
MODELS = [("8B, 4 bits", 4.5, 32, 4096), ("70B, 4 bits", 40.0, 80, 8192)]


def predictions(rows: int = 8) -> str:
    """A pass on 1, 2 and 4 machines, whose time is that of reading the weights and of the sums."""
    lines = ["| model | link | 1 machine | 2 | 4 |", "|---|---|---|---|---|"]
    for model, gigabytes, layers, hidden in MODELS:
        for link, microseconds, speed, messages in LINKS:
            cells = [model, link]
            for ranks in (1, 2, 4):
                sums = (2 * layers + 1) * (ranks > 1)
                octets = sums * 2 * (ranks - 1) / ranks * rows * hidden * 2  # half precision
                reading = gigabytes / MEMORY / ranks
                seconds = reading + sums * messages(ranks) * microseconds * 1e-6 + octets / speed / 1e9
                cells.append(f"{1e3 * seconds:.1f} ms")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PLACES = {"measured": "| ranks |", "predicted": "| model | link |"}  # how each table of the page begins


def renewed(page: str, tables: dict[str, str]) -> str:
    """The page with these tables in the places of its own."""
    parts = page.split("\n\n")
    for name, begins in PLACES.items():
        (place,) = [i for i, part in enumerate(parts) if part.startswith(begins)]
        parts[place] = tables[name]
    return "\n\n".join(parts)


def kept(path: Path) -> list[dict[Any, Any]]:
    return [json.loads(line, object_hook=_numbered) for line in path.read_text("utf-8").splitlines()]


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
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "scale.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "scale.md")
    options = parser.parse_args()

    from tempo_mlx.ranks.processes import rank

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
        options.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
        tables = {"measured": table(kept(options.out)), "predicted": predictions()}
        options.page.write_text(renewed(options.page.read_text("utf-8"), tables), "utf-8")


if __name__ == "__main__":
    main()
