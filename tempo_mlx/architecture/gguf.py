"""From the metadata and tensor names of a GGUF file to the Hugging Face config and names of the same model.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what llama.cpp does not store, it hard-codes
by architecture, and so does this table (llama.cpp, src/llama-model.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.architecture.families import FAMILIES, NORM_KEYS
from tempo_mlx.errors import ModelError

_MOE = {"expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size"}
_POST = {"post_attention_norm": "post_attention_layernorm"}


@dataclass(frozen=True)
class Row:
    """One of llama.cpp's architectures: the family it is here, and what it has of its own.

    fields: metadata keys -> config keys; parts: tensors of a layer -> our names; facts: config keys that llama.cpp
    does not store; permuted: llama.cpp rotates neighbouring dimensions where Hugging Face rotates halves, and its
    converter permutes the rows of q and k.
    """

    model_type: str
    fields: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    permuted: bool = False


ROWS: Mapping[str, Row] = MappingProxyType(
    {
        "llama": Row("llama", permuted=True), "mistral": Row("llama", permuted=True),
        "qwen2": Row("qwen2"), "qwen3": Row("qwen3"), "gemma": Row("gemma"), "gemma2": Row("gemma2"),
        "gemma3": Row("gemma3_text"), "phi3": Row("phi3", parts={"ffn_up": "mlp.gate_up_proj"}),
        "smollm3": Row("smollm3", permuted=True), "olmo2": Row("olmo2"), "granite": Row("granite", permuted=True),
        "seed_oss": Row("seed_oss", parts=_POST), "arcee": Row("arcee", permuted=True),
        "glm4": Row(
            "glm4", parts={"ffn_up": "mlp.gate_up_proj", "post_attention_norm": "post_self_attn_layernorm",
                           "ffn_norm": "post_attention_layernorm", "post_ffw_norm": "post_mlp_layernorm"},
        ), "ernie4_5": Row("ernie4_5"),
        "starcoder2": Row("starcoder2"), "hunyuan-dense": Row("hunyuan_v1_dense"), "nemotron": Row("nemotron"),
        "olmo": Row("olmo", {"attention.clamp_kqv": "clip_qkv"}, permuted=True),
        "command-r": Row("cohere", {"logit_scale": "logit_scale"}),
        "cohere2": Row("cohere2", {"logit_scale": "logit_scale"}),
        "qwen2moe": Row(
            "qwen2_moe",
            {**_MOE, "expert_count": "num_experts",
             "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        ),
        "qwen3moe": Row("qwen3_moe", {**_MOE, "expert_count": "num_experts"}, facts={"norm_topk_prob": True}),
        "olmoe": Row("olmoe", {**_MOE, "expert_count": "num_experts"}),
        "granitemoe": Row(
            "granitemoe", {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
            permuted=True,
        ),
        "mixtral": Row(  # llama.cpp calls it llama
            "mixtral", {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
            permuted=True,
        ),
        "gpt-oss": Row(
            "gpt_oss",
            {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
             "expert_feed_forward_length": "intermediate_size"},
            parts={**_POST, "attn_sinks": "self_attn.sinks"},
        ),
        "glm4moe": Row(
            "glm4_moe",
            {**_MOE, "expert_count": "n_routed_experts", "expert_shared_count": "n_shared_experts",
             "leading_dense_block_count": "first_k_dense_replace", "expert_weights_scale": "routed_scaling_factor",
             "expert_weights_norm": "norm_topk_prob", "expert_group_count": "n_group",
             "expert_group_used_count": "topk_group"},
            parts=_POST,
        ),
        "lfm2": Row("lfm2", {"shortconv.l_cache": "conv_L_cache"}, facts={"block_auto_adjust_ff_dim": False}),
        "lfm2moe": Row(
            "lfm2_moe",
            {**_MOE, "expert_count": "num_experts", "shortconv.l_cache": "conv_L_cache",
             "leading_dense_block_count": "num_dense_layers"},
        ),
    }
)  # fmt: skip

_FIELDS = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
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
        "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "expert_gating_func",
        "nextn_predict_layers", "attention.causal", "use_parallel_residual",
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
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "router",
    "ffn_gate_exps": "experts.gate_proj", "ffn_up_exps": "experts.up_proj", "ffn_down_exps": "experts.down_proj",
    "ffn_gate_shexp": "mlp.gate_proj", "ffn_up_shexp": "mlp.up_proj", "ffn_down_shexp": "mlp.down_proj",
    "ffn_gate_inp_shexp": "mlp.row_gate", "exp_probs_b": "router.correction", "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj",
}  # fmt: skip
_GGUF_NORMS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "pre": {"ffn_norm": "post_attention_layernorm"},
        "parallel": {},
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
_GGUF_TOP = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "token_embd_norm": "model.norm",
}  # fmt: skip
_GGUF_LAYER = re.compile(r"blk\.(\d{1,4})\.([\w.]+)\.(weight|bias)")
_ROTATED = re.compile(r"model\.layers\.(\d+)\.self_attn\.([qk])_proj\.(?:weight|bias)")
_WHOLE = {"self_attn.sinks.weight": "self_attn.sinks", "router.correction.bias": "router.correction"}


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, list[float]],
) -> dict[str, Any]:
    """The config.json this model would have.

    shapes: of all tensors, rows first; factors: the numbers of those whose name starts with `rope_f`.
    Raises: ModelError naming an architecture, or a metadata key, that is not supported.
    """
    architecture, row = row_of(metadata)
    stated = {
        key[len(architecture) + 1 :]: value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    config: dict[str, Any] = {"model_type": row.model_type, **row.facts}
    _read_unequal_heads(config, stated)
    for key, value in stated.items():
        name = row.fields.get(key) or _FIELDS.get(key)
        if name is not None and name not in config:
            config[name] = _plain(value, f"{architecture}.{key}")
        elif name is None and key not in _OTHER and not _is_nothing(value):
            raise ModelError(
                f"The GGUF file sets {architecture}.{key}, which tempo-mlx does not know; it might change "
                "the computation, so the model is refused."
            )
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ModelError("The GGUF file holds no token embedding (token_embd.weight); the model is refused.")
    config["vocab_size"] = embedding[0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config["num_hidden_layers"] = config.get("num_hidden_layers", 0) - int(
        stated.get("nextn_predict_layers", 0)
    )
    _check_heads(config, stated)
    _add_family_facts(config, stated, shapes)
    _add_rope(config, stated, factors)
    config |= {name: metadata[key] for key, name in _IDS.items() if type(metadata.get(key)) is int}
    return config


def names_of(family: str) -> list[str]:
    """What llama.cpp calls one of our families; it calls a Mixtral a llama with experts."""
    return [name.replace("mixtral", "llama") for name, row in ROWS.items() if row.model_type == family]


def row_of(metadata: Mapping[str, Any]) -> tuple[str, Row]:
    """general.architecture, and its row. Raises: ModelError naming one that is not supported."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ROWS:
        raise ModelError(
            f"The GGUF architecture {str(architecture)[:60]!r} is not supported; supported are {', '.join(ROWS)}."
        )
    sparse = architecture == "llama" and not _is_nothing(metadata.get("llama.expert_count"))
    return architecture, ROWS["mixtral" if sparse else architecture]


def _is_nothing(value: Any) -> bool:
    """Whether a key says that the model does without it: no experts, no window."""
    return value is None or (not isinstance(value, (np.ndarray, str)) and value in (0, False))


def _read_unequal_heads(config: dict[str, Any], stated: Mapping[str, Any]) -> None:
    """LFM2 marks the layers without attention by their having no key/value heads."""
    heads = stated.get("attention.head_count_kv")
    if isinstance(heads, np.ndarray) and "full_attn_idxs" in FAMILIES[config["model_type"]].defaults:
        config["full_attn_idxs"] = [index for index, count in enumerate(heads.tolist()) if count]
        config["num_key_value_heads"] = int(max(heads.tolist(), default=0))


def _plain(value: Any, key: str) -> Any:
    """A number; llama.cpp writes a list where layers may differ, and we support only equal layers."""
    if isinstance(value, np.ndarray) and value.size and bool(np.all(value == value.flat[0])):
        value = value.flat[0].item()
    if type(value) not in (int, float, bool):
        raise ModelError(
            f"The GGUF key {key} is not one number; models with unequal layers are not supported."
        )
    # float32 in the file: 1e-05 is written as 9.999999747378752e-06
    return float(str(np.float32(value))) if type(value) is float else value


def _check_heads(config: dict[str, Any], stated: Mapping[str, Any]) -> None:
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if type(heads) is not int or type(width) is not int or heads < 1:
        raise ModelError("The GGUF file states no head count or embedding length; the model is refused.")
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
    family = FAMILIES[model_type]
    for key, tensor in _BIASES.items():
        if key in family.defaults and not (key == "attention_bias" and model_type == "gpt_oss"):
            config[key] = tensor in tensors
    if "use_qk_norm" in family.defaults:
        config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
    eps = stated.get("attention.layer_norm_rms_epsilon", stated.get("attention.layer_norm_epsilon"))
    if eps is not None:
        config[next(key for key in NORM_KEYS if key in family.defaults)] = _plain(eps, "layer_norm_epsilon")
    if model_type == "gemma":
        config["hidden_act"] = "gelu_pytorch_tanh"
    if model_type in ("qwen3_moe", "qwen2_moe", "lfm2_moe"):
        config.setdefault("mlp_only_layers", [])
    if "moe_intermediate_size" in family.defaults and "moe_intermediate_size" not in config:
        raise ModelError("The GGUF file does not say how wide its experts are; the model is refused.")
    if "attention_multiplier" in config and "attention_multiplier" not in family.defaults:
        raise ModelError(f"The GGUF file sets an attention scale, which {model_type} models do not have.")


_BIASES = {
    "attention_bias": "blk.0.attn_q.bias", "attention_out_bias": "blk.0.attn_output.bias",
    "mlp_bias": "blk.0.ffn_down.bias", "use_bias": "blk.0.attn_q.bias",
}  # fmt: skip


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
    if config["model_type"] == "gpt_oss":
        scaling["truncate"] = False
    if scaling:
        config["rope_scaling"] = scaling


def name_from_gguf(name: str, architecture: Architecture, row: Row) -> str | None:
    """Our name of a GGUF tensor, or None for one that has no place in the architecture."""
    stem, _, kind = name.rpartition(".")
    if stem in _GGUF_TOP:
        return f"{_GGUF_TOP[stem]}.{kind}"
    match = _GGUF_LAYER.fullmatch(name)
    if match is None:
        return None
    layer, part, kind = match.groups()
    norms = _GGUF_NORMS.get(architecture.norm_placement, {})
    own = row.parts.get(part) or _GGUF_PARTS.get(part) or norms.get(part)
    if own is None:
        return None
    return f"model.layers.{int(layer)}.{_WHOLE.get(f'{own}.{kind}', f'{own}.{kind}')}"


def permuted_heads(name: str, a: Architecture, row: Row) -> int | None:
    """How many heads of neighbouring rotary pairs the tensor has, which Hugging Face keeps as halves; None: none."""
    match = _ROTATED.fullmatch(name)
    if match is None or not row.permuted or int(match[1]) >= len(a.layers):
        return None
    attention = a.layers[int(match[1])].attention
    if attention is None:
        return None
    return attention.num_attention_heads if match[2] == "q" else attention.num_key_value_heads
