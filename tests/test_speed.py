"""Speed as a setting (`max_parallel_tokens auto`), and the gate that keeps a step from growing slower."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
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
from tempo_mlx.model import device, linear
from tempo_mlx.model.forward import Around, Forward
from tempo_mlx.model.transformer import Transformer
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
    with monkeypatch.context() as moved:  # the cache directory came along to a new machine
        moved.setattr(device, "name", lambda: "another chip")
        assert width.row_costs(model) == LINEAR
    assert width.row_costs(model) == CHEAP
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


# Processor time of a piece of work over that of what it stands on: each the smallest of many runs on one thread, so
# that other work on the machine hardly counts. Lower them when something gets leaner. The products of few rows take
# less than half of OpenBLAS's time (few_rows.py), so that what lies between them counts for more at one row.
COMMITTED = {
    "a step of one row, over its products": 1.4,
    "a step of eight rows, over its products": 1.1,
    "the prompt, over its products": 1.4,
    "a step of five branches, over one of a single text": 1.3,
    "a step with all that is done for it, over its passes": 1.1,
}
ALLOWED = 1.5
STEADY = 1.5  # a machine on which the same work takes that many times its least time tells nothing
ROUNDS = 10  # at most: each may be the quiet one
PROMPT, STEPS = 128, 8
Case = Callable[[], float]


def processor_time(work: Callable[[], object]) -> float:
    """Seconds that `work` keeps the processor busy."""
    start = time.process_time()
    work()
    return time.process_time() - start


class Timed(Around):
    """A model that adds up what its passes take."""

    seconds = 0.0

    def forward(self, *given: Any, **options: Any) -> Forward:
        start = time.process_time()
        out: Forward = self.model.forward(*given, **options)
        self.seconds += time.process_time() - start
        return out


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[Case, Case]]:
    """Of each name the work and what it stands on."""
    loaded = tempo_mlx.load("smollm2-135m", dequantize=True)
    model, ids = loaded.model, list(range(1000, 1000 + PROMPT))
    assert isinstance(model, Transformer)
    cache = model.new_cache()
    prefill(model, ids, cache, never)

    def step(rows: int) -> None:
        bias = np.zeros((rows, PROMPT + rows), np.float32)
        bias[:, PROMPT:] = np.where(np.eye(rows), 0, -np.inf)
        model.forward(ids[:rows], [PROMPT] * rows, bias, cache)
        cache.truncate(PROMPT)

    def prompt() -> None:
        prefill(model, ids, model.new_cache(), never)

    timed = Timed(model)

    def steps(model: Any = model, **settings: Any) -> float:
        """What comes after the prompt and the first step."""
        length = {"max_tokens": STEPS, "min_steps": STEPS}
        loop = iter(tempo_mlx.stream(replace(loaded, model=model), ids[:8], **length, **settings))
        next(loop)
        timed.seconds = 0.0
        return processor_time(lambda: deque(loop, maxlen=0))

    pairs = (
        (partial(processor_time, partial(step, 1)), partial(processor_time, Products(model, 1))),
        (partial(processor_time, partial(step, 8)), partial(processor_time, Products(model, 8))),
        (partial(processor_time, prompt), partial(processor_time, Products(model, PROMPT))),
        (partial(steps, branches=5), partial(steps, decoder="plain", temperature=0.0)),
        (partial(steps, timed, threshold=0.05), lambda: timed.seconds),  # of the run just before
    )
    return dict(zip(COMMITTED, pairs, strict=True))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(
    blas.ensure().name != "OpenBLAS", reason="the committed ratios are those of OpenBLAS on Linux"
)
@pytest.mark.parametrize("name", COMMITTED)
def test_nothing_takes_longer_than_was_committed(cases: dict[str, tuple[Case, Case]], name: str) -> None:
    work: list[float] = []
    base: list[float] = []
    for _ in range(ROUNDS):
        pair = dict(zip(("work", "base"), cases[name], strict=True))
        timings = interleaved(pair, 1, warm_up=False)
        work += timings["work"].samples
        base += timings["base"].samples
        if min(work) / min(base) <= COMMITTED[name] * ALLOWED:
            return
    said = f"{name}: {min(work) / min(base):.2f} times, where {COMMITTED[name]} was committed"
    if (spread := float(np.median(base)) / min(base)) > STEADY:
        pytest.skip(
            f"{said}; but the machine is not steady, the same work takes {spread:.1f} times its least"
        )
    pytest.fail(f"{said}.")


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
