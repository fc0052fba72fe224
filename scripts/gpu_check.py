"""Check tempo-mlx on this machine's GPU in one go: Metal, or CUDA with MLX's CUDA build. Within four minutes.

    python scripts/gpu_check.py --out gpu-check                   # all parts; report in gpu-check/report.json
    python scripts/gpu_check.py --out gpu-check --model x.gguf    # a real packed model in place of a random one
    python scripts/gpu_check.py --rehearse --out gpu-check        # without a GPU: small, on the CPU, by the GPU's rules
    python scripts/gpu_check.py --plan                            # what it would do here, and nothing else

Needs no network: models are random, of a real model's shape, unless given. Each part runs in a process of its own, so
that one that fails, hangs or takes the device down with it does not hide the others. Exit code 1 if any part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gpu_parts import PARTS, Bench, Failed

ROOT = Path(__file__).resolve().parent.parent


def run_part(name: str, bench: Bench) -> int:
    """In a process of its own: writes OUT/parts/NAME.json."""
    from tempo_mlx.model import device

    start = time.perf_counter()
    told: dict[str, Any] = {}
    ok = False
    by_gpu_rules = patch.object(device, "on_gpu", return_value=True)
    try:
        with by_gpu_rules if bench.rehearse else patch.dict(os.environ):
            sentence, told = PARTS[name][0](bench)
        ok = True
    except Failed as problem:
        sentence, *rest = problem.args
        told = rest[0] if rest else {}
    except Exception as problem:  # the report has it, and the other parts go on
        sentence = f"{type(problem).__name__}: {str(problem).splitlines()[0][:300] if str(problem) else ''}"
        told = {"traceback": traceback.format_exc().splitlines()[-25:]}
    result = {"ok": ok, "sentence": sentence, "seconds": round(time.perf_counter() - start, 1), "found": told}
    path = bench.out / "parts" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=str))
    return 0 if ok else 1


def run_all(options: argparse.Namespace, names: list[str]) -> int:
    out = Path(options.out).resolve()
    (out / "parts").mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    results: dict[str, Any] = {}
    for name in names:
        (out / "parts" / f"{name}.json").unlink(missing_ok=True)
        left = deadline - time.monotonic()
        if left < 8:
            results[name] = {
                "ok": False,
                "sentence": f"Not begun: the {options.seconds} seconds were over.",
                "seconds": 0,
            }
        else:
            results[name] = in_own_process(name, options, out, min(left, PARTS[name][1] * options.patience))
        row = results[name]
        print(
            f"{'PASS' if row['ok'] else 'FAIL'}  {name:<9} {row['seconds']:>5} s  {row['sentence']}",
            flush=True,
        )
    failed = [name for name, row in results.items() if not row["ok"]]
    report = {
        "format": "tempo-mlx/gpu-check",
        "rehearsal": options.rehearse,
        "failed": failed,
        "parts": results,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1, default=str))
    print(
        f"{len(results) - len(failed)} of {len(results)} parts passed; all that was found: {out / 'report.json'}"
    )
    return 1 if failed else 0


def in_own_process(name: str, options: argparse.Namespace, out: Path, seconds: float) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--out", str(out)]
    command += ["--rehearse"] if options.rehearse else []
    for flag in ("model", "default"):
        command += [f"--{flag}", getattr(options, flag)] if getattr(options, flag) else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    log = out / "parts" / f"{name}.log"
    with log.open("w") as file:
        try:
            code: int | str = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False,
                env={**os.environ, "PYTHONPATH": path},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = f"it was stopped after {seconds:.0f} seconds"
    took = round(time.perf_counter() - start, 1)
    written = out / "parts" / f"{name}.json"
    if written.exists():
        return {**json.loads(written.read_text()), "seconds": took}
    tail = log.read_text(errors="replace").splitlines()[-12:]
    reason = code if isinstance(code, str) else f"the process ended with code {code} and wrote nothing"
    return {
        "ok": False,
        "sentence": f"No result: {reason}; {' | '.join(tail[-2:])[:300]}",
        "seconds": took,
        "log": tail,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        default=tempfile.gettempdir() + "/tempo-gpu-check",
        help="folder for the report and random models",
    )
    parser.add_argument("--model", help="a packed GGUF file, in place of a random one")
    parser.add_argument(
        "--default", help="the model of the decoder and parity parts (default: smollm2-135m if it is here)"
    )
    parser.add_argument("--parts", help="only these, separated by commas: " + ", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=230, help="in all")
    parser.add_argument("--patience", type=float, default=1.0, help="times each part's own limit")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with small models, by the GPU's rules"
    )
    parser.add_argument("--plan", action="store_true", help="say what would be done")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.parts.split(",") if options.parts else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"{unknown[0]} is no part; they are {', '.join(PARTS)}")
    if options.part:
        return run_part(options.part, Bench(options))
    sys.path.insert(0, str(ROOT))
    from tempo_mlx.mlx import mx

    gpu = mx.metal.is_available() or mx.cuda.is_available()
    if options.plan or not (gpu or options.rehearse):
        print(
            "Would do"
            if gpu
            else "No GPU that MLX can use is here (--rehearse runs it on the CPU). On one it would do:"
        )
        for name in names:
            print(f"  {name:<9} {PARTS[name][0].__doc__}")
        return 0
    return run_all(options, names)


if __name__ == "__main__":
    sys.exit(main())
