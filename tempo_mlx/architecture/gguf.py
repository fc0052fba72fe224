"""From the metadata of a GGUF file to the Hugging Face config of the same model.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what llama.cpp does not store, it hard-codes
by architecture, and so do this table and gguf_rules.py (llama.cpp, src/models and conversion).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from tempo_mlx.architecture import gguf_rules as rules
from tempo_mlx.architecture.families import FAMILIES, NORM_KEYS, Family
from tempo_mlx.architecture.gguf_rules import Header, plain
from tempo_mlx.errors import ModelError

_MOE = {"expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size"}
_SHARED_WIDTH = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_LOCAL = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_ROUTER = {
    **_MOE, "expert_count": "n_routed_experts", "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace", "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob", "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}  # fmt: skip
# What a file leaves out where it does nothing; the families' own defaults are other.
_ROUTER_FACTS = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0}
_LATENT = {"attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank"}
_DELTA = {
    "ssm.conv_kernel": "linear_conv_kernel_dim", "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads", "ssm.time_step_rank": "linear_num_value_heads",
    "full_attention_interval": "full_attention_interval",
}  # fmt: skip
_POST = {"post_attention_norm": "post_attention_layernorm"}
_MAMBA = {
    "ssm.conv_kernel": "mamba_d_conv", "ssm.state_size": "mamba_d_state", "ssm.group_count": "mamba_n_groups",
    "ssm.time_step_rank": "mamba_n_heads",
}  # fmt: skip
_NEMOTRON = {
    "ssm.conv_kernel": "conv_kernel", "ssm.state_size": "ssm_state_size", "ssm.group_count": "n_groups",
    "ssm.time_step_rank": "mamba_num_heads",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One of llama.cpp's architectures: the family it is here, and what it has of its own.

    fields: metadata keys -> config keys; parts: tensors of a layer -> our names; facts: config keys that llama.cpp
    leaves out; rule: config keys that take more than one of the file's, and win; unused: metadata keys that say nothing
    here; permuted: llama.cpp rotates neighbouring dimensions where Hugging Face rotates halves, and its converter
    permutes the rows of q and k; tiled: the value heads of a key head stand apart (gguf_tensors.py).
    """

    model_type: str
    fields: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    rule: Callable[[Header], dict[str, Any]] | None = None
    unused: tuple[str, ...] = ()
    permuted: bool = False
    tiled: bool = False


# By llama.cpp's name; what follows a slash tells apart the families that share one (_variant).
ROWS: Mapping[str, Row] = MappingProxyType(
    {
        "llama": Row("llama", permuted=True), "mistral": Row("llama", permuted=True),
        "mistral3": Row("llama", permuted=True), "mistral3/yarn": Row("ministral3", permuted=True),
        "qwen2": Row("qwen2"), "qwen3": Row("qwen3"), "gemma": Row("gemma", facts={"hidden_act": "gelu_pytorch_tanh"}),
        "gemma2": Row("gemma2", rule=rules.gemma2), "gemma3": Row("gemma3_text", rule=rules.gemma3),
        "phi3": Row("phi3", parts={"ffn_up": "mlp.gate_up_proj"}, rule=rules.phi3),
        "smollm3": Row("smollm3", permuted=True), "olmo2": Row("olmo2"),
        "olmo2/windows": Row("olmo3", rule=rules.olmo3), "granite": Row("granite", permuted=True),
        "seed_oss": Row("seed_oss", parts=_POST), "arcee": Row("arcee", permuted=True),
        "exaone4": Row("exaone4", rule=rules.exaone4),
        "glm4": Row(
            "glm4", parts={"ffn_up": "mlp.gate_up_proj", "post_attention_norm": "post_self_attn_layernorm",
                           "ffn_norm": "post_attention_layernorm", "post_ffw_norm": "post_mlp_layernorm"},
        ), "chatglm": Row("glm", parts={"ffn_up": "mlp.gate_up_proj"}), "ernie4_5": Row("ernie4_5"),
        "ernie4_5-moe": Row("ernie4_5_moe", {
            "expert_count": "moe_num_experts", "expert_used_count": "moe_k",
            "expert_feed_forward_length": "moe_intermediate_size", "expert_shared_count": "moe_num_shared_experts",
            "leading_dense_block_count": "moe_layer_start_index", "interleave_moe_layer_step": "moe_layer_interval"},
            unused=("expert_shared_feed_forward_length",)),
        "starcoder2": Row("starcoder2"), "hunyuan-dense": Row("hunyuan_v1_dense"), "nemotron": Row("nemotron"),
        "apertus": Row("apertus"), "phi2": Row("phi"), "stablelm": Row("stablelm", rule=rules.stablelm),
        "gptneox": Row("gpt_neox", {"use_parallel_residual": "use_parallel_residual"}),
        "olmo": Row("olmo", {"attention.clamp_kqv": "clip_qkv"}, permuted=True),
        "command-r": Row("cohere", {"logit_scale": "logit_scale"}),
        "cohere2": Row("cohere2", {"logit_scale": "logit_scale"}),
        "qwen2moe": Row("qwen2_moe", {**_MOE, **_SHARED_WIDTH, "expert_count": "num_experts"},
                        facts={"mlp_only_layers": []}),
        "qwen3moe": Row("qwen3_moe", {**_MOE, "expert_count": "num_experts"},
                        facts={"norm_topk_prob": True, "mlp_only_layers": []}),
        "olmoe": Row("olmoe", {**_MOE, "expert_count": "num_experts"}),
        "granitemoe": Row("granitemoe", _LOCAL, permuted=True),
        "phimoe": Row("phimoe", _LOCAL, rule=rules.phi3),
        "llama/experts": Row("mixtral", _LOCAL, permuted=True),
        "llama4": Row("llama4_text", {
            **_LOCAL, "feed_forward_length": "intermediate_size_mlp", "expert_feed_forward_length": "intermediate_size",
            "interleave_moe_layer_step": "interleave_moe_layer_step"}, rule=rules.llama4),
        "gpt-oss": Row(
            "gpt_oss", {**_LOCAL, "expert_feed_forward_length": "intermediate_size"},
            parts={**_POST, "attn_sinks": "self_attn.sinks"},
        ),
        "glm4moe": Row("glm4_moe", _ROUTER, parts=_POST),
        "deepseek2": Row("deepseek_v3", {**_ROUTER, **_LATENT}, facts=_ROUTER_FACTS, rule=rules.latent),
        "deepseek2/softmax": Row("deepseek_v2", {**_ROUTER, **_LATENT}, facts=_ROUTER_FACTS, rule=rules.latent),
        "deepseek2/dense": Row("youtu", _LATENT, rule=rules.latent, unused=tuple(_ROUTER)),
        "mistral4": Row("mistral4", {**_ROUTER, **_LATENT}, facts=_ROUTER_FACTS, rule=rules.latent),
        "lfm2": Row("lfm2", {"shortconv.l_cache": "conv_L_cache"}, facts={"block_auto_adjust_ff_dim": False},
                    rule=rules.lfm2),
        "lfm2moe": Row(
            "lfm2_moe", {**_MOE, "expert_count": "num_experts", "shortconv.l_cache": "conv_L_cache",
                         "leading_dense_block_count": "num_dense_layers"}, rule=rules.lfm2,
        ),
        "qwen3next": Row(
            "qwen3_next", {**_MOE, **_SHARED_WIDTH, **_DELTA, "expert_count": "num_experts"}, parts=_POST,
            facts={"mlp_only_layers": []}, rule=rules.delta_net,
        ),
        "qwen35": Row("qwen3_5_text", _DELTA, parts=_POST, rule=rules.delta_net, tiled=True),
        "qwen35moe": Row("qwen3_5_moe_text", {**_MOE, **_SHARED_WIDTH, **_DELTA, "expert_count": "num_experts"},
                         parts=_POST, rule=rules.delta_net, tiled=True),
        "granitehybrid": Row("granitemoehybrid", {
            **_LOCAL, **_MAMBA, "expert_shared_feed_forward_length": "shared_intermediate_size"},
            rule=rules.granite_hybrid, permuted=True),
        "granitehybrid/rotating": Row("bamba", _MAMBA, rule=rules.bamba, permuted=True),
        "falcon-h1": Row("falcon_h1", {**_MAMBA, "ssm.inner_size": "mamba_d_ssm"}, rule=rules.falcon_h1),
        "nemotron_h": Row("nemotron_h", _NEMOTRON, parts={"attn_norm": "norm"}, rule=rules.nemotron_h, permuted=True),
        "nemotron_h_moe": Row("nemotron_h", {
            **_ROUTER, **_NEMOTRON, "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size"},
            parts={"attn_norm": "norm"}, facts=_ROUTER_FACTS, rule=rules.nemotron_h, permuted=True),
        "gemma3n": Row("gemma3n_text", {
            "altup.num_inputs": "altup_num_inputs", "altup.active_idx": "altup_active_idx",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input"}, rule=rules.gemma3n),
        "gemma4": Row("gemma4_text", {
            "expert_used_count": "top_k_experts", "expert_count": "num_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input"}, rule=rules.gemma4),
    }
)  # fmt: skip
# Families whose files have another's name, and are read as that, since it computes the same (a Mistral with a window,
# the 7B v0.1, without it, as llama.cpp does).
_SAME = {"glm4_moe_lite": ["deepseek2"], "mistral": ["llama", "mistral3"]}

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
# Facts about the file, or read on their own below and in the rules.
_OTHER = frozenset(
    {
        "vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
        "rope.scaling.finetuned", "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor",
        "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "expert_gating_func",
        "nextn_predict_layers", "attention.causal", "use_parallel_residual",
        "rope.freq_base_swa", "tensor_data_layout", "attention.sliding_window_pattern", "rope.scale_linear",
        "rope.dimension_sections", "rope.dimension_count_swa", "ssm.inner_size", "attention.recurrent_layers",
        "attention.key_length_mla", "attention.value_length_mla", "attention.key_length_swa",
        "attention.value_length_swa", "attention.temperature_scale", "attention.temperature_length",
        "activation_sparsity_scale",
    }
)  # fmt: skip
_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


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
    start = len(architecture) + 1
    stated = {key[start:]: value for key, value in metadata.items() if key.startswith(f"{architecture}.")}
    header = Header(architecture, stated, shapes, factors)
    config: dict[str, Any] = {"model_type": row.model_type, **(row.rule(header) if row.rule else {})}
    for key, value in stated.items():
        name = row.fields.get(key) or _FIELDS.get(key)
        if name is not None and name not in config:
            config[name] = plain(value, f"{architecture}.{key}")
        elif name is None and key not in _OTHER and key not in row.unused and not _is_nothing(value):
            raise ModelError(
                f"The GGUF file sets {architecture}.{key}, which tempo-mlx does not know; it might change "
                "the computation, so the model is refused."
            )
    config = {**row.facts, **config}
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ModelError("The GGUF file holds no token embedding (token_embd.weight); the model is refused.")
    config["vocab_size"] = embedding[0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config["num_hidden_layers"] = header.layers
    _check_heads(config, header)
    _refuse_what_is_not_built(FAMILIES[row.model_type], header)
    _add_family_facts(config, header)
    _add_rope(config, header)
    config |= {name: metadata[key] for key, name in _IDS.items() if type(metadata.get(key)) is int}
    return config


def names_of(family: str) -> list[str]:
    """What llama.cpp calls one of our families."""
    named = [name.partition("/")[0] for name, row in ROWS.items() if row.model_type == family]
    return list(dict.fromkeys([*named, *_SAME.get(family, [])]))


def row_of(metadata: Mapping[str, Any]) -> tuple[str, Row]:
    """general.architecture, and its row. Raises: ModelError naming one that is not supported."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ROWS or "/" in architecture:
        raise ModelError(
            f"The GGUF architecture {str(architecture)[:60]!r} is not supported; docs/models.md lists those that are."
        )
    return architecture, ROWS.get(f"{architecture}/{_variant(architecture, metadata)}", ROWS[architecture])


def _variant(architecture: str, metadata: Mapping[str, Any]) -> str:
    """Which of the families that llama.cpp gives one name the file is of; "": the plain one."""
    sparse = not _is_nothing(metadata.get(f"{architecture}.expert_count"))
    if architecture == "llama":
        return "experts" if sparse else ""
    if architecture == "olmo2":
        return "" if _is_nothing(metadata.get("olmo2.attention.sliding_window")) else "windows"
    if architecture == "granitehybrid":
        return "" if _is_nothing(metadata.get("granitehybrid.rope.scaling.finetuned")) else "rotating"
    if architecture == "mistral3":
        return "" if _is_nothing(metadata.get("mistral3.attention.temperature_scale")) else "yarn"
    if architecture == "deepseek2":
        sigmoid = str(metadata.get("deepseek2.expert_gating_func")) == "2"
        return "dense" if not sparse else "" if sigmoid else "softmax"
    return ""


def _is_nothing(value: Any) -> bool:
    """Whether a key says that the model does without it: no experts, no window."""
    return value is None or (not isinstance(value, (np.ndarray, str)) and value in (0, False))


def _check_heads(config: dict[str, Any], header: Header) -> None:
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if type(heads) is not int or type(width) is not int or heads < 1:
        raise ModelError("The GGUF file states no head count or embedding length; the model is refused.")
    if type(config.setdefault("head_dim", width // heads)) is not int or config["head_dim"] < 1:
        raise ModelError(
            f"The GGUF file has heads of {config['head_dim']!r} dimensions; the model is refused."
        )
    key_length = header.number("attention.key_length", config["head_dim"])
    value_length = header.number("attention.value_length", key_length)
    if value_length != key_length and "kv_lora_rank" not in config:
        raise ModelError(
            f"The GGUF file has values of {value_length} dimensions and keys of {key_length}; only "
            "equal lengths are supported."
        )


def _add_family_facts(config: dict[str, Any], header: Header) -> None:
    """What the tensors tell, and what llama.cpp knows about an architecture without storing it."""
    family = FAMILIES[config["model_type"]]
    for key, part in _BIASES.items():
        if key in family.defaults and key not in family.ignored and config["model_type"] != "gpt_oss":
            config[key] = header.holds(part) or header.holds(part.replace("attn_q.", "attn_qkv."))
    if "lm_head_bias" in family.defaults:
        config["lm_head_bias"] = "output.bias" in header.shapes
    if "use_qk_norm" in family.defaults and "use_qk_norm" not in config:
        config["use_qk_norm"] = header.holds("attn_q_norm.weight")
    stated = header.stated
    eps = stated.get("attention.layer_norm_rms_epsilon", stated.get("attention.layer_norm_epsilon"))
    if eps is not None:
        config[next(key for key in NORM_KEYS if key in family.defaults)] = plain(eps, "layer_norm_epsilon")
    told = "moe_intermediate_size" in config or family.defaults.get("moe_intermediate_size") is None
    if header.number("expert_count", 0) and not told:
        raise ModelError("The GGUF file does not say how wide its experts are; the model is refused.")
    if "attention_multiplier" in config and "attention_multiplier" not in family.defaults:
        raise ModelError(
            f"The GGUF file sets an attention scale, which {config['model_type']} models do not have."
        )


_BIASES = {
    "attention_bias": "attn_q.bias", "attention_out_bias": "attn_output.bias",
    "mlp_bias": "ffn_down.bias", "use_bias": "attn_q.bias",
}  # fmt: skip


def _refuse_what_is_not_built(family: Family, header: Header) -> None:
    """Raises: ModelError for what llama.cpp's graphs of this architecture do and ours of the family does not."""
    temperature = header.number("attention.temperature_scale", 0)
    original = header.number("rope.scaling.original_context_length", 0)
    if temperature and (
        "llama_4_scaling" not in family.defaults
        or header.number("attention.temperature_length", original) != original
    ):
        raise ModelError(
            "The GGUF file scales queries by their position (attention.temperature_scale) in a way that tempo-mlx does "
            f"not do for {header.architecture} files; the model is refused."
        )
    scores = header.number("expert_gating_func", 0)  # 2: sigmoid
    if family.experts is not None and scores and (scores == 2) != (family.experts.get("router") == "sigmoid"):
        raise ModelError(
            f"The GGUF file chooses experts by its expert_gating_func {scores}, which tempo-mlx does not do for "
            f"{header.architecture} files; the model is refused."
        )


def _add_rope(config: dict[str, Any], header: Header) -> None:
    if "rope_parameters" in config:
        return
    rotated = header.number("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"] or "partial_rotary_factor" in FAMILIES[config["model_type"]].defaults:
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    kind = str(header.stated.get("rope.scaling.type", "none"))
    scaling: dict[str, Any] = {}
    if divisors := header.factors.get("rope_freqs.weight"):
        # Llama 3's scaling as the divisors it comes to; longrope can say exactly that.
        scaling = {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors}
        limit = config.get("max_position_embeddings")
        scaling |= {"attention_factor": 1.0, "original_max_position_embeddings": limit}
    elif long := header.factors.get("rope_factors_long.weight"):
        short = header.factors.get("rope_factors_short.weight", long)
        scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        for key, name in _LONG.items():
            if key in header.stated:
                scaling[name] = header.number(key)
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": header.number("rope.scaling.factor")}
    elif kind == "yarn":
        scaling = _yarn(header)
    elif "rope.scale_linear" in header.stated:
        scaling = {"rope_type": "linear", "factor": header.number("rope.scale_linear")}
    elif kind not in ("none", "longrope"):
        raise ModelError(f"The GGUF file's rope scaling {kind[:40]!r} is not supported.")
    if config["model_type"] == "gpt_oss":  # llama.cpp rounds where the ramp begins and ends; OpenAI does not
        scaling["truncate"] = False
    if scaling:
        config["rope_scaling"] = scaling


_LONG = {
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
_YARN = {
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_attn_factor": "attention_factor", "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
    "attention.temperature_scale": "llama_4_scaling_beta",
}  # fmt: skip


def _yarn(header: Header) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": header.number("rope.scaling.factor")}
    scaling |= {name: header.number(key) for key, name in _YARN.items() if key in header.stated}
    if "mscale_all_dim" in scaling:
        scaling["mscale"] = 1.0
        if header.architecture in (
            "deepseek2",
            "mistral4",
        ):  # the converter writes a tenth of it, and no mscale
            scaling["mscale_all_dim"] = scaling["mscale"] = round(10 * scaling["mscale_all_dim"], 6)
    return scaling
