"""Whether a device may use the attention kernel: the programs it needs, their check, and the verdict kept."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest

from tempo_mlx.mlx import mx
from tempo_mlx.model import device, kernel_check, kernels
from tempo_mlx.model.kernels import (
    CompactBias,
    Launch,
    fused_attention,
)
from tests.metal import DTYPES, ON_METAL, RUN, Case, as_float, generated_program, runs_kernels


@runs_kernels
@pytest.mark.parametrize(
    ("shape", "dtype"), [((6, 2, 64), mx.float32), ((8, 8, 80), mx.float16), ((8, 4, 96), mx.bfloat16)]
)
def test_self_check_passes_with_this_kernel(shape: tuple[int, int, int], dtype: Any) -> None:
    """And meets every program that such heads need, whatever the number of rows and slots."""
    met: set[str] = set()

    def noted(launch: Launch) -> list[Any]:
        met.add(program_name(launch))
        return RUN(launch)

    check = kernel_check.compare_paths(shape, dtype, noted)
    assert check.ok, check.message
    assert 0 < check.max_error < 0.03
    assert programs_of(shape, dtype) == met and len(met) <= 6


def program_name(launch: Launch) -> str:
    """What tells programs apart: the template, and in which memory MLX passes each array (few numbers: constant)."""
    arrays = [(x.dtype, x.size < 8) for x in launch.inputs if isinstance(x, mx.array)]
    return f"{launch.kernel.name} {launch.template} {arrays} {launch.output_dtypes}"


def programs_of(shape: tuple[int, int, int], dtype: Any) -> set[str]:
    """Of every number of rows, a few slots and many, with attention mass and without."""
    heads, groups, dim = shape
    met: set[str] = set()

    def noted(launch: Launch) -> list[Any]:
        met.add(program_name(launch))
        return [mx.zeros(s, d) for s, d in zip(launch.output_shapes, launch.output_dtypes, strict=True)]

    for rows in range(1, kernels.MAX_ROWS + 1):
        for slots in (rows + 20, 900, 1100, 2100):
            queries, keys = mx.zeros((heads, rows, dim), dtype), mx.zeros((groups, slots, dim), dtype)
            for mass in (False, True):
                for bias in (None, np.zeros((rows, slots), np.float32)):
                    compact = CompactBias.of(bias, np.full(rows, slots), np.arange(slots), None)
                    fused_attention(
                        queries, keys, keys, compact, scale=1.0, softcap=None, mass=mass, run=noted
                    )
    return met


def test_self_check_turns_the_kernel_down_when_it_is_wrong_or_does_not_run() -> None:
    def wrong(launch: Launch) -> list[Any]:
        return [mx.zeros(s, d) for s, d in zip(launch.output_shapes, launch.output_dtypes, strict=True)]

    def broken(launch: Launch) -> list[Any]:
        raise RuntimeError("program_source:12: error: unknown type name 'bfloat'")

    refused = kernel_check.compare_paths((6, 2, 64), mx.float32, wrong)
    assert refused.ok is False
    assert refused.max_error > 0.1
    assert "off by" in refused.message
    refused = kernel_check.compare_paths((6, 2, 64), mx.float32, broken)
    assert refused.ok is False
    assert "unknown type name" in refused.message


@pytest.mark.skipif(ON_METAL, reason="this machine has Metal")
def test_without_metal_the_portable_path_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a GPU that is not Metal's."""
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    assert kernel_check.self_check((6, 2, 64), mx.float32).ok is None
    assert not kernel_check.use_kernel((6, 2, 64), mx.float32)
    case = Case(window=9)
    where = case.positions[-case.rows :], case.positions
    found = as_float(kernels.layer_bias(case.bias, *where, 9, (6, 2, 64), False))
    assert np.array_equal(found, np.concatenate([case.visible] * 3))
    assert kernels.layer_bias(None, *where, None, (6, 2, 64), False) is None


def test_the_verdict_is_kept_by_device_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has Metal, as told here; a kernel that was wrong stays turned down until it changes."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda _: tmp_path)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    facts = {"device_name": "M1"}
    monkeypatch.setattr(mx, "device_info", lambda: facts)
    verdicts = iter([False, True, True])
    asked = []

    def compared(shape: Any, dtype: Any) -> kernel_check.SelfCheck:
        asked.append(shape)
        return kernel_check.SelfCheck(next(verdicts), 0.5, "measured")

    monkeypatch.setattr(kernel_check, "compare_paths", compared)

    def verdict(dim: int = 64) -> bool:
        kernel_check.self_check.cache_clear()  # as in another process
        return kernel_check.use_kernel((6, 2, dim), mx.bfloat16)

    assert not verdict() and not verdict() and len(asked) == 1
    facts["device_name"] = "M4"
    assert verdict() and verdict() and len(asked) == 2
    assert not verdict(dim=48) and len(asked) == 2  # no kernel for such heads
    (tmp_path / kernel_check.KEPT).write_text("{")
    assert verdict() and len(asked) == 3
    kernel_check.self_check.cache_clear()


CLANG = shutil.which("clang++")
STRICT = Path(__file__).with_name("metal_strict.h")


def refused(program: str) -> str:
    """What clang has against a program, with memory as Metal tells it apart; nothing if it takes it."""
    command = [str(CLANG), "-xc++", "-std=c++17", "--target=aarch64-linux-gnu", "-fsyntax-only", "-w"]
    text = re.sub(r"\[\[.*?\]\]", "", program)  # Metal's attributes
    done = subprocess.run(
        [*command, "-include", str(STRICT), "-"], input=text, capture_output=True, text=True, check=False
    )
    return done.stderr


def generated(dim: int, dtype: Any) -> dict[str, str]:
    """Every program that heads of this size need, by its name: rows and spans one and several, heads many and few."""
    programs: dict[str, str] = {}

    def noted(launch: Launch) -> list[Any]:
        programs.setdefault(program_name(launch), generated_program(launch))
        return [mx.zeros(s, d) for s, d in zip(launch.output_shapes, launch.output_dtypes, strict=True)]

    for heads, groups in ((9, 3), (2, 2)):
        for rows, slots in kernel_check.COMPARED:
            queries, keys = mx.zeros((heads, rows, dim), dtype), mx.zeros((groups, slots, dim), dtype)
            compact = CompactBias.of(None, np.full(rows, slots), np.arange(slots), None)
            fused_attention(queries, keys, keys, compact, scale=1.0, softcap=None, mass=True, run=noted)
    return programs


@pytest.mark.slow
@pytest.mark.skipif(CLANG is None, reason="no clang, which knows address spaces (apt install clang)")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", kernels.HEAD_DIMS)
def test_every_program_keeps_metals_memories_apart(dim: int, dtype: str) -> None:
    programs = generated(dim, DTYPES[dtype])
    assert len(programs) >= 6
    with ThreadPoolExecutor(2) as pool:
        for name, problem in zip(programs, pool.map(refused, programs.values()), strict=True):
            assert not problem, f"{name}: {problem}"


@pytest.mark.slow
@pytest.mark.skipif(CLANG is None, reason="no clang, which knows address spaces (apt install clang)")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("float score[ROWS];", "float score[ROWS]; const constant float* mixed = table;"),
        ("float score[ROWS];", "float score[ROWS]; device float* mixed = totals;"),
        ("simd_any(seen)", "simd_some(seen)"),
    ],
)
def test_a_program_that_mixes_them_up_is_refused(right: str, wrong: str) -> None:
    program = next(text for name, text in generated(64, mx.float32).items() if "attention" in name)
    assert right in program and not refused(program)
    assert "error:" in refused(program.replace(right, wrong))
