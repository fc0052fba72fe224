"""The models on this machine: what there is, what one is like, and how to be rid of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tempo_mlx.errors import ModelError, OutputError
from tempo_mlx.weights.checkpoint import Checkpoint
from tempo_mlx.weights.local import PROGRAMS, find_local, local_models
from tempo_mlx.weights.memory import Memory, estimate_memory
from tempo_mlx.weights.precision import DEVICES, Device, Precision, choose
from tempo_mlx.weights.registry import KNOWN, PACKAGED
from tempo_mlx.weights.tensor import PackedTensor, Tensor

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

SAMPLED = 64  # rows of a matrix that is requantised


@dataclass(frozen=True)
class Listed:
    """A model that can be named. nbytes: its size on disk, or what a fetch would bring; parameters: where known."""

    name: str
    nbytes: float
    present: bool
    description: str
    parameters: float | None = None


@dataclass(frozen=True)
class Description:
    """What `tempo-mlx models info` tells. `computed`: in what, and the memory at `slots` tokens, 8 rows in a pass, by
    device. requantised: how many of the weights are not packed exactly; loss: by how much, as rms of the error over
    that of the weights.
    """

    checkpoint: Checkpoint
    slots: int
    licence: str | None
    computed: Mapping[Device, tuple[Precision, Memory]]
    requantised: int
    loss: float


def list_models() -> list[Listed]:
    """The models with a short name, present or not, and those that are on this disk besides."""
    here = local_models()
    cached = {model.name: model.nbytes for model in here if model.program == "hf"}
    models = [
        Listed(
            model.name,
            model.nbytes,
            model.path.exists(),
            f"{model.description}, {model.licence}",
            model.parameters,
        )
        for model in PACKAGED.values()
    ]
    models += [
        Listed(
            model.name, cached.get(model.repo, model.nbytes), model.repo in cached, f"{model.repo}, {model.licence}",
            model.parameters,
        )
        for model in KNOWN.values()
    ]  # fmt: skip
    repos = {model.repo for model in KNOWN.values()}
    models += [
        Listed(
            model.name if model.program == "hf" else model.full_name, model.nbytes, True,
            f"in {PROGRAMS[model.program].removeprefix('the ')}",
        )
        for model in here
        if model.program != "hf" or model.name not in repos
    ]  # fmt: skip
    return models


def describe(checkpoint: Checkpoint, context: int = 2048, *, cpu_packs: bool) -> Description:
    """Facts about a model, and the memory it takes with `context` tokens in its cache. cpu_packs: see precision.py."""
    slots = min(context, checkpoint.architecture.max_position_embeddings)
    named = PACKAGED.get(checkpoint.id)
    computed: dict[Device, tuple[Precision, Memory]] = {}
    for device in DEVICES:
        precision = choose(device, checkpoint.stored, cpu_packs=cpu_packs)
        computed[device] = precision, estimate_memory(checkpoint, **asdict(precision), slots=slots)
    requantised, loss = _requantised(checkpoint.tensors.values())
    return Description(
        checkpoint=checkpoint,
        slots=slots,
        licence=named.licence if named else checkpoint.licence,
        computed=computed,
        requantised=requantised,
        loss=loss,
    )


def _requantised(tensors: Iterable[Tensor]) -> tuple[int, float]:
    """How many weights do not fit MLX's layouts, and what that costs, from a sample of their rows."""
    lossy = [each for each in tensors if each.layout is not None and each.kind != "mlx_quantized"]
    error = size = 0.0
    for tensor in lossy:
        rows = tensor.shape[0]
        some = tensor.rows(
            np.linspace(0, rows - 1, min(rows, SAMPLED if len(tensor.shape) == 2 else 1), dtype=np.intp)
        )
        exact = some.numpy()
        error += float(np.square(PackedTensor(*some.quantized()).numpy() - exact).sum(dtype=np.float64))
        size += float(np.square(exact).sum(dtype=np.float64))
    return sum(math.prod(each.shape) for each in lossy), math.sqrt(error / size) if size else 0.0


def remove(name: str) -> tuple[str, int]:
    """Delete a model that was fetched; files of one's own are never touched.

    Returns: what was removed, and the bytes it freed.
    Raises: ModelError if the model was not fetched, OutputError if it cannot be deleted.
    """
    try:
        if name in PACKAGED:
            path = PACKAGED[name].path
            if not path.exists():
                raise ModelError(f"{name} is not on this machine; there is nothing to remove.")
            freed = path.stat().st_size
            path.unlink()
            return str(path), freed
        found = find_local(KNOWN[name].repo if name in KNOWN else name)
        if found is not None and found.program != "hf":
            raise ModelError(f"{found.full_name} belongs to {PROGRAMS[found.program]}; remove it there.")
        cache = _hub_cache()
        repo_id = name if found is None else found.name
        repos = [repo for repo in cache.repos if repo.repo_id == repo_id] if cache else []
        revisions = [revision.commit_hash for repo in repos for revision in repo.revisions]
        if cache is None or not revisions:
            hint = (
                "it is your own, delete it yourself"
                if Path(name).exists()
                else "`tempo-mlx models list` shows all"
            )
            raise ModelError(f"{name} was not fetched by tempo-mlx; {hint}.")
        plan = cache.delete_revisions(*revisions)
        plan.execute()
        return name, plan.expected_freed_size
    except OSError as error:
        raise OutputError(f"Cannot remove {name}: {error.strerror or error}.") from None


def _hub_cache() -> HFCacheInfo | None:
    """The Hugging Face cache; None where there is none yet."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return None
