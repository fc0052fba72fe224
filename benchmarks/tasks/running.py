"""Run an arm on problems, and keep of each the texts, whether they are right, and what they took: a JSON line each."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tempo_mlx
from benchmarks.quality.running import Counting
from benchmarks.side_by_side import side_by_side
from benchmarks.studies import append_record, read_records
from benchmarks.tasks.arms import Arm
from benchmarks.tasks.problems import Problem, Task

Record = dict[str, Any]


def run_arm(
    loaded: tempo_mlx.LoadedModel,
    task: Task,
    arm: Arm,
    problems: Sequence[Problem],
    path: Path,
    together: int = 1,
) -> Iterator[Record]:
    """Append a line to `path` for every problem that has none there, yielding it; so many problems are run at once."""
    done = {record["problem"] for record in read_records(path)}
    missing = [problem for problem in problems if problem.id not in done]
    if together == 1:
        records = (measure(loaded, task, arm, problem, loaded.model) for problem in missing)
    else:
        works = [partial(measure, loaded, task, arm, problem) for problem in missing]
        records = (
            {**record, "seconds": None, "cpu": None} for record in side_by_side(loaded.model, works, together)
        )
    for record in records:
        append_record(path, record)
        yield record


def measure(loaded: tempo_mlx.LoadedModel, task: Task, arm: Arm, problem: Problem, among: Any) -> Record:
    """One problem. among: the model, or that as it is among other problems."""
    model = Counting(among)
    seed = zlib.crc32(problem.id.encode())  # other draws for every problem
    settings = {**task.settings, **arm.settings, "seed": seed}
    wall, cpu = time.perf_counter(), time.process_time()
    decoding = tempo_mlx.stream(
        tempo_mlx.LoadedModel(model, loaded.tokenizer, loaded.config), problem.prompt, **settings
    )
    for _ in decoding:
        pass
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    run = decoding.run()
    paths = list(run.paths)
    if run.decoder == "enumerate":  # texts that are spelled in two ways are found twice, and are one
        paths = list({path.text.strip(): path for path in reversed(paths)}.values())[::-1]
    texts = [path.text for path in paths] or [run.final_text]
    logprobs = [path.logprob for path in paths] or [None]
    solved: dict[str, bool] = {}
    shown: dict[str, bool] = {}
    for text in texts:
        if text not in solved:
            solved[text] = problem.solves(text)
            if problem.passes is not None:
                shown[text] = solved[text] or problem.passes(text)
    return {
        "problem": problem.id,
        "texts": texts,
        "logprobs": logprobs,
        "tokens": [len(path.token_ids) for path in paths] or [len(run.steps)],
        "answers": [problem.answer(text) for text in texts],
        "right": [solved[text] for text in texts],
        "shown": [shown[text] for text in texts] if problem.passes is not None else None,
        "passes": sum(model.passes.values()) or len(run.steps),
        "rows": sum(rows * count for rows, count in model.passes.items()) or len(run.steps),
        "seconds": round(wall, 3),
        "cpu": round(cpu, 3),
        "masses": run.tree,
        "finish": run.finish_reason,
    }
