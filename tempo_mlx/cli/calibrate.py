"""`tempo-mlx calibrate`: learn where a model may be left early."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tempo_mlx.cli.console import make_consoles
from tempo_mlx.cli.generate import load_with_progress
from tempo_mlx.cli.output import check_apart, check_file
from tempo_mlx.errors import ConfigError
from tempo_mlx.load_config import LoadConfig

if TYPE_CHECKING:
    from tempo_mlx.exits.calibration import Calibration


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model, as for generate.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text of your own, whose paragraphs are continued too; may be repeated."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Layers (from 0) to look at, beside the last. Every 4th without."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to continue each prompt by.", min=8, max=4096)] = 96,
    translators: Annotated[
        bool,
        typer.Option(
            "--translators/--no-translators", help="Without: for models trained to be left early (LayerSkip)."
        ),
    ] = True,
    device: Annotated[str, typer.Option(help="Where to compute, as for generate.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Number format, as for generate.")] = "auto",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Another place than beside the models.")
    ] = None,
) -> None:
    """Learn where a model may be left early, and how sure it must be: what --early-exit needs.

    The model continues prompts that come with the package; translators are fitted to what its layers make of them, and
    held to it on prompts left out. Takes minutes; interrupted, the same command goes on.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from tempo_mlx.exits.calibrate import calibrate as learn
    from tempo_mlx.exits.calibrate import forget_samples
    from tempo_mlx.exits.calibration import place_of

    err, chosen = make_consoles()[1], None if layers is None else whole_numbers(layers)
    for file in text or ():
        if not file.is_file():
            raise ConfigError(f"--text {file} is no file; name a text file.")
    if output is not None:
        check_file(output)
        check_apart({"--output": output}, {f"--text {file}": file for file in text or ()})
    load = LoadConfig(model=model, device=device, dtype=dtype)  # type: ignore[arg-type]  # checked there
    loaded = load_with_progress(load, err, quiet=False)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=err) as bars:
        tasks = {stage: bars.add_task(stage, total=None) for stage in ("Sampling", "Fitting", "Judging")}

        def note(stage: str, done: int, total: int) -> None:
            bars.update(tasks[stage], completed=done, total=total)

        found = learn(
            loaded, layers=chosen, files=text or (), tokens=tokens, translators=translators, progress=note
        )
    place = output or place_of(found.key)
    found.save(place)
    forget_samples(found.key)
    out, _ = make_consoles()
    out.print(table(found), soft_wrap=True)
    err.print(f"Saved {place}", soft_wrap=True)


def table(found: Calibration) -> str:
    """The exits, and what was found of them at each target."""
    from tempo_mlx.exits.calibration import TARGETS

    lines = [f"{'layer':>5} {'tokens':>7}  " + "  ".join(f"{f'at {target:.0%}':>18}" for target in TARGETS)]
    for item in found.exits:
        cells = []
        for target in TARGETS:
            least = item.margin(target)
            said = "never" if least is None else f"{item.share(target):.0%}, margin {least:.1f}"
            cells.append(f"{said + (' *' if target in item.pays else '  '):>18}")
        lines.append(f"{item.layer:>5} {item.width:>7}  " + "  ".join(cells))
    return "\n".join(
        [*lines, "Shares of tokens that may leave there, judged by prompts left out; * where it pays."]
    )


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--layers is {text!r}; write whole numbers with commas, such as 3,7,11."
        ) from error
