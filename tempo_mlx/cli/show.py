"""`tempo-mlx show`: a saved run, without its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tempo_mlx.cli.console import make_consoles, say, say_figures, write_data
from tempo_mlx.cli.options import with_settings
from tempo_mlx.cli.output import check_apart, event, look_of, print_texts
from tempo_mlx.errors import ConfigError
from tempo_mlx.output_config import OutputConfig
from tempo_mlx.report.safe import isolated, printable

if TYPE_CHECKING:
    from tempo_mlx.decode.step import RunStep, RunToken
    from tempo_mlx.report.run import Run

BARS = "▁▂▃▄▅▆▇█"
TABLE_WIDTH = 80  # of a terminal that all of a set's columns fit into
_SHOWN = ("format", "view", "show_above", "show_token_ids", "show_probabilities", "color")


@with_settings(OutputConfig, only=_SHOWN)
def show(
    flags: dict[str, Any],
    file: Annotated[Path, typer.Argument(metavar="RUN.json", help="A run file, as generate saves it.")],
    steps: Annotated[
        bool, typer.Option("--steps", help="List every set: who was kept, removed or rejected, and why.")
    ] = False,
    schedule: Annotated[bool, typer.Option("--schedule", help="Plot the threshold of each step.")] = False,
    tree: Annotated[
        bool, typer.Option("--tree", help="Draw what a tree search visited at each step.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Save the run as one page that opens without a server.")
    ] = None,
    embed: Annotated[
        Path | None,
        typer.Option(
            "--embed", metavar="FOLDER", help="Save what shows the run on a page of yours: <tempo-run>."
        ),
    ] = None,
) -> None:
    """Show a run file: its text, or with --steps how it came about."""
    from tempo_mlx.report.run import Run
    from tempo_mlx.strict import plain

    output = OutputConfig(**flags)
    check_apart({"--html": html}, {"RUN.json": file})
    out, err = make_consoles(output.color)
    run = Run.load(file)
    if html is not None:
        from tempo_mlx.files import write_atomic
        from tempo_mlx.report.html import to_html

        write_atomic(html, to_html(run.to_json(), run.phrases))
        err.print(f"Saved {html}", style="dim", soft_wrap=True)
    elif embed is not None:
        _save_embedded(run, embed, f"{file.stem}.phrases.json", out, err)
    elif output.format == "html":
        from tempo_mlx.report.html import to_html

        write_data(out, to_html(run.to_json(), run.phrases))
    elif output.format == "json":
        write_data(out, run.to_json(indent=2) + "\n")
    elif output.format == "jsonl":
        for step in run.steps:
            write_data(out, event("step", plain(step)))
        write_data(out, event("run", run.to_dict()))
    elif schedule:
        _print_schedule(run, out)
    elif steps:
        _print_steps(run, out)
    elif tree:
        _print_trees(run, out)
    else:
        _print_text(run, output, out, err)


def _save_embedded(run: Run, folder: Path, name: str, out: Console, err: Console) -> None:
    """The element's script and the run with its phrases; printed: what to write into a page beside them."""
    from tempo_mlx.files import write_atomic
    from tempo_mlx.report.html import built, to_embed

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "tempo-run.js", built("tempo-run.js"))
    write_atomic(folder / name, to_embed(run.to_json(), run.phrases))
    err.print(
        f"Saved {folder / 'tempo-run.js'} and {folder / name}; for a page beside them:",
        style="dim",
        soft_wrap=True,
    )
    element = f'<tempo-run src="{name}"></tempo-run>'
    out.print(
        f'<script src="tempo-run.js" defer></script>\n{element}',
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _print_text(run: Run, output: OutputConfig, out: Console, err: Console) -> None:
    from tempo_mlx.report.listing import run_bits
    from tempo_mlx.report.styles import LEGEND, Bit, drawn, raw
    from tempo_mlx.report.summary import summary

    look = look_of(output, out)
    prompt = "" if run.config.get("chat") else run.prompt.text
    if run.is_lattice:
        bits = run_bits(run, look)
        if out.is_terminal:
            out.print(drawn([Bit(prompt, "dim"), *bits]))
        else:
            out.file.write(raw(bits) + "\n")
        if out.is_terminal and look.view == "phrases" and any(bit.alone for bit in bits):
            err.print(LEGEND, style="dim")
    print_texts(run, output, look, out, prompt)
    if run.reasoning:
        err.print(isolated(run.reasoning), style="dim", soft_wrap=True)
    say_figures(err, summary(run))


def _print_steps(run: Run, out: Console) -> None:
    """A row for each member, and for each candidate that was rejected."""
    from tempo_mlx.report.text import visible_whitespace

    tokens = [token for step in run.steps for token in step.tokens]
    known = [name for name in ("posterior", "attention") if any(getattr(t, name) is not None for t in tokens)]
    rows: list[tuple[str, ...]] = []
    for step in run.steps:
        for token in step.tokens:
            position = str(step.position if token.position is None else token.position)
            text, probability = isolated(visible_whitespace(token.text)), f"{token.probability:.4f}"
            scores = (_number(getattr(token, name)) for name in known)
            rows.append(
                (str(step.step), position, text, str(token.id), probability, *scores, _fate(step, token))
            )
        for item in step.rejected:
            text, probability = isolated(visible_whitespace(item.text)), f"{item.probability:.4f}"
            blank, why = [""] * len(known), printable(f"rejected: {item.why}")
            rows.append((str(step.step), "", text, str(item.id), probability, *blank, why))
    if out.width < TABLE_WIDTH:
        for index, position, text, number, probability, *scored, fate in rows:
            figures = {"at": position, "id": number, **dict(zip(known, scored, strict=True))}
            said = ", ".join(f"{name} {value}" for name, value in figures.items() if value)
            say(out, f"{index}: {text}  {probability}, {said}: {fate}", indent=4)
        return
    table = Table("step", "position", "token", "id", "probability", *known, box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap, column.min_width = True, len(str(column.header))
    table.columns[2].no_wrap, table.columns[2].overflow = False, "fold"
    table.add_column("what became of it")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _print_trees(run: Run, out: Console) -> None:
    from tempo_mlx.report.search import search_trees, totals

    if run.tree is None:
        raise ConfigError(f"The {run.decoder} decoder searched no tree; leave out --tree.")
    drawn = search_trees(run)
    say(out, ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in totals(run).items()))
    for tree in drawn:
        out.print(tree)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _fate(step: RunStep, token: RunToken) -> str:
    why = token.removed_why
    if why is None:
        return "ends the text" if token.slot is None else "kept"
    name = "unattended" if why.unattended else "removed"
    signal = printable(why.signal)
    return f"{name} after step {token.removed_after}: {signal} {why.score:.4f} under {why.threshold:.4f}"


def _print_schedule(run: Run, out: Console) -> None:
    """The threshold of each step, and how wide the set was: one bar a step."""
    thresholds = [step.threshold or 0.0 for step in run.steps]
    widths = [len(step.tokens) for step in run.steps]
    widest = max(widths, default=1)
    room = max(out.width - len("threshold "), 1) if out.is_terminal else max(len(widths), 1)
    for start in range(0, len(widths), room):
        out.print(f"threshold {_bars(thresholds[start : start + room])}", soft_wrap=True)
        shares = [width / widest for width in widths[start : start + room]]
        out.print(f"width     {_bars(shares)}", soft_wrap=True)
    if thresholds:
        say(out, f"threshold {thresholds[0]:.3f} to {thresholds[-1]:.3f}, width at most {widest}")


def _bars(shares: list[float]) -> str:
    return "".join(BARS[int(min(max(share, 0.0) * len(BARS), len(BARS) - 1))] for share in shares)
