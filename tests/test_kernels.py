"""The attention kernel against MLX operations, and those against numpy, over random lattices.

Without a Mac the kernel runs on the CPU: MLX generates the program for Metal (on every platform, when it
exports a function), and metal_shim.h lets a C++ compiler build that very text. On a Mac it runs on the GPU.
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
from tempo_mlx.model.exponential import exponentials, gated_silu
from tempo_mlx.model.kernels import (
    CompactBias,
    Launch,
    fused_attention,
    lattice_attention,
    portable_attention,
)
from tempo_mlx.model.metal import ATTENTION, COMBINE, MASS

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


# Tests


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", kernels.HEAD_DIMS)
def test_kernel_agrees_at_every_head_dim_and_dtype(dim: int, dtype: str) -> None:
    check(Case(dtype, dim, seed=dim))


@runs_kernels
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 16])
@pytest.mark.parametrize(("groups", "heads_per_key"), [(3, 1), (1, 2), (2, 3), (1, 8)])
def test_kernel_agrees_at_every_number_of_rows_and_heads(rows: int, groups: int, heads_per_key: int) -> None:
    check(Case(groups=groups, heads_per_key=heads_per_key, rows=rows, slots=31 + rows, prompt=9, seed=rows))


@runs_kernels
@pytest.mark.parametrize("seed", range(12))
def test_kernel_agrees_on_random_lattices(seed: int) -> None:
    """Ragged sizes, spans, windows, softcaps and strides, all at once."""
    random = np.random.default_rng(seed)
    rows = int(random.integers(1, 17))
    prompt = int(random.integers(0, 60))
    check(
        Case(
            rows=rows,
            prompt=prompt,
            slots=prompt + rows + int(random.integers(0, 90)),
            groups=int(random.integers(1, 3)),
            heads_per_key=int(random.integers(1, 5)),
            softcap=float(random.uniform(0.5, 5)) if random.random() < 0.5 else None,
            window=int(random.integers(1, 40)) if random.random() < 0.5 else None,
            span=int(random.integers(20, 80)),
            stride=int(random.integers(1, 3)),
            seed=seed,
        )
    )


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_combines_spans_that_some_rows_do_not_see(dtype: str) -> None:
    check(Case(dtype, 128, rows=3, slots=150, prompt=100, window=17, span=32, seed=5))


@runs_kernels
@pytest.mark.parametrize("span", [kernels.SPAN, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_take_their_share_from_every_slot(dtype: str, span: int) -> None:
    """Beside the kernel, in one span and in several; and by definition, as one more score that holds nothing."""
    case = Case(dtype, rows=3, slots=50, span=span, window=30, seed=7)
    heads, _, dim = case.arrays[0].shape
    sinks = mx.array(np.linspace(-1, 4, heads, dtype=np.float32))
    found = fused_attention(*case.arrays, case.compact, **case.settings, span=span, run=RUN, sinks=sinks)
    queries, keys, values = (x.astype(mx.float32) for x in case.arrays)
    wanted = portable_attention(queries, keys, values, folded(case), **case.settings, sinks=sinks)
    error, mass_error = difference(found, wanted)
    assert error <= TOLERANCE[dtype] and mass_error <= MASS_TOLERANCE
    q, k, v = (np.array(x) for x in (queries, keys, values))
    scores = np.einsum("hld,hsd->hls", q, np.repeat(k, case.heads_per_key, 0)) * case.settings["scale"]
    scores = np.concatenate(
        [scores + case.visible, np.tile(np.array(sinks)[:, None, None], (1, 3, 1))], axis=2
    )
    shares = np.exp(scores - scores.max(axis=2, keepdims=True))
    shares = (shares / shares.sum(axis=2, keepdims=True))[..., :-1]
    out = np.einsum("hls,hsd->lhd", shares, np.repeat(v, case.heads_per_key, 0)).reshape(3, heads * dim)
    np.testing.assert_allclose(np.array(wanted[0]), out, atol=1e-5)
    np.testing.assert_allclose(np.array(wanted[1]), shares.mean(axis=(0, 1)), atol=1e-6)


@runs_kernels
def test_kernel_sees_one_slot_only() -> None:
    case = Case(rows=1, slots=1, prompt=0)
    check(case)
    assert float(fused(case)[1][0]) == pytest.approx(1)


@runs_kernels
def test_kernel_gives_nothing_to_slots_nobody_sees() -> None:
    case = Case(rows=4, slots=60, prompt=10, seed=3)
    unseen = np.isneginf(case.bias).all(axis=0)
    assert unseen.sum() > 5
    mass = as_float(fused(case)[1])
    assert (mass[unseen] == 0).all()
    assert mass.sum() == pytest.approx(1, abs=1e-5)


@runs_kernels
def test_self_check_passes_with_this_kernel() -> None:
    check = kernels.compare_paths(RUN)
    assert check.ok
    assert 0 < check.max_error < 0.03


def test_self_check_turns_the_kernel_down_when_it_is_wrong_or_does_not_run() -> None:
    def wrong(launch: Launch) -> list[Any]:
        return [mx.zeros(s, d) for s, d in zip(launch.output_shapes, launch.output_dtypes, strict=True)]

    def broken(launch: Launch) -> list[Any]:
        raise RuntimeError("program_source:12: error: unknown type name 'bfloat'")

    refused = kernels.compare_paths(wrong)
    assert refused.ok is False
    assert refused.max_error > 0.1
    assert "off by" in refused.message
    refused = kernels.compare_paths(broken)
    assert refused.ok is False
    assert "unknown type name" in refused.message


@pytest.mark.skipif(ON_METAL, reason="this machine has Metal")
def test_without_metal_the_portable_path_is_used() -> None:
    assert kernels.kernel_self_check().ok is None
    assert not kernels.use_kernel()
    case = Case(window=9)
    where = case.positions[-case.rows :], case.positions
    found = as_float(kernels.layer_bias(case.bias, *where, 9, (6, 2, 64), False))
    assert np.array_equal(found, np.concatenate([case.visible] * 3))
    assert kernels.layer_bias(None, *where, None, (6, 2, 64), False) is None


def test_compact_bias_means_the_same_as_the_whole() -> None:
    case = Case(rows=5, prompt=20, slots=60, seed=4)
    everything = np.zeros((5, 60), np.float32)
    causal = np.where(np.arange(60) <= np.arange(55, 60)[:, None], np.float32(0), np.float32(-np.inf))
    for bias, whole, first_open in (
        (case.bias, case.bias, 20),
        (everything, everything, 59),
        (None, causal, 55),
    ):
        compact = CompactBias.of(bias, case.positions[-5:], case.positions, None)
        assert compact.first_open == first_open
        assert np.array_equal(np.pad(as_float(compact.table), ((0, 0), (first_open, 0))), whole)


def test_a_window_that_reaches_every_slot_is_none() -> None:
    positions = np.arange(10, dtype=np.int64)
    assert CompactBias.of(None, positions[-2:], positions, 10).window == 0
    assert CompactBias.of(None, positions[-2:], positions, 9).window == 9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("slots", [70, 900])  # small and large softmax
def test_portable_path_is_attention_by_definition(dtype: str, softcap: float | None, slots: int) -> None:
    case = Case(dtype, rows=7, slots=slots, prompt=40, softcap=softcap, window=33, stride=2, seed=6)
    out, mass = lattice_attention(*case.arrays, folded(case), **case.settings)
    assert out.dtype == DTYPES[dtype]
    error, mass_error = difference((out, mass), numpy_attention(case))
    assert error <= TOLERANCE[dtype]
    assert mass_error <= MASS_TOLERANCE


@pytest.mark.parametrize("rows", [1, 2, kernels.BLOCK, kernels.BLOCK + 1, 300])
@pytest.mark.parametrize("mass", [False, True])
def test_no_bias_is_plain_causal(rows: int, mass: bool) -> None:
    """Also for a prompt, of which blocks of rows are computed apart."""
    case = Case(rows=rows, slots=rows + 17, prompt=17)
    case.__dict__["bias"] = np.where(
        np.arange(case.slots) <= np.arange(17, case.slots)[:, None], np.float32(0), np.float32(-np.inf)
    )
    out, received = lattice_attention(*case.arrays, None, **{**case.settings, "mass": mass})
    expected, expected_mass = numpy_attention(case)
    assert np.abs(as_float(out) - expected).max() < TOLERANCE["float32"]
    assert (received is not None) == mass
    if mass:
        assert np.abs(as_float(received) - expected_mass).max() < MASS_TOLERANCE


def test_softmax_and_silu_are_exact_and_hide_what_is_not_seen() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(scale=9, size=(400, 900)).astype(np.float32)
    scores[random.random(scores.shape) < 0.4] = -np.inf
    expected = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    weights, total = exponentials(mx.array(scores))
    found = as_float(weights if total is None else weights / total)
    assert np.abs(found - expected).max() < 2e-6
    assert (found[np.isinf(scores)] == 0).all()
    x = np.linspace(-100, 80, 10_001, dtype=np.float32)
    wanted = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(
        as_float(gated_silu(mx.array(x), mx.array(3.0))), 3 * wanted, rtol=1e-5, atol=1e-30
    )


MUTATIONS = {
    "first open slot": (ATTENTION, "slot >= first_open", "slot > first_open"),
    "table row": (ATTENTION, "table[row[i] *", "table[row[0] *"),
    "window": (ATTENTION, ">= window", "> window"),
    "last slot": (ATTENTION, "base + team < end;", "base + team <= end;"),
    "head of a row": (ATTENTION, "r % heads_per_key", "r / rows"),
    "slot stride": (ATTENTION, "slot * keys_strides[1]", "slot * D"),
    "value stride": (ATTENTION, "key_head * values_strides[0]", "key_head * slots * D"),
    "query stride": (ATTENTION, "queries_strides[1]", "D"),
    "scale": (ATTENTION, "= scale * static_cast", "= static_cast"),
    "softcap": (ATTENTION, "if (softcap > 0)", "if (softcap > 9)"),
    "reduction over a team": (ATTENTION, "other = TEAM / 2", "other = TEAM / 4"),
    "running maximum": (ATTENTION, "top[i] = new_top;", ""),
    "rescaled output": (ATTENTION, "output[i][d] * keep +", "output[i][d] +"),
    "rescaled total": (ATTENTION, "total[i] * keep + weight", "total[i] + weight"),
    "merge of teams": (ATTENTION, "team_total += simd_shuffle_xor(team_total, other)", "team_total += 0"),
    "merge of simdgroups": (ATTENTION, "totals[s] * metal::exp(tops[s] - whole_top)", "totals[s]"),
    "barrier before the merge": (ATTENTION, "threadgroup_barrier(mem_flags::mem_threadgroup);\n        float",
                                 "float"),
    "barrier after the merge": (ATTENTION, "threadgroup_barrier(mem_flags::mem_threadgroup);  //", "//"),
    "lanes that leave": (ATTENTION, "if (simd_any(seen))", "if (seen)"),
    "ragged tile": (ATTENTION, "metal::min(tile * ROWS + i, rows * heads_per_key - 1)",
                    "metal::min(tile * ROWS + i, rows * heads_per_key - 2)"),
    "span": (ATTENTION, "part * span", "part * (span - 1)"),
    "weight of a span": (COMBINE, "weight = metal::exp(logsumexps[at] - top)", "weight = 1"),
    "sum over spans": (COMBINE, "top + metal::log(whole)", "top"),
    "mean over heads": (MASS, "sum / heads_and_rows", "sum"),
    "normalised mass": (MASS, "- logsumexp[r]", ""),
}  # fmt: skip
MUTATION_CASES = (
    Case(rows=3, slots=70, prompt=30, softcap=2.0, window=29, span=24, stride=2, seed=1),
    Case(rows=5, slots=40, prompt=1, heads_per_key=1, seed=2),
)


@runs_kernels
def test_mutation_cases_are_green_as_they_stand() -> None:
    for case in MUTATION_CASES:
        check(case)


@runs_kernels
@pytest.mark.skipif(ON_METAL, reason="a mutated kernel may hang a GPU")
@pytest.mark.parametrize("what", MUTATIONS)
def test_a_mutation_of_the_kernel_is_noticed(what: str) -> None:
    kernel, old, new = MUTATIONS[what]
    assert old in kernel.source
    mutated = dataclasses.replace(kernel, source=kernel.source.replace(old, new))

    def run(launch: Launch) -> list[Any]:
        return on_cpu(dataclasses.replace(launch, kernel=mutated) if launch.kernel == kernel else launch)

    def is_red(case: Case) -> bool:
        try:
            error, mass_error = difference(fused(case, run), portable(case))
        except KernelError:
            return True
        return error > TOLERANCE[case.dtype] or mass_error > MASS_TOLERANCE

    assert any(is_red(case) for case in MUTATION_CASES)
