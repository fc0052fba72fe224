"""Random lattices, and the attention kernel run over them: on a Mac on its GPU, elsewhere on the CPU.

MLX generates the program for Metal on every platform, when it exports a function, and metal_shim.h lets a C++ compiler
build that very text.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tempo_mlx.mlx import mx
from tempo_mlx.model import kernels
from tempo_mlx.model.kernels import (
    CompactBias,
    Launch,
    fused_attention,
    portable_attention,
)

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}  # half the spacing of numbers near 4
MASS_TOLERANCE = 2e-6
SHIM = Path(__file__).with_name("metal_shim.h")
ON_METAL = mx.metal.is_available()
COMPILER = shutil.which("g++") or shutil.which("clang++")


def runs_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """Skipped where the kernel cannot be run, and slow, since a C++ compiler builds every program that is new."""
    can = ON_METAL or (COMPILER is not None and platform.system() == "Linux")
    reason = "no Metal, and no C++ compiler on Linux: the attention kernel cannot be run here"
    return pytest.mark.slow(pytest.mark.skipif(not can, reason=reason)(test))


# Random lattices


@dataclass(frozen=True)
class Case:
    """Shapes and settings of one comparison; `slots` counts the rows' own, which come last."""

    dtype: str = "float32"
    dim: int = 64
    groups: int = 2
    heads_per_key: int = 3
    rows: int = 4
    slots: int = 53
    prompt: int = 20  # slots that every row sees
    softcap: float | None = None
    window: int | None = None
    span: int = kernels.SPAN
    stride: int = 1  # every which slot of its buffer the cache uses
    seed: int = 0

    @functools.cached_property
    def random(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """(S,): the prompt, then sets whose members share a position; a gap after the prompt in some."""
        later = np.cumsum(self.random.random(self.slots - self.prompt) < 0.4) + (self.random.random() < 0.5)
        return np.concatenate([np.arange(self.prompt), self.prompt + later]).astype(np.int64)

    @functools.cached_property
    def bias(self) -> np.ndarray:
        """(L, S): log gamma on earlier sets, some members unseen, one slot in four removed for all rows."""
        later = self.slots - self.prompt
        table = np.log(self.random.random((self.rows, later)))
        table[self.random.random((self.rows, later)) < 0.2] = -np.inf
        table[:, self.random.random(later) < 0.25] = -np.inf
        table[:, later - self.rows :] = np.where(np.eye(self.rows), 0, -np.inf)
        return np.concatenate([np.zeros((self.rows, self.prompt)), table], axis=1).astype(np.float32)

    @functools.cached_property
    def visible(self) -> np.ndarray:
        """The bias (L, S) with the window in it."""
        if self.window is None:
            return self.bias
        near = self.positions[-self.rows :, None] - self.positions < self.window
        return np.where(near, self.bias, np.float32(-np.inf))

    @functools.cached_property
    def arrays(self) -> tuple[Any, Any, Any]:
        """Queries, keys, values: views of buffers that are NaN where the kernel has no business reading."""
        heads, dtype = self.groups * self.heads_per_key, DTYPES[self.dtype]
        projected = mx.array(self.random.standard_normal((self.rows, heads, self.dim)).astype(np.float32))
        views = [projected.astype(dtype).transpose(1, 0, 2)]
        for _ in range(2):
            buffer = np.full((self.groups, self.slots * self.stride + 9, self.dim), np.nan, np.float32)
            used = np.arange(self.slots) * self.stride
            buffer[:, used] = self.random.standard_normal((self.groups, self.slots, self.dim))
            views.append(mx.array(buffer).astype(dtype)[:, : self.slots * self.stride : self.stride])
        mx.eval(views)
        return views[0], views[1], views[2]

    @property
    def settings(self) -> dict[str, Any]:
        return {"scale": 1.3 * self.dim**-0.5, "softcap": self.softcap, "mass": True}

    @property
    def compact(self) -> CompactBias:
        return CompactBias.of(self.bias, self.positions[-self.rows :], self.positions, self.window)


def numpy_attention(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Head by head and in float64, from the definition."""
    queries, keys, values = (np.array(x.astype(mx.float32), np.float64) for x in case.arrays)
    out = np.empty((case.rows, len(queries), case.dim))
    mass = np.zeros(case.slots)
    for head, query in enumerate(queries):
        group = head // case.heads_per_key
        scores = case.settings["scale"] * query @ keys[group].T
        if case.softcap is not None:
            scores = case.softcap * np.tanh(scores / case.softcap)
        weights = np.exp(scores + case.visible)
        weights /= weights.sum(axis=1, keepdims=True)
        out[:, head] = weights @ values[group]
        mass += weights.mean(axis=0) / len(queries)
    return out.reshape(case.rows, -1), mass


def difference(found: tuple[Any, Any], expected: tuple[Any, Any]) -> tuple[float, float]:
    """Largest absolute difference in output and in mass; NaN counts as infinitely wrong."""
    pairs = zip(found, expected, strict=True)
    worst = [float(np.max(np.abs(as_float(a) - as_float(b)))) for a, b in pairs]
    return (np.nan_to_num(worst[0], nan=np.inf), np.nan_to_num(worst[1], nan=np.inf))


def as_float(x: Any) -> np.ndarray:
    return np.array(x.astype(mx.float32)) if isinstance(x, mx.array) else np.asarray(x)


# The kernel, run on whatever there is


def generated_program(launch: Launch) -> str:
    """The text MLX hands to the Metal compiler for this launch, printed while it exports it as a function."""
    with tempfile.TemporaryDirectory() as directory:
        printed = Path(directory, "printed")
        before = os.dup(1)
        with printed.open("wb") as file:
            os.dup2(file.fileno(), 1)  # MLX prints from C++
        try:
            traced = {i: x for i, x in enumerate(launch.inputs) if isinstance(x, mx.array)}

            def function(*arrays: Any) -> Any:
                inputs = {**dict(enumerate(launch.inputs)), **dict(zip(traced, arrays, strict=True))}
                return kernels.on_metal(
                    dataclasses.replace(launch, inputs=tuple(inputs.values())), verbose=True
                )

            mx.export_function(str(Path(directory, "launch.mlxfn")), function, *traced.values())
        finally:
            os.dup2(before, 1)
            os.close(before)
        match = re.search(r"```\n(.*)\n```", printed.read_text(), re.DOTALL)
    assert match, "MLX printed no program"
    return match[1]


PARAMETER = re.compile(
    r"^  (?:const )?(?:device|constant|const constant)? ?([\w<>]+)([*&]?) (\w+) \[\[(\w+)(?:\(\d+\))?\]\]"
)


def parameters(program: str) -> list[tuple[str, str, str, str]]:
    """(type, * or & or nothing, name, attribute) of each parameter of the kernel."""
    signature = program[program.index("[[kernel]] void") : program.index(") {\n")]
    matches = [PARAMETER.match(line) for line in signature.splitlines()[1:]]
    assert all(matches), signature
    return [m.groups() for m in matches if m]  # type: ignore[misc]


@functools.cache
def built(program: str) -> Any:
    """The program as a shared library with one function, `run(buffers, grid, threadgroup, seed)`."""
    arguments = []
    buffers = 0
    for kind, how, _, attribute in parameters(program):
        if attribute != "buffer":
            arguments.append(f"shim::{attribute}()")
            continue
        arguments.append(f"{'*' if how == '&' else ''}({kind}*)buffers[{buffers}]")
        buffers += 1
    name = re.search(r"decltype\((.*?)\) ", program) or re.search(r"void (\w+)\(", program)
    assert name
    driver = (
        f'#include "{SHIM}"\n{program}\n'
        'extern "C" const char* run(void** buffers, const uint* grid, const uint* group, uint seed) {\n'
        f"  return shim::launch([=] {{ {name[1]}({', '.join(arguments)}); }}, grid, group, seed);\n}}\n"
    )
    stem = scratch() / hashlib.sha256(driver.encode()).hexdigest()[:16]
    source, library = stem.with_suffix(".cpp"), stem.with_suffix(".so")
    source.write_text(driver)
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror"]
    unknown = ["-Wno-attributes", "-Wno-unknown-pragmas"]  # Metal's
    command = [str(COMPILER), *flags, *unknown, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = ctypes.CDLL(str(library)).run
    run.restype = ctypes.c_char_p
    return run


@functools.cache
def scratch() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="tempo-mlx-kernels-"))
    atexit.register(shutil.rmtree, directory)
    return directory


def on_cpu(launch: Launch, seed: int = 0) -> list[Any]:
    """What `on_metal` does, on the CPU: every thread of every threadgroup, in an order `seed` decides."""
    program = generated_program(launch)
    inputs = dict(zip(launch.kernel.inputs, map(as_numpy, launch.inputs), strict=True))
    outputs = {
        name: np.full(shape, np.nan, np.float32) if dtype == mx.float32 else np.full(shape, 0x7FFF, np.uint16)
        for name, shape, dtype in zip(
            launch.kernel.outputs, launch.output_shapes, launch.output_dtypes, strict=True
        )
    }  # NaN, so that what the kernel does not write shows
    buffers = [
        buffer_for(name, {**inputs, **outputs})
        for _, _, name, attribute in parameters(program)
        if attribute == "buffer"
    ]
    pointers = (ctypes.c_void_p * len(buffers))(*[b.ctypes.data for b in buffers])
    sizes = [(ctypes.c_uint * 3)(*size) for size in (launch.grid, launch.threadgroup)]
    error = built(program)(pointers, *sizes, seed)
    if error:
        raise KernelError(error.decode())
    return [
        mx.array(x) if dtype == mx.float32 else mx.array(x).view(dtype)
        for x, dtype in zip(outputs.values(), launch.output_dtypes, strict=True)
    ]


class KernelError(Exception):
    """Threads of a group went different ways where Metal wants them together."""


def as_numpy(x: Any) -> np.ndarray:
    """What a kernel gets: an array with its strides, two-byte floats as bits; a number as MLX types it."""
    if isinstance(x, mx.array):
        return np.array(x if x.dtype.size == 4 else x.view(mx.uint16), copy=False)
    return np.array(x, {bool: np.bool_, int: np.int32, float: np.float32}[type(x)])


def buffer_for(name: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    if name in arrays:
        return arrays[name]
    of, _, what = name.rpartition("_")
    array = arrays[of]
    if what == "shape":
        return np.array(array.shape, np.int32)
    assert what == "strides", name
    return np.array(array.strides, np.int64) // array.itemsize


RUN: Callable[[Launch], list[Any]] = kernels.on_metal if ON_METAL else on_cpu


def fused(case: Case, run: Callable[[Launch], list[Any]] = RUN) -> tuple[Any, Any]:
    return fused_attention(*case.arrays, case.compact, **case.settings, span=case.span, run=run)


def portable(case: Case) -> tuple[Any, Any]:
    """In float32, from the same rounded arrays."""
    queries, keys, values = (x.astype(mx.float32) for x in case.arrays)
    return portable_attention(queries, keys, values, folded(case), **case.settings)


def folded(case: Case) -> Any:
    """What the rows see, once for each head that shares a key head."""
    return mx.array(np.tile(case.visible, (case.heads_per_key, 1)))


def check(case: Case) -> None:
    out, mass = fused(case)
    assert out.dtype == DTYPES[case.dtype]
    error, mass_error = difference((out, mass), portable(case))
    assert error <= TOLERANCE[case.dtype], case
    assert mass_error <= MASS_TOLERANCE, case
