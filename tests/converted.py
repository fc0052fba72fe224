"""Twins as .gguf files, tensor by tensor what llama.cpp's converter makes of a Hugging Face directory.

Nothing here is read with our own code: names are those of the gguf package's table, the changes those of llama.cpp's
conversion/*.py, and test_llama_cpp.py has llama.cpp read the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from tests.ggufs import add_byte_level_tokenizer, permute, write
from tests.twin_table import GGUF_TWINS, SIZES, VOCABULARY
from tests.twins import reference, twin

# twin -> llama.cpp's architecture
CONVERTED = {
    "gguf-exaone4": "exaone4", "gguf-exaone4-windows": "exaone4", "gguf-mistral3": "mistral3",
    "gguf-ministral3": "mistral3", "gguf-deepseek_v2": "deepseek2", "gguf-deepseek_v2-lite": "deepseek2",
    "gguf-deepseek_v3": "deepseek2", "gguf-glm4_moe_lite": "deepseek2", "gguf-youtu": "deepseek2",
    "gguf-mistral4": "mistral4", "gguf-qwen3_next": "qwen3next", "gguf-qwen3_5": "qwen35",
    "gguf-qwen3_5_moe": "qwen35moe", "gguf-granite4-h": "granitehybrid", "gguf-granite4-h-dense": "granitehybrid",
    "gguf-nemotron_h": "nemotron_h", "gguf-nemotron_h_moe": "nemotron_h_moe", "gguf-gemma3n": "gemma3n",
    "gguf-gemma4-e": "gemma4", "gguf-gemma4-moe": "gemma4",
}  # fmt: skip
_ATTENTION = ("attention", "full_attention")
_SIGMOID = ("gguf-deepseek_v3", "gguf-glm4_moe_lite")

# Metadata


def _metadata(name: str, architecture: str, config: Any) -> dict[str, Any]:
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
        "gemma4": _gemma4,
    }.get(architecture, lambda config: {})  # fmt: skip
    stated |= _rope(getattr(config, "rope_parameters", None) or {}) | own(config)
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
    groups = [config.num_key_value_heads if each in _ATTENTION else 0 for each in config.layer_types]
    return {
        "attention.head_count_kv": groups, "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.state_size": config.mamba_d_state, "ssm.group_count": config.mamba_n_groups,
        "ssm.inner_size": config.mamba_expand * config.hidden_size, "ssm.time_step_rank": config.mamba_n_heads,
        "expert_shared_feed_forward_length": config.shared_intermediate_size, "rope.scaling.finetuned": False,
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


# Tensors


def _changed(
    name: str, weight: np.ndarray, architecture: str, config: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's tensor as modify_tensors of the architecture's class yields it."""
    if name.endswith(".A_log"):
        weight = -np.exp(weight)
    if name.endswith("conv1d.weight"):
        weight = weight[:, 0]
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    name = re.sub(r"backbone(.*)mixer\.experts", r"model\1mlp.experts", name)
    if name.endswith(".dt_bias"):
        name = name.replace(".dt_bias", ".dt.bias" if architecture == "nemotron_h_moe" else ".dt_proj.bias")
    if architecture.startswith("qwen3"):
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            weight = weight + 1
        if architecture != "qwen3next" and "linear_attn." in name:
            weight = _tiled(name, weight, config)
    if architecture.startswith(("granite", "nemotron")):
        if name.endswith((".A_log", ".D")):
            weight = weight[:, None]
        if re.search(r"(mamba|mixer)\.norm\.weight$", name):
            weight = weight.reshape(2, -1)
    if architecture.startswith(("granite", "nemotron", "mistral3")) and re.search(
        r"[qk]_proj\.weight$", name
    ):
        query = "q_proj" in name
        weight = permute(weight, config.num_attention_heads if query else config.num_key_value_heads)
    if name.endswith(("correct_output_scale", "layer_scalar")):
        name = f"{name}.weight"
    if "in_proj_qkvz" in name:
        yield from _unmixed(name, weight, config)
    elif name.endswith("kv_b_proj.weight"):
        parts = weight.reshape(config.num_attention_heads, -1, weight.shape[-1])
        yield name.replace("kv_b", "k_b"), parts[:, : config.qk_nope_head_dim].swapaxes(1, 2)
        yield name.replace("kv_b", "v_b"), parts[:, config.qk_nope_head_dim :]
    elif re.search(r"(input_linear\.weight|experts\.gate_up_proj)$", name) and architecture != "gemma4":
        for part, half in zip(("gate", "up"), np.split(weight, 2, axis=-2), strict=True):
            yield re.sub(r"input_linear\.weight|gate_up_proj$", f"{part}_proj.weight", name), half
    elif re.search(r"\.experts\.(gate_up|down)_proj$", name):
        yield f"{name}.weight", weight
    else:
        yield name, weight


def _tiled(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """_reorder_v_heads: from one key head after another to the first of each, the second of each."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    size, mixed = config.linear_value_head_dim, 2 * keys * config.linear_key_head_dim

    def reorder(part: np.ndarray, width: int) -> np.ndarray:
        return part.reshape(keys, heads // keys, width, *part.shape[1:]).swapaxes(0, 1).reshape(part.shape)

    if "in_proj_qkv" in name or "conv1d" in name:
        return np.concatenate([weight[:mixed], reorder(weight[mixed:], size)])
    if "out_proj" in name:
        return reorder(weight.T, size).T
    if "in_proj_z" in name:
        return reorder(weight, size)
    return weight if name.endswith("norm.weight") else reorder(weight, 1)


def _unmixed(name: str, weight: np.ndarray, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Qwen3-Next's q, k, v and z, which lie together by key head."""
    keys, size = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // keys * config.linear_value_head_dim
    parts = np.split(weight.reshape(keys, -1, weight.shape[-1]), np.cumsum([size, size, values]), axis=1)
    query, key, value, z = (part.reshape(-1, weight.shape[-1]) for part in parts)
    yield name.replace("in_proj_qkvz", "in_proj_qkv"), np.concatenate([query, key, value])
    yield name.replace("in_proj_qkvz", "in_proj_z"), z


def _stacked(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a directory, with experts and Gemma 3n's projections as one."""
    single = re.compile(r"(.*\.experts|model\.altup_\w+)\.(\d+)(\..*)")
    found: dict[str, Any] = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if match := single.fullmatch(name):
            found.setdefault(match[1] + match[3], {})[int(match[2])] = weight
        else:
            found[name] = weight
    return {
        name: np.stack([each[index] for index in sorted(each)]) if isinstance(each, dict) else each
        for name, each in found.items()
    }


def _named(table: gguf.TensorNameMap, name: str) -> str:
    """format_tensor_name where the converter's classes do without the table."""
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    own = {
        "router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale",
        "block_sparse_moe.gate_proj.weight": "ffn_gate_exps.weight",
        "block_sparse_moe.up_proj.weight": "ffn_up_exps.weight",
    }  # fmt: skip
    if layer is not None and layer[2] in own:
        return f"blk.{layer[1]}.{own[layer[2]]}"
    found = table.get_name(name, (".weight", ".bias"))
    if found is None and layer is not None and "shared_mlp" in name:
        part = {"gate_proj": "gate", "up_proj": "up", "output_linear": "down"}[name.split(".")[-2]]
        return f"blk.{layer[1]}.ffn_{part}_shexp.weight"
    assert found is not None, name
    return found


@cache
def converted_twin(name: str) -> Path:
    """A twin of CONVERTED as a float32 .gguf file."""
    # with what was asked for: transformers keeps some of it by layer
    config = SimpleNamespace(**{**reference(name).config.to_dict(), **SIZES, **GGUF_TWINS[name][1]})
    architecture = CONVERTED[name]
    path = twin(name) / f"{name}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in _metadata(name, architecture, config).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}[type(value)]  # fmt: skip
        add(f"{architecture}.{key}", value)
    add_byte_level_tokenizer(writer, twin(name), VOCABULARY)
    kind = {each: arch for arch, each in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    dense = architecture == "granitehybrid" and not config.num_local_experts
    for hf_name, weight in _stacked(twin(name)).items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for changed, array in _changed(hf_name, weight, architecture, config):
            stored = _named(table, changed)
            stored = stored.replace("_shexp", "") if dense else stored
            writer.add_tensor(stored, np.ascontiguousarray(array))
    if architecture == "gemma4":
        half = config.global_head_dim // 2
        turning = int(half * config.rope_parameters["full_attention"]["partial_rotary_factor"])
        writer.add_tensor(
            "rope_freqs.weight", np.array([1.0] * turning + [1e30] * (half - turning), np.float32)
        )
    write(writer)
    return path
