"""`tempo-mlx batch`: many prompts from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempo_mlx.cli.console import Interrupts, make_consoles, progress_bar
from tempo_mlx.cli.options import ConfigFile, other_tables, with_settings
from tempo_mlx.config import GenerateConfig
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.resolution import Shortcuts
from tempo_mlx.settings import canonical, settings_of
from tempo_mlx.sources import load_settings

if TYPE_CHECKING:
    from tempo_mlx.batch import Maker


@with_settings(LoadConfig, GenerateConfig, Shortcuts)
def batch(
    flags: dict[str, object],
    prompts: Annotated[
        Path,
        typer.Argument(metavar="PROMPTS.jsonl", help='One "prompt", or {"prompt": ..., settings}, a line.'),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="RUNS.jsonl", help="One run a line; continued if it exists.")
    ],
    data_parallel: Annotated[
        bool,
        typer.Option(help="Under mlx.launch: a whole model on every rank, and the prompts spread over them."),
    ] = False,
    keep_errors: Annotated[
        bool,
        typer.Option("--keep-errors", help="Do not try lines again that failed when the file was begun."),
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Run every prompt of a file, in order. The same command again goes on where the last one stopped, and tries again
    what failed.

    A line that fails becomes a line that says why, and the rest goes on; the exit code is then 1.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from tempo_mlx.batch import Here, Spread, read_items, run_batch
    from tempo_mlx.cli.generate import CONFIGS, load_with_progress, with_system

    given = with_system(load_settings(config, os.environ, flags, configs=CONFIGS, elsewhere=other_tables))
    given.generation()  # what is wrong for every line is wrong now

    of_runs = {**settings_of(GenerateConfig), **settings_of(Shortcuts)}

    def configure(own: Mapping[str, Any]) -> GenerateConfig:
        return given.with_flags(**canonical(own, of_runs)).generation()

    _, err = make_consoles()
    items = read_items(prompts, configure)
    load = given.make(LoadConfig)
    make: Maker
    if data_parallel:
        with progress_bar(err, f"Fetching {load.model}") as progress:
            make = Spread(load, progress)
    else:
        make = Here(load_with_progress(load, err, quiet=False))
    failed = 0
    bar = Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), console=err
    )
    with Interrupts() as interrupts, bar:
        task = bar.add_task("Prompts", total=len(items))
        for number, error in run_batch(make, items, out, interrupts.reason, keep_errors):
            bar.advance(task)
            if error is not None:
                failed += 1
                bar.console.print(f"Line {number} failed: {error}", soft_wrap=True)
    if failed:
        err.print(f"{failed} of {len(items)} prompts failed; their lines in {out} say why.", soft_wrap=True)
    raise typer.Exit(interrupts.exit_code or (1 if failed else 0))
