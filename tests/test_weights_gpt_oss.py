"""Gpt-oss as OpenAI publishes it: experts in blocks of mxfp4, under Hugging Face's names and under their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tempo_mlx.errors import ModelError  # noqa: E402
from tempo_mlx.mlx import mx  # noqa: E402
from tempo_mlx.model.mlx_backend import build  # noqa: E402
from tempo_mlx.weights import open_checkpoint  # noqa: E402
from tests.twins import twin, write_tokenizer  # noqa: E402

EXPERTS = ("gate_up_proj", "down_proj")
ORIGINAL = (  # Hugging Face's name of a part, OpenAI's
    ("input_layernorm.weight", "attn.norm.scale"), ("post_attention_layernorm.weight", "mlp.norm.scale"),
    ("self_attn.o_proj.", "attn.out."), ("self_attn.sinks", "attn.sinks"), ("mlp.router.", "mlp.gate."),
    ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"), ("mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
    ("mlp.experts.gate_up_proj_", "mlp.mlp1_weight."), ("mlp.experts.down_proj_", "mlp.mlp2_weight."),
)  # fmt: skip


def _blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, in, out) as transformers keeps it -> blocks (n, out, in / 32, 16) and scales, as OpenAI does."""
    packed, scales = mx.quantize(
        mx.array(np.ascontiguousarray(weight.swapaxes(1, 2))), group_size=32, bits=4, mode="mxfp4"
    )
    count, rows, _ = packed.shape
    return np.array(packed).view(np.uint8).reshape(count, rows, -1, 16), np.array(scales)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin with its experts in blocks, as the files of openai/gpt-oss-20b."""
    path = tmp_path_factory.mktemp("gpt-oss")
    tensors: dict[str, np.ndarray] = {}
    for name, weight in load_file(twin("gpt_oss") / "model.safetensors").items():
        if name.endswith(EXPERTS):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = _blocks(weight)
        else:
            tensors[name] = weight
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((twin("gpt_oss") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def original(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in OpenAI's names."""
    path = tmp_path_factory.mktemp("original")
    found, tensors = load_file(published / "model.safetensors"), {}
    for name, weight in found.items():
        name = name.replace("model.layers.", "block.").replace("model.embed_tokens.", "embedding.")
        name = name.replace("lm_head.", "unembedding.").replace("model.norm.weight", "norm.scale")
        for theirs, ours in ORIGINAL:
            name = name.replace(theirs, ours)
        tensors[name] = weight
    for layer in range(4):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"block.{layer}.self_attn.{each}_proj.{kind}") for each in "qkv"]
            tensors[f"block.{layer}.attn.qkv.{kind}"] = np.concatenate(parts)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((published / "config.json").read_text())
    yarn = config["rope_parameters"]
    kept = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "swiglu_limit", "head_dim",
            "num_attention_heads", "num_key_value_heads", "sliding_window")  # fmt: skip
    stated = {key: config[key] for key in kept} | {
        "num_experts": config["num_local_experts"], "experts_per_token": config["num_experts_per_tok"],
        "initial_context_length": yarn["original_max_position_embeddings"], "rope_theta": yarn["rope_theta"],
        "rope_scaling_factor": yarn["factor"], "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(stated))
    write_tokenizer(path)
    return path


def _logits(path: Path, tokens: np.ndarray) -> Any:
    model = build(open_checkpoint(str(path)), "auto", "float32")
    return np.array(model.forward(tokens, np.arange(len(tokens)), None, model.new_cache()).logits)


def test_it_is_what_transformers_makes_of_it(published: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        published, dtype=torch.float32, attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    ).float().eval()  # fmt: skip
    tokens = np.random.default_rng(0).integers(256, size=40)
    with torch.inference_mode():
        wanted = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()
    assert wanted.std() > 0.5
    np.testing.assert_allclose(_logits(published, tokens), wanted, atol=1e-4)


def test_experts_stay_packed(published: Path) -> None:
    checkpoint = open_checkpoint(str(published))
    assert checkpoint.quantization == "mlx mxfp4 4-bit, group 32"
    for part, shape in {"gate_proj": (8, 96, 64), "up_proj": (8, 96, 64), "down_proj": (8, 64, 96)}.items():
        tensor = checkpoint.tensor(f"model.layers.1.experts.{part}.weight")
        assert (tensor.kind, tensor.shape) == ("mlx_quantized", shape)
        packed, scales, biases, layout = tensor.quantized()
        assert (layout.mode, biases, packed.dtype) == ("mxfp4", None, np.uint32)
        dense = mx.dequantize(mx.array(packed), mx.array(scales), group_size=32, bits=4, mode="mxfp4")
        np.testing.assert_array_equal(np.array(dense.astype(mx.float32)), tensor.numpy())


def test_the_original_names_are_the_same_model(published: Path, original: Path) -> None:
    ours, theirs = open_checkpoint(str(original)), open_checkpoint(str(published))
    assert ours.architecture.layers == theirs.architecture.layers
    assert ours.quantization == theirs.quantization
    assert ours.architecture.max_position_embeddings == 128  # YaRN's
    for name in theirs.names():
        np.testing.assert_array_equal(ours.tensor(name).numpy(), theirs.tensor(name).numpy(), err_msg=name)
    tokens = np.random.default_rng(1).integers(256, size=20)
    np.testing.assert_array_equal(_logits(original, tokens), _logits(published, tokens))


@pytest.mark.parametrize("what", ["scales", "shape", "type"])
def test_blocks_without_their_scales_are_refused(what: str, published: Path, tmp_path: Path) -> None:
    tensors = load_file(published / "model.safetensors")
    blocks = "model.layers.0.mlp.experts.down_proj_blocks"
    if what == "scales":
        del tensors[blocks.replace("blocks", "scales")]
    elif what == "shape":
        tensors[blocks] = tensors[blocks][..., :8].copy()
    else:
        tensors[blocks] = tensors[blocks].astype(np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    with pytest.raises(ModelError, match=r"down_proj_blocks.* not of blocks of 16 bytes"):
        open_checkpoint(str(tmp_path))
