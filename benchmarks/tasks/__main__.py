"""Do several texts help on tasks? Programs, sums, and short questions, by each way to get several texts.

    python -m benchmarks.tasks run humaneval --data HumanEval.jsonl.gz --model MODEL [--arm NAME ...]
    python -m benchmarks.tasks run gsm8k --data gsm8k-test.jsonl --model MODEL
    python -m benchmarks.tasks run questions --model MODEL
    python -m benchmarks.tasks report

Results are kept in --out, a line a problem and arm: what is there is not computed again, so an interrupted run goes on
where it stopped, and --minutes ends one part of a long run. Seeds are fixed. Programs that a model wrote run in a
sandbox (tempo_mlx/sandbox.py). An arm of eight programs takes a model of 0.5 billion parameters about 25 minutes of one
core, with --together 16.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tempo_mlx
from benchmarks.tasks.arms import arms_for
from benchmarks.tasks.page import write_page
from benchmarks.tasks.problems import read_task
from benchmarks.tasks.running import run_arm

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "benchmarks" / "results" / "tasks"
TIMED = 10  # problems


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    stages = parser.add_subparsers(dest="stage", required=True)
    run = stages.add_parser("run")
    run.add_argument("task", choices=("humaneval", "gsm8k", "questions"))
    run.add_argument("--data", type=Path, help="the data set's file")
    run.add_argument("--model", required=True)
    run.add_argument("--arm", nargs="+", metavar="ARM", help="these arms; all unless given")
    run.add_argument(
        "--tuning", action="store_true", help="the problems kept for tuning, in files of their own"
    )
    run.add_argument("--problems", type=int, help="at most so many problems, for now")
    run.add_argument("--minutes", type=float, default=60.0, help="stop decoding after so long")
    run.add_argument("--together", type=int, default=1, help="problems that are run at once; not timed")
    run.add_argument("--timing", action="store_true", help="the problems that are timed, one by one")
    report = stages.add_parser("report")
    report.add_argument("--page", type=Path, default=ROOT / "docs" / "tasks.md")
    for each in (run, report):
        each.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if options.stage == "report":
        print(write_page(options.out, options.page))
    else:
        run_stage(options)


def run_stage(options: argparse.Namespace) -> None:
    end = time.monotonic() + 60.0 * options.minutes
    task = read_task(options.task, options.data)
    loaded = tempo_mlx.load(options.model)
    if options.timing:
        kind, problems, options.together = f"{task.name}-timing", task.problems[:TIMED], 1
    elif options.tuning:
        kind, problems = f"{task.name}-tuning", task.split(True)
    else:
        kind, problems = task.name, task.problems
    problems = problems[: options.problems]
    for arm in arms_for(task.name, options.tuning):
        if options.arm and arm.name not in options.arm:
            continue
        path = options.out / model_name(options.model) / kind / f"{arm.name}.jsonl"
        for record in run_arm(loaded, task, arm, problems, path, options.together):
            right = "".join("+" if each else "-" for each in record["right"])
            said = f"{arm.name:18} {record['problem']:16} {right:10} {record['rows']:5} rows"
            print(said if record["seconds"] is None else f"{said} {record['seconds']:6.1f} s", flush=True)
            if time.monotonic() > end:
                print("The time of this part is up; the same command goes on.")
                return


def model_name(model: str) -> str:
    return Path(model).stem.removesuffix("-q4_k_m")


if __name__ == "__main__":
    main()
