"""Passes made as one give what each gives alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tempo_mlx.model.forward import Ask
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.model.together import together
from tempo_mlx.weights import open_checkpoint
from tests.twins import twin

LENGTHS = (40, 7, 20)  # of prompts: beyond windows and the lengths from which ropes are scaled, and not
# Windows, chunks, ropes that follow the length, experts, sinks, latents, layers that read another's keys.
KINDS = ("llama", "llama-dynamic", "phi4", "gemma3", "mixtral", "gpt_oss", "llama4", "deepseek_v3", "mistral4",
         "gemma3n", "gemma4-e")  # fmt: skip
TREE = np.array([[0, -np.inf], [-np.inf, 0]], np.float32)


def model_of(name: str) -> Any:
    return build(open_checkpoint(str(twin(name))), "cpu", "float32")


def asks_of(model: Any) -> list[Ask]:
    """One row, three rows in a line, and two branches, each after a prompt of its own."""
    random = np.random.default_rng(3)
    caches = [model.new_cache() for _ in LENGTHS]
    for cache, length in zip(caches, LENGTHS, strict=True):
        model.forward(random.integers(256, size=length), np.arange(length), None, cache, logits="none")
    first, second, third = LENGTHS
    bias = np.concatenate([np.zeros((2, third), np.float32), TREE], axis=1)
    return [
        Ask([5], np.array([first]), None, caches[0]),
        Ask([6, 7, 8], np.arange(second, second + 3), None, caches[1]),
        Ask([9, 10], np.array([third, third]), bias, caches[2]),
    ]


def alone(model: Any, ask: Ask) -> np.ndarray:
    logits: np.ndarray = model.forward(ask.tokens, ask.positions, ask.bias, ask.cache).logits
    return logits


@pytest.mark.parametrize("name", KINDS)
def test_passes_made_as_one_equal_each_alone(name: str) -> None:
    model = model_of(name)
    asks, same = asks_of(model), asks_of(model)
    for _ in range(2):  # the second time over what the first has written
        for found, ask in zip(together(model, asks), same, strict=True):
            np.testing.assert_allclose(found.logits, alone(model, ask), atol=1e-4)
        for one, other in zip(asks, same, strict=True):
            assert one.cache.positions.tolist() == other.cache.positions.tolist()
        asks, same = (
            [Ask([11], each.positions[-1:] + 1, None, each.cache) for each in of] for of in (asks, same)
        )


def test_numbers_that_are_not_finite_stay_where_they_are() -> None:
    model = model_of("llama")
    asks, same = asks_of(model), asks_of(model)
    bias = np.full((1, LENGTHS[0] + 1), np.nan, np.float32)
    asks[0] = Ask(asks[0].tokens, asks[0].positions, bias, asks[0].cache)
    first, second, third = (each.logits for each in together(model, asks))
    assert first is not None and not np.isfinite(first).any()
    np.testing.assert_allclose(second, alone(model, same[1]), atol=1e-4)
    np.testing.assert_allclose(third, alone(model, same[2]), atol=1e-4)
