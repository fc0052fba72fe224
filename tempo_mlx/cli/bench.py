"""`tempo-mlx bench`: speed beside mlx-lm and transformers, on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tempo_mlx.cli.console import make_consoles
from tempo_mlx.load_config import DEFAULT_MODEL, LoadConfig

if TYPE_CHECKING:
    from tempo_mlx.bench.results import Result

DIRECTORY = Path("benchmarks") / "results"


def bench(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="A suite, or several with commas: texts, decode, rows, context, prefill, tempo, pruning, branches, "
            "load, memory, startup, llama.cpp, models. All without one."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds and shorter texts.")] = False,
    model: Annotated[str, typer.Option(help="The model, as for generate.")] = DEFAULT_MODEL,
    also: Annotated[list[str] | None, typer.Option(help="A further model, for the suite models.")] = None,
    dtype: Annotated[str, typer.Option(help="Number format, as for generate.")] = "auto",
    contender: Annotated[
        list[str] | None,
        typer.Option(help="Beside whom: 'tempo-mlx (torch)', mlx-lm, transformers. All without one."),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Where results, plots and the page go.", metavar="DIRECTORY")
    ] = DIRECTORY,
    page: Annotated[
        Path | None, typer.Option(help="The page's own place, instead of speed.md beside the results.")
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(help="A checkout of the original TEMPO, to compare with.", metavar="DIRECTORY"),
    ] = None,
) -> None:
    """Measure speed beside mlx-lm, transformers and llama.cpp with the same weights, and write a page about it.

    Tables and JSON lines go to stdout. Let nothing else run meanwhile. Suites measured before on this machine, with
    the same versions, stay on the page.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads sleep, so that cores are free
    from tempo_mlx.bench.contenders import NAMES, check_equal, line_up
    from tempo_mlx.bench.machine import environment, load_average
    from tempo_mlx.bench.results import read_results, write_results
    from tempo_mlx.bench.steps import tokens
    from tempo_mlx.bench.suites import MODELS, SUITES, choose, measure

    out, err = make_consoles()
    names = choose(suite or [], also or [])
    note_other_work(err)
    config = LoadConfig(model=model, dtype=dtype)  # type: ignore[arg-type]  # checked there
    place, store = page or output / "speed.md", output / "speed.json"
    for file in (place, store):
        file.parent.mkdir(parents=True, exist_ok=True)
    with line_up(config, contender or NAMES, err.print) as field:
        equal = check_equal(field, tokens(field, 24))
        facts = environment(dict(field.loaded.model.info))
        conditions = {**facts, "date": None, "quick": quick}
        results = read_results(store, conditions)
        for result in measure(field, names, quick=quick, original=original, also=also or []):
            result.load_average = load_average()
            show(out, result, facts)
            results[result.suite] = result
            results = {name: results[name] for name in (*SUITES, MODELS) if name in results}
            write_results(store, conditions, list(results.values()))  # at once, so that nothing is lost
    write(list(results.values()), facts, equal, quick, place, output, err)
    err.print(f"Saved {place}, {output / 'speed.jsonl'} and {store}", soft_wrap=True)


def note_other_work(err: Console) -> None:
    from tempo_mlx.bench.machine import QUIET, load_average

    load = load_average()
    if load is not None and load > QUIET:
        err.print(f"Note: the load average is {load:.1f}; with other work on the machine times mean little.")


def write(
    results: list[Result],
    facts: dict[str, Any],
    equal: dict[str, float],
    quick: bool,
    place: Path,
    output: Path,
    err: Console,
) -> None:
    """The page in its place; plots, where they can be drawn, and JSON lines in the directory `output`."""
    from tempo_mlx.bench import plots
    from tempo_mlx.bench.page import page
    from tempo_mlx.bench.results import to_json
    from tempo_mlx.files import write_atomic

    drawn = plots.draw(results, output) if plots.available() else {}
    if not drawn:
        err.print("No plots: matplotlib is not installed (pip install 'tempo-mlx[bench]').")
    lines = "".join(f"{line}\n" for result in results for line in to_json(result, facts))
    write_atomic(output / "speed.jsonl", lines)
    write_atomic(place, page(place, results, facts, quick, drawn, equal))


def show(out: Console, result: Result, facts: dict[str, Any]) -> None:
    """A suite's table and figures, and a JSON line a row."""
    from tempo_mlx.bench.results import COLUMNS, cells, floor_line, text_table, to_json

    out.print(result.suite, style="bold")
    out.print(text_table(COLUMNS, [cells(row) for row in result.rows]), soft_wrap=True)
    for line in (floor_line(result), *result.notes):
        if line:
            out.print(line, soft_wrap=True)
    for goal in result.goals:
        verdict = "ok  " if goal.holds else "over"
        out.print(f"{verdict} {goal.what}: {goal.value:.2f} (at most {goal.bound:g})", soft_wrap=True)
    for line in to_json(result, facts):
        out.print(line, soft_wrap=True)
