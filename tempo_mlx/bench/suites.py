"""All suites, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tempo_mlx import blas
from tempo_mlx.bench import generation, peers, processes, steps
from tempo_mlx.bench.contenders import Field
from tempo_mlx.bench.machine import read_bandwidth
from tempo_mlx.bench.results import Result
from tempo_mlx.bench.steps import Effort
from tempo_mlx.errors import ConfigError

Suite = Callable[[Field, Effort], Result]
SUITES: dict[str, Suite] = {
    "texts": peers.texts,
    "decode": steps.decode,
    "rows": steps.rows,
    "context": steps.context,
    "prefill": steps.prefill,
    "tempo": generation.tempo,
    "pruning": generation.pruning,
    "branches": generation.branches,
    "load": processes.load,
    "memory": processes.memory,
    "startup": processes.startup,
    "llama.cpp": peers.llama_cpp,
}
MODELS = "models"  # the suite of further models


def choose(names: Sequence[str], also: Sequence[str] = ()) -> list[str]:
    """The suites asked for (a name may hold several, separated by commas), or all; that of further models where there
    are some. Raises ConfigError.
    """
    wanted = [name.strip() for each in names for name in each.split(",") if name.strip()]
    for name in wanted:
        if name not in (*SUITES, MODELS):
            raise ConfigError(f"{name} is no suite; choose from {', '.join((*SUITES, MODELS))}.")
    if MODELS in wanted and not also:
        raise ConfigError("The suite models needs one: add --also MODEL.")
    return [name for name in (*SUITES, *([MODELS] if also else [])) if not wanted or name in wanted]


def measure(
    field: Field,
    names: Sequence[str],
    *,
    quick: bool,
    original: Path | None = None,
    also: Sequence[str] = (),
) -> Iterator[Result]:
    """Run these suites one after the other. also: further models, of the suite for them."""
    effort = Effort(quick, read_bandwidth(), blas.measure_gflops())
    special = {"tempo": partial(generation.tempo, original=original), MODELS: partial(peers.models, also)}
    for name in names:
        suite = special[name] if name in special else SUITES[name]
        yield suite(field, effort)
