"""What the files of a model hold, whichever kind they are: its config, and its tensors by Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.weights.tensor import Tensor


@dataclass(frozen=True)
class Contents:
    """`tensors`: under the names that a Hugging Face directory of the family has."""

    config: Mapping[str, Any]
    architecture: Architecture
    quantization: str
    licence: str | None
    tensors: Mapping[str, Tensor]
