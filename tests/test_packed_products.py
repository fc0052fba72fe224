"""Products of packed weights on the CPU: right for every layout and shape, and left out where they are not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import twins
from test_blas import run

import tempo_mlx
from tempo_mlx import blas, few_rows, packed_products
from tempo_mlx.mlx import mx
from tempo_mlx.model.device import cpu_packs
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.model.reader import Reader
from tempo_mlx.weights import open_checkpoint
from tempo_mlx.weights.convert import convert
from tempo_mlx.weights.memory import estimate_memory
from tempo_mlx.weights.tensor import Layout, kept_layout

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or not blas._installed("mlx-cpu"), reason="for MLX's CPU build on Linux"
    ),
    pytest.mark.slow,  # compiling takes longer than all that is fast
    pytest.mark.skipif(not any(map(shutil.which, packed_products.COMPILERS)), reason="no C++ compiler here"),
]
REPORT = """
from tempo_mlx import blas
from tempo_mlx.model.device import cpu_packs
print(cpu_packs(), blas.ensure().why_unpacked)
from tempo_mlx.mlx import mx
x, w = mx.random.normal((3, 96)), mx.quantize(mx.random.normal((7, 96)), 32, 4)
assert mx.abs(mx.quantized_matmul(x, *w, True, 32, 4) - x @ mx.dequantize(*w, 32, 4).T).max().item() < 1e-4
"""


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [*range(1, 18), 40, 70])
def test_its_products(rows: int, bits: int, group: int) -> None:
    """Every number of rows; outputs that fill no block; ends of every length; shared by threads; several tiles."""
    assert cpu_packs()
    rng = np.random.default_rng(rows)
    for outs, size in ((1, group), (9, 5 * group), (31, 640), (2500, 256)):
        x = rng.standard_normal((rows, size), np.float32)
        parts = mx.quantize(mx.array(rng.standard_normal((outs, size), np.float32)), group, bits)
        exact = x.astype(np.float64) @ np.array(mx.dequantize(*parts, group, bits)).astype(np.float64).T
        found = np.array(mx.quantized_matmul(mx.array(x), *parts, True, group, bits))
        np.testing.assert_allclose(found, exact, atol=1e-5 * size)


def test_rows_and_weights_that_lie_in_no_order() -> None:
    """Columns of a wider array, and outputs that were picked."""
    rng = np.random.default_rng(0)
    wide = mx.array(rng.standard_normal((128, 5), np.float32))
    parts = mx.quantize(mx.array(rng.standard_normal((40, 128), np.float32)))
    weights, picked = mx.dequantize(*parts), mx.array([3, 39, 3, 0])
    counted = packed_products.counted(str(blas.ensure().packed))
    before = counted()
    found = mx.quantized_matmul(wide.T[1:4], *(part[picked] for part in parts))
    assert counted() == before + 1
    np.testing.assert_allclose(np.array(found), np.array(wide.T[1:4] @ weights[picked].T), atol=1e-4)


@pytest.mark.parametrize("rows", [3, 70])
def test_rows_that_overlap_or_go_backwards(rows: int) -> None:
    """One row for all, each half of the one before it, and the last first."""
    assert cpu_packs()
    rng = np.random.default_rng(rows)
    numbers = mx.array(rng.standard_normal((rows, 128), np.float32))
    parts = mx.quantize(mx.array(rng.standard_normal((40, 128), np.float32)))
    weights = mx.dequantize(*parts)
    mx.eval(numbers)
    half = mx.as_strided(numbers, (2 * rows - 1, 128), (64, 1))
    for x in (mx.broadcast_to(numbers[:1], (rows, 128)), half, numbers[::-1]):
        found = mx.quantized_matmul(x, *parts)
        np.testing.assert_allclose(np.array(found), np.array(x @ weights.T), atol=1e-3)


def test_what_it_does_not_compute_is_mlx_s() -> None:
    x, w = mx.random.normal((3, 64)), mx.random.normal((8, 64))
    counted = packed_products.counted(str(blas.ensure().packed))
    before = counted()
    for bits in (2, 3, 6):
        parts = mx.quantize(w, 32, bits)
        wanted = x @ mx.dequantize(*parts, 32, bits).T
        np.testing.assert_allclose(
            np.array(mx.quantized_matmul(x, *parts, True, 32, bits)), np.array(wanted), atol=1e-4
        )
    parts = mx.quantize(w, 32)  # rows of eight, in the other order
    np.testing.assert_allclose(
        np.array(mx.quantized_matmul(x[:, :8], *parts, False, 32)),
        np.array(x[:, :8] @ mx.dequantize(*parts, 32)),
        atol=1e-4,
    )
    half = [part.astype(mx.bfloat16) if part.dtype == mx.float32 else part for part in mx.quantize(w)]
    mx.eval(mx.quantized_matmul(x.astype(mx.bfloat16), *half))
    assert counted() == before


@pytest.mark.parametrize(
    ("file", "line", "change"),
    [
        ("few_rows.c", ", vec) * scale[j] + offset[j];", ", vec) * scale[0] + offset[j];"),
        ("few_rows.c", "memcpy(end, row + at, 4 * (count - at))", "memcpy(end, row + at, 4)"),
        ("few_rows.c", "i / span % 2", "i / span % 2 == 0"),
        ("few_rows.c", "p.a = ordered;", "p.a = ordered; ordered[0] = 0;"),
        ("few_rows.c", "p->scales[group] + p->offsets[group]", "p->scales[group] + p->offsets[0]"),
        ("few_rows.c", "rows[(size_t)i * p->k + at] = x[", "rows[(size_t)i * p->k + at] = x[1 +"),
        ("packed_products.cpp", "std::make_shared<PackedProduct>(stream, width, size)",
         "std::make_shared<PackedProduct>(stream, width, 64)"),
        ("packed_products.cpp", "    described++;\n", ""),
    ],
)  # fmt: skip
def test_one_that_computes_wrongly_is_left_out(file: str, line: str, change: str, tmp_path: Path) -> None:
    """And the weights are unpacked then."""
    source = Path(few_rows.__file__).with_name(file)
    text = source.read_text("utf-8")
    assert text.count(line) == 1
    (tmp_path / file).write_text(text.replace(line, change), "utf-8")
    module = file.partition(".")[0]
    cache = tmp_path / "tempo-mlx" / "blas"
    cache.mkdir(parents=True)
    for made in (
        blas._renamed_openblas(),
        *([Path(str(blas.ensure().packed))] if module == "few_rows" else []),
    ):
        shutil.copy(made, cache)  # what is not changed is not made again
    code = f"""
from pathlib import Path
from tempo_mlx import {module}
{module}.SOURCE = Path({str(tmp_path / file)!r})
{REPORT}"""
    assert run(code, XDG_CACHE_HOME=str(tmp_path)) == "False None"


def test_without_a_compiler_for_it_weights_are_unpacked_and_the_reason_is_kept(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'c++: out of ideas' >&2; exit 1\n", "utf-8")
    compiler.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    packs, _, why = run(REPORT, PATH=path, XDG_CACHE_HOME=str(tmp_path)).partition(" ")
    assert packs == "False" and "out of ideas" in why
    assert run(REPORT, TEMPO_BLAS="openblas") == "False None"


@pytest.fixture(scope="module", params=[3, 4, 5, 6, 8])
def packed_twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("packed") / "twin"
    return open_checkpoint(str(convert(str(twins.twin("llama")), path, bits=request.param, group_size=32)))


def test_a_model_stays_packed_where_no_number_changes_by_it(packed_twin: Any) -> None:
    models = [build(packed_twin, "cpu", "float32", packed=packing) for packing in (False, None)]
    assert [model.info["quantization"] for model in models] == [None, packed_twin.quantization]
    for rows in (5, 33):
        tokens, positions = np.arange(rows) * 7 % 256, np.arange(rows)
        logits = [model.forward(tokens, positions, None, model.new_cache()).logits for model in models]
        np.testing.assert_allclose(logits[0], logits[1], atol=2e-4)
    sizes = [estimate_memory(packed_twin, dtype="float32", packed=each).weights for each in (False, "exact")]
    assert sizes[1] < 0.6 * sizes[0]


def test_which_weights_stay(packed_twin: Any) -> None:
    tensor = packed_twin.tensor("model.layers.0.mlp.down_proj.weight")
    wanted = Layout(4 if tensor.layout.bits == 4 else 8, 32)
    assert kept_layout(tensor, "exact") == wanted and kept_layout(tensor, True) == tensor.layout
    assert kept_layout(tensor, False) is None
    assert kept_layout(packed_twin.tensor("model.norm.weight"), "exact") is None
    reader = Reader(packed_twin, mx.float32, "exact")
    linear = reader.linear("model.layers.0.mlp.down_proj")
    np.testing.assert_array_equal(np.array(linear.rows(mx.arange(4))), tensor.numpy()[:4])


def test_the_default_model_stays_packed() -> None:
    loaded = tempo_mlx.load()
    assert (loaded.model.info["quantization"], loaded.model.info["dtype"]) == ("q4_1", "float32")
    plain = tempo_mlx.load(dequantize=True)
    assert plain.model.info["quantization"] is None
    texts = [
        tempo_mlx.generate(each, "The capital of France is", max_tokens=12, threshold=1.0).text
        for each in (loaded, plain)
    ]
    assert texts[0] == texts[1]
