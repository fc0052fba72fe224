"""`tempo-mlx models`: what is on this machine, fetch, describe, remove."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tempo_mlx.cli.console import make_consoles, print_facts, progress_bar, say
from tempo_mlx.cli.help import Group
from tempo_mlx.load_config import DEFAULT_MODEL

if TYPE_CHECKING:
    from tempo_mlx.weights.memory import Memory
    from tempo_mlx.weights.precision import Precision

SCALES_IN_FLOAT32 = 1.15  # times the bytes of 4-bit weights with scales in 16 bits
app = typer.Typer(cls=Group, invoke_without_command=True, rich_markup_mode=None)
Name = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A name from the list, a Hugging Face repo id, a directory or a .gguf file."
    ),
]


@app.callback()
def _root(ctx: typer.Context) -> None:
    """List, fetch, describe and remove models; alone, it lists."""
    if ctx.invoked_subcommand is None:
        from rich.table import Table

        list_models()
        usage = Table.grid(padding=(0, 2))
        for name, command in typer.main.get_group(app).commands.items():
            usage.add_row(f"tempo-mlx models {name}", (command.help or "").partition("\n")[0])
        err = make_consoles()[1]
        err.print()
        err.print(usage, style="dim")


@app.command("list")
def list_models() -> None:
    """List models worth running, and those that are on this disk, whoever keeps them there.

    Sizes and memory are about right: what a fetch brings, and what the weights take once loaded on this device.
    """
    from tempo_mlx.weights import manage

    out = make_consoles()[0]
    rows = [("model", "size", "memory", "here", "what it is")]
    for model in manage.list_models():
        memory = (
            "" if model.parameters is None else gigabytes(weights_in_memory(model.parameters, model.nbytes))
        )
        here = "yes" if model.present else "no"
        rows.append((model.name, gigabytes(model.nbytes), memory, here, model.description))
    wide = max(len(row[0]) for row in rows)
    lines = [
        f"{name:<{wide}}  {size:>7}  {memory:>8}  {here:<4}  {what}"
        for name, size, memory, here, what in rows
    ]
    if not out.is_terminal or max(map(len, lines)) <= out.width:
        for line in lines:
            out.print(line, soft_wrap=True)
        return
    for name, size, memory, here, what in rows[1:]:
        in_memory = f", {memory} in memory" if memory else ""
        say(
            out, f"{name}\n    {size}{in_memory}, {'here' if here == 'yes' else 'not here'}: {what}", indent=4
        )


def weights_in_memory(parameters: float, stored: float) -> float:
    """Bytes of a model's weights once they are loaded on this machine's own device."""
    from tempo_mlx.mlx import mx
    from tempo_mlx.model.device import cpu_packs
    from tempo_mlx.model.mlx_backend import choose_device
    from tempo_mlx.weights.precision import UNPACKED_BELOW

    if choose_device("auto") == mx.cpu:
        quantised = stored < parameters  # less than 8 bits a weight
        return SCALES_IN_FLOAT32 * stored if quantised and cpu_packs() else 4 * parameters
    return 2 * parameters if parameters < UNPACKED_BELOW else stored


@app.command()
def pull(model: Name = DEFAULT_MODEL) -> None:
    """Fetch a model, so that it works offline afterwards; prints where it lies."""
    from tempo_mlx.weights.download import locate

    out, err = make_consoles()
    with progress_bar(err, f"Fetching {model}") as progress:
        path, _ = locate(model, progress=progress)
    out.print(str(path), soft_wrap=True)


@app.command()
def info(
    model: Name = DEFAULT_MODEL,
    context: Annotated[
        int, typer.Option(min=1, metavar="TOKENS", help="Context length for the memory estimate.")
    ] = 2048,
) -> None:
    """Describe a model: family, parameters, context, quantisation, memory, licence."""
    from tempo_mlx.weights import manage, open_checkpoint

    out, err = make_consoles()
    with progress_bar(err, f"Fetching {model}") as progress:
        checkpoint = open_checkpoint(model, progress=progress)
    from tempo_mlx.model.device import cpu_packs

    about = manage.describe(checkpoint, context, cpu_packs=cpu_packs())
    a = checkpoint.architecture
    share = about.requantised / checkpoint.parameters
    lost = f"{share:.0%} of the weights on a GPU, off by {about.loss:.1%} of their size (root mean square)"
    rows = {
        "model": checkpoint.id,
        "path": str(checkpoint.path),
        "family": a.family,
        "parameters": f"{checkpoint.parameters / 1e6:,.1f} million",
        "layers": f"{a.num_hidden_layers} of {a.hidden_size}, {a.num_attention_heads} heads "
        f"({a.num_key_value_heads} for keys and values) of {a.head_dim}",
        "context": f"{a.max_position_embeddings:,} tokens",
        "vocabulary": f"{a.vocab_size:,} tokens",
        "quantisation": checkpoint.quantization,
        "on the CPU": memory_line(*about.computed["cpu"], about.slots),
        "on a GPU": memory_line(*about.computed["gpu"], about.slots),
        **({"requantised": lost} if about.computed["gpu"][0].packed and about.requantised else {}),
        "licence": about.licence or "not stated",
    }
    print_facts(out, rows)


def memory_line(precision: Precision, memory: Memory, slots: int) -> str:
    states = f" and {size(memory.states)} of states" if memory.states else ""
    packed = {False: "", True: "packed, computed in ", "exact": "packed where exact, computed in "}
    how = packed[precision.packed] + precision.dtype
    return f"{size(memory.total)}: weights {size(memory.weights)} ({how}), cache of {slots:,} tokens{states}, 8 rows"


@app.command()
def remove(model: Name) -> None:
    """Delete a model that was fetched; files of your own are never touched."""
    from tempo_mlx.weights import manage

    removed, freed = manage.remove(model)
    make_consoles()[0].print(f"Removed {removed} ({size(freed)})", soft_wrap=True)


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"


def size(nbytes: float) -> str:
    """Bytes for people: 93.8 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit in ("B", "kB") else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
