"""What the tiny random models of tests/twins.py are: of every family, of every GGUF architecture, and wide ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOCABULARY = 320  # 256 bytes, 4 special tokens, some pairs, and rows that no token has
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": None,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_YARN = {**_LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0], "partial_rotary_factor": 0.75,
}  # fmt: skip
_LONGROPE_WHOLE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 8.0, 8.0], "original_max_position_embeddings": 64,
}  # fmt: skip
_SPREAD = (
    1.1547005383792515  # of 64 positions over 256; what the converter writes whatever a config's mscale says
)
_FALCON_SCALES = {
    "key_multiplier": 0.5, "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5, "mlp_multipliers": [0.9, 1.1],
    "attention_in_multiplier": 1.2, "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.9, "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
}  # fmt: skip
_MOE = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4,
}  # fmt: skip
_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3,
}  # fmt: skip
_DELTA_GGUF = {  # llama.cpp has one size for keys and values, and full attention at even distances
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 2}
_NEMOTRON_MOE = {
    "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "ssm_state_size": 16, "n_groups": 2, "n_routed_experts": 8, "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 1.5, "layers_block_type": ["mamba", "attention", "mamba", "moe"],
}  # fmt: skip
_SCALES = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
}
_GEMMA_OWN = {
    "head_dim": 16, "sliding_window": 10, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
_YARN_LONG = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

# name -> transformers' classes ("Llama" for LlamaConfig and LlamaForCausalLM) and what differs from SIZES
TWINS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": _LINEAR}),
    "llama-dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            "max_position_embeddings": 32,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 12, "head_dim": 24}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": _YARN}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "gemma2": ("Gemma2", {"head_dim": 24, "sliding_window": 10, "query_pre_attn_scalar": 20}),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 24, "sliding_window": 10, "num_hidden_layers": 6, "query_pre_attn_scalar": 20,
            "rope_parameters": _GEMMA_ROPE,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 20}),
    "phi4": ("Phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}),
    "smollm3": ("SmolLM3", {"use_sliding_window": True, "sliding_window": 12}),
    "olmo2": ("Olmo2", {}),
    "ministral": (
        "Ministral",
        {"head_dim": 16, "sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "ministral3": ("Ministral3", {"head_dim": 16, "rope_parameters": _YARN_LONG}),
    "gemma": ("Gemma", {"head_dim": 24}),
    "vaultgemma": ("VaultGemma", {"head_dim": 16, "sliding_window": 10, "query_pre_attn_scalar": 20}),
    "olmo": ("Olmo", {"clip_qkv": 1.5}),
    "olmo3": ("Olmo3", {"sliding_window": 10}),
    "seed_oss": ("SeedOss", {"head_dim": 24, "attention_out_bias": True}),
    "exaone4": ("Exaone4", {"head_dim": 16, "sliding_window": 10}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 16, "attention_bias": True}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16, "use_bias": True}),
    "arcee": ("Arcee", {"mlp_bias": True, "attention_bias": True, "head_dim": 16}),
    "nemotron": ("Nemotron", {"head_dim": 16, "mlp_bias": True}),
    "apertus": ("Apertus", {"rope_parameters": _LLAMA3}),
    "helium": ("Helium", {"head_dim": 16}),
    "nanochat": ("NanoChat", {}),
    "glm": ("Glm", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "cohere": ("Cohere", {"use_qk_norm": True, "logit_scale": 0.5}),
    "cohere2": ("Cohere2", {"head_dim": 16, "sliding_window": 10, "logit_scale": 0.5}),
    "phi": ("Phi", {}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("StableLm", {"use_parallel_residual": True}),
    "starcoder2": ("Starcoder2", {"sliding_window": 12}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_neox-serial": ("GPTNeoX", {"use_parallel_residual": False}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "phimoe": (
        "Phimoe",
        {"num_local_experts": 4, "lm_head_bias": True, "attention_bias": True, "rope_parameters": {
            **_LONGROPE_WHOLE, "original_max_position_embeddings": 256, "short_mscale": 1.2, "long_mscale": 1.2}},
    ),
    "phimoe-plain": ("Phimoe", {"num_local_experts": 4, "lm_head_bias": True, "attention_bias": True}),
    "qwen2_moe": ("Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2}),
    "qwen3_moe": ("Qwen3Moe", {**_MOE, "head_dim": 24, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2, **_SCALES}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 2},
    ),
    "gpt_oss": (
        "GptOss",
        {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 10,
         "rope_parameters": {**_YARN, "truncate": False}},
    ),
    "llama4": (
        "Llama4Text",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 80,
         "interleave_moe_layer_step": 2, "attention_chunk_size": 16, "floor_scale": 8},
    ),
    "glm4_moe": ("Glm4Moe", {**_DEEPSEEK, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
    "glm4_moe_lite": ("Glm4MoeLite", {**_LATENT, **_DEEPSEEK}),
    "deepseek_v2": (
        "DeepseekV2",
        {**_LATENT, **_DEEPSEEK, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0,
         "q_lora_rank": None},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**_LATENT, **_DEEPSEEK, "rope_parameters": {**_YARN_LONG, "mscale_all_dim": 0.7}},
    ),
    "mistral4": (
        "Mistral4",
        {**_LATENT, **_DEEPSEEK, "rope_parameters": {**_YARN_LONG, "partial_rotary_factor": 0.34}},
    ),
    "youtu": ("Youtu", _LATENT),
    "gemma3n": (
        "Gemma3nText",
        {**_GEMMA_OWN, "num_hidden_layers": 5, "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 3,
         "altup_active_idx": 1, "activation_sparsity_pattern": [0.95, 0.5, 0.0, 0.0, 0.0],
         "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 2, "full_attention"]},
    ),
    "gemma4-e": (
        "Gemma4Text",
        {**_GEMMA_OWN, "num_hidden_layers": 6, "global_head_dim": 32, "num_kv_shared_layers": 2,
         "use_double_wide_mlp": True, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
    ),
    "gemma4-moe": (
        "Gemma4Text",
        {**_GEMMA_OWN, "hidden_size_per_layer_input": 0, "global_head_dim": 32, "enable_moe_block": True,
         "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32, "attention_k_eq_v": True,
         "num_global_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "qwen3_next": ("Qwen3Next", {**_DELTA, **_MOE, "head_dim": 16, "shared_expert_intermediate_size": 32}),
    "qwen3_5": ("Qwen3_5Text", {**_DELTA, "head_dim": 16}),
    "qwen3_5_moe": ("Qwen3_5MoeText", {**_DELTA, **_MOE, "head_dim": 16, "shared_expert_intermediate_size": 32}),
    "lfm2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention", "conv", "conv"], "conv_bias": True, "block_multiple_of": 16},
    ),
    "lfm2_moe": ("Lfm2Moe", {**_MOE, "layer_types": ["conv", "full_attention", "conv", "conv"], "num_dense_layers": 1}),
    "granite4-dense": (
        "GraniteMoeHybrid",
        {"layer_types": ["attention"] * 2, "num_hidden_layers": 2, "num_local_experts": 0,
         "shared_intermediate_size": 48, "position_embedding_type": "rope"},
    ),
    "granite4-h": (
        "GraniteMoeHybrid",
        {**_MAMBA, **_SCALES, "layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3,
         "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
    ),
    "nemotron_h": (
        "NemotronH",
        {"head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2,
         "use_bias": True, "layers_block_type": ["mamba", "attention", "mamba", "mlp"]},
    ),
    "nemotron_h-moe": ("NemotronH", {**_NEMOTRON_MOE, "n_group": 2, "topk_group": 1}),
    "falcon_h1": (
        "FalconH1",
        {**_MAMBA, "mamba_d_ssm": 128, "num_hidden_layers": 2, "mamba_rms_norm": True,
         "mamba_norm_before_gate": False, **_FALCON_SCALES},
    ),
    "bamba": ("Bamba", {**_MAMBA, "attn_layer_indices": [1], "num_hidden_layers": 3}),
    "mamba2": (
        "Mamba2",
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "num_hidden_layers": 3},
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0, "logits_scaling": 0.5, "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        },
    ),
}  # fmt: skip

# Twins as GGUF files can hold them: no windows or steps that llama.cpp has no key for.
GGUF_TWINS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gguf-seed_oss": ("SeedOss", {"head_dim": 24, "attention_out_bias": False}),
    "gguf-arcee": ("Arcee", {"head_dim": 16}),
    "gguf-gemma": ("Gemma", {"head_dim": 24}),
    "gguf-glm4": ("Glm4", {"head_dim": 16}),
    "gguf-ernie4_5": ("Ernie4_5", {"head_dim": 16}),
    "gguf-starcoder2": ("Starcoder2", {"sliding_window": None}),
    "gguf-hunyuan": ("HunYuanDenseV1", {"head_dim": 16}),
    "gguf-nemotron": ("Nemotron", {"head_dim": 16}),
    "gguf-olmo": ("Olmo", {"clip_qkv": 1.5}),
    "gguf-cohere": ("Cohere", {"logit_scale": 0.5}),
    "gguf-cohere2": ("Cohere2", {"head_dim": 16, "sliding_window": 10, "logit_scale": 0.5}),
    "gguf-qwen2_moe": ("Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 48}),
    "gguf-qwen3_moe": ("Qwen3Moe", {**_MOE, "head_dim": 24, "norm_topk_prob": True}),
    "gguf-olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4}),
    "gguf-granitemoe": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2, **_SCALES}),
    "gguf-mixtral": ("Mixtral", {"num_local_experts": 4}),
    "gguf-gpt_oss": (
        "GptOss",
        {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 10,
         "rope_parameters": {**_YARN, "truncate": False}},
    ),
    "gguf-glm4_moe": (
        "Glm4Moe",
        {**_DEEPSEEK, "head_dim": 16, "use_qk_norm": True, "attention_bias": True, "n_group": 1,
         "routed_scaling_factor": 1.5},
    ),
    "gguf-lfm2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "gguf-lfm2_moe": (
        "Lfm2Moe",
        {**_MOE, "layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    ),
    "gguf-exaone4": ("Exaone4", {"head_dim": 16, "sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "gguf-exaone4-windows": ("Exaone4", {"head_dim": 16, "sliding_window": 10}),
    "gguf-mistral3": ("Mistral", {"head_dim": 24, "sliding_window": None}),
    "gguf-ministral3": ("Ministral3", {"head_dim": 16, "rope_parameters": _YARN_LONG}),
    "gguf-deepseek_v2": (
        "DeepseekV2", {**_LATENT, **_DEEPSEEK, "n_group": 1, "topk_method": "greedy", "routed_scaling_factor": 2.0},
    ),
    "gguf-deepseek_v2-lite": (
        "DeepseekV2", {**_LATENT, **_DEEPSEEK, "topk_method": "group_limited_greedy", "q_lora_rank": None},
    ),
    "gguf-deepseek_v3": (
        "DeepseekV3",
        {**_LATENT, **_DEEPSEEK, "rope_parameters": {**_YARN_LONG, "mscale": 0.7, "mscale_all_dim": 0.7}},
    ),
    "gguf-glm4_moe_lite": ("Glm4MoeLite", {**_LATENT, **_DEEPSEEK, "n_group": 1}),
    "gguf-youtu": ("Youtu", {**_LATENT, "tie_word_embeddings": True}),
    "gguf-mistral4": ("Mistral4", {**_LATENT, **_DEEPSEEK, "rope_parameters": _YARN_LONG}),
    "gguf-qwen3_next": (
        "Qwen3Next", {**_DELTA_GGUF, **_MOE, "head_dim": 16, "shared_expert_intermediate_size": 32},
    ),
    "gguf-qwen3_5": ("Qwen3_5Text", {**_DELTA_GGUF, "head_dim": 16}),
    "gguf-qwen3_5_moe": (
        "Qwen3_5MoeText", {**_DELTA_GGUF, **_MOE, "head_dim": 16, "shared_expert_intermediate_size": 32},
    ),
    "gguf-granite4-h": (
        "GraniteMoeHybrid",
        {**_MAMBA, **_SCALES, "layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3,
         "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
    ),
    "gguf-granite4-h-dense": (
        "GraniteMoeHybrid",
        {**_MAMBA, **_SCALES, "layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3,
         "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96},
    ),
    "gguf-nemotron_h": (
        "NemotronH", {**_NEMOTRON_MOE, "layers_block_type": ["mamba", "attention", "mamba", "mlp"]},
    ),
    "gguf-nemotron_h_moe": ("NemotronH", {**_NEMOTRON_MOE, "n_group": 1, "topk_group": 1}),
    "gguf-gemma3n": (
        "Gemma3nText",
        {**_GEMMA_OWN, "num_hidden_layers": 10, "num_kv_shared_layers": 5, "laurel_rank": 8,
         "activation_sparsity_pattern": [0.95] * 5 + [0.0] * 5,
         "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 2},
    ),
    "gguf-gemma4-e": (
        "Gemma4Text",
        {**_GEMMA_OWN, "num_hidden_layers": 5, "global_head_dim": 32, "num_kv_shared_layers": 2,
         "use_double_wide_mlp": True,
         "layer_types": ["sliding_attention", *["sliding_attention", "full_attention"] * 2]},
    ),
    "gguf-gemma4-moe": (
        "Gemma4Text",
        {**_GEMMA_OWN, "hidden_size_per_layer_input": 0, "global_head_dim": 32, "enable_moe_block": True,
         "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32, "attention_k_eq_v": True,
         "num_global_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gguf-llama4": (
        "Llama4Text",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48,
         "intermediate_size_mlp": 80, "interleave_moe_layer_step": 2},
    ),
    "gguf-olmo3": (
        "Olmo3",
        {"sliding_window": 10, "rope_parameters": {
            "full_attention": _YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    ),
    "gguf-phimoe": (
        "Phimoe",
        {"num_local_experts": 4, "lm_head_bias": True, "attention_bias": True, "rope_parameters": {
            **_LONGROPE_WHOLE, "short_mscale": _SPREAD, "long_mscale": _SPREAD}},
    ),
    "gguf-phi": ("Phi", {"intermediate_size": 256, "num_key_value_heads": 4}),
    "gguf-gpt_neox": ("GPTNeoX", {}),
    "gguf-gpt_neox-serial": ("GPTNeoX", {"use_parallel_residual": False}),
    "gguf-stablelm": ("StableLm", {"use_qkv_bias": True}),
    "gguf-stablelm-parallel": ("StableLm", {"use_parallel_residual": True}),
    "gguf-ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 2,
         "moe_layer_start_index": 1, "intermediate_size": 128, "head_dim": 16},
    ),
    "gguf-apertus": ("Apertus", {"rope_parameters": _LLAMA3}),
    "gguf-falcon_h1": (
        "FalconH1",
        {**_MAMBA, "head_dim": 16, "mamba_d_ssm": 128, "num_hidden_layers": 2, "mamba_rms_norm": True,
         "mamba_norm_before_gate": False, **_FALCON_SCALES},
    ),
    "gguf-bamba": (
        "Bamba", {**_MAMBA, "attn_layer_indices": [1], "num_hidden_layers": 3, "attn_rotary_emb": 8},
    ),
    "gguf-glm": ("Glm", {"head_dim": 16, "rms_norm_eps": 1e-5, "attention_bias": True}),
    "gguf-glm-fused": ("Glm", {"head_dim": 16, "rms_norm_eps": 1e-5, "attention_bias": True}),
}  # fmt: skip

# Twins of each kind of layer whose cache can be quantised: its keys and values are of a multiple of 32 numbers.
WIDE_TWINS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "wide-qwen3_5": ("Qwen3_5Text", {**_DELTA, "head_dim": 32}),
    "wide-lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"] * 2, "num_attention_heads": 2}),
    "wide-granite4-h": (
        "GraniteMoeHybrid",
        {**_MAMBA, **_SCALES, "layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3,
         "num_local_experts": 0, "shared_intermediate_size": 48, "num_attention_heads": 2},
    ),
    "wide-mixtral": ("Mixtral", {"num_local_experts": 4, "num_attention_heads": 2}),
    "wide-deepseek_v3": ("DeepseekV3", {**_LATENT, **_DEEPSEEK, "kv_lora_rank": 24, "rope_parameters": _YARN_LONG}),
    "wide-gpt_oss": (
        "GptOss",
        {"head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 10,
         "rope_parameters": {**_YARN, "truncate": False}},
    ),
    "wide-gemma4-e": (
        "Gemma4Text",
        {**_GEMMA_OWN, "head_dim": 32, "num_hidden_layers": 6, "global_head_dim": 64, "num_kv_shared_layers": 2,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
    ),
}  # fmt: skip
