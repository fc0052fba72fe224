"""The metadata that llama.cpp's converter writes for a config, architecture by architecture (its conversion/*.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

# Whose converters write nothing that they do not name, neither a key length nor a rope base.
_PARTIAL = ("phi2", "gptneox", "stablelm", "chatglm")
_ATTENTION = ("attention", "full_attention")
_SIGMOID = ("gguf-deepseek_v3", "gguf-glm4_moe_lite")


def metadata_of(name: str, architecture: str, config: Any) -> dict[str, Any]:
    """As TextModel.set_gguf_parameters and its subclasses write it."""
    names = {
        "block_count": ("num_hidden_layers",), "context_length": ("max_position_embeddings",),
        "embedding_length": ("hidden_size",), "feed_forward_length": ("intermediate_size",),
        "attention.head_count": ("num_attention_heads",), "attention.head_count_kv": ("num_key_value_heads",),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "layer_norm_epsilon"),
        "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
        "expert_used_count": ("num_experts_per_tok", "top_k_experts"),
        "attention.key_length": ("head_dim",), "attention.value_length": ("head_dim",),
        "attention.sliding_window": ("sliding_window",), "embedding_scale": ("embedding_multiplier",),
        "final_logit_softcapping": ("final_logit_softcapping",), "residual_scale": ("residual_multiplier",),
        "attention.scale": ("attention_multiplier",), "logit_scale": ("logits_scaling",),
        "expert_group_count": ("n_group",), "expert_group_used_count": ("topk_group",),
    }  # fmt: skip
    stated = {}
    for key, keys in names.items():
        if architecture == "nemotron_h" and key.startswith("expert"):
            continue  # transformers' class has them all the same
        found = next(
            (getattr(config, each) for each in keys if getattr(config, each, None) is not None), None
        )
        if found is not None:
            stated[key] = found
    own = {
        "deepseek2": _latent, "mistral4": _latent, "qwen3next": _delta, "qwen35": _delta, "qwen35moe": _delta,
        "granitehybrid": _granite, "nemotron_h": _nemotron, "nemotron_h_moe": _nemotron, "gemma3n": _gemma3n,
        "gemma4": _gemma4, "llama4": _llama4, "ernie4_5-moe": _ernie, "falcon-h1": _falcon, "phimoe": _phimoe,
        **dict.fromkeys(_PARTIAL, _partial),
    }.get(architecture, lambda config: {})  # fmt: skip
    if architecture in _PARTIAL:
        stated = {
            key: each for key, each in stated.items() if "attention.key" not in key and "value_l" not in key
        }
    stated |= _rope(getattr(config, "rope_parameters", None) or {}) | own(config)
    stated = {key: each for key, each in stated.items() if each is not None}
    if architecture == "gptneox":
        del stated["attention.head_count_kv"]
    kinds = getattr(config, "layer_types", None)
    if "attention.sliding_window" in stated and kinds is not None:
        stated["attention.sliding_window_pattern"] = [each == "sliding_attention" for each in kinds]
    if name in _SIGMOID:
        stated["expert_gating_func"] = 2
    if name == "gguf-ministral3":
        stated["rope.scaling.yarn_log_multiplier"] = config.rope_parameters["mscale_all_dim"]
    if name in ("gguf-ministral3", "gguf-mistral4"):
        stated["attention.temperature_scale"] = config.rope_parameters["llama_4_scaling_beta"]
    if name == "gguf-mistral4":
        stated["attention.temperature_length"] = config.rope_parameters["original_max_position_embeddings"]
    return stated


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    full = rope.get("full_attention", rope)
    stated = {"rope.freq_base": float(full["rope_theta"])} if "rope_theta" in full else {}
    if full.get("rope_type") == "yarn":
        stated |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(full["factor"])}
        stated["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
        stated |= {
            f"rope.scaling.yarn_{key}": float(full[key])
            for key in ("beta_fast", "beta_slow")
            if full.get(key)
        }
    if "sliding_attention" in rope:
        stated["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    return stated


def _latent(config: Any) -> dict[str, Any]:
    rotated, rank = config.qk_rope_head_dim, config.kv_lora_rank
    experts = getattr(config, "n_routed_experts", None)
    scale = config.rope_parameters.get("mscale_all_dim")
    return {
        "attention.head_count_kv": 1, "attention.kv_lora_rank": rank, "attention.key_length": rank + rotated,
        "attention.value_length": rank, "attention.key_length_mla": config.qk_nope_head_dim + rotated,
        "attention.value_length_mla": config.v_head_dim, "rope.dimension_count": rotated,
        "leading_dense_block_count": getattr(config, "first_k_dense_replace", None) or (
            1 if hasattr(config, "mlp_layer_types") else config.num_hidden_layers if experts is None else 0),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", config.intermediate_size),
        "expert_shared_count": getattr(config, "n_shared_experts", 0),
        **({"attention.q_lora_rank": config.q_lora_rank} if config.q_lora_rank else {}),
        **({"expert_weights_scale": float(config.routed_scaling_factor)} if experts else {}),
        **({"expert_weights_norm": True} if getattr(config, "norm_topk_prob", False) else {}),
        **({"rope.scaling.yarn_log_multiplier": 0.1 * scale} if scale else {}),
    }  # fmt: skip


def _llama4(config: Any) -> dict[str, Any]:
    return {
        "feed_forward_length": config.intermediate_size_mlp, "expert_feed_forward_length": config.intermediate_size,
        "interleave_moe_layer_step": config.interleave_moe_layer_step, "vocab_size": config.vocab_size,
        "rope.dimension_count": config.head_dim,
    }  # fmt: skip


def _ernie(config: Any) -> dict[str, Any]:
    return {
        "expert_count": config.moe_num_experts, "expert_used_count": config.moe_k,
        "interleave_moe_layer_step": config.moe_layer_interval,
        "leading_dense_block_count": config.moe_layer_start_index,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.moe_num_shared_experts,
        "expert_shared_feed_forward_length": config.intermediate_size // config.num_key_value_heads,
    }  # fmt: skip


def _phimoe(config: Any) -> dict[str, Any]:
    original = config.rope_parameters["original_max_position_embeddings"]
    scale = config.max_position_embeddings / original
    return {
        "rope.scaling.original_context_length": original, "rope.scaling.attn_factor": math.sqrt(
            1 + math.log(scale) / math.log(original)), "rope.dimension_count": 16,
        "attention.sliding_window": config.sliding_window or 0,
    }  # fmt: skip


def _partial(config: Any) -> dict[str, Any]:
    glm = config.model_type == "glm"
    kind = "rms_" if glm else ""
    rotated = config.rope_parameters["partial_rotary_factor"]
    parallel = getattr(config, "use_parallel_residual", None)
    return {
        "rope.dimension_count": int(rotated * config.hidden_size) // config.num_attention_heads,
        f"attention.layer_norm_{kind}epsilon": 1e-5 if glm else config.layer_norm_eps,
        "context_length": config.hidden_size if glm else config.max_position_embeddings,
        "rope.freq_base": 10000.0 if glm else None, "use_parallel_residual": parallel,
    }  # fmt: skip


def _falcon(config: Any) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": config.mamba_d_conv, "ssm.state_size": config.mamba_d_state,
        "ssm.group_count": config.mamba_n_groups, "ssm.inner_size": config.mamba_d_ssm,
        "ssm.time_step_rank": config.mamba_d_ssm // config.mamba_d_head, "vocab_size": config.vocab_size,
        "embedding_scale": None,
    }  # fmt: skip


def _delta(config: Any) -> dict[str, Any]:
    heads = config.linear_num_value_heads
    stated = {
        "ssm.conv_kernel": config.linear_conv_kernel_dim, "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads, "ssm.time_step_rank": heads,
        "ssm.inner_size": config.linear_value_head_dim * heads,
        "full_attention_interval": config.layer_types.index("full_attention") + 1,
        "rope.dimension_count": int(config.head_dim * 0.25), "rope.dimension_sections": [1, 1, 0, 0],
    }  # fmt: skip
    if hasattr(config, "moe_intermediate_size"):
        stated["expert_feed_forward_length"] = config.moe_intermediate_size
        stated["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return stated


def _granite(config: Any) -> dict[str, Any]:
    kinds = getattr(config, "layer_types", None) or [
        "attention" if index in config.attn_layer_indices else "mamba"
        for index in range(config.num_hidden_layers)
    ]
    groups = [config.num_key_value_heads if each in _ATTENTION else 0 for each in kinds]
    return {
        "attention.head_count_kv": groups, "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.state_size": config.mamba_d_state, "ssm.group_count": config.mamba_n_groups,
        "ssm.inner_size": config.mamba_expand * config.hidden_size, "ssm.time_step_rank": config.mamba_n_heads,
        "expert_shared_feed_forward_length": getattr(config, "shared_intermediate_size", None),
        "rope.dimension_count": getattr(config, "attn_rotary_emb", None),
        "rope.scaling.finetuned": config.model_type == "bamba",
    }  # fmt: skip


def _nemotron(config: Any) -> dict[str, Any]:
    kinds = config.layers_block_type
    stated: dict[str, Any] = {
        "attention.head_count_kv": [config.num_key_value_heads if each in _ATTENTION else 0 for each in kinds],
        "ssm.conv_kernel": config.conv_kernel, "ssm.state_size": config.ssm_state_size,
        "ssm.group_count": config.n_groups, "ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim,
        "ssm.time_step_rank": config.mamba_num_heads, "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "feed_forward_length": [config.intermediate_size if each == "mlp" else 0 for each in kinds],
    }  # fmt: skip
    if "moe" not in kinds:
        return stated
    width = config.moe_intermediate_size
    return stated | {
        "feed_forward_length": [width if each == "moe" else 0 for each in kinds],
        "expert_feed_forward_length": width, "expert_weights_norm": config.norm_topk_prob,
        "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
        "expert_count": config.n_routed_experts, "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
    }  # fmt: skip


def _gemma3n(config: Any) -> dict[str, Any]:
    return {
        "altup.active_idx": config.altup_active_idx, "altup.num_inputs": config.altup_num_inputs,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "activation_sparsity_scale": [
            NormalDist().inv_cdf(each) if each else float("-inf") for each in config.activation_sparsity_pattern
        ],
        "feed_forward_length": [config.intermediate_size] * config.num_hidden_layers,
    }  # fmt: skip


def _gemma4(config: Any) -> dict[str, Any]:
    count, shared = config.num_hidden_layers, config.num_kv_shared_layers
    sliding = [each == "sliding_attention" for each in config.layer_types]
    stated: dict[str, Any] = {
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
        "attention.key_length": config.global_head_dim, "attention.value_length": config.global_head_dim,
        "attention.key_length_swa": config.head_dim, "attention.value_length_swa": config.head_dim,
        "rope.dimension_count": config.global_head_dim, "rope.dimension_count_swa": config.head_dim,
    }  # fmt: skip
    if config.moe_intermediate_size is not None:
        stated["expert_feed_forward_length"] = config.moe_intermediate_size
    if config.use_double_wide_mlp:
        width = config.intermediate_size
        stated["feed_forward_length"] = [
            width if index < count - shared else 2 * width for index in range(count)
        ]
    if getattr(config, "num_global_key_value_heads", None) is not None:
        few, many = config.num_global_key_value_heads, config.num_key_value_heads
        stated["attention.head_count_kv"] = [many if each else few for each in sliding]
    return stated
