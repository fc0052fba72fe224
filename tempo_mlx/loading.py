"""From a name to a model that can run: weights, backend, tokenizer; over several ranks where they were launched."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

from tempo_mlx.errors import BackendError, ConfigError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.model.forward import Chooser, Model
from tempo_mlx.model.pages import give_back
from tempo_mlx.prompt_cache import PromptCache, of_slots, read_prompt_cache
from tempo_mlx.ranks import processes as ranks
from tempo_mlx.ranks.processes import Leader
from tempo_mlx.settings import shown
from tempo_mlx.weights import Checkpoint, Progress, Tokenizer, open_checkpoint
from tempo_mlx.weights.memory import Limit, device_limit, require_memory
from tempo_mlx.weights.precision import Device, Precision, choose


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer. `tempo_mlx.generate` and `stream` take one, from any thread.

    leader: of the ranks that share it. lock: held while it computes, so that steps of several threads take turns.
    prompt_cache: what its file held.
    """

    model: Model
    tokenizer: Tokenizer
    config: LoadConfig = field(default_factory=LoadConfig)
    leader: Leader | None = None
    lock: AbstractContextManager[bool] = field(default_factory=RLock, repr=False, compare=False)
    prompt_cache: PromptCache | None = field(default=None, repr=False, compare=False)

    @property
    def chooser(self) -> Chooser | None:
        """The model as one that chooses on its device; None where it does not."""
        if self.config.backend == "torch":
            return None
        from tempo_mlx.model.choosing import chooser_of

        return chooser_of(self.model)

    def cache_for(self, ids: Sequence[int]) -> Any | None:
        """A cache with what is known of a prompt from before; None where that is nothing."""
        if self.prompt_cache is None:
            return None
        cache = self.prompt_cache.prefix(self.model, ids)
        return cache if len(cache) else None


def require_loaded(loaded: object) -> None:
    """Raises ConfigError for anything but a model that was loaded."""
    if isinstance(loaded, LoadedModel):
        return
    if isinstance(loaded, str | os.PathLike):
        raise ConfigError(
            f"{shown(loaded)} names a model that is not loaded yet; give tempo_mlx.load({shown(loaded)})."
        )
    raise ConfigError(f"{shown(loaded)} is no model; give what tempo_mlx.load(...) returned.")


def load_model(
    config: LoadConfig,
    progress: Progress | None = None,
    *,
    alone: bool = False,
    slots: int | None = None,
    beside: int = 0,
) -> LoadedModel:
    """Open (fetch, where needed) and build the model `config` names.

    Where `mlx.launch` started this process, the model is spread over its ranks; on ranks other than 0 this does not
    return, but follows rank 0 and ends with it. alone: the whole model, whatever started this process. slots: of the
    cache, as many as there must be memory for. beside: bytes that models in other processes of ours hold.

    Raises ModelError, DownloadError, BackendError (the backend or device is not here, or a rank), MemoryLimitError,
    ConfigError (a setting that the backend does not have).
    """
    rank = None if alone else ranks.rank()
    if rank:
        ranks.follow()
    if rank is not None and config.backend == "torch":
        raise ConfigError(
            "The torch backend runs in one process; start it without mlx.launch, or choose mlx."
        )
    if config.backend == "torch" and config.kv_bits is not None:
        raise ConfigError(
            f"kv_bits {config.kv_bits} has no effect with the torch backend; leave it out, or choose --backend mlx."
        )
    leader = None if rank is None else ranks.lead()
    checkpoint = open_checkpoint(config.model, progress=progress, adapter=config.adapter)
    if (limit := limit_of(config)) is not None:
        sharing, precision = 1 if leader is None else leader.size, precision_of(config, checkpoint)
        limit = limit.beside(beside)
        require_memory(checkpoint, limit, precision, slots=slots, kv_bits=config.kv_bits, ranks=sharing)
    model: Model
    if leader is not None:
        from tempo_mlx.ranks.model import load_shards

        leader.set_timeout(config.rank_timeout)
        model = load_shards(leader, config, checkpoint)
    elif config.backend == "torch":
        try:
            from tempo_mlx.model.torch_backend import TorchTransformer
        except ModuleNotFoundError as error:
            sentence = "The torch backend needs PyTorch; pip install 'tempo-mlx[torch]' brings it."
            raise BackendError(sentence) from error
        model = TorchTransformer(checkpoint, config.device, config.dtype)
    else:
        from tempo_mlx.model.mlx_backend import build, wire

        if config.wired:
            wire(config.device)
        model = build(
            checkpoint, config.device, config.dtype, dequantize=config.dequantize, kv_bits=config.kv_bits
        )
    kept = None
    if config.prompt_cache is not None:
        of_slots(model.new_cache())
        kept = read_prompt_cache(config.prompt_cache, model) if Path(config.prompt_cache).exists() else None
    return LoadedModel(model, checkpoint.tokenizer(), config, leader, prompt_cache=kept)


def precision_of(config: LoadConfig, checkpoint: Checkpoint) -> Precision:
    """What the model will be computed in."""
    if config.backend == "torch":
        return Precision("float32" if config.dtype == "auto" else config.dtype, packed=False)
    from tempo_mlx.model.device import cpu_packs

    asked = config.dtype, config.dequantize
    return choose(device_of(config), checkpoint.stored, *asked, cpu_packs=cpu_packs())


def device_of(config: LoadConfig) -> Device:
    from tempo_mlx.model import device
    from tempo_mlx.model.mlx_backend import choose_device

    return device.kind_of(choose_device(config.device))


def limit_of(config: LoadConfig) -> Limit | None:
    """How much memory the model may take: as much as was allowed, or else as there is; None where torch's GPU knows."""
    give_back()  # so that it counts as free
    if config.max_memory_gb is not None:
        packs = config.backend == "mlx" and device_of(config) == "gpu"
        return Limit(config.max_memory_gb * 1e9, "allowed by --max-memory-gb", packs, asked=True)
    if config.backend == "torch":
        return device_limit("cpu", {}) if config.device in ("auto", "cpu") else None
    from tempo_mlx.mlx import mx

    device = device_of(config)
    return device_limit(device, mx.device_info(mx.cpu if device == "cpu" else mx.gpu))
