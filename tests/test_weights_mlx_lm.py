"""What mlx-lm's convert makes of experts, of models that see, and in every mode of MLX: as mlx-lm reads it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed; it needs Python 3.11")

from tempo_mlx.errors import ModelError  # noqa: E402
from tempo_mlx.mlx import mx  # noqa: E402
from tempo_mlx.model.mlx_backend import build  # noqa: E402
from tempo_mlx.weights import Checkpoint, open_checkpoint  # noqa: E402
from tempo_mlx.weights.convert import convert  # noqa: E402
from tests.twins import reference, twin  # noqa: E402

PROMPT = [5, 17, 42, 99, 3, 250, 118]
QUANTISED: Mapping[str, dict[str, Any]] = {
    "dense": {},
    "affine": {"quantize": True, "q_bits": 4, "q_group_size": 32},
    **{mode: {"quantize": True, "q_mode": mode} for mode in ("mxfp4", "mxfp8", "nvfp4")},
}
# twin -> what mlx-lm wants config.json to say, too
EXPERTS: Mapping[str, dict[str, Any]] = {
    "mixtral": {}, "phimoe-plain": {}, "olmoe": {}, "lfm2_moe": {}, "deepseek_v3": {}, "glm4_moe_lite": {},
    "gguf-qwen2_moe": {}, "gguf-qwen3_moe": {"num_experts": 8}, "glm4_moe": {"rope_scaling": None},
    "qwen3_next": {"full_attention_interval": 2, "num_experts": 8},
}  # fmt: skip
WRAPPERS = {"mistral": "mistral3", "ministral3": "mistral3", "qwen3": "qwen3_vl", "gemma3": "gemma3"}
ALL_MODES = ("mixtral", "deepseek_v3", "gemma3")


def source(name: str, path: Path, changes: Mapping[str, Any]) -> Path:
    """The twin, its config in the spelling that mlx-lm knows."""
    if name == "ministral3":  # but for this one, whose rope it reads in today's spelling alone
        return Path(shutil.copytree(twin(name), path, ignore=shutil.ignore_patterns("*.gguf")))
    convert(str(twin(name)), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def wrap(path: Path, model_type: str) -> Path:
    """Make the model in a directory the text part of one that sees."""
    text = json.loads((path / "config.json").read_text())
    outer = {"model_type": model_type, "text_config": text, "vision_config": {}, "image_token_index": 5}
    outer |= {key: text[key] for key in ("vocab_size", "tie_word_embeddings") if key in text}
    (path / "config.json").write_text(json.dumps(outer))
    tensors = {f"language_model.{key}": each for key, each in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    return path


def converted(path: Path, mode: str) -> Checkpoint:
    made = path.with_name(f"{path.name}-{mode}")
    mlx_lm.convert(str(path), str(made), **QUANTISED[mode])
    return open_checkpoint(str(made))


def ours(checkpoint: Checkpoint, packed: bool = False) -> np.ndarray:
    model = build(checkpoint, "cpu", "float32", packed=packed)
    logits = model.forward(PROMPT, np.arange(len(PROMPT)), None, model.new_cache()).logits
    assert logits is not None
    return logits


def mlx_lms(checkpoint: Checkpoint) -> np.ndarray:
    mx.set_default_device(mx.cpu)
    model, _ = mlx_lm.utils.load_model(checkpoint.path)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([PROMPT]))[0])


def transformers(model: Any) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([PROMPT]), use_cache=False).logits[0].numpy()
    return logits


MATRIX = [
    (name, mode)
    for name in (*EXPERTS, *WRAPPERS)
    for mode in (QUANTISED if name in ALL_MODES else ("dense", "affine", "mxfp4"))
]


@pytest.mark.parametrize(("name", "mode"), MATRIX)
def test_what_mlx_lm_converts_means_what_it_means_to_mlx_lm(name: str, mode: str, tmp_path: Path) -> None:
    path = source(name, tmp_path / "model", EXPERTS.get(name, {}))
    checkpoint = converted(wrap(path, WRAPPERS[name]) if name in WRAPPERS else path, mode)
    assert ("bit" in checkpoint.quantization) == (mode != "dense")
    found = ours(checkpoint)
    np.testing.assert_allclose(found, mlx_lms(checkpoint), atol=3e-4)
    if mode == "dense":
        np.testing.assert_allclose(found, transformers(reference(name)), atol=3e-4)
    else:
        np.testing.assert_allclose(found, ours(checkpoint, packed=True), atol=2e-2)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "phimoe", "deepseek_v3"])
def test_a_rope_that_mlx_lm_drops_is_read(name: str, tmp_path: Path) -> None:
    """It does not know transformers 5's rope_parameters, and leaves them in the config that it writes."""
    path = Path(shutil.copytree(twin(name), tmp_path / "model", ignore=shutil.ignore_patterns("*.gguf")))
    checkpoint = converted(path, "dense")
    assert np.abs(mlx_lms(checkpoint) - transformers(reference(name))).max() > 0.1
    np.testing.assert_allclose(ours(checkpoint), transformers(reference(name)), atol=1e-4)


@pytest.mark.parametrize("mode", QUANTISED)
def test_a_hybrid_that_sees_is_as_transformers_computes_it(mode: str, tmp_path: Path) -> None:
    """mlx-lm's own recurrence differs from transformers' by a hundredth."""
    path = source("qwen3_5", tmp_path / "model", {"full_attention_interval": 2})
    checkpoint = converted(wrap(path, "qwen3_5"), mode)
    model = copy.deepcopy(reference("qwen3_5"))
    rounded = {name: torch.tensor(checkpoint.tensor(name).numpy()) for name in checkpoint.names()}
    changed = [name for name, each in model.state_dict().items() if (each != rounded[name]).any()]
    assert (len(changed) > 10) == (mode != "dense")
    model.load_state_dict(rounded)
    np.testing.assert_allclose(ours(checkpoint), transformers(model), atol=3e-4)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8"])
def test_gpt_oss_is_as_transformers_computes_it(mode: str, tmp_path: Path) -> None:
    """Whose file holds its experts packed before mlx-lm sees it, and whose YaRN is not cut to whole dimensions, which
    mlx-lm does not know."""
    path = source("gpt_oss", tmp_path / "model", {"quantization_config": {"quant_method": "mxfp4"}})
    tensors = load_file(path / "model.safetensors")
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        rows = mx.array(np.ascontiguousarray(tensors.pop(key).swapaxes(1, 2)))
        packed, scales = mx.quantize(rows, group_size=32, bits=4, mode="mxfp4")
        packed = np.array(packed)
        tensors[f"{key}_blocks"] = packed.view(np.uint8).reshape(*packed.shape[:2], -1, 16)
        tensors[f"{key}_scales"] = np.array(scales)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = converted(path, mode)
    model = copy.deepcopy(reference("gpt_oss"))
    state = model.state_dict()
    for name in state:
        stem = name.replace(".mlp.experts.", ".experts.").replace(".mlp.router.", ".router.")
        if "experts." not in name:
            state[name] = torch.tensor(checkpoint.tensor(stem).numpy())
            continue
        stem, _, kind = stem.rpartition("_proj")
        parts = [f"{stem.removesuffix('gate_up')}{part}_proj" for part in ("gate", "up")]
        parts = parts if "gate_up" in name else [f"{stem}_proj"]
        leaf = "bias" if kind else "weight"
        found = [checkpoint.tensor(f"{part}.{leaf}").numpy() for part in parts]
        found = [each if kind else each.swapaxes(1, 2) for each in found]
        whole = np.stack(found, axis=-1).reshape(*found[0].shape[:-1], -1)  # gates and inputs in turns
        state[name] = torch.tensor(whole)
    model.load_state_dict(state)
    np.testing.assert_allclose(ours(checkpoint), transformers(model), atol=1e-4)


def test_what_mlx_lm_leaves_out_is_named(tmp_path: Path) -> None:
    """It drops what corrects ERNIE's choice of experts, so that another model is left."""
    path = source("ernie4_5_moe", tmp_path / "model", {})
    with pytest.raises(ModelError, match="converted by mlx-lm, which leaves out") as caught:
        converted(path, "dense")
    assert "convert it with tempo-mlx" in str(caught.value)
    again = open_checkpoint(str(convert(str(twin("ernie4_5_moe")), tmp_path / "ours")))
    np.testing.assert_allclose(ours(again), transformers(reference("ernie4_5_moe")), atol=1e-4)
