"""A quantised cache under each kind of layer: beside states, under experts, of latents, with sinks, shared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tempo_mlx
from tempo_mlx.report.verify import verify
from tests.twin_table import WIDE_TWINS
from tests.twins import twin

TOKENS = np.random.default_rng(2).integers(10, 250, 24)


def seen(model: Any) -> tuple[np.ndarray, int]:
    """Logits of rows from a cache of the rows before them, and the bytes of keys and values."""
    cache = model.new_cache()
    model.forward(TOKENS[:16], np.arange(16), None, cache, logits="none")
    logits = model.forward(TOKENS[16:], np.arange(16, 24), None, cache).logits
    states = 0 if cache.states is None else sum(int(each.nbytes) for each in cache.states.arrays())
    return logits, cache.nbytes - states


@pytest.mark.parametrize("name", WIDE_TWINS)
def test_fewer_bits_take_less_and_differ_more(name: str) -> None:
    path = str(twin(name))
    exact, whole = seen(tempo_mlx.load(path, dtype="float32").model)
    loaded = {bits: tempo_mlx.load(path, dtype="float32", kv_bits=bits) for bits in (8, 4)}
    errors, sizes = [], []
    for each in loaded.values():
        logits, size = seen(each.model)
        errors.append(float(np.sqrt(np.square(logits - exact).mean())))
        sizes.append(size)
    assert 0 < errors[0] < errors[1] / 4 and errors[0] < 0.05, errors
    assert sizes[0] < 0.35 * whole and sizes[1] < 0.22 * whole
    for settings in (
        {"threshold": 0.02, "posterior_threshold": 0.2, "pruning_signal": "posterior"},
        {"branches": 3},
    ):
        run = tempo_mlx.generate(loaded[8], "the sand", max_tokens=6, min_steps=6, **settings)
        result = verify(run, loaded[8])
        assert result.ok, (settings, result.findings)
