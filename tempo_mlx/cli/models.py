"""`tempo-mlx models`: what is on this machine, fetch, describe, remove."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tempo_mlx.cli.console import make_consoles, print_facts, progress_bar
from tempo_mlx.config import DEFAULT_MODEL
from tempo_mlx.errors import ModelError, OutputError

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

app = typer.Typer(no_args_is_help=True, help="List, fetch, describe and remove models.")
Name = Annotated[
    str, typer.Argument(metavar="MODEL", help="A name, a Hugging Face repo id, a directory or a .gguf file.")
]


@app.command("list")
def list_models() -> None:
    """List the models that have a name here, and those in the Hugging Face cache."""
    from rich.table import Table

    from tempo_mlx.weights.registry import PACKAGED

    table = Table("model", "size", "on this machine", "description", box=None, pad_edge=False)
    for model in PACKAGED.values():
        present = "yes" if model.path.exists() else "no: tempo-mlx models pull"
        table.add_row(model.name, size(model.nbytes), present, f"{model.description} ({model.licence})")
    cache = _hub_cache()
    for repo in cache.repos if cache else ():
        if repo.repo_type == "model":
            table.add_row(repo.repo_id, size(repo.size_on_disk), "yes", "Hugging Face cache")
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
    from tempo_mlx.weights import open_checkpoint
    from tempo_mlx.weights.registry import PACKAGED

    out, err = make_consoles()
    with progress_bar(err, f"Fetching {model}") as progress:
        checkpoint = open_checkpoint(model, progress=progress)
    a = checkpoint.architecture
    slots = min(context, a.max_position_embeddings)
    numbers = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * slots
    licence = PACKAGED[model].licence if model in PACKAGED else _licence(checkpoint.path)
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
        "weights": f"{size(checkpoint.nbytes)} as stored, {size(4 * checkpoint.parameters)} in float32",
        "cache": f"{size(4 * numbers)} at {slots:,} slots in float32, half in 16 bits",
        "licence": licence,
    }
    print_facts(out, rows)


@app.command()
def remove(model: Name) -> None:
    """Delete a model that was fetched; files of your own are never touched."""
    from tempo_mlx.weights.registry import PACKAGED

    out, _ = make_consoles()
    if model in PACKAGED:
        path = PACKAGED[model].path
        if not path.exists():
            raise ModelError(f"{model} is not on this machine; there is nothing to remove.")
        try:
            path.unlink()
        except OSError as error:
            raise OutputError(f"Cannot remove {path}: {error.strerror or error}.") from error
        out.print(f"Removed {path}", soft_wrap=True)
        return
    cache = _hub_cache()
    repos = [repo for repo in cache.repos if repo.repo_id == model] if cache else []
    revisions = [revision.commit_hash for repo in repos for revision in repo.revisions]
    if cache is None or not revisions:
        hint = (
            "it is your own, delete it yourself"
            if Path(model).exists()
            else "`tempo-mlx models list` shows all"
        )
        raise ModelError(f"{model} was not fetched by tempo-mlx; {hint}.")
    plan = cache.delete_revisions(*revisions)
    plan.execute()
    out.print(f"Removed {model} ({plan.expected_freed_size_str})")


def _hub_cache() -> HFCacheInfo | None:
    """The Hugging Face cache; None where there is none yet."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None


def _licence(path: Path) -> str:
    """The licence a model card or a file beside the weights names."""
    folder = path if path.is_dir() else path.parent
    card = folder / "README.md"
    if path.is_dir() and card.is_file():
        lines = card.read_text("utf-8", errors="replace").splitlines()[:50]
        named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("license:")]
        if named:
            return named[0]
    files = sorted(file.name for file in folder.glob("LICENSE*")) if path.is_dir() else []
    return f"see {files[0]}" if files else "not stated"


def size(nbytes: float) -> str:
    """Bytes for people: 93.8 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit in ("B", "kB") else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
