"""What a step dispatches on a GPU, counted on MLX's graph with the GPU's path forced: every operation there costs a
launch, and a small model's step is made of them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest

from tempo_mlx.bench.census import described, operations
from tempo_mlx.mlx import mx
from tempo_mlx.model import device, kernels, transformer
from tempo_mlx.model.kernels import Launch
from tempo_mlx.model.metal import ATTENTION
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.model.rotation import Rotation
from tempo_mlx.weights import open_checkpoint
from tests import twins

LAYERS = 4  # of the twins
BESIDE = 3  # the embedding's row, the last norm, the head


@pytest.fixture
def by_gpu_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's fast functions and the kernel's launches are one operation each, as on a GPU; nothing is computed."""
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: mx.sin(x))
    monkeypatch.setattr(mx.fast, "layer_norm", lambda x, weight, bias, eps: mx.sinh(x))
    monkeypatch.setattr(mx.fast, "rope", lambda x, *rest, **options: mx.cos(x))
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda queries, keys, values, **options: mx.tan(queries)
    )
    monkeypatch.setattr(transformer, "use_kernel", lambda shape, dtype: True)
    monkeypatch.setattr(kernels, "fused_attention", partial(kernels.fused_attention, run=launched))


def launched(launch: Launch) -> list[Any]:
    """A launch in the graph: one operation on its first input, and numbers that need none."""
    outputs = [
        mx.array(np.zeros(shape, np.float32)).astype(dtype)
        for shape, dtype in zip(launch.output_shapes, launch.output_dtypes, strict=True)
    ]
    mx.eval(outputs)
    first = launch.inputs[0]
    assert isinstance(first, mx.array)
    if launch.kernel == ATTENTION:
        outputs[0] = mx.tan(first).transpose(1, 0, 2).reshape(launch.output_shapes[0])
    else:  # COMBINE: one span of several; MASS: one row of all
        outputs[0] = mx.tan(first)[:1].reshape(launch.output_shapes[0])
    return outputs


def step(family: str, rows: int, attention: bool = False, width: int | None = None) -> Counter[str]:
    model = build(open_checkpoint(str(twins.twin(family))), "cpu", "bfloat16")
    cache = model.new_cache()
    cache.reserve(np.arange(20))
    cache.commit()
    mx.eval(cache.arrays())
    return operations(described(model, cache, rows, attention, width=width))


# By layer: two norms, four products, the turn, two writes to the cache, the kernel, SiLU, two additions
USUAL = 2 + 4 + 1 + 2 + 1 + 1 + 2


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_step_dispatches_thirteen_operations_a_layer(by_gpu_rules: None, rows: int) -> None:
    found = step("llama", rows)
    assert found["Concatenate"] == found["Sigmoid"] == 0
    assert found.total() == LAYERS * USUAL + BESIDE + 1, found  # and to float32


@pytest.mark.parametrize(("rows", "width", "more"), [(1, 1, 6), (1, 4, 6), (4, 4, 10)])
def test_choosing_there_is_a_few_more(by_gpu_rules: None, rows: int, width: int, more: int) -> None:
    """Of one row the largest, without it, normalised, the best, their numbers, normalised; of several their mixture."""
    found = step("llama", rows, width=width) - step("llama", rows)
    assert found.total() == more, found


def test_attention_mass_is_one_more_for_each_layer(by_gpu_rules: None) -> None:
    more = step("llama", 4, attention=True) - step("llama", 4)
    assert more.total() == LAYERS + 1, more  # and the layers' side by side


AS_MANY = ("llama", "llama-tied", "qwen2", "qwen3", "gemma3", "starcoder2", "nemotron", "phi3", "smollm3", "gemma2",
           "olmo2", "cohere2", "phi", "olmoe", "phimoe", "mixtral")  # fmt: skip
MORE = {"phi4": LAYERS}  # one a layer: what does not turn of a head is put beside what does


@pytest.mark.parametrize("family", [*AS_MANY, *MORE])
def test_it_is_no_more_than_mlx_lm_dispatches(by_gpu_rules: None, family: str) -> None:
    """Its step for the same model, which ends in log-probabilities and their best."""
    load = pytest.importorskip("mlx_lm.utils").load_model
    from mlx_lm.models.cache import make_prompt_cache

    model: Any = load(twins.twin(family))[0]
    cache = make_prompt_cache(model)
    mx.eval(model(mx.arange(20)[None], cache=cache), [layer.state for layer in cache])
    logits = model(mx.array([[5]]), cache=cache)[:, -1]
    log_probs = logits - mx.logsumexp(logits, keepdims=True)
    kept = [array for layer in cache for array in layer.state if isinstance(array, mx.array)]
    theirs = operations([mx.argmax(log_probs, -1), log_probs, *kept])
    own = step(family, 1, width=1).total()
    assert own == theirs.total() + MORE[family] if family in MORE else own <= theirs.total(), theirs


@pytest.mark.parametrize("family", ["apertus", "gemma3", "gpt_oss", "starcoder2"])
def test_half_precision_stays_so(by_gpu_rules: None, family: str) -> None:
    """What one layer widens all others would multiply with, twice as slowly."""
    model = build(open_checkpoint(str(twins.twin(family))), "cpu", "bfloat16")
    cache = model.new_cache()
    cache.reserve(np.arange(3))
    x, _ = model.through([5, 6, 7], model.rows(np.arange(3), None, cache), cache)
    assert x.dtype == mx.bfloat16


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rows", "dim"), [(1, 16), (3, 16), (20, 16), (3, 24), (3, 32), (20, 48)])
def test_a_gpu_turns_heads_as_the_cpu_does(
    interleaved: bool, rows: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as the definition does; in one operation, unless what does not turn is no multiple of what does."""
    random = np.random.default_rng(rows)
    x = random.normal(size=(rows, 3, dim)).astype(np.float32)
    angle = random.normal(size=(rows, 8))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    pairs = np.stack([x[..., :16:2], x[..., 1:16:2]] if interleaved else [x[..., :8], x[..., 8:16]])
    turns = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angle)[:, None]
    both = np.stack([turns.real, turns.imag], axis=-1 if interleaved else -2).reshape(rows, 3, 16)
    expected = np.concatenate([both, x[..., 16:]], axis=-1)
    on_cpu = Rotation(cos, sin, dim, interleaved)(mx.array(x))
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    wide = mx.array(np.concatenate([x, x[:, :1]], axis=1))[:, :3]  # a view of what a product gives
    mx.eval(wide)
    on_gpu = Rotation(cos, sin, dim, interleaved)(wide)
    assert operations([on_gpu]).total() == (2 if dim % 16 else 1)
    for found in (on_cpu, on_gpu):
        np.testing.assert_allclose(np.array(found), expected, atol=1e-5)
