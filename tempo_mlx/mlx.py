"""MLX, imported after the BLAS it computes with: the only place that imports it."""

from __future__ import annotations

from tempo_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optimizers  # noqa: E402

__all__ = ["mx", "nn", "optimizers"]
