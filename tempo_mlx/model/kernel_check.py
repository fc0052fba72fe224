"""Whether the attention kernel may be used here: on a GPU it is compared with MLX operations before first use.

Letters: L new rows, S slots, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np

from tempo_mlx._version import __version__
from tempo_mlx.kept import keep, kept
from tempo_mlx.mlx import mx
from tempo_mlx.model import device
from tempo_mlx.model.kernels import (
    HEAD_DIMS,
    SPAN,
    CompactBias,
    Launch,
    fused_attention,
    on_metal,
    portable_attention,
)
from tempo_mlx.model.metal import ATTENTION, COMBINE, HEADER, MASS

Shape = tuple[int, int, int]  # H, K, D

KEPT = "kernel-checks.json"
MASS_TOLERANCE = 1e-5
ROUNDING = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 3e-2}  # of the output
COMPARED = (
    (1, 300),
    (5, 301),
    (1, SPAN + 300),
    (5, SPAN + 301),
)  # rows and slots: each tile, one span and two


@dataclass(frozen=True)
class SelfCheck:
    """Kernel against MLX operations on this device.

    ok: None where there is no Metal. max_error: the largest absolute difference in output or attention mass.
    """

    ok: bool | None
    max_error: float
    message: str


def use_kernel(shape: Shape, dtype: mx.Dtype) -> bool:
    """Whether rows of such heads go through the kernel: on Metal, where it was right when it was checked."""
    return shape[2] in HEAD_DIMS and device.on_gpu() and self_check(shape, dtype).ok is True


@functools.cache
def self_check(shape: Shape, dtype: mx.Dtype) -> SelfCheck:
    """Whether kernel and MLX operations agree on this machine's GPU, in every program that such heads need.

    Compared once for each device and version: the verdict is kept.
    """
    if not mx.metal.is_available():
        return SelfCheck(None, 0.0, "The attention kernel is for Metal, which this machine does not have.")
    found = kept(KEPT).get(_key(shape, dtype))
    return SelfCheck(**found) if found else fresh_check(shape, dtype)


def fresh_check(shape: Shape, dtype: mx.Dtype) -> SelfCheck:
    """The same on Metal, compared now; the verdict is kept."""
    check = compare_paths(shape, dtype)
    keep(KEPT, _key(shape, dtype), asdict(check))
    return check


def _key(shape: Shape, dtype: mx.Dtype) -> str:
    program = "".join([HEADER, *(kernel.source for kernel in (ATTENTION, COMBINE, MASS))])
    digest = hashlib.sha256(program.encode()).hexdigest()[:16]
    facts = device.name(), metadata.version("mlx"), __version__, digest
    return " ".join(map(str, (*facts, *shape, dtype)))


def compare_paths(
    shape: Shape, dtype: mx.Dtype, run: Callable[[Launch], list[mx.array]] = on_metal
) -> SelfCheck:
    """Kernel, launched by `run`, against MLX operations, on random lattices."""
    worst = 0.0
    for rows, slots in COMPARED:
        try:
            error, mass_error = _differences(shape, dtype, rows, slots, run)
        except (RuntimeError, ValueError) as problem:  # MLX raises them where Metal cannot compile or launch
            message = f"The attention kernel does not run here, so MLX operations are used: {problem}"
            return SelfCheck(False, 0.0, message)
        worst = max(worst, error, mass_error)
        if not (error <= ROUNDING[dtype] and mass_error <= MASS_TOLERANCE):
            message = (
                f"The attention kernel is off by {error:.1e} (attention mass by {mass_error:.1e}) with {rows} rows, "
                f"{slots} slots and heads {shape} in {dtype}, so MLX operations are used; please report it."
            )
            return SelfCheck(False, worst, message)
    return SelfCheck(True, worst, f"The attention kernel agrees with MLX operations within {worst:.1e}.")


def _differences(
    shape: Shape, dtype: mx.Dtype, rows: int, slots: int, run: Callable[[Launch], list[mx.array]]
) -> tuple[float, float]:
    """Largest differences of output and mass on one random lattice with a window and a softcap; NaN is infinite."""
    heads, groups, dim = shape
    generator = np.random.default_rng(rows + slots)
    window = slots * 4 // 5
    hidden = generator.random((rows, slots)) < 0.3
    bias = np.where(hidden, -np.inf, -generator.exponential(size=(rows, slots))).astype(np.float32)
    bias[:, : slots // 2] = 0
    bias[:, slots - rows :] = np.where(np.eye(rows), 0, -np.inf)  # each row sees itself, not its siblings
    positions = np.arange(slots)
    within = positions[-rows:, None] - positions < window
    queries, keys, values = (
        mx.array(generator.standard_normal((n, length, dim)).astype(np.float32)).astype(dtype)
        for n, length in ((heads, rows), (groups, slots), (groups, slots))
    )
    compact = CompactBias.of(bias, positions[-rows:], positions, window)
    settings: dict[str, Any] = {"scale": dim**-0.5, "softcap": 30.0, "mass": True}
    found = fused_attention(queries, keys, values, compact, **settings, run=run)
    with mx.stream(mx.cpu):  # clear of the GPU's reduced-precision products
        queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
        dense = mx.array(np.tile(np.where(within, bias, np.float32(-np.inf)), (heads // groups, 1)))
        expected = portable_attention(queries, keys, values, dense, **settings)
        pairs = [
            tuple(np.array(x.astype(mx.float32)) for x in pair if x is not None)
            for pair in zip(found, expected, strict=True)
        ]
    error, mass_error = (float(np.nan_to_num(np.abs(a - b).max(), nan=np.inf)) for a, b in pairs)
    return error, mass_error
