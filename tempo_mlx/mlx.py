"""MLX, imported after the BLAS it computes with: the only place that imports it."""

from __future__ import annotations

import os

from tempo_mlx import blas

blas.ensure()
# Float32 is asked for where numbers shall be exact; CUDA and Apple's newest GPUs multiply it in 10 bits unless told.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optimizers  # noqa: E402

__all__ = ["begin", "mx", "nn", "optimizers"]


def begin(*arrays: mx.array) -> None:
    """Have what was described computed, without waiting for it."""
    mx.async_eval(*arrays)  # type: ignore[no-untyped-call]  # MLX's stubs leave it out
