"""Families with mixtures of experts, and those with latent attention."""

from __future__ import annotations

from tempo_mlx.architecture.config import Config
from tempo_mlx.architecture.dense import LLAMA, PLAIN, YARN_MISTRAL, after_max_window_layers, every, without
from tempo_mlx.architecture.layers import Family

_MOE = {"num_experts_per_tok": 2, "num_local_experts": 8, "router_jitter_noise": 0.0}
_SPARSE_STEP = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_DEEPSEEK = {
    **LLAMA, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
    "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1, "norm_topk_prob": True,
    "max_position_embeddings": 4096, "rope_interleave": True,
}  # fmt: skip
_DEEPSEEK_ROUTER = {"router": "sigmoid", "correction": True, "group_top": 2}
_DENSE_FIRST = frozenset(
    {"qk_head_dim", "mlp_bias", "scoring_func", "topk_method", "ep_size", "head_dim", "partial_rotary_factor"}
)


def rotated_or_full(values: Config, count: int) -> list[str]:
    """Llama 4: layers with positions see their own block of them."""
    stated = values.choices("no_rope_layers", count, (0, 1)) if values.values["no_rope_layers"] else None
    if stated is None:
        return every(count, values.integer("no_rope_layer_interval"), "chunked_attention", "full_attention")
    return ["chunked_attention" if each else "full_attention" for each in stated]


def alternating(values: Config, count: int) -> list[str]:
    return every(count, 2, "sliding_attention", "full_attention")


# Of gpt-oss' original weights.
_OPENAI_NAMES = (
    (r"^block\.", "model.layers."), (r"^embedding\.", "model.embed_tokens."), (r"^unembedding\.", "lm_head."),
    (r"^norm\.scale$", "model.norm.weight"), (r"\.attn\.norm\.scale$", ".input_layernorm.weight"),
    (r"\.mlp\.norm\.scale$", ".post_attention_layernorm.weight"), (r"\.attn\.qkv\.", ".self_attn.qkv_proj."),
    (r"\.attn\.out\.", ".self_attn.o_proj."), (r"\.attn\.sinks$", ".self_attn.sinks"),
    (r"\.mlp\.mlp1_weight\.", ".experts.gate_up_proj."), (r"\.mlp\.mlp2_weight\.", ".experts.down_proj."),
    (r"\.mlp\.mlp1_bias$", ".experts.gate_up_proj_bias"), (r"\.mlp\.mlp2_bias$", ".experts.down_proj_bias"),
)  # fmt: skip

SPARSE: dict[str, Family] = {
    "mixtral": Family(
        {**PLAIN, **_MOE, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
         "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None},
        "Mixtral 8x7B", experts={"normalised": True},
    ),
    "phimoe": Family(
        {**without(LLAMA, "mlp_bias"), **_MOE, "vocab_size": 32064, "intermediate_size": 6400,
         "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
         "num_local_experts": 16, "router_jitter_noise": 0.01, "rope_theta": 1000000.0, "lm_head_bias": False,
         "sliding_window": None},
        "Phi-3.5-MoE", model={"norm": "layer", "norm_bias": True}, experts={"router": "sparsemixer"},
        ignored=frozenset({"input_jitter_noise", "original_max_position_embeddings"}),
    ),
    "qwen2_moe": Family(
        {**PLAIN, **_SPARSE_STEP, "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
         "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
         "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
         "max_window_layers": 28, "layer_types": None, "moe_intermediate_size": 1408,
         "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60,
         "norm_topk_prob": False, "qkv_bias": True},
        "Qwen1.5-MoE", attention={"output_bias": False}, experts={"row_gate": True}, kinds=after_max_window_layers,
    ),
    "qwen3_moe": Family(
        {**without(LLAMA, "mlp_bias"), **_SPARSE_STEP, "vocab_size": 151936, "hidden_size": 2048,
         "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
         "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
         "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_local_experts": 128, "norm_topk_prob": False},
        "Qwen3-30B-A3B", attention={"qk_norm": "head"}, experts={}, aliases={"num_experts": "num_local_experts"},
    ),
    "olmoe": Family(
        {**without(LLAMA, "mlp_bias"), "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048,
         "num_hidden_layers": 16, "num_attention_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
         "clip_qkv": None, "num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False},
        "OLMoE", attention={"qk_norm": "projection"}, experts={},
    ),
    "granitemoe": Family(
        {**without(LLAMA, "mlp_bias"), **_MOE, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
         "residual_multiplier": 1.0, "attention_multiplier": 1.0},
        "Granite 3 MoE", experts={"router": "chosen"},
        names=((r"\.block_sparse_moe\.input_linear\.", ".experts.gate_up_proj."),
               (r"\.block_sparse_moe\.output_linear\.", ".experts.down_proj."),
               (r"\.block_sparse_moe\.router\.layer\.", ".router.")),
    ),
    "ernie4_5_moe": Family(
        {**PLAIN, "vocab_size": 103424, "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 28,
         "num_attention_heads": 20, "num_key_value_heads": 4, "max_position_embeddings": 131072,
         "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "use_bias": False, "tie_word_embeddings": True,
         "moe_intermediate_size": 1536, "moe_k": 6, "moe_num_experts": 64, "moe_num_shared_experts": 2,
         "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
        "ERNIE 4.5 21B-A3B", experts={"correction": True, "normalised": True}, interleaved=True,
    ),
    "gpt_oss": Family(
        {**without(LLAMA, "mlp_bias"), "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
         "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
         "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "attention_bias": True,
         "sliding_window": 128, "layer_types": None, "num_local_experts": 128, "num_experts_per_tok": 4,
         "swiglu_limit": 7.0, "swiglu_alpha": 1.702,
         "rope_parameters": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                             "truncate": False, "original_max_position_embeddings": 4096}},
        "gpt-oss 20B and 120B", attention={"sinks": True}, kinds=alternating, names=_OPENAI_NAMES,
        experts={"router": "chosen", "bias": True, "stored": "turns"},
        ignored=frozenset({"experts_per_token", "initial_context_length"}),
    ),
    "llama4_text": Family(
        {**without(LLAMA, "mlp_bias"), "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192,
         "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40,
         "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
         "rope_theta": 500000.0, "num_experts_per_tok": 1, "num_local_experts": 16, "interleave_moe_layer_step": 1,
         "moe_layers": None, "use_qk_norm": True, "no_rope_layers": None, "no_rope_layer_interval": 4,
         "attention_chunk_size": 8192, "layer_types": None, "attn_temperature_tuning": True, "floor_scale": 8192,
         "attn_scale": 0.1},
        "Llama 4 Scout and Maverick", attention={"qk_norm": "plain", "norm_after_rope": True}, interleaved=True,
        experts={"router": "sigmoid", "input_scaled": True, "stored": "across"}, kinds=rotated_or_full,
        names=((r"\.feed_forward\.(?=(gate|up|down)_proj)", ".mlp."),), ignored=frozenset({"for_llm_compressor"}),
    ),
    "glm4_moe": Family(
        {**without(LLAMA, "mlp_bias"), "vocab_size": 151552, "intermediate_size": 10944, "num_hidden_layers": 46,
         "num_attention_heads": 96, "num_key_value_heads": 8, "max_position_embeddings": 131072,
         "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "moe_intermediate_size": 1408,
         "num_experts_per_tok": 8, "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0,
         "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True, "use_qk_norm": False},
        "GLM-4.5, GLM-4.5-Air", attention={"qk_norm": "head", "output_bias": False}, experts=_DEEPSEEK_ROUTER,
    ),
    "glm4_moe_lite": Family(
        {**without(_DEEPSEEK, "mlp_bias", "head_dim", "first_k_dense_replace"), "vocab_size": 154880,
         "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536, "num_hidden_layers": 47,
         "num_attention_heads": 20, "num_key_value_heads": 20, "n_routed_experts": 64, "q_lora_rank": 768,
         "routed_scaling_factor": 1.8, "qk_nope_head_dim": 192, "v_head_dim": 256, "n_group": 1, "topk_group": 1,
         "num_experts_per_tok": 4, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5,
         "mlp_layer_types": None, "first_k_dense_replace": 1},
        "GLM-4.7-Flash", experts=_DEEPSEEK_ROUTER, ignored=_DENSE_FIRST,
    ),
    "deepseek_v2": Family(
        {**_DEEPSEEK, "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "max_position_embeddings": 2048, "first_k_dense_replace": 0, "n_group": None,
         "topk_group": None, "n_routed_experts": 64, "n_shared_experts": 2, "routed_scaling_factor": 1.0,
         "topk_method": "greedy", "norm_topk_prob": False, "moe_intermediate_size": 1407, "num_experts_per_tok": 6},
        "DeepSeek-V2-Lite, DeepSeek-Coder-V2", experts={"normalised": False},
        ignored=_DENSE_FIRST - {"topk_method"} | {"norm_topk_prob"},
    ),
    "deepseek_v3": Family(_DEEPSEEK, "DeepSeek-V3, R1, Moonlight", experts=_DEEPSEEK_ROUTER, ignored=_DENSE_FIRST,
                          attention={}),
    "youtu": Family(
        {**without(_DEEPSEEK, "n_routed_experts", "moe_intermediate_size", "n_shared_experts", "first_k_dense_replace",
                   "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
                   "moe_layer_freq"), "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144,
         "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 16,
         "max_position_embeddings": 131072, "tie_word_embeddings": True},
        "Youtu-LLM", ignored=_DENSE_FIRST,
    ),
    "mistral4": Family(
        {**_DEEPSEEK, "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
         "num_attention_heads": 32, "num_key_value_heads": 32, "n_routed_experts": 128, "kv_lora_rank": 256,
         "q_lora_rank": 1024, "qk_nope_head_dim": 64, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4,
         "routed_scaling_factor": 1.0, "max_position_embeddings": 1048576, "first_k_dense_replace": 0,
         "llama_4_scaling": True,
         "rope_parameters": {**YARN_MISTRAL, "factor": 128.0, "original_max_position_embeddings": 8192}},
        "Mistral Small 4", experts={"group_top": 2}, ignored=_DENSE_FIRST,
    ),
}  # fmt: skip
