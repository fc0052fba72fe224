"""Where MLX computes. What depends on it asks here, so that tests can have the GPU's way on a machine without one."""

from __future__ import annotations

from tempo_mlx.mlx import mx
from tempo_mlx.weights.precision import Device


def on_gpu() -> bool:
    return bool(mx.default_device().type == mx.gpu)


def kind_of(device: mx.DeviceType) -> Device:
    """What the rules for numbers (weights/precision.py) call it."""
    return "cpu" if device == mx.cpu else "gpu"
