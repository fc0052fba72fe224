"""`tempo-mlx verify`: recompute a saved run and compare all that it says."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tempo_mlx.cli.console import make_consoles, say
from tempo_mlx.cli.options import ConfigFile, other_tables, with_settings
from tempo_mlx.errors import RunFileError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.report.safe import isolated, printable
from tempo_mlx.sources import load_settings

if TYPE_CHECKING:
    from tempo_mlx.loading import LoadedModel
    from tempo_mlx.report.run import Run
    from tempo_mlx.report.verify import Verification


@with_settings(LoadConfig, defaults={"model": "the run's own"})
def verify(
    flags: dict[str, object],
    file: Annotated[Path, typer.Argument(metavar="RUN.json", help="A run file, as generate saves it.")],
    config: ConfigFile = None,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Decode again and compare, instead of one dense pass.")
    ] = False,
) -> None:
    """Recompute all that a run file says, with one dense forward pass, and name what cannot be.

    dtype and cache are as the flags say, so load the model as it was for the run. Exit code 1 when anything is not
    what the model gives. Steps that left the model early promise agreement and not exactness, and are held to that.
    """
    from tempo_mlx.cli.generate import CONFIGS, load_with_progress
    from tempo_mlx.report.run import Run

    run = Run.load(file)
    load = load_settings(config, os.environ, flags, configs=CONFIGS, elsewhere=other_tables).make(LoadConfig)
    if "model" not in flags:
        if not isinstance(run.model.get("id"), str):
            raise RunFileError("The run file does not name its model; give --model.")
        load = replace(load, model=str(run.model["id"]))
    out, err = make_consoles()
    loaded = load_with_progress(load, err, quiet=False)
    if run.model.get("dtype") != loaded.model.info.get("dtype"):
        say(
            err,
            f"The run was made in {run.model.get('dtype')} and this model computes in "
            f"{loaded.model.info.get('dtype')}; --dtype says otherwise.",
        )
    raise typer.Exit(0 if (_rerun if rerun else _replay)(run, loaded, out) else 1)


def _replay(run: Run, loaded: LoadedModel, out: Console) -> bool:
    from tempo_mlx.report.verify import verify as replay

    result = replay(run, loaded)
    _table(result, out)
    for finding in result.findings:
        _say(finding, out)
    _say(f"Recomputed: {', '.join(result.recomputed)}.", out)
    _say(f"Nobody can recompute: {'; '.join(result.left_open)}.", out)
    verdict = "Exact" if result.ok else "NOT exact"
    if result.ok and result.early:
        steps = f"in {result.early} steps; the others are exact"
        verdict = (
            f"Left early, where agreement is promised and not exactness (--rerun repeats the run), {steps}"
        )
    _say(
        f"{verdict}: {result.compared} things said of {result.steps} steps recomputed from {result.rows} rows; largest "
        f"difference {result.max_difference:.2e}, tolerance {result.tolerance:.3g} (by this model's dtype and "
        f"depth, and the run's length and temperature); {result.agreement:.1%} of the best tokens agree.",
        out,
    )
    return result.ok


def _table(result: Verification, out: Console) -> None:
    from tempo_mlx.report.text import visible_whitespace

    table = Table(
        "quantity", "largest difference", "step", "token", "recorded", "recomputed", box=None, pad_edge=False
    )
    for worst in result.worst:
        token = isolated(visible_whitespace(worst.token)) if worst.token is not None else ""
        numbers = f"{worst.recorded:.6g}", f"{worst.recomputed:.6g}"
        table.add_row(worst.quantity, f"{worst.size:.2e}", str(worst.step), token, *numbers)
    out.print(table)


def _say(sentence: str, out: Console) -> None:
    """As it is: what a file says may look like markup, or move the cursor."""
    out.print(printable(sentence), markup=False, highlight=False, soft_wrap=True)


def steps_taken(run: Run) -> int | None:
    """How many steps the decoding took, which may be others than its file has; None: as far as it goes."""
    from tempo_mlx.decode.registry import DECODERS

    if not run.steps or not DECODERS[run.decoder].masses:
        return len(run.steps)
    passes = (run.tree or {}).get("passes")  # the first step goes by the prompt's
    return passes + 1 if isinstance(passes, int) and passes >= 0 else None


def _rerun(run: Run, loaded: LoadedModel, out: Console) -> bool:
    from tempo_mlx.api import stream
    from tempo_mlx.report.verify import compare, decode_settings, tolerance_for

    config = decode_settings(run)
    decoding = stream(loaded, run.prompt, config)
    for _ in islice(decoding, steps_taken(run)):
        pass
    tolerance = tolerance_for(loaded.model, run, config)
    found = compare(run, decoding.run(), tolerance, loaded.tokenizer)
    for difference in found.differences:
        _say(difference, out)
    same = "The same" if found.ok else "NOT the same"
    _say(
        f"{same}: {len(run.steps)} steps, their texts, removals, rejected candidates and paths decoded again; numbers "
        f"differ by at most {found.largest:.2e}, tolerance {tolerance.worst:g}.",
        out,
    )
    return found.ok
