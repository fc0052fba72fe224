"""From a name to a model that can run: weights, backend, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from tempo_mlx.config import LoadConfig
from tempo_mlx.errors import BackendError, ConfigError
from tempo_mlx.model.forward import Model
from tempo_mlx.weights import Checkpoint, Progress, Tokenizer, open_checkpoint
from tempo_mlx.weights.memory import require_memory


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer. `tempo_mlx.generate` and `stream` take one."""

    model: Model
    tokenizer: Tokenizer
    config: LoadConfig = field(default_factory=LoadConfig)


def load_model(config: LoadConfig, progress: Progress | None = None) -> LoadedModel:
    """Open (fetch, where needed) and build the model `config` names.

    Raises ModelError, DownloadError, BackendError (the backend or device is not here), MemoryLimitError,
    ConfigError (a setting that the backend does not have).
    """
    if config.backend == "torch" and config.kv_bits is not None:
        raise ConfigError(
            f"kv_bits {config.kv_bits} has no effect with the torch backend; leave it out, or choose --backend mlx."
        )
    checkpoint = open_checkpoint(config.model, progress=progress)
    if config.max_memory_gb is not None:
        require_memory(
            checkpoint, config.max_memory_gb, dtype=_loaded_as(config, checkpoint), kv_bits=config.kv_bits
        )
    model: Model
    if config.backend == "torch":
        try:
            from tempo_mlx.model.torch_backend import TorchTransformer
        except ModuleNotFoundError as error:
            raise BackendError(
                "The torch backend needs PyTorch; install tempo-mlx with its extra: [torch]."
            ) from error
        model = TorchTransformer(checkpoint, config.device, config.dtype)
    else:
        from tempo_mlx.model.mlx_backend import build

        model = build(checkpoint, config.device, config.dtype, kv_bits=config.kv_bits)
    return LoadedModel(model, checkpoint.tokenizer(), config)


def _loaded_as(config: LoadConfig, checkpoint: Checkpoint) -> str | None:
    """The dtype of the weights in memory; None: as they are stored."""
    if config.backend == "torch":
        return "float32" if config.dtype == "auto" else config.dtype
    from tempo_mlx.model._mlx import mx
    from tempo_mlx.model.mlx_backend import choose_device, choose_dtype

    dtype, packed = choose_dtype(config.dtype, choose_device(config.device) == mx.cpu, checkpoint)
    return None if packed else str(dtype).removeprefix("mlx.core.")
