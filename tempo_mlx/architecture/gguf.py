"""From the metadata and tensor names of a GGUF file to the Hugging Face config and names of the same model.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what llama.cpp does not store, it hard-codes
by architecture, and so does this table (llama.cpp, src/llama-model.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.architecture.families import FAMILIES
from tempo_mlx.errors import ModelError

# general.architecture -> model_type
GGUF_FAMILIES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3": "gemma3_text", "phi3": "phi3", "smollm3": "smollm3", "olmo2": "olmo2", "granite": "granite",
}  # fmt: skip
# llama.cpp rotates neighbouring dimensions in these, and permutes the rows of q and k when it converts.
_INTERLEAVED_ROPE = frozenset({"llama", "mistral", "smollm3", "granite"})

_FIELDS = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
# Facts about the file, or read on their own below.
_OTHER = frozenset(
    {
        "vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
        "rope.scaling.finetuned",
        "rope.freq_base_swa", "tensor_data_layout", "attention.sliding_window_pattern", "rope.scale_linear",
    }
)  # fmt: skip
_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


# llama.cpp's names (gguf-py, tensor_mapping.py) of the parts of a layer. The norms around attention and MLP
# depend on where the architecture puts them.
_GGUF_PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_qkv": "self_attn.qkv_proj", "attn_norm": "input_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GGUF_NORMS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "pre": {"ffn_norm": "post_attention_layernorm"},
        "post": {
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        "sandwich": {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    }
)
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_LAYER = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, list[float]],
) -> dict[str, Any]:
    """The config.json this model would have.

    shapes: of all tensors, rows first; factors: the numbers of those whose name starts with `rope_f`.
    Raises: ModelError naming an architecture, or a metadata key, that is not supported.
    """
    architecture = metadata.get("general.architecture")
    model_type = GGUF_FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if model_type is None or not isinstance(architecture, str):
        raise ModelError(
            f"The GGUF architecture {str(architecture)[:60]!r} is not supported; supported are "
            f"{', '.join(GGUF_FAMILIES)}."
        )
    stated = {
        key[len(architecture) + 1 :]: value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    config: dict[str, Any] = {"model_type": model_type}
    for key, value in stated.items():
        if key in _FIELDS:
            config[_FIELDS[key]] = _plain(value, f"{architecture}.{key}")
        elif key not in _OTHER:
            raise ModelError(
                f"The GGUF file sets {architecture}.{key}, which tempo-mlx does not know; it might change "
                "the computation, so the model is refused."
            )
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ModelError("The GGUF file holds no token embedding (token_embd.weight); fetch it again.")
    config["vocab_size"] = embedding[0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    _check_heads(config, stated)
    _add_family_facts(config, stated, shapes)
    _add_rope(config, stated, factors)
    config |= {name: metadata[key] for key, name in _IDS.items() if type(metadata.get(key)) is int}
    return config


def _plain(value: Any, key: str) -> Any:
    """A number; llama.cpp writes a list where layers may differ, and we support only equal layers."""
    if isinstance(value, np.ndarray) and value.size and bool(np.all(value == value.flat[0])):
        value = value.flat[0].item()
    if type(value) not in (int, float):
        raise ModelError(
            f"The GGUF key {key} is not one number; models with unequal layers are not supported."
        )
    # float32 in the file: 1e-05 is written as 9.999999747378752e-06
    return float(str(np.float32(value))) if type(value) is float else value


def _check_heads(config: dict[str, Any], stated: Mapping[str, Any]) -> None:
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if type(heads) is not int or type(width) is not int or heads < 1:
        raise ModelError("The GGUF file states no head count or embedding length; fetch it again.")
    config.setdefault("head_dim", width // heads)
    value_length = stated.get("attention.value_length", config["head_dim"])
    if value_length != config["head_dim"]:
        raise ModelError(
            f"The GGUF file has values of {value_length} dimensions and keys of {config['head_dim']}; only "
            "equal lengths are supported."
        )


def _add_family_facts(config: dict[str, Any], stated: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """What llama.cpp knows about an architecture without storing it."""
    model_type, layers = config["model_type"], config.get("num_hidden_layers")
    if model_type in ("gemma2", "gemma3_text"):  # the 27B models scale by the width of a head's share
        by_width = layers == {"gemma2": 46, "gemma3_text": 62}[model_type]
        scale = config["hidden_size"] / config["num_attention_heads"] if by_width else config["head_dim"]
        config["query_pre_attn_scalar"] = scale
        config["hidden_activation"] = "gelu_pytorch_tanh"
    if model_type == "gemma2":
        config.setdefault("sliding_window", 4096)
    if model_type == "gemma3_text":
        config["rope_local_base_freq"] = _plain(
            stated.get("rope.freq_base_swa", 10000.0), "rope.freq_base_swa"
        )
        config["sliding_window_pattern"] = _plain(
            stated.get("attention.sliding_window_pattern", 6), "pattern"
        )
    if model_type == "phi3":  # zero: no window
        config["sliding_window"] = config.get("sliding_window") or None
        original = stated.get("rope.scaling.original_context_length", config.get("max_position_embeddings"))
        config["original_max_position_embeddings"] = original
    for key, tensor in (("attention_bias", "blk.0.attn_output.bias"), ("mlp_bias", "blk.0.ffn_down.bias")):
        if key in FAMILIES[model_type].defaults:
            config[key] = tensor in tensors
    if "attention_multiplier" in config and model_type != "granite":
        raise ModelError(f"The GGUF file sets an attention scale, which {model_type} models do not have.")


def _add_rope(config: dict[str, Any], stated: Mapping[str, Any], factors: Mapping[str, list[float]]) -> None:
    rotated = stated.get("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    kind = stated.get("rope.scaling.type", "none")
    scaling: dict[str, Any] = {}
    if divisors := factors.get("rope_freqs.weight"):
        # Llama 3's scaling as the divisors it comes to; longrope can say exactly that.
        scaling = {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors}
        limit = config.get("max_position_embeddings")
        scaling |= {"attention_factor": 1.0, "original_max_position_embeddings": limit}
    elif long := factors.get("rope_factors_long.weight"):
        short = factors.get("rope_factors_short.weight", long)
        scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        if "rope.scaling.attn_factor" in stated:
            scaling["attention_factor"] = _plain(
                stated["rope.scaling.attn_factor"], "rope.scaling.attn_factor"
            )
    elif kind in ("linear", "yarn"):
        scaling = {
            "rope_type": kind,
            "factor": _plain(stated.get("rope.scaling.factor"), "rope.scaling.factor"),
        }
        if kind == "yarn" and "rope.scaling.original_context_length" in stated:
            scaling["original_max_position_embeddings"] = stated["rope.scaling.original_context_length"]
    elif "rope.scale_linear" in stated:
        scaling = {"rope_type": "linear", "factor": _plain(stated["rope.scale_linear"], "rope.scale_linear")}
    elif kind not in ("none", "longrope"):
        raise ModelError(f"The GGUF file's rope scaling {str(kind)[:40]!r} is not supported.")
    if scaling:
        config["rope_scaling"] = scaling


def name_from_gguf(name: str, architecture: Architecture) -> str | None:
    """The Hugging Face name of a GGUF tensor, or None for one that has no place in the architecture."""
    stem, _, kind = name.rpartition(".")
    if stem in _GGUF_TOP:
        return f"{_GGUF_TOP[stem]}.{kind}"
    match = _GGUF_LAYER.fullmatch(name)
    if match is None:
        return None
    layer, part, kind = match.groups()
    part = _GGUF_PARTS.get(part) or _GGUF_NORMS[architecture.norm_placement].get(part)
    if part == "mlp.up_proj" and architecture.family == "phi3":  # holds gate and up
        part = "mlp.gate_up_proj"
    return None if part is None else f"model.layers.{int(layer)}.{part}.{kind}"


def interleaved_heads(name: str, kind: str, a: Architecture) -> int | None:
    """How many heads of neighbouring rotary pairs the tensor has, which Hugging Face keeps as halves; None: none.

    kind: general.architecture.
    """
    heads = {".q_proj.": a.num_attention_heads, ".k_proj.": a.num_key_value_heads}
    found = [count for part, count in heads.items() if part in name]
    return found[0] if found and kind in _INTERLEAVED_ROPE else None
