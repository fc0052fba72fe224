"""Where MLX computes. What depends on it asks here, so that tests can have the GPU's way on a machine without one."""

from __future__ import annotations

from tempo_mlx.mlx import mx


def on_gpu() -> bool:
    return bool(mx.default_device().type == mx.gpu)
