"""Where checkpoints keep the same tensors: as each family does, fused, stacked, across, and as mlx-lm converts them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tempo_mlx.errors import ModelError  # noqa: E402
from tempo_mlx.weights import open_checkpoint  # noqa: E402
from tests.twins import twin  # noqa: E402

Tensors = dict[str, np.ndarray]


def rewritten(name: str, path: Path, change: Any, **config: Any) -> Path:
    """A copy of a twin whose tensors went through `change`."""
    shutil.copytree(twin(name), path)
    tensors: Tensors = load_file(path / "model.safetensors")
    save_file(
        {key: np.ascontiguousarray(value) for key, value in change(tensors).items()},
        path / "model.safetensors",
    )
    stated = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(stated))
    return path


def same(one: Path, other: Path) -> None:
    ours, theirs = open_checkpoint(str(one)), open_checkpoint(str(other))
    assert ours.names() == theirs.names()
    for name in ours.names():
        np.testing.assert_allclose(
            ours.tensor(name).numpy(), theirs.tensor(name).numpy(), atol=3e-7, err_msg=name
        )


def as_mlx_lm(tensors: Tensors) -> Tensors:
    """Convolutions with their taps first, norms with the 1 in them, experts stacked."""
    found: Tensors = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        if name.endswith("conv1d.weight"):
            tensor = np.swapaxes(tensor, 1, 2)
        elif name.endswith("norm.weight") and "linear_attn" not in name:
            tensor = tensor + np.float32(1)
        if ".experts." in name and name.count(".") > 5:
            stem, _, rest = name.partition(".experts.")
            place, _, part = rest.partition(".")
            stacks.setdefault(f"{stem}.switch_mlp.{part}", {})[int(place)] = tensor
        else:
            found[name] = tensor
    return found | {name: np.stack([parts[i] for i in sorted(parts)]) for name, parts in stacks.items()}


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_hybrids_of_mlx_lm(name: str, tmp_path: Path) -> None:
    same(rewritten(name, tmp_path / "copy", as_mlx_lm), twin(name))


def test_latent_attention_of_mlx_lm(tmp_path: Path) -> None:
    def apart(tensors: Tensors) -> Tensors:
        for name in [each for each in tensors if each.endswith("kv_b_proj.weight")]:
            both = tensors.pop(name).reshape(4, 16 + 12, 16)  # heads, nope and value, rank
            tensors[name.replace("kv_b_proj", "embed_q")] = np.swapaxes(both[:, :16], 1, 2)
            tensors[name.replace("kv_b_proj", "unembed_out")] = both[:, 16:]
        return tensors

    same(rewritten("deepseek_v3", tmp_path / "copy", apart), twin("deepseek_v3"))
    with pytest.raises(ModelError, match="unembed_out"):
        lost = rewritten(
            "deepseek_v3",
            tmp_path / "lost",
            lambda tensors: {n: t for n, t in apart(tensors).items() if "unembed_out" not in n},
        )
        open_checkpoint(str(lost))


def test_multipliers_in_the_weights_are_refused(tmp_path: Path) -> None:
    copy = rewritten("falcon_h1", tmp_path / "copy", as_mlx_lm)
    with pytest.raises(ModelError, match="converted by mlx-lm"):
        open_checkpoint(str(copy))


def test_stacked_and_single_experts_are_the_same(tmp_path: Path) -> None:
    def stacked(tensors: Tensors) -> Tensors:
        found = {n: t for n, t in tensors.items() if ".experts." not in n}
        for part in ("gate_proj", "up_proj", "down_proj"):
            for layer in {n.split(".")[2] for n in tensors if ".experts." in n}:
                stem = f"model.layers.{layer}.mlp"
                parts = [tensors[f"{stem}.experts.{i}.{part}.weight"] for i in range(8)]
                found[f"{stem}.switch_mlp.{part}.weight"] = np.stack(parts)
        return found

    same(rewritten("qwen3_moe", tmp_path / "copy", stacked), twin("qwen3_moe"))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    def short(tensors: Tensors) -> Tensors:
        return {n: t[:, :8] if n.endswith("experts.gate_up_proj") else t for n, t in tensors.items()}

    with pytest.raises(ModelError, match="gate_up_proj"):
        open_checkpoint(str(rewritten("mistral4", tmp_path / "short", short)))
    fewer = rewritten(
        "qwen3_moe",
        tmp_path / "fewer",
        lambda tensors: {n: t for n, t in tensors.items() if ".experts.7." not in n},
    )
    with pytest.raises(ModelError, match="experts"):
        open_checkpoint(str(fewer))


def test_a_wrapper_lends_what_its_text_part_does_not_say(tmp_path: Path) -> None:
    """Quantization, special tokens and a tied head may stand outside; the head's tie is the wrapper's to say."""

    def inside(tensors: Tensors) -> Tensors:
        return {f"language_model.{name}": tensor for name, tensor in tensors.items()} | {
            "vision_tower.patch.weight": np.ones((2, 2), np.float32)
        }

    path = tmp_path / "wrapped"
    rewritten("qwen3_5", path, inside)
    text = json.loads((path / "config.json").read_text())
    text.pop("eos_token_id")
    outer = {
        "model_type": "qwen3_5", "text_config": {**text, "bos_token_id": None}, "eos_token_id": 257,
        "tie_word_embeddings": False, "vision_config": {"hidden_size": 3},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(outer))
    same(path, twin("qwen3_5"))
    assert open_checkpoint(str(path)).config["eos_token_id"] == 257
