"""Adapters: what mlx-lm writes makes the same model here as there, and says so in the run's file."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tempo_mlx.api import generate, load
from tempo_mlx.errors import ModelError
from tempo_mlx.mlx import mx
from tempo_mlx.report.verify import verify
from tests.trees import prompt
from tests.twins import twin

mlx_lm_utils = pytest.importorskip("mlx_lm.utils")
tuner = pytest.importorskip("mlx_lm.tuner.utils")


@cache
def folder() -> Any:
    import tempfile

    return tempfile.TemporaryDirectory(prefix="tempo-mlx-adapters-")


@cache
def adapter(kind: str, name: str = "llama", seed: int = 1) -> Path:
    """One that mlx-lm's own layers made and its own writer wrote, of numbers that matter."""
    path = Path(folder().name) / f"{kind}-{name}-{seed}"
    path.mkdir()
    model, _ = mlx_lm_utils.load_model(twin(name))
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0}
    if kind == "some":
        parameters["keys"] = ["self_attn.q_proj", "mlp.down_proj"]
    layers = 1 if kind == "some" else len(model.layers)
    model.freeze()
    tuner.linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    random = np.random.default_rng(seed)
    from mlx.utils import tree_flatten

    weights = {}
    for key, value in tree_flatten(model.trainable_parameters()):
        noise = (
            random.normal(0, 0.2, value.shape)
            if not key.endswith(".m")
            else random.normal(0, 0.1, value.shape)
        )
        weights[key] = value + mx.array(noise.astype(np.float32))
    mx.save_safetensors(str(path / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "dora" if kind == "dora" else "lora", "num_layers": layers}
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_parameters": parameters}))
    return path


def theirs(kind: str, ids: list[int]) -> Any:
    """mlx-lm's logits (n, V)."""
    model, _ = mlx_lm_utils.load_model(twin("llama"))
    tuner.load_adapters(model, str(adapter(kind)))
    model.eval()
    return np.array(model(mx.array([ids]))[0].astype(mx.float32))


def ours(model: Any, ids: list[int]) -> Any:
    return model.model.forward(ids, range(len(ids)), None, model.model.new_cache()).logits


@pytest.mark.parametrize("kind", ["lora", "dora", "some"])
def test_an_adapter_makes_mlx_lms_model(kind: str) -> None:
    ids = prompt(0, 12)
    adapted, plain = load(twin("llama"), adapter=str(adapter(kind))), load(twin("llama"))
    assert np.abs(ours(adapted, ids) - theirs(kind, ids)).max() < 2e-4  # by a GPU's operations 1.3e-4
    assert np.abs(ours(adapted, ids) - ours(plain, ids)).max() > 0.05


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_beside_packed_weights_it_is_what_it_is_fused_with_them(kind: str, tmp_path: Path) -> None:
    from tempo_mlx.model.mlx_backend import build
    from tempo_mlx.weights import open_checkpoint
    from tempo_mlx.weights.convert import convert

    packed = tmp_path / "packed"
    convert(str(twin("llama")), packed, bits=8, group_size=32)
    checkpoint = open_checkpoint(str(packed), adapter=str(adapter(kind)))
    ids = prompt(1, 12)
    found = []
    for stays in (True, False):
        model = build(checkpoint, "cpu", "float32", packed=stays)
        found.append(model.forward(ids, range(len(ids)), None, model.new_cache()).logits)
    assert np.abs(found[0] - found[1]).max() < 1e-4


def test_an_adapter_of_a_model_that_sees_is_that_of_its_language_model(tmp_path: Path) -> None:
    """mlx-lm names such a model's layers as its files do, `language_model.` before each."""
    source = adapter("lora")
    (tmp_path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    weights = mx.load(str(source / "adapters.safetensors"))
    named = {f"language_model.{name}": each for name, each in weights.items()}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), named)
    ids = prompt(0, 12)
    found = [ours(load(twin("llama"), adapter=str(each)), ids) for each in (tmp_path, source)]
    assert np.array_equal(*found)


def test_a_run_says_its_adapter_and_verifies_with_no_other() -> None:
    adapted = load(twin("llama"), adapter=str(adapter("lora")))
    run = generate(adapted, prompt(2), decoder="plain", max_tokens=6)
    assert len(run.model["adapter"]) == 64 and verify(run, adapted).ok
    for other in (load(twin("llama")), load(twin("llama"), adapter=str(adapter("lora", seed=2)))):
        with pytest.raises(ModelError, match="was made with the adapter"):
            verify(run, other)
    with pytest.raises(ModelError, match="was made with no adapter"):
        verify(generate(load(twin("llama")), prompt(2), max_tokens=3), adapted)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="name the model that it was made for"):
        load(twin("qwen3"), adapter=str(adapter("lora")))
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        load(twin("llama"), adapter=str(tmp_path))
    for change, words in (
        ({"fine_tune_type": "full"}, "kind 'full'"),
        ({"lora_parameters": {"alpha": 2}}, "scale"),
        ({"fine_tune_type": "dora"}, "must have lora_a, lora_b, m"),
    ):
        source = adapter("lora")
        config = json.loads((source / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        (tmp_path / "adapters.safetensors").write_bytes((source / "adapters.safetensors").read_bytes())
        with pytest.raises(ModelError, match=words):
            load(twin("llama"), adapter=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text((adapter("lora") / "adapter_config.json").read_text())
    (tmp_path / "adapters.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match=r"adapters\.safetensors"):
        load(twin("llama"), adapter=str(tmp_path))
