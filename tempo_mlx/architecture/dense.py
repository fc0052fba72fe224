"""Families whose layers are attention and one MLP. Defaults are those of transformers' config classes, since a
config.json leaves out what equals them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempo_mlx.architecture.config import Config
from tempo_mlx.architecture.layers import Family, rotary_layers

LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "rope_theta": 10000.0,
}  # fmt: skip
GEMMA = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False, "rope_theta": 10000.0, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "layer_types": None, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip
GEMMA_MODEL = {"norm_offset": 1.0, "norm_placement": "sandwich", "scaled_embedding": True}


def without(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


YARN_MISTRAL = {
    "rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip
PLAIN = without(LLAMA, "attention_bias", "mlp_bias")
QWEN = {
    **LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None,
}  # fmt: skip


def every(count: int, step: int, kind: str, other: str) -> list[str]:
    """`other` in each place that `step` divides, counted from 1, and `kind` elsewhere."""
    return [kind if not step or (index + 1) % step else other for index in range(count)]


def after_max_window_layers(values: Config, count: int) -> list[str]:
    first = values.values["max_window_layers"]
    if type(first) is not int or first < 0:
        raise values.fail("max_window_layers", "a whole number")
    window = values.values.get("sliding_window") is not None
    return ["sliding_attention" if window and index >= first else "full_attention" for index in range(count)]


def where_not_rotated(values: Config, count: int) -> list[str]:
    """SmolLM3: layers without positions slide."""
    rotary = rotary_layers(values, count)
    return ["full_attention" if rotates else "sliding_attention" for rotates in rotary]


def sliding_but_every(step: int) -> Any:
    def kinds(values: Config, count: int) -> list[str]:
        pattern = values.values.get("sliding_window_pattern")
        return every(
            count, pattern if isinstance(pattern, int) else step, "sliding_attention", "full_attention"
        )

    return kinds


_NEOX_NAMES = (
    (r"^gpt_neox\.embed_in\.", "model.embed_tokens."), (r"^embed_out\.", "lm_head."),
    (r"^gpt_neox\.final_layer_norm\.", "model.norm."), (r"^gpt_neox\.layers\.", "model.layers."),
    (r"\.attention\.query_key_value\.", ".self_attn.qkv_proj."), (r"\.attention\.dense\.", ".self_attn.o_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.up_proj."), (r"\.mlp\.dense_4h_to_h\.", ".mlp.down_proj."),
)  # fmt: skip
_FC_NAMES = ((r"\.mlp\.(fc1|c_fc)\.", ".mlp.up_proj."), (r"\.mlp\.(fc2|c_proj)\.", ".mlp.down_proj."))
_LAYER_NORM = {"norm": "layer", "norm_bias": True}
_COHERE = {
    **without(LLAMA, "rms_norm_eps", "mlp_bias"), "vocab_size": 256000, "hidden_size": 8192,
    "intermediate_size": 22528, "num_hidden_layers": 40, "num_attention_heads": 64,
    "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True,
}  # fmt: skip

DENSE: dict[str, Family] = {
    "llama": Family(LLAMA, "Llama 3.x, SmolLM2, TinyLlama"),
    "mistral": Family(
        {**PLAIN, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32,
         "sliding_window": 4096},
        "Mistral 7B, Mistral Small 3, Devstral",
    ),
    "ministral": Family(
        {**PLAIN, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
         "sliding_window": 4096, "layer_types": None},
        "Ministral 8B", kinds=sliding_but_every(0),
    ),
    "ministral3": Family(
        {**PLAIN, "vocab_size": 131072, "intermediate_size": 14336, "num_hidden_layers": 34,
         "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5,
         "rope_theta": 1000000.0, "sliding_window": None, "llama_4_scaling": True,
         "rope_parameters": {**YARN_MISTRAL, "factor": 16.0, "original_max_position_embeddings": 16384}},
        "Ministral 3",
    ),
    "qwen2": Family(without(QWEN, "attention_bias", "mlp_bias"), "Qwen2.5", attention={
        "qkv_bias": True, "output_bias": False}, kinds=after_max_window_layers),
    "qwen2_5_vl_text": Family(
        {**without(QWEN, "attention_bias", "mlp_bias"), "vocab_size": 152064, "hidden_size": 8192,
         "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
         "rms_norm_eps": 1e-5, "max_window_layers": 80, "rope_theta": 1000000.0},
        "Qwen2.5-VL (text)", attention={"qkv_bias": True, "output_bias": False}, kinds=after_max_window_layers,
    ),
    "qwen3": Family({**without(QWEN, "mlp_bias"), "head_dim": 128}, "Qwen3", attention={"qk_norm": "head"},
                    kinds=after_max_window_layers),
    "qwen3_vl_text": Family(
        {**without(LLAMA, "mlp_bias"), "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
         "head_dim": 128, "max_position_embeddings": 128000, "rope_theta": 500000.0},
        "Qwen3-VL (text)", attention={"qk_norm": "head"},
    ),
    "gemma": Family(
        {**without(GEMMA, "query_pre_attn_scalar", "sliding_window", "layer_types", "final_logit_softcapping",
                   "attn_logit_softcapping", "hidden_activation"), "hidden_size": 3072, "intermediate_size": 24576,
         "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
         "hidden_act": "gelu_pytorch_tanh"},
        "Gemma 1", model={"norm_offset": 1.0, "scaled_embedding": True}, mlp={"hidden_act": "gelu_tanh"},
        ignored=frozenset({"hidden_activation"}),
    ),
    "gemma2": Family(GEMMA, "Gemma 2", model=GEMMA_MODEL, ignored=frozenset({"hidden_act", "sliding_window_size"}),
                     kinds=sliding_but_every(2)),
    "gemma3_text": Family(
        {**without(GEMMA, "attn_logit_softcapping"), "vocab_size": 262208, "max_position_embeddings": 131072,
         "rope_theta": 1000000.0, "final_logit_softcapping": None, "rope_local_base_freq": 10000.0,
         "sliding_window_pattern": 6},
        "Gemma 3", model=GEMMA_MODEL, attention={"qk_norm": "head"}, kinds=sliding_but_every(6),
        ignored=frozenset({"hidden_act", "attn_logit_softcapping"}),
    ),
    "vaultgemma": Family(
        GEMMA, "VaultGemma", model={"norm_offset": 1.0, "scaled_embedding": True}, kinds=sliding_but_every(2),
        names=((r"\.pre_feedforward_layernorm\.", ".post_attention_layernorm."),),
    ),
    "phi": Family(
        {**without(PLAIN, "rms_norm_eps"), "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192,
         "num_hidden_layers": 24, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5,
         "qk_layernorm": False},
        "Phi 1.5, Phi 2", model={**_LAYER_NORM, "norm_placement": "parallel", "head_bias": True},
        attention={"qkv_bias": True, "output_bias": True}, mlp={"gated": False, "bias": True},
        names=(*_FC_NAMES, (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
               (r"^model\.final_layernorm\.", "model.norm.")),
    ),
    "phi3": Family(
        {**PLAIN, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
         "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096,
         "sliding_window": None, "partial_rotary_factor": 1.0},
        "Phi 3.5, Phi 4",
    ),
    "smollm3": Family(
        {**LLAMA, "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
         "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
         "rope_theta": 2000000.0, "use_sliding_window": False, "sliding_window": None, "no_rope_layers": None,
         "no_rope_layer_interval": 4, "layer_types": None},
        "SmolLM3", kinds=where_not_rotated,
    ),
    "olmo": Family(
        {**without(LLAMA, "rms_norm_eps", "mlp_bias"), "vocab_size": 50304, "clip_qkv": None, "layer_norm_eps": 1e-5},
        "OLMo", model={"norm": "layer", "norm_weight": False},
    ),
    "olmo2": Family({**without(LLAMA, "mlp_bias"), "vocab_size": 50304, "rms_norm_eps": 1e-5}, "OLMo 2",
                    model={"norm_placement": "post"}, attention={"qk_norm": "projection"}),
    "olmo3": Family(
        {**without(LLAMA, "mlp_bias"), "vocab_size": 50304, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
         "sliding_window": 4096, "layer_types": None, "rope_local_base_freq": None},
        "OLMo 3", model={"norm_placement": "post"}, attention={"qk_norm": "projection"}, kinds=sliding_but_every(4),
    ),
    "granite": Family(
        {**LLAMA, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
         "attention_multiplier": 1.0},
        "Granite 3.x",
    ),
    "seed_oss": Family({**LLAMA, "vocab_size": 155136, "intermediate_size": 27648, "num_hidden_layers": 64,
                        "num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128,
                        "max_position_embeddings": 524288, "attention_bias": True, "attention_out_bias": False},
                       "Seed-OSS"),
    "exaone4": Family(
        {**PLAIN, "vocab_size": 102400, "intermediate_size": 16384, "rms_norm_eps": 1e-5, "sliding_window": 4096,
         "sliding_window_pattern": 4, "layer_types": None},
        "EXAONE 4", model={"norm_placement": "post"}, attention={"qk_norm": "head"}, kinds=sliding_but_every(4),
        rotates=("sliding_attention",),
    ),
    "hunyuan_v1_dense": Family(
        {**without(LLAMA, "mlp_bias"), "vocab_size": 290943, "rms_norm_eps": 1e-5},
        "Hunyuan dense", attention={"qk_norm": "head", "norm_after_rope": True},
        names=((r"\.query_layernorm\.", ".q_norm."), (r"\.key_layernorm\.", ".k_norm.")),
    ),
    "ernie4_5": Family(
        {**PLAIN, "vocab_size": 103424, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18,
         "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072,
         "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "use_bias": False, "tie_word_embeddings": True},
        "ERNIE 4.5 0.3B", interleaved=True,
    ),
    "arcee": Family({**LLAMA, "hidden_size": 2560, "intermediate_size": 18432, "hidden_act": "relu2",
                     "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}, "Arcee AFM", mlp={"gated": False}),
    "nemotron": Family(
        {**without(LLAMA, "rms_norm_eps"), "vocab_size": 256000, "hidden_size": 6144, "intermediate_size": 24576,
         "num_attention_heads": 48, "max_position_embeddings": 4096, "norm_eps": 1e-5, "hidden_act": "relu2",
         "partial_rotary_factor": 0.5},
        "Nemotron-4, Minitron", model={**_LAYER_NORM, "norm_offset": 1.0}, mlp={"gated": False},
    ),
    "apertus": Family(
        {**without(LLAMA, "mlp_bias"), "vocab_size": 131072, "intermediate_size": 14336,
         "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "hidden_act": "xielu", "rope_theta": 12000000.0,
         "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192}},
        "Apertus", attention={"qk_norm": "head"}, mlp={"gated": False},
        names=((r"\.attention_layernorm\.", ".input_layernorm."),
               (r"\.feedforward_layernorm\.", ".post_attention_layernorm.")),
    ),
    "helium": Family(
        {**LLAMA, "vocab_size": 48000, "hidden_size": 2560, "intermediate_size": 7040, "num_hidden_layers": 24,
         "num_attention_heads": 20, "num_key_value_heads": 20, "head_dim": 128, "max_position_embeddings": 4096,
         "rms_norm_eps": 1e-8, "rope_theta": 100000.0},
        "Helium", attention={"output_bias": False}, interleaved=True,
    ),
    "nanochat": Family(
        {**without(LLAMA, "mlp_bias"), "vocab_size": 50304, "hidden_size": 768, "intermediate_size": 8192,
         "num_hidden_layers": 12, "num_attention_heads": 6, "num_key_value_heads": 6, "hidden_act": "relu2",
         "final_logit_softcapping": 15.0},
        "nanochat", model={"norm_weight": False, "embedding_norm": True, "reversed_rope": True},
        attention={"qk_norm": "plain", "norm_after_rope": True}, mlp={"gated": False}, names=_FC_NAMES,
    ),
    "glm": Family(
        {**without(LLAMA, "mlp_bias"), "vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40,
         "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07,
         "attention_bias": True, "partial_rotary_factor": 0.5},
        "GLM-4 9B", attention={"output_bias": False}, interleaved=True,
    ),
    "glm4": Family(
        {**without(LLAMA, "mlp_bias"), "vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40,
         "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07,
         "attention_bias": True, "partial_rotary_factor": 0.5},
        "GLM-4-0414", model={"norm_placement": "sandwich"}, attention={"output_bias": False}, interleaved=True,
        names=((r"\.post_attention_layernorm\.", ".pre_feedforward_layernorm."),
               (r"\.post_self_attn_layernorm\.", ".post_attention_layernorm."),
               (r"\.post_mlp_layernorm\.", ".post_feedforward_layernorm.")),
    ),
    "glm4v_text": Family(
        {**without(LLAMA, "mlp_bias"), "vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40,
         "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
         "attention_bias": True, "partial_rotary_factor": 1.0},
        "GLM-4.1V (text)", model={"norm_placement": "sandwich"}, interleaved=True,
        attention={"qkv_bias": True, "output_bias": False},
        names=((r"\.post_attention_layernorm\.", ".pre_feedforward_layernorm."),
               (r"\.post_self_attn_layernorm\.", ".post_attention_layernorm."),
               (r"\.post_mlp_layernorm\.", ".post_feedforward_layernorm.")),
    ),
    "cohere": Family(
        {**_COHERE, "use_qk_norm": False, "rope_theta": 500000.0}, "Command R",
        model={"norm": "layer", "norm_placement": "parallel"}, attention={"qk_norm": "heads"}, interleaved=True,
    ),
    "cohere2": Family(
        {**_COHERE, "sliding_window": 4096, "layer_types": None, "head_dim": None}, "Command R7B, Command A",
        model={"norm": "layer", "norm_placement": "parallel"}, interleaved=True, kinds=sliding_but_every(4),
        rotates=("sliding_attention",),
    ),
    "stablelm": Family(
        {**without(PLAIN, "rms_norm_eps"), "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912,
         "num_key_value_heads": 32, "max_position_embeddings": 4096, "layer_norm_eps": 1e-5,
         "partial_rotary_factor": 0.25, "use_qkv_bias": False, "qk_layernorm": False,
         "use_parallel_residual": False},
        "StableLM 2", model=_LAYER_NORM,
    ),
    "starcoder2": Family(
        {**without(PLAIN, "rms_norm_eps"), "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288,
         "num_hidden_layers": 30, "num_attention_heads": 24, "num_key_value_heads": 2,
         "max_position_embeddings": 4096, "norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh",
         "sliding_window": None, "use_bias": True, "tie_word_embeddings": True},
        "StarCoder2", model=_LAYER_NORM, mlp={"gated": False}, names=_FC_NAMES,
    ),
    "gpt_neox": Family(
        {**without(PLAIN, "rms_norm_eps"), "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576,
         "num_hidden_layers": 44, "num_attention_heads": 64, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
         "attention_bias": True, "partial_rotary_factor": 0.25, "use_parallel_residual": True},
        "Pythia, GPT-NeoX", model={**_LAYER_NORM, "norm_placement": "parallel2"},
        mlp={"gated": False, "bias": True}, names=_NEOX_NAMES,
        ignored=frozenset({"num_key_value_heads", "head_dim", "classifier_dropout"}),
        aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    ),
}  # fmt: skip
