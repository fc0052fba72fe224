"""Suites that start a new process for every run: load, memory, startup; and the original TEMPO."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tempo_mlx import blas
from tempo_mlx.bench.contenders import Field
from tempo_mlx.bench.results import MLX_LM, Result
from tempo_mlx.bench.steps import Effort, weight_bytes
from tempo_mlx.bench.timing import Timing, interleaved, ratio, stopwatch
from tempo_mlx.errors import BackendError

TASKS = {"tempo-mlx": "tempo_mlx", "mlx-lm": "mlx_lm", "transformers": "transformers"}
PROMPT = "Once upon a time"


def load(field: Field, effort: Effort) -> Result:
    """From files to a model that could run."""
    result = Result(
        "load",
        "From files (which the system has in memory) to a model that could run, in a new process after all imports: "
        "tempo-mlx from the checkpoint as it is, the others from what `tempo-mlx convert` makes of it in the numbers "
        "that are computed with.",
    )
    timings = _in_turns(field, "load", "seconds", effort.processes(8))
    result.add("load", timings)
    result.goal("load, times mlx-lm's", ratio(timings, "tempo-mlx", MLX_LM), 1.5)
    return result


def memory(field: Field, effort: Effort) -> Result:
    """Peak memory: load, 512 tokens of prompt, 32 steps."""
    result = Result(
        "memory",
        "Peak memory of a process that loads, runs a prompt of 512 tokens, and 32 steps; tempo-mlx from the checkpoint "
        "as it is, the others from the converted directory.",
    )
    timings = _in_turns(field, "memory", "peak", effort.processes(4))
    megabytes = {  # bytes -> MB, as Measurement multiplies by 1000
        name: Timing(tuple(size / 1e9 for size in timing.samples)) for name, timing in timings.items()
    }
    result.add("load, 512 tokens, 32 steps", megabytes)
    result.rows = [replace(row, unit="MB") for row in result.rows]
    result.goal("peak memory, times mlx-lm's", ratio(timings, "tempo-mlx", MLX_LM), 1.05)
    result.floor = weight_bytes(field.loaded.model) / 1e6
    result.floor_is = "the weights"
    return result


def startup(field: Field, effort: Effort) -> Result:
    """The command lines of tempo-mlx and mlx-lm, until one token is printed."""
    result = Result(
        "startup",
        "A new process of each command line, until it has printed one greedy token and ended; tempo-mlx from the "
        "checkpoint as it is, mlx-lm from the converted directory on the same BLAS.",
    )
    commands = {"tempo-mlx": _one_token(field.loaded.config.model)}
    if field.named("mlx-lm") is not None:
        commands["mlx-lm"] = [
            *("-m", "mlx_lm", "generate", "--model", str(field.directory), "--prompt", PROMPT),
            *("--ignore-chat-template", "--max-tokens", "1", "--temp", "0"),
        ]
    cases: dict[str, Callable[[], float]] = {
        name: partial(stopwatch, partial(_run, command, with_blas=name == "mlx-lm"))
        for name, command in commands.items()
    }
    timings = interleaved(cases, effort.processes(8), warm_up=False)
    result.add("process to first token", timings)
    result.goal("start to first token, times mlx-lm's", ratio(timings, "tempo-mlx", MLX_LM), 1.0)
    return result


def run_original(checkout: Path, directory: Path, prompts: Sequence[str], length: int) -> float:
    """Seconds the original TEMPO takes to decode these prompts, as it reports them, without loading."""
    done = _run(
        [str(Path(__file__).with_name("original.py")), str(checkout), str(directory), str(length), *prompts]
    )
    return float(done.splitlines()[-1])


def _one_token(model: str) -> list[str]:
    flags = ["--decoder", "plain", "--temperature", "0", "--max-tokens", "1", "--quiet"]
    return ["-m", "tempo_mlx", "generate", PROMPT, "--model", model, *flags]


def process_to_first_token(model: str) -> float:
    """Seconds of our command line, from its start to its end after one greedy token."""
    return stopwatch(partial(_run, _one_token(model)))


def _in_turns(field: Field, task: str, quantity: str, rounds: int) -> dict[str, Timing]:
    cases: dict[str, Callable[[], float]] = {}
    for each in field.contenders:
        if each.name in TASKS:
            cases[each.name] = partial(lambda name: told(field, task, name)[quantity], each.name)
    return interleaved(cases, rounds, warm_up=False)


def told(field: Field, task: str, contender: str) -> dict[str, float]:
    """What a process of child.py says."""
    model = field.loaded.config.model if contender == "tempo-mlx" else str(field.directory)
    command = ["-m", "tempo_mlx.bench.child", task, TASKS[contender], model]
    said: dict[str, float] = json.loads(
        _run([*command, str(field.loaded.model.info["dtype"])]).splitlines()[-1]
    )
    return said


def _run(arguments: Sequence[str], with_blas: bool = False) -> str:
    """The standard output of a Python process. with_blas: preload the BLAS that tempo-mlx would use."""
    path = blas.ensure().path if with_blas else None
    environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false"} | ({"LD_PRELOAD": path} if path else {})
    done = subprocess.run(
        [sys.executable, *arguments], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise BackendError(f"A process of the benchmark failed ({' '.join(arguments[:4])}): {last}")
    return done.stdout
