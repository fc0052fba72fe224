"""`tempo-mlx doctor`: what computes here, how fast, what is missing, and whether it computes right."""

from __future__ import annotations

import json
import platform
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tempo_mlx._version import __version__
from tempo_mlx.cli.console import make_consoles, print_facts
from tempo_mlx.cli.models import size
from tempo_mlx.errors import BackendError
from tempo_mlx.load_config import DEFAULT_MODEL, LoadConfig

if TYPE_CHECKING:
    from tempo_mlx.loading import LoadedModel
    from tempo_mlx.model.kernel_check import SelfCheck

Facts = dict[str, str]


def doctor(
    model: Annotated[
        str, typer.Option("--model", help="The model whose rows are timed.", metavar="TEXT")
    ] = DEFAULT_MODEL,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            help="Also write all of it to this file (JSON), to attach to an issue.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Report versions, devices, BLAS and its speed, the attention kernel, the model cache, and what rows cost.

    Exit code 1 where the attention kernel computes something else than it should.
    """
    out, _ = make_consoles()
    told: dict[str, Facts] = {}

    def show(title: str, facts: Facts) -> None:
        out.print(title, style="bold")
        print_facts(out, facts, indent="  ")
        told[title] = facts

    show("versions", _versions())
    show("devices", _devices())
    show("blas", _blas())
    show("models", _models())
    loaded = _load(model)
    checks = _checks(loaded)
    show("kernel", {name: check.message for name, check in checks.items()})
    show("rows", _rows(model, loaded))
    if report is not None:
        if loaded is not None:
            show("one row", _one_row(model))
        _write(report, told)
    if wrong := [name for name, check in checks.items() if check.ok is False]:
        raise BackendError(
            f"The attention kernel failed its check for {wrong[0]}, so slower MLX operations take its place; please "
            "report it with what `tempo-mlx doctor --report FILE` writes."
        )


def _write(path: Path, told: dict[str, Facts]) -> None:
    """Without the name of the user's home."""
    from tempo_mlx.files import write_atomic

    text = json.dumps({"format": "tempo-mlx/doctor", **told}, indent=2, ensure_ascii=False)
    home = json.dumps(str(Path.home()))[1:-1].rstrip("/")
    write_atomic(path, (re.sub(re.escape(home) + r'(?=[/"])', "~", text) if home else text) + "\n")


def _load(model: str) -> LoadedModel | None:
    """None where it would have to be fetched."""
    from tempo_mlx.loading import load_model
    from tempo_mlx.weights.registry import PACKAGED

    if model in PACKAGED and not PACKAGED[model].path.exists():
        return None
    return load_model(LoadConfig(model=model))


def _versions() -> Facts:
    from importlib import metadata

    rows = {"tempo-mlx": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    for name in ("mlx", "mlx-lm", "numpy", "tokenizers", "gguf", "torch", "transformers", "fastapi"):
        try:
            rows[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows[name] = "not installed"
    return rows


def _devices() -> Facts:
    from tempo_mlx.mlx import mx
    from tempo_mlx.model import device

    gpu = "no"
    if mx.metal.is_available() or mx.cuda.is_available():
        facts = mx.device_info()
        memory = facts.get("memory_size") or facts.get("total_memory") or 0
        gpu = f"{device.name()}, {size(float(memory))}"
    rows = {
        "default": str(mx.default_device()),
        "metal": gpu if mx.metal.is_available() else "no",
        "cuda": gpu if mx.cuda.is_available() else "no",
    }
    try:
        import torch
    except ModuleNotFoundError:
        rows["torch"] = "not installed: pip install 'tempo-mlx[torch]' brings it"
    else:
        rows["torch"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return rows


def _blas() -> Facts:
    from tempo_mlx import blas
    from tempo_mlx.model.device import cpu_packs

    info = blas.ensure()
    rows = {"library": info.name + (f" ({info.path})" if info.path else "")}
    if info.reason:
        rows["why not a faster one"] = info.reason
    if info.few_rows:
        rows["few rows"] = info.few_rows
    if info.why_not:
        rows["few rows"] = f"by the same library, more slowly: {info.why_not}"
    if info.packed:
        rows["packed weights"] = (
            info.packed if cpu_packs() else "unpacked: what this library computes is not right"
        )
    if info.why_unpacked:
        rows["packed weights"] = f"unpacked: {info.why_unpacked}"
    rows["measured"] = f"{blas.measure_gflops():.0f} GFLOP/s on the CPU, 1024 x 1024 in float32"
    return rows


def _checks(loaded: LoadedModel | None) -> dict[str, SelfCheck]:
    """Compared now, in every program: for the model's heads, and for every head dim the kernel is for."""
    from tempo_mlx.mlx import mx
    from tempo_mlx.model.kernel_check import fresh_check, self_check
    from tempo_mlx.model.kernels import HEAD_DIMS
    from tempo_mlx.model.transformer import Transformer

    wanted = {((8, 8 >> index % 3, dim), mx.bfloat16) for index, dim in enumerate(HEAD_DIMS)}
    wanted |= {((6, 2, 64), mx.float32), ((8, 2, 128), mx.float16)}
    if loaded is not None and isinstance(loaded.model, Transformer):
        wanted |= {(kind[2], loaded.model.dtype) for kind in loaded.model.kinds if kind[2][2] in HEAD_DIMS}
    if not mx.metal.is_available():
        return {"attention": self_check(*next(iter(wanted)))}
    return {
        f"{heads} heads on {groups}, head dim {dim}, {str(dtype).removeprefix('mlx.core.')}": fresh_check(
            (heads, groups, dim), dtype
        )
        for (heads, groups, dim), dtype in sorted(wanted, key=str)
    }


def _models() -> Facts:
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


def _rows(model: str, loaded: LoadedModel | None) -> Facts:
    """What a pass of k rows costs beside one row: measured now, and kept for `--max-parallel-tokens auto`."""
    from tempo_mlx.decode.padding import paying
    from tempo_mlx.decode.width import affordable, row_costs

    if loaded is None:
        return {model: "not measured, as it has not been fetched yet"}
    costs = row_costs(loaded.model, again=True)
    ratios = ", ".join(f"{rows} rows {cost / costs[1]:.2f}" for rows, cost in costs.items() if rows > 1)
    info, pads = loaded.model.info, loaded.chooser is not None
    padded = {"run as more rows": ", ".join(f"{rows} as {more}" for rows, more in paying(costs).items())}
    return {
        "computed in": " ".join(
            str(info[each]) for each in ("dtype", "quantization", "device") if info[each]
        ),
        model: f"1 row {1000 * costs[1]:.1f} ms; times that: {ratios}",
        **(padded if pads and paying(costs) else {}),
        "--max-parallel-tokens auto": str(affordable(costs, pads=pads)),
    }


def _one_row(model: str) -> Facts:
    """The step of ordinary decoding, beside mlx-lm's where that is installed, on the same weights in turns."""
    from tempo_mlx.bench.contenders import line_up
    from tempo_mlx.bench.steps import PROMPT, one_row, tokens

    notes: list[str] = []
    with line_up(LoadConfig(model=model), ("mlx-lm",), notes.append) as field:
        limit = field.loaded.model.architecture.max_position_embeddings
        timings = one_row(field, tokens(field, min(PROMPT, limit // 2)), rounds=6)
    rows = {name: f"{1000 * timing.quartile:.2f} ms" for name, timing in timings.items()}
    return rows if not notes else {**rows, "mlx-lm": notes[0]}
