"""Models, caches and runs that go from thread to thread, as servers, notebooks and asyncio.to_thread make them; and the
memory that a load takes. MLX computes what was put off in the thread that put it off, and in no other."""

from __future__ import annotations

import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tempo_mlx
from tempo_mlx.cores import threads
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.exits import plan as exit_plan
from tempo_mlx.mlx import mx
from tempo_mlx.model import reader
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.weights import open_checkpoint
from tests import twin_table, twins
from tests.exits import loaded_with_exits

ENDED = object()


def in_new_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns, or raises, in a thread that ends with it."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def steps_in_threads(model: Any, **settings: Any) -> list[list[int]]:
    """The tokens of a run each of whose steps is made in a new thread."""
    prompt = "the sand and the sea"
    stream: Iterator[Any] = in_new_thread(lambda: iter(tempo_mlx.stream(model, prompt, seed=1, **settings)))
    steps = []
    while (step := in_new_thread(lambda: next(stream, ENDED))) is not ENDED:
        steps.append([member.id for member in step.tokens])
    return steps


RUNS: dict[str, dict[str, Any]] = {
    "superposed": {"threshold": 0.02, "max_tokens": 12},
    "posterior": {"threshold": 0.02, "max_tokens": 20, "pruning_signal": "posterior", "posterior_threshold": 0.2},
    "attention": {"threshold": 0.02, "max_tokens": 20, "attention_threshold": 0.05},
    "coherence": {"threshold": 0.02, "max_tokens": 12, "pruning_strategy": "coherence"},
    "tree": {"decoder": "tree", "branches": 3, "max_tokens": 12},
    "mcts": {"decoder": "mcts", "mcts_simulations": 4, "max_tokens": 6},
    "beam": {"decoder": "beam", "max_tokens": 8},
    "diverse-beam": {"decoder": "diverse-beam", "max_tokens": 8},
    "sample": {"decoder": "sample", "max_tokens": 8},
    "enumerate": {"decoder": "enumerate", "max_tokens": 6},
    "plain": {"decoder": "plain", "max_tokens": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("family", ["llama", "granite4-h"])
def test_every_step_may_be_made_in_another_thread(family: str, name: str) -> None:
    """And gives what one thread gives."""
    model = in_new_thread(lambda: tempo_mlx.load(str(twins.twin(family))))
    moved = steps_in_threads(model, **RUNS[name])
    run = tempo_mlx.generate(model, "the sand and the sea", seed=1, **RUNS[name])
    assert moved == [[token.id for token in step.tokens] for step in run.steps]


def test_every_decoder_is_among_them() -> None:
    assert {settings.get("decoder", "superposed") for settings in RUNS.values()} == set(DECODERS)


@pytest.mark.parametrize("kv", ["exact", "propagate"])
@pytest.mark.parametrize("name", ["superposed", "plain"])
def test_passes_that_leave_early_may_too(
    name: str, kv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        exit_plan, "SURE", 0.0
    )  # exits of a random model keep no promise; they stay open all the same
    model = in_new_thread(
        lambda: loaded_with_exits("llama", {1: 0.15, 2: 0.1, 3: 0.5}, tmp_path, monkeypatch)
    )
    settings = {**RUNS[name], "early_exit": True, "exit_kv": kv, "max_tokens": 16}
    moved = steps_in_threads(model, **settings)
    run = tempo_mlx.generate(model, "the sand and the sea", seed=1, **settings)
    assert moved == [[token.id for token in step.tokens] for step in run.steps]
    assert any(step.exit_layer is not None for step in run.steps)


@pytest.mark.parametrize("family", twin_table.TWINS)
def test_a_model_of_every_family_is_loaded_in_one_thread_and_used_in_others(family: str) -> None:
    checkpoint = open_checkpoint(str(twins.twin(family)))
    model = in_new_thread(lambda: build(checkpoint, "cpu", "float32"))
    cache = in_new_thread(model.new_cache)
    in_new_thread(lambda: model.forward([3, 4, 5], range(3), None, cache))
    other = in_new_thread(cache.copy)
    for each in (cache, other):
        in_new_thread(lambda each=each: each.truncate(2))
        out = in_new_thread(lambda each=each: model.forward([7], [len(each)], None, each))
        assert np.isfinite(out.logits).all()


@pytest.mark.parametrize("removed", [[], [1], [2, 5]])
def test_what_a_cache_keeps_is_there_for_another_thread(removed: list[int]) -> None:
    model = build(open_checkpoint(str(twins.twin("qwen3_5"))), "cpu", "float32")
    cache = model.new_cache()
    model.forward(range(8), range(8), None, cache, parents=np.eye(8, k=-1, dtype=np.float32))
    in_new_thread(lambda: cache.keep(np.setdiff1d(np.arange(8), removed)))
    left = 8 - len(removed)
    parents = np.eye(1, left + 1, left - 1, dtype=np.float32)
    in_new_thread(lambda: model.forward([7], [8], None, cache, parents=parents))
    assert len(cache) == left + 1


@pytest.mark.parametrize(("dtype", "packed"), [("float32", None), ("float32", False), ("bfloat16", False)])
def test_a_load_takes_little_more_than_the_model(
    dtype: Any, packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a quantised file, whose numbers pass through float32, by pieces, as many at once as there are threads."""
    monkeypatch.setattr(reader, "PIECE", 1 << 14)
    monkeypatch.setattr(reader, "threads", lambda: 3)
    path = tmp_path / "model"
    wide_model(path)
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.identity  # reads the file by 2 MB, whatever its size
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    model = build(checkpoint, "cpu", dtype, packed=packed)
    beside = tracemalloc.get_traced_memory()[1]  # numpy's arrays
    tracemalloc.stop()
    size = mx.get_active_memory() - before  # and not its arrays', of which some are views of others
    assert model.info["dtype"] == dtype
    assert (
        0 < size < 1.05 * checkpoint.parameters * {"float32": 4, "bfloat16": 2}[dtype]
    )  # and no copy is left
    assert mx.get_peak_memory() - before + beside < 1.15 * size


def wide_model(path: Path) -> None:
    """Of a large vocabulary and few layers, 4-bit: the embedding is most of it."""
    import json

    hidden, vocabulary = 256, 20_000
    shapes = {"model.embed_tokens": (vocabulary, hidden)}
    for layer in range(8):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{each}_proj": (hidden, hidden) for each in "qkvo"}
        shapes |= {f"{prefix}mlp.{each}_proj": (2 * hidden, hidden) for each in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj"] = (hidden, 2 * hidden)
    tensors = {"model.norm.weight": mx.ones(hidden)}
    for name, shape in shapes.items():
        tensors |= dict(zip((f"{name}.weight", f"{name}.scales", f"{name}.biases"),
                            mx.quantize(mx.random.normal(shape), group_size=64, bits=4), strict=True))  # fmt: skip
    for layer in range(8):
        for norm in ("input", "post_attention"):
            tensors[f"model.layers.{layer}.{norm}_layernorm.weight"] = mx.ones(hidden)
    path.mkdir()
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "tie_word_embeddings": True, "rope_theta": 1e4,
        "quantization": {"group_size": 64, "bits": 4},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))


def test_as_many_threads_as_cores_or_as_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert threads() == 7
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert threads() == 2
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "0")  # as many as there are
    assert threads() == 7
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert threads() == 8
