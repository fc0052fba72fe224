"""Which model runs where: the settings of `load`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tempo_mlx.errors import ConfigError
from tempo_mlx.settings import Checked, row

DEFAULT_MODEL = "smollm2-135m"


def _input(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Input", help, **rest)


# fmt: off
@dataclass(frozen=True)
class LoadConfig(Checked):
    """Which model, computed by what, in how much memory."""

    model: str = _input(
        DEFAULT_MODEL,
        "Model: a name from `tempo-mlx models`, a Hugging Face repo id, a directory, or a .gguf file.",
        environment=("MODEL_PATH",), aliases=("-m",),
    )
    backend: Literal["mlx", "torch"] = _input("mlx", "What computes: MLX, or the torch reference.", audience="study")
    device: Literal["auto", "cpu", "gpu", "cuda", "mps"] = _input(
        "auto", "Where it computes; mps is another name for gpu.", environment=("DEVICE",),
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = _input(
        "auto", "Number format of activations, scales and unpacked weights; auto is float32 on the CPU, on a GPU the "
        "16 bits that suit the file.",
    )
    dequantize: bool = _input(
        False, "Unpack quantised weights: more memory, and on a GPU faster rows.",
        audience="study",
    )
    adapter: str | None = _input(None, "Directory of a LoRA or DoRA adapter, as mlx-lm writes it.")
    prompt_cache: str | None = _input(
        None, "File with the cache of a prompt, for prompts that begin like it; `generate` and `ask` write it where it "
        "is not there.",
    )
    kv_bits: Literal[4, 8] | None = row(
        None, "Limits", "Store the KV cache quantised to so many bits.", default_text="off",
    )
    max_memory_gb: float | None = row(
        None, "Limits", "Memory in GB that weights, cache and rows may use, checked before loading; by default what "
        "macOS recommends for the GPU, or what is free.", above=0, maximum=1e6, default_text="the device's",
    )
    wired: bool = row(
        False, "Limits", "Keep the model in the Mac's memory while the program runs (MLX's wired limit), as mlx-lm "
        "does; it has been linked to crashes of macOS.", "study",
    )
    rank_timeout: float = row(
        30.0, "Limits", "Under mlx.launch: a rank without a sign of life for so many seconds ends the run.", "study",
        minimum=3, maximum=86400,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "mps":
            object.__setattr__(self, "device", "gpu")
        if not self.model.strip():
            raise ConfigError("model is empty; name a model, for example " + DEFAULT_MODEL + ".")
# fmt: on
