"""`tempo-mlx doctor`: what computes here, how fast, and what is missing."""

from __future__ import annotations

import platform
import shutil
from typing import Annotated

import typer
from rich.console import Console

from tempo_mlx._version import __version__
from tempo_mlx.cli.console import make_consoles, print_facts
from tempo_mlx.cli.models import size
from tempo_mlx.load_config import DEFAULT_MODEL, LoadConfig


def doctor(
    model: Annotated[
        str, typer.Option("--model", help="The model whose rows are timed.", metavar="TEXT")
    ] = DEFAULT_MODEL,
) -> None:
    """Report versions, devices, BLAS and its speed, the attention kernel, the model cache, and what rows cost."""
    out, _ = make_consoles()
    _section(out, "versions", _versions())
    _section(out, "devices", _devices())
    _section(out, "blas", _blas())
    _section(out, "kernel", _kernel())
    _section(out, "models", _models())
    _section(out, "rows", _rows(model))


def _section(out: Console, title: str, rows: dict[str, str]) -> None:
    out.print(title, style="bold")
    print_facts(out, rows, indent="  ")


def _versions() -> dict[str, str]:
    from importlib import metadata

    rows = {"tempo-mlx": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    for name in ("mlx", "mlx-lm", "numpy", "tokenizers", "gguf", "torch", "transformers", "fastapi"):
        try:
            rows[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows[name] = "not installed"
    return rows


def _devices() -> dict[str, str]:
    from tempo_mlx.mlx import mx

    gpu = "no"
    if mx.metal.is_available() or mx.cuda.is_available():
        facts = mx.device_info()
        memory = facts.get("memory_size") or facts.get("total_memory") or 0
        gpu = f"{facts.get('device_name') or facts.get('architecture')}, {size(float(memory))}"
    rows = {
        "default": str(mx.default_device()),
        "metal": gpu if mx.metal.is_available() else "no",
        "cuda": gpu if mx.cuda.is_available() else "no",
    }
    try:
        import torch
    except ModuleNotFoundError:
        rows["torch"] = "not installed: the extra [torch] brings it"
    else:
        rows["torch"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return rows


def _blas() -> dict[str, str]:
    from tempo_mlx import blas

    info = blas.ensure()
    rows = {"library": info.name + (f" ({info.path})" if info.path else "")}
    if info.reason:
        rows["why not a faster one"] = info.reason
    rows["measured"] = f"{blas.measure_gflops():.0f} GFLOP/s on the CPU, 1024 x 1024 in float32"
    return rows


def _kernel() -> dict[str, str]:
    from tempo_mlx.model.kernels import kernel_self_check

    return {"attention": kernel_self_check().message}


def _models() -> dict[str, str]:
    from tempo_mlx.weights.registry import PACKAGED, cache_directory

    folder = cache_directory()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    rows = {
        "cache": f"{folder}, {size(used)} used, {size(shutil.disk_usage(existing).free)} free on the disk"
    }
    for model in PACKAGED.values():
        rows[model.name] = "present" if model.path.exists() else "not fetched yet: tempo-mlx models pull"
    return rows


def _rows(model: str) -> dict[str, str]:
    """What a pass of k rows costs beside one row: measured now, and kept for `--max-parallel-tokens auto`."""
    from tempo_mlx.decode.width import affordable, row_costs
    from tempo_mlx.loading import load_model
    from tempo_mlx.weights.registry import PACKAGED

    if model in PACKAGED and not PACKAGED[model].path.exists():
        return {model: "not measured, as it has not been fetched yet"}
    costs = row_costs(load_model(LoadConfig(model=model)).model, again=True)
    ratios = ", ".join(f"{rows} rows {cost / costs[1]:.2f}" for rows, cost in costs.items() if rows > 1)
    return {
        model: f"1 row {1000 * costs[1]:.1f} ms; times that: {ratios}",
        "--max-parallel-tokens auto": str(affordable(costs)),
    }
