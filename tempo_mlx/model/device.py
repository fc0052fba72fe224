"""Where MLX computes. What depends on it asks here, so that tests can have the GPU's way on a machine without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

from tempo_mlx import blas
from tempo_mlx.mlx import mx
from tempo_mlx.model.packed_check import trusted
from tempo_mlx.weights.precision import Device

P = ParamSpec("P")
R = TypeVar("R")


def on_gpu() -> bool:
    return bool(mx.default_device().type == mx.gpu)


def name() -> str:
    """Of the chip, or of its kind: what was measured on one says nothing of another."""
    facts = mx.device_info()
    return str(facts.get("device_name") or facts.get("architecture"))


def kind_of(device: mx.DeviceType) -> Device:
    """What the rules for numbers (weights/precision.py) call it."""
    return "cpu" if device == mx.cpu else "gpu"


@cache
def cpu_packs() -> bool:
    """Whether the CPU multiplies packed weights by few_rows.c. Compared with MLX's own product, once in a process."""
    library = blas.ensure().packed
    return library is not None and trusted(library)


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """A function that works element by element, as one operation on a GPU, where each of them costs a launch; on the
    CPU, where MLX would call a C++ compiler for that, as it stands. It is given every array it uses.
    """
    compiled = mx.compile(function, shapeless=True)

    @wraps(function)
    def either(*arrays: P.args, **constants: P.kwargs) -> R:
        return (compiled if on_gpu() else function)(*arrays, **constants)

    return either
