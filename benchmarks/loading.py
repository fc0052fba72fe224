"""Time and memory of loading a model, beside mlx-lm loading what `convert` made of it; each in a process of its own.

    python -m benchmarks.loading [--model NAME] [--runs 5]

mlx-lm loads the directory twice: with the numbers as tempo-mlx holds them here (equal work), and as stored. Prints a
table (medians, range, ratio to mlx-lm's equal work), then one JSON line. Takes the default model two minutes on two
cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.studies import versions

# each prints seconds, and bytes of peak memory, from the first import to a model that could run
_TIMED = """
import resource, sys, time
from pathlib import Path
start = time.perf_counter()
{body}
seconds = time.perf_counter() - start
status = Path("/proc/self/status")
if status.exists():  # Linux passes ru_maxrss on from the parent process
    peak = int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(seconds, peak)
"""
_OURS = _TIMED.format(body="import tempo_mlx\nloaded = tempo_mlx.load(sys.argv[1])")
_THEIRS = _TIMED.format(body="from tempo_mlx import mlx\nfrom mlx_lm import load\nloaded = load(sys.argv[1])")


def measure(script: str, model: str) -> tuple[float, float]:
    run = subprocess.run([sys.executable, "-c", script, model], capture_output=True, text=True, check=True)
    seconds, peak = run.stdout.split()[-2:]
    return float(seconds), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()

    from tempo_mlx import load
    from tempo_mlx.weights.convert import convert

    info = load(options.model).model.info
    with tempfile.TemporaryDirectory() as directory:
        equal = convert(options.model, Path(directory) / "equal", dtype=info["dtype"])
        stored = convert(options.model, Path(directory) / "stored")
        cases = {
            f"tempo-mlx, {info['dtype']}": (_OURS, options.model),
            f"mlx-lm, {info['dtype']}": (_THEIRS, str(equal)),
            "mlx-lm, as stored": (_THEIRS, str(stored)),
        }
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for _ in range(options.runs):  # interleaved, so that a busy moment hits all
            for name, (script, model) in cases.items():
                samples[name].append(measure(script, model))
    rows = {name: np.array(each) for name, each in samples.items()}
    base = np.median(rows[f"mlx-lm, {info['dtype']}"], axis=0)
    print(f"{'':24} {'seconds':>8} {'range':>13} {'ratio':>6} {'peak MB':>8} {'ratio':>6}")
    for name, each in rows.items():
        seconds, peak = np.median(each, axis=0)
        spread = f"{each[:, 0].min():.2f} to {each[:, 0].max():.2f}"
        print(
            f"{name:24} {seconds:8.2f} {spread:>13} {seconds / base[0]:6.2f} {peak / 1e6:8.0f} {peak / base[1]:6.2f}"
        )
    result = {
        "benchmark": "loading",
        "samples": {name: each.tolist() for name, each in rows.items()},
        "versions": versions(info),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
