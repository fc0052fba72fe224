"""What the files of a model hold, whichever kind they are: its config, and its tensors by Hugging Face's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.weights.tensor import Tensor
from tempo_mlx.weights.tokenizer import Tokenizer


@dataclass(frozen=True)
class Contents:
    """`files`: all that was read. `tensors`: under the names that a Hugging Face directory of the family has.
    `tokenizer` reads it when it is called, and raises ModelError saying what is wrong with it."""

    files: tuple[Path, ...]

    config: Mapping[str, Any]
    architecture: Architecture
    quantization: str
    licence: str | None
    tensors: Mapping[str, Tensor]
    tokenizer: Callable[[], Tokenizer]
