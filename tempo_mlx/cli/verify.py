"""`tempo-mlx verify`: recompute a saved run and compare every probability in it."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tempo_mlx.cli.console import make_consoles
from tempo_mlx.cli.options import ConfigFile, other_tables, with_settings
from tempo_mlx.config import LoadConfig
from tempo_mlx.resolution import resolve, upgrade
from tempo_mlx.sources import load_settings

if TYPE_CHECKING:
    from tempo_mlx.decode.step import RunToken
    from tempo_mlx.loading import LoadedModel
    from tempo_mlx.report.run import Run


@with_settings(LoadConfig)
def verify(
    flags: dict[str, object],
    file: Annotated[Path, typer.Argument(metavar="RUN.json", help="A run file, as generate saves it.")],
    config: ConfigFile = None,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Decode again and compare, instead of one dense pass.")
    ] = False,
) -> None:
    """Recompute a run with one dense forward pass, from the file alone, and report the largest difference.

    The model is the run's own unless --model is given. Exit code 1 when a difference is out of tolerance, except for a
    run with steps that left the model early, which promises agreement and not exactness.
    """
    from tempo_mlx.cli.generate import CONFIGS, load_with_progress
    from tempo_mlx.report.run import Run

    run = Run.load(file)
    load = load_settings(config, os.environ, flags, configs=CONFIGS, elsewhere=other_tables).make(LoadConfig)
    if "model" not in flags:
        load = replace(load, model=str(run.model["id"]))
    if "kv_bits" not in flags and load.backend == "mlx":
        load = replace(load, kv_bits=run.model.get("kv_bits"))
    out, err = make_consoles()
    loaded = load_with_progress(load, err, quiet=False)
    raise typer.Exit(0 if (_rerun if rerun else _replay)(run, loaded, out) else 1)


def _replay(run: Run, loaded: LoadedModel, out: Console) -> bool:
    from tempo_mlx.report.text import visible_whitespace
    from tempo_mlx.report.verify import verify as replay

    result = replay(run, loaded.model)
    table = Table(
        "quantity", "largest difference", "step", "token", "recorded", "recomputed", box=None, pad_edge=False
    )
    for worst in result.worst:
        token = visible_whitespace(worst.token) if worst.token is not None else ""
        numbers = f"{worst.recorded:.6g}", f"{worst.recomputed:.6g}"
        table.add_row(worst.quantity, f"{worst.size:.2e}", str(worst.step), token, *numbers)
    out.print(table)
    early = "Left early, where agreement is promised and not exactness (--rerun repeats the run)"
    verdict = "Exact" if result.ok else early if result.lossy else "NOT exact"
    out.print(
        f"{verdict}: {result.compared} numbers of {result.steps} steps "
        f"recomputed from {result.rows} rows; largest difference {result.max_difference:.2e}, tolerance "
        f"{result.tolerance:g}; {result.agreement:.1%} of the best tokens agree.",
        soft_wrap=True,
    )
    return result.ok or result.lossy


def _rerun(run: Run, loaded: LoadedModel, out: Console) -> bool:
    from tempo_mlx.api import stream
    from tempo_mlx.report.verify import require_settings, tolerance_of

    require_settings(run)
    decoding = stream(loaded, run.prompt.token_ids, replace(resolve(upgrade(run.config)), timeout=None))
    for _ in islice(decoding, len(run.steps)):
        pass
    tolerance = max(tolerance_of(run.model), tolerance_of(loaded.model.info))
    largest, step = compare(run, decoding.run())
    if step is not None:
        verdict = f"NOT the same: step {step} has other tokens or removals; up to there"
    else:
        same = "The same" if largest < tolerance else "NOT the same"
        verdict = f"{same}: every set and removal of {len(run.steps)} steps is equal;"
    out.print(
        f"{verdict} probabilities differ by at most {largest:.2e}, tolerance {tolerance:g}.", soft_wrap=True
    )
    return step is None and largest < tolerance


def compare(run: Run, again: Run) -> tuple[float, int | None]:
    """Largest difference of a probability; the first step with other tokens or removals, if any."""
    largest = 0.0
    for one, other in zip(run.steps, again.steps, strict=False):
        if [_identity(token) for token in one.tokens] != [_identity(token) for token in other.tokens]:
            return largest, one.step
        pairs = zip(one.tokens, other.tokens, strict=True)
        largest = max([largest, *(abs(a.probability - b.probability) for a, b in pairs)])
    return largest, None if len(run.steps) == len(again.steps) else min(len(run.steps), len(again.steps))


def _identity(token: RunToken) -> tuple[int, int | None, int | None]:
    return token.id, token.slot, token.removed_after
