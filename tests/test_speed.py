"""Speed as a setting (`max_parallel_tokens auto`), and the gate that keeps a step from growing slower."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest

import tempo_mlx
from tempo_mlx import blas
from tempo_mlx.bench.steps import Products
from tempo_mlx.bench.timing import interleaved
from tempo_mlx.decode import width
from tempo_mlx.decode.prefill import never, prefill
from tempo_mlx.mlx import mx
from tempo_mlx.model import linear
from tempo_mlx.resolution import resolve
from tests import twins

CHEAP = {rows: 0.94 + 0.06 * rows for rows in width.ROWS}
LINEAR = {rows: 0.3 + 0.7 * rows for rows in width.ROWS}
FREE = dict.fromkeys(width.ROWS, 1.0)
DEAR = {1: 1.0, 2: 2.6, 4: 5.0, 8: 9.0, 16: 20.0}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda _: tmp_path)
    return tmp_path / "row-costs.json"


@pytest.mark.parametrize(
    ("costs", "rows"), [(CHEAP, 16), (LINEAR, 2), (FREE, 16), (DEAR, 1), ({1: 1.0, 2: 1.5, 4: 2.5}, 3)]
)
def test_the_widest_set_that_costs_at_most_two_rows(costs: dict[int, float], rows: int) -> None:
    assert width.affordable(costs) == rows


def test_rows_are_measured_once_and_kept(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tempo_mlx.load(str(twins.twin("llama"))).model
    measured = width.row_costs(model)
    assert sorted(measured) == list(width.ROWS) and all(cost > 0 for cost in measured.values())
    assert [record.message for record in caplog.records] == [
        "Measuring once what rows cost on this device; it takes some seconds."
    ]
    monkeypatch.setattr(width, "measure", lambda _: CHEAP)
    assert width.row_costs(model) == measured
    assert width.row_costs(model, again=True) == CHEAP == width.row_costs(model)
    other = tempo_mlx.load(str(twins.twin("llama")), dtype="float16").model
    monkeypatch.setattr(width, "measure", lambda _: LINEAR)
    assert width.row_costs(other) == LINEAR and width.row_costs(model) == CHEAP  # each for itself
    key = next(iter(json.loads(store.read_text())))
    few = dict.fromkeys((1, 2, 4, 8, 16), 1.0)  # as another version measured
    for damaged in ("", "[]", '{"x": 3}', *(json.dumps({key: each}) for each in ({"one": 1}, 3, [], few))):
        store.write_text(damaged)
        assert width.row_costs(model) == LINEAR


def test_measuring_goes_on_without_a_place_to_keep_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.parent.joinpath("file").touch()
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda _: store.parent / "file")
    monkeypatch.setattr(width, "measure", lambda _: CHEAP)
    assert width.row_costs(tempo_mlx.load(str(twins.twin("llama"))).model) == CHEAP


@pytest.mark.parametrize("settings", [{"threshold": 0.001}, {"decoder": "mcts", "mcts_simulations": 2}])
def test_auto_is_a_number_before_decoding_begins(
    store: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """And the run's config holds that number, so that it reproduces the run on any device."""
    monkeypatch.setattr(width, "measure", lambda _: {1: 1.0, 2: 1.5, 4: 2.5})
    loaded = tempo_mlx.load(str(twins.twin("llama")))
    run = tempo_mlx.generate(loaded, "the sand", max_tokens=5, max_parallel_tokens="auto", **settings)
    assert run.config["max_parallel_tokens"] == 3
    if "decoder" not in settings:
        assert max(len(step.tokens) for step in run.steps) == 3


# Processor time of a pass of so many rows over that of its matrix products alone: one thread, smallest of many runs,
# so that other work on the machine does not count. Lower them when a step gets leaner. The products of few rows take
# less than half of OpenBLAS's time (few_rows.py), so that what lies between them counts for more at one row.
COMMITTED = {1: 1.4, 8: 1.1}
ALLOWED = 1.15


def processor_time(work: Callable[[], object]) -> float:
    """Seconds that `work` keeps the processor busy."""
    start = time.process_time()
    work()
    return time.process_time() - start


@pytest.fixture(scope="module")
def real() -> Any:
    return tempo_mlx.load("smollm2-135m")


@pytest.mark.slow
@pytest.mark.skipif(
    blas.ensure().name != "OpenBLAS", reason="the committed ratios are those of OpenBLAS on Linux"
)
@pytest.mark.parametrize("rows", COMMITTED)
def test_a_step_is_no_slower_than_the_committed_ratio(real: Any, rows: int) -> None:
    """Other work can make a measurement large, but not three."""
    model, ids = real.model, list(range(1000, 1128))
    cache = model.new_cache()
    prefill(model, ids, cache, never)
    bias = np.zeros((rows, len(ids) + rows), np.float32)
    bias[:, len(ids) :] = np.where(np.eye(rows), 0, -np.inf)

    def step() -> None:
        model.forward(ids[:rows], [len(ids)] * rows, bias, cache)
        cache.truncate(len(ids))

    cases = {
        "step": partial(processor_time, step),
        "products": partial(processor_time, Products(model, rows)),
    }
    ratios = []
    for _ in range(3):
        timings = interleaved(cases, 8, repeats=2)
        ratios.append(min(timings["step"].samples) / min(timings["products"].samples))
        if ratios[-1] <= COMMITTED[rows] * ALLOWED:
            return
    pytest.fail(f"A step of {rows} rows takes {min(ratios):.2f} times its products, not {COMMITTED[rows]}.")


def test_where_sets_have_one_token_nothing_is_measured(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(width, "measure", None)
    loaded = tempo_mlx.load(str(twins.twin("llama")))
    config = resolve({"decoder": "plain"}, {"max_parallel_tokens": "auto"})
    assert width.with_measured_width(config, loaded.model) == config


@pytest.mark.parametrize("rows", range(1, 40))
def test_rows_that_fill_no_tile_are_filled_up(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that is sooner; the product is the same."""
    random = np.random.default_rng(rows)
    x, weight = random.normal(size=(rows, 24)), random.normal(size=(11, 24))
    filled = []
    pad = linear.mx.pad
    monkeypatch.setattr(linear.mx, "pad", lambda *args: filled.append(rows) or pad(*args))
    monkeypatch.setattr(blas, "ensure", lambda: blas.BlasInfo("OpenBLAS"))
    monkeypatch.setattr(linear.platform, "machine", lambda: "x86_64")
    layer = linear.Linear(mx.array(weight.astype(np.float32)))
    product = np.array(layer(mx.array(x.astype(np.float32))))
    assert product.shape == (rows, 11) and np.allclose(product, x @ weight.T, atol=1e-5)
    on_cpu = mx.default_device().type == mx.cpu
    assert bool(filled) == (on_cpu and rows in (5, 6, 7, 13, 14, 15, 21, 22, 23, 29, 30, 31))
    filled.clear()
    layer(mx.array(x.astype(np.float16)))
    monkeypatch.setattr(blas, "ensure", lambda: blas.BlasInfo(blas.NETLIB))
    layer(mx.array(x.astype(np.float32)))
    assert not filled
