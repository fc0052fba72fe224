"""`tempo-mlx models`: what is on this machine, fetch, describe, remove."""

from __future__ import annotations

from typing import Annotated

import typer

from tempo_mlx.cli.console import make_consoles, print_facts, progress_bar
from tempo_mlx.config import DEFAULT_MODEL

app = typer.Typer(no_args_is_help=True, help="List, fetch, describe and remove models.")
Name = Annotated[
    str, typer.Argument(metavar="MODEL", help="A name, a Hugging Face repo id, a directory or a .gguf file.")
]


@app.command("list")
def list_models() -> None:
    """List the models that have a name here, and those in the Hugging Face cache."""
    from rich.table import Table

    from tempo_mlx.weights import manage

    table = Table("model", "size", "on this machine", "description", box=None, pad_edge=False)
    for model in manage.list_models():
        present = "yes" if model.present else "no: tempo-mlx models pull"
        table.add_row(model.name, size(model.nbytes), present, model.description)
    make_consoles()[0].print(table)


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
    about = manage.describe(checkpoint, context)
    a, stored, wide = checkpoint.architecture, about.as_stored, about.as_float32
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
        "weights": f"{size(stored.weights)} as stored, {size(wide.weights)} in float32",
        "cache": f"{size(wide.cache)} at {about.slots:,} slots in float32, half in 16 bits",
        "memory": f"{size(stored.total)} as stored, {size(wide.total)} in float32, with cache and 8 rows",
        "licence": about.licence or "not stated",
    }
    print_facts(out, rows)


@app.command()
def remove(model: Name) -> None:
    """Delete a model that was fetched; files of your own are never touched."""
    from tempo_mlx.weights import manage

    removed, freed = manage.remove(model)
    make_consoles()[0].print(f"Removed {removed} ({size(freed)})", soft_wrap=True)


def size(nbytes: float) -> str:
    """Bytes for people: 93.8 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit in ("B", "kB") else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
