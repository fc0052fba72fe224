"""Families whose layers differ from one another: recurrent beside attention, and Gemma's of 2025 and 2026."""

from __future__ import annotations

from tempo_mlx.architecture.config import Config
from tempo_mlx.architecture.dense import GEMMA, LLAMA, every, sliding_but_every, without
from tempo_mlx.architecture.layers import Family
from tempo_mlx.architecture.states import delta_net, mamba2, short_conv

_DELTA = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "layer_types": None, "full_attention_interval": 4,
}  # fmt: skip
_QWEN_NEXT = {
    **without(LLAMA, "mlp_bias"), **_DELTA, "vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8, "num_experts": 256,
}  # fmt: skip
_QWEN_ATTENTION = {"qk_norm": "head", "gated": True}
_MAMBA = {
    "mamba_n_heads": 128, "mamba_d_head": None, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False, "time_step_limit": None,
}  # fmt: skip
_LFM = {
    "vocab_size": 65536, "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 128000, "norm_eps": 1e-5,
    "tie_word_embeddings": True, "rope_theta": 1000000.0, "conv_bias": False, "conv_L_cache": 3, "layer_types": None,
    "full_attn_idxs": None, "hidden_act": "silu",
}  # fmt: skip
_LFM_NAMES = (
    (r"^model\.embedding_norm\.", "model.norm."), (r"\.operator_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."), (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.q_layernorm\.", ".q_norm."), (r"\.k_layernorm\.", ".k_norm."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."), (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."), (r"\.feed_forward\.(?=(gate|up|down)_proj\.)", ".mlp."),
)  # fmt: skip
_GRANITE_NAMES = (
    (r"\.shared_mlp\.input_linear\.", ".mlp.gate_up_proj."), (r"\.shared_mlp\.output_linear\.", ".mlp.down_proj."),
    (r"\.block_sparse_moe\.input_linear\.", ".experts.gate_up_proj."),
    (r"\.block_sparse_moe\.output_linear\.", ".experts.down_proj."),
    (r"\.block_sparse_moe\.router\.layer\.", ".router."),
)  # fmt: skip
_NEMOTRON_NAMES = (
    (r"^backbone\.embeddings?\.", "model.embed_tokens."), (r"^backbone\.norm_f\.", "model.norm."),
    (r"^backbone\.layers\.", "model.layers."), (r"\.mixer\.(?=[qkvo]_proj)", ".self_attn."),
    (r"\.mixer\.(?=(up|down)_proj)", ".mlp."),
    (r"\.mixer\.(?=A_log|D$|dt_bias|conv1d|norm|in_proj|out_proj)", ".mamba."),
)  # fmt: skip
_GEMMA_OWN = {
    **without(GEMMA, "query_pre_attn_scalar", "attn_logit_softcapping"), "vocab_size": 262144, "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0, "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
}  # fmt: skip
_GEMMA_MODEL = {"norm_placement": "sandwich", "scaled_embedding": True}
_GEMMA_ATTENTION = {"qk_norm": "head", "value_norm": True, "scale": 1.0}


def linear_but_every(values: Config, count: int) -> list[str]:
    return every(count, values.integer("full_attention_interval"), "linear_attention", "full_attention")


def full_at(values: Config, count: int) -> list[str]:
    """LFM2 and Bamba: the layers that have attention are listed."""
    key = "full_attn_idxs" if "full_attn_idxs" in values else "attn_layer_indices"
    full = values.values.get(key)
    if not isinstance(full, list):
        full = range(count) if key == "full_attn_idxs" else []
    return ["full_attention" if index in full else "linear_attention" for index in range(count)]


def all_linear(values: Config, count: int) -> list[str]:
    return ["linear_attention"] * count


def nemotron_blocks(values: Config, count: int) -> list[str]:
    """M: Mamba, *: attention, -: an MLP, E: experts."""
    names = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
    names |= {"mamba": "linear_attention", "attention": "full_attention"} | {
        each: each for each in names.values()
    }
    blocks = values.values.get("layers_block_type")
    stated = blocks if isinstance(blocks, list) else values.values.get("hybrid_override_pattern") or ""
    fits = isinstance(stated, (list, str)) and len(stated) == count
    if not fits or not all(isinstance(each, str) and each in names for each in stated):
        raise values.fail(
            "layers_block_type" if blocks else "hybrid_override_pattern", f"the kinds of {count} layers"
        )
    return [names[each] for each in stated]


HYBRID: dict[str, Family] = {
    "qwen3_next": Family(
        {**_QWEN_NEXT, "vocab_size": 151936, "intermediate_size": 5632, "num_hidden_layers": 48,
         "decoder_sparse_step": 1, "mlp_only_layers": [], "num_experts_per_tok": 10, "num_experts": 512,
         "norm_topk_prob": True},
        "Qwen3-Next-80B-A3B", model={"norm_offset": 1.0}, attention=_QWEN_ATTENTION, experts={"row_gate": True},
        kinds=linear_but_every, recurrent=delta_net,
    ),
    "qwen3_5_text": Family(
        {**without(_QWEN_NEXT, "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok",
                   "num_experts"), "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
         "num_key_value_heads": 4},
        "Qwen3.5, Qwen3.6 dense", model={"norm_offset": 1.0}, attention=_QWEN_ATTENTION, kinds=linear_but_every,
        recurrent=delta_net,
    ),
    "qwen3_5_moe_text": Family(
        _QWEN_NEXT, "Qwen3.5-35B-A3B, Qwen3.6-35B-A3B", model={"norm_offset": 1.0}, attention=_QWEN_ATTENTION,
        experts={"row_gate": True, "normalised": True}, kinds=linear_but_every, recurrent=delta_net,
    ),
    "lfm2": Family(
        {**_LFM, "block_auto_adjust_ff_dim": True, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0},
        "LFM2, LFM2.5", attention={"qk_norm": "head"}, names=_LFM_NAMES, kinds=full_at, recurrent=short_conv,
        aliases={"block_ff_dim": "intermediate_size", "block_norm_eps": "norm_eps", "num_heads": "num_attention_heads"},
        ignored=frozenset({"block_dim", "block_mlp_init_scale", "block_out_init_scale", "block_use_swiglu",
                           "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init"}),
    ),
    "lfm2_moe": Family(
        {**_LFM, "hidden_size": 2048, "intermediate_size": 7168, "moe_intermediate_size": 1792, "num_dense_layers": 2,
         "num_experts_per_tok": 4, "num_experts": 32, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
         "use_expert_bias": True},
        "LFM2-8B-A1B", attention={"qk_norm": "head"}, names=_LFM_NAMES, kinds=full_at, recurrent=short_conv,
        experts={"router": "sigmoid"}, ignored=frozenset({"conv_dim", "conv_dim_out"}),
    ),
    "granitemoehybrid": Family(
        {**without(LLAMA, "mlp_bias"), **_MAMBA, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
         "residual_multiplier": 1.0, "attention_multiplier": 1.0, "num_local_experts": 8, "num_experts_per_tok": 2,
         "shared_intermediate_size": 1024, "position_embedding_type": None, "layer_types": None},
        "Granite 4.0, Granite 4.0-H", experts={"router": "chosen"}, names=_GRANITE_NAMES, kinds=all_linear,
        recurrent=mamba2, ignored=frozenset({"init_method", "normalization_function", "mlp_bias"}),
    ),
    "bamba": Family(
        {**LLAMA, **_MAMBA, "vocab_size": 128000, "intermediate_size": 14336, "num_key_value_heads": 8,
         "max_position_embeddings": 262144, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5,
         "attn_layer_indices": None, "layer_types": None},
        "Bamba 9B v2", names=((r"\.feed_forward\.", ".mlp."), (r"^model\.final_layernorm\.", "model.norm."),
                              (r"\.pre_ff_layernorm\.", ".post_attention_layernorm.")),
        kinds=full_at, recurrent=mamba2, ignored=frozenset({"attn_rotary_emb"}),
    ),
    "falcon_h1": Family(
        {**LLAMA, **_MAMBA, "vocab_size": 128000, "intermediate_size": 14336, "num_key_value_heads": 8,
         "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "mamba_d_ssm": 1024, "mamba_rms_norm": False,
         "mamba_norm_before_gate": True, "embedding_multiplier": 1.0, "lm_head_multiplier": 1.0,
         "mlp_multipliers": [1.0, 1.0], "key_multiplier": 1.0, "attention_in_multiplier": 1.0,
         "attention_out_multiplier": 1.0, "ssm_multipliers": [1.0] * 5, "ssm_in_multiplier": 1.0,
         "ssm_out_multiplier": 1.0},
        "Falcon-H1", names=((r"\.feed_forward\.", ".mlp."), (r"^model\.final_layernorm\.", "model.norm."),
                            (r"\.pre_ff_layernorm\.", ".post_attention_layernorm.")), recurrent=mamba2,
        ignored=frozenset({"attn_layer_indices", "attn_rotary_emb", "mamba_use_mlp", "projectors_bias", "layer_types"}),
    ),
    "nemotron_h": Family(
        {**without(LLAMA, "rms_norm_eps", "hidden_act"), "vocab_size": 131072, "intermediate_size": 21504,
         "num_hidden_layers": 52, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096,
         "layer_norm_epsilon": 1e-5, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu",
         "mamba_num_heads": 128, "mamba_head_dim": 64,
         "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "use_conv_bias": True, "use_bias": False,
         "layers_block_type": None, "hybrid_override_pattern": None,
         "moe_latent_size": None, "time_step_limit": None, "n_routed_experts": 8, "num_experts_per_tok": 2,
         "moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688, "n_group": 1, "topk_group": 1,
         "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_shared_experts": 1},
        "Nemotron-H, Nemotron Nano 2, Nemotron 3 Nano", mlp={"gated": False}, names=_NEMOTRON_NAMES,
        attention={"qkv_bias": False, "output_bias": False},
        experts={"router": "sigmoid", "correction": True, "group_top": 2, "gated": False},
        aliases={"attention_head_dim": "head_dim", "rms_norm_eps": "layer_norm_epsilon"}, kinds=nemotron_blocks,
        rotates=(), recurrent=mamba2, ignored=frozenset({"sliding_window", "norm_eps", "expand",
            "residual_in_fp32", "attention_bias", "rope_theta", "partial_rotary_factor", "time_step_floor"}),
    ),
    "mamba2": Family(
        {"vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128, "head_dim": 64,
         "state_size": 128, "n_groups": 8, "conv_kernel": 4, "layer_norm_epsilon": 1e-5, "use_bias": False,
         "use_conv_bias": True, "hidden_act": "silu", "tie_word_embeddings": False, "time_step_limit": None,
         "layers_block_type": [], "max_position_embeddings": 1 << 20},
        "Mamba 2 (Codestral Mamba)", names=_NEMOTRON_NAMES, kinds=all_linear, recurrent=mamba2,
        ignored=frozenset({"residual_in_fp32", "intermediate_size", "num_attention_heads", "num_key_value_heads"}),
    ),
    "gemma3n_text": Family(
        {**_GEMMA_OWN, "vocab_size": 262400, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 35,
         "num_key_value_heads": 2, "max_position_embeddings": 32768, "sliding_window": 512, "altup_active_idx": 0,
         "altup_correct_scale": True, "altup_num_inputs": 4, "num_kv_shared_layers": 15, "laurel_rank": 64,
         "activation_sparsity_pattern": None},
        "Gemma 3n E2B and E4B", model=_GEMMA_MODEL, attention=_GEMMA_ATTENTION, kinds=sliding_but_every(5),
        ignored=frozenset({"altup_coef_clip", "hidden_act"}),
    ),
    "gemma4_text": Family(
        {**_GEMMA_OWN, "num_hidden_layers": 30, "max_position_embeddings": 131072, "sliding_window": 512,
         "final_logit_softcapping": None, "global_head_dim": 512, "num_global_key_value_heads": None,
         "per_layer_config": None, "attention_k_eq_v": False, "enable_moe_block": False, "use_double_wide_mlp": False,
         "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None, "partial_rotary_factor": None,
         "use_bidirectional_attention": None,
         "rope_parameters": {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25}}},
        "Gemma 4", model={**_GEMMA_MODEL, "layer_scalar": True}, attention=_GEMMA_ATTENTION,
        experts={"own_norm": True, "normalised": True}, kinds=sliding_but_every(6),
        names=((r"(\.layers\.\d+\.router)\.proj\.", r"\1."),), ignored=frozenset({"hidden_act"}),
    ),
}  # fmt: skip
