"""Language models inside models that see: what their config says where, and MLX's own way of quantising them."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tempo_mlx.errors import ModelError
from tempo_mlx.mlx import mx
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.weights import open_checkpoint
from tempo_mlx.weights.tensor import Layout
from tests.twins import twin

# twin -> what stands around it, and where its weights are then
WRAPPERS = {
    "gemma3": ("gemma3", "language_model."),
    "mistral": ("mistral3", "model.language_model."),
    "qwen3_5": ("qwen3_5", "language_model."),
    "gemma4-moe": ("gemma4", "model.language_model."),
    "llama4": ("llama4", "language_model."),
}
PLACES = ("top", "text", "both", "absent")
LEFT_OVER = {
    "tie_word_embeddings": None,
    "eos_token_id": 299,
    "bos_token_id": 258,
    "quantization": {"bits": 2},
}
USUAL, OWN = Layout(4, 32), Layout(8, 32)  # all but one of the weights, and that one
PROMPT = [5, 17, 42, 99, 3, 250, 118]


def inside(raw: str, prefix: str) -> str:
    """The name of a text model's weight in a wrapper."""
    if prefix == "language_model.":
        return prefix + raw
    return raw if raw.startswith("lm_head") else raw.replace("model.", prefix, 1)


def wrapped(name: str, path: Path) -> dict[str, Any]:
    """The twin in a directory as a model that sees, its head written out and its matrices quantised as MLX does; what
    its text config says."""
    shutil.copytree(twin(name), path, ignore=shutil.ignore_patterns("*.gguf", "generation_config.json"))
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": tokenizer["chat_template"]}))
    tensors: dict[str, np.ndarray] = {}
    arrays = load_file(path / "model.safetensors")
    arrays.setdefault("lm_head.weight", arrays["model.embed_tokens.weight"][::-1].copy())
    for raw, array in arrays.items():
        new = inside(raw, WRAPPERS[name][1])
        layout = OWN if "layers.1." in raw and "o_proj" in raw else USUAL
        tensors[new] = array
        if array.ndim in (2, 3) and array.shape[-1] % 32 == 0 and "router" not in raw and "conv1d" not in raw:
            parts = mx.quantize(mx.array(array), **asdict(layout))
            stem = new.removesuffix(".weight")
            tensors |= zip((new, f"{stem}.scales", f"{stem}.biases"), map(np.array, parts), strict=True)
    tensors["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, path / "model.safetensors")
    text: dict[str, Any] = json.loads((path / "config.json").read_text())
    return text


def table(name: str) -> dict[str, Any]:
    """The quantization of config.json: one layer has an entry of its own, under the name it has in the file."""
    stem = inside("model.layers.1.self_attn.o_proj", WRAPPERS[name][1])
    return {**asdict(USUAL), stem: asdict(OWN)}


def said(key: str, value: Any, place: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What the wrapper says, and what its text config does; of both, the inner is left over from another model."""
    inner = LEFT_OVER[key] if place == "both" else value
    inner = (not value) if inner is None else inner
    return (
        {key: value} if place in ("top", "both") else {},
        {key: inner} if place in ("text", "both") else {},
    )


def configs(name: str, text: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, str], bool]]:
    """Every config: quantization, ends, beginning and tie at the top, in the text config, in both, or nowhere."""
    keys = ("quantization", "eos_token_id", "bos_token_id", "tie_word_embeddings")
    bare = {key: value for key, value in text.items() if key not in keys}
    for *places, tied in itertools.product(PLACES[:3], PLACES, PLACES, PLACES, (True, False)):
        stated = dict(zip(keys, places, strict=True))
        values = (table(name), [257], 256, tied)
        halves = [said(key, value, stated[key]) for key, value in zip(keys, values, strict=True)]
        outer: dict[str, Any] = {"model_type": WRAPPERS[name][0], "vision_config": {"hidden_size": 3}}
        inner: dict[str, Any] = dict(bare)
        for top, low in halves:
            outer |= top
            inner |= low
        yield {**outer, "text_config": inner}, stated, tied


@pytest.mark.parametrize("name", WRAPPERS)
def test_whatever_is_said_is_found_wherever_it_stands(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    text = wrapped(name, path)
    seen = 0
    for config, places, tied in configs(name, text):
        (path / "config.json").write_text(json.dumps(config))
        checkpoint = open_checkpoint(str(path))
        tokenizer = checkpoint.tokenizer()
        where = (places, tied)
        ends = {"top": {257}, "text": {257}, "both": {257, 299}, "absent": set()}[places["eos_token_id"]]
        assert tokenizer.eos_ids == ends | {259}, where  # which the template ends its turns with
        begins = {"top": 256, "text": 256, "both": 258, "absent": None}[places["bos_token_id"]]
        assert tokenizer.bos_id == begins, where
        default = name.startswith("gemma")  # transformers' classes
        expected = default if places["tie_word_embeddings"] == "absent" else tied
        assert checkpoint.architecture.tie_word_embeddings == expected, where
        assert ("lm_head.weight" in checkpoint.names()) == (not expected), where
        layouts = [
            checkpoint.tensor(f"model.layers.{index}.self_attn.o_proj.weight").quantized()[3]
            for index, layer in enumerate(checkpoint.architecture.layers)
            if layer.attention is not None
        ]
        assert OWN in layouts and set(layouts) <= {USUAL, OWN}, where
        seen += 1
    assert seen == 384


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_quantised_wrapper_computes_what_its_text_model_does(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    text = wrapped(name, path)
    outer = {"model_type": WRAPPERS[name][0], "quantization": table(name), "tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps({**outer, "text_config": text}))
    checkpoint = open_checkpoint(str(path))
    alone = tmp_path / "alone"
    shutil.copytree(twin(name), alone, ignore=shutil.ignore_patterns("*.gguf"))
    tensors = load_file(alone / "model.safetensors")
    for raw in tensors.keys() & {f"{each}" for each in checkpoint.names()}:
        tensors[raw] = checkpoint.tensor(raw).numpy().reshape(tensors[raw].shape)
    head = checkpoint.tensor("lm_head.weight").numpy()
    save_file({**tensors, "lm_head.weight": head}, alone / "model.safetensors")
    (alone / "config.json").write_text(json.dumps({**text, "tie_word_embeddings": False}))
    found = []
    for packed, each in ((False, checkpoint), (True, checkpoint), (False, open_checkpoint(str(alone)))):
        model = build(each, "cpu", "float32", packed=packed)
        found.append(model.forward(PROMPT, np.arange(len(PROMPT)), None, model.new_cache()).logits)
    np.testing.assert_allclose(found[0], found[1], atol=5e-3)
    if name in (
        "gemma3",
        "mistral",
        "qwen3_5",
    ):  # no experts, whose weights are under other names in the file
        np.testing.assert_allclose(found[0], found[2], atol=1e-5)


def test_an_entry_of_a_layer_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model"
    text = wrapped("gemma3", path)
    wrong = {
        **table("gemma3"),
        "language_model.model.layers.1.self_attn.o_proj": {"bits": 3, "group_size": 32},
    }
    config = {"model_type": "gemma3", "quantization": wrong, "text_config": text}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.o_proj"):
        open_checkpoint(str(path))
