"""How a step's cost grows with the work: long runs of every kind, by quarters, and what their records take.

    python -m benchmarks.growth [--model NAME] [--steps 4000] [--kind NAME ...]

The model's passes are timed apart from everything else, since they read the more slots the longer the run is; the rest
should not grow with it. Prints a table, then one JSON line for each kind. Two cores, the default model: about an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

import tempo_mlx
from benchmarks.studies import versions
from tempo_mlx.model.forward import Around, Forward

PROMPT = "Once upon a time"
QUARTERS = 4
KINDS: dict[str, dict[str, Any]] = {
    "superposed, pruned": {"use_retroactive_pruning": True},
    "8 branches": {"branches": 8},
    "MCTS": {"decoder": "mcts"},
    "enumerate, 64 leaves": {"leaves": 64, "threshold": 0.01},
    "5 paths": {"paths": 5},
}


class Timed(Around):
    """A model that says how long its passes took."""

    seconds = 0.0

    def forward(self, *inputs: Any, **options: Any) -> Forward:
        start = time.perf_counter()
        found = self.model.forward(*inputs, **options)
        self.seconds += time.perf_counter() - start
        return found


def measure(loaded: tempo_mlx.LoadedModel, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """One run of so many steps at most; milliseconds a step, in each quarter of it and at the end."""
    model = Timed(loaded.model)
    timed = tempo_mlx.LoadedModel(model, loaded.tokenizer, loaded.config)
    length = {"max_tokens": steps, **({} if "leaves" in settings else {"min_steps": steps})}
    decoding = tempo_mlx.stream(timed, PROMPT, **settings, **length)
    at = [(time.perf_counter(), model.seconds)]
    for _ in decoding:
        at.append((time.perf_counter(), model.seconds))
    whole, inside = np.diff(np.array(at[1:]), axis=0).T * 1e3  # the first step has the prompt's pass
    outside = [float(np.median(part)) for part in np.array_split(whole - inside, QUARTERS)]
    passes = [float(np.median(part)) for part in np.array_split(inside, QUARTERS)]
    ended, run = timed_call(decoding.run)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        saved, _ = timed_call(lambda: run.save(path))
        loading, again = timed_call(lambda: tempo_mlx.Run.load(path))
        size = path.stat().st_size
    assert again == run
    shown, _ = timed_call(lambda: run.phrases) if run.decoder == "superposed" else (None, None)
    return {
        "steps": len(at) - 1,
        "members": sum(len(step.tokens) for step in run.steps),
        "outside_ms": outside,
        "passes_ms": passes,
        "run_s": ended,
        "save_s": saved,
        "load_s": loading,
        "phrases_s": shown,
        "megabytes": size / 1e6,
    }


def timed_call(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--kind", nargs="+", choices=[*KINDS], default=[*KINDS])
    options = parser.parse_args()
    loaded = tempo_mlx.load(options.model)
    print(f"{'':22}{'steps':>6}{'members':>8}  outside the passes, ms a step   passes, ms a step")
    results = []
    for kind in options.kind:
        result = {"benchmark": "growth", "kind": kind, **measure(loaded, KINDS[kind], options.steps)}
        results.append({**result, "versions": versions(loaded.model.info)})
        outside, passes = (
            " ".join(f"{value:7.1f}" for value in result[name]) for name in ("outside_ms", "passes_ms")
        )
        print(f"{kind:22}{result['steps']:6}{result['members']:8}{outside:>32}{passes:>32}")
        ends = ", ".join(
            f"{name} {result[f'{name}_s']:.2f} s"
            for name in ("run", "save", "load", "phrases")
            if result[f"{name}_s"] is not None
        )
        print(f"{'':22}{ends}, {result['megabytes']:.1f} MB", flush=True)
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
