"""What the tensors of a checkpoint are called: Hugging Face's Llama names are what all others map to."""

from __future__ import annotations

import re

from tempo_mlx.architecture.architecture import Architecture

# Not weights of the language model: buffers of older transformers versions, and a vision tower.
IGNORED = re.compile(
    r".*\.rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector|vision_model)\..*|"
    r"rope_freqs\.weight|rope_factors_(long|short)\.weight"
)


def from_huggingface(name: str) -> str:
    """The name without the prefixes that multimodal checkpoints put before their language model."""
    for prefix in ("language_model.", "model.language_model."):
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            return rest if rest.startswith(("model.", "lm_head.")) else f"model.{rest}"
    return name


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor the model needs, by name, and its shape."""
    a = architecture
    heads, kv_heads = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (heads, a.hidden_size),
        "self_attn.k_proj.weight": (kv_heads, a.hidden_size),
        "self_attn.v_proj.weight": (kv_heads, a.hidden_size),
        "self_attn.o_proj.weight": (a.hidden_size, heads),
        "mlp.gate_proj.weight": (a.intermediate_size, a.hidden_size),
        "mlp.up_proj.weight": (a.intermediate_size, a.hidden_size),
        "mlp.down_proj.weight": (a.hidden_size, a.intermediate_size),
    }
    norms = {
        "pre": ("input_layernorm", "post_attention_layernorm"),
        "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "sandwich": ("input_layernorm", "post_attention_layernorm",
                     "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    }[a.norm_placement]  # fmt: skip
    layer |= {f"{norm}.weight": (a.hidden_size,) for norm in norms}
    if a.qk_norm is not None:
        per_head = a.qk_norm == "head"
        layer["self_attn.q_norm.weight"] = (a.head_dim if per_head else heads,)
        layer["self_attn.k_norm.weight"] = (a.head_dim if per_head else kv_heads,)
    biased = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] if a.qkv_bias else []
    biased += ["self_attn.o_proj"] if a.output_bias else []
    biased += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if a.mlp_bias else []
    layer |= {f"{part}.bias": layer[f"{part}.weight"][:1] for part in biased}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    for index in range(a.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{part}": shape for part, shape in layer.items()}
    shapes["model.norm.weight"] = (a.hidden_size,)
    if not a.tie_word_embeddings:
        shapes["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    return shapes


def fused_parts(name: str, architecture: Architecture) -> dict[str, slice] | None:
    """Where Phi-3's fused projections keep what others store apart: part name -> rows. None: not fused."""
    a = architecture
    heads, kv_heads = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    if ".self_attn.qkv_proj." in name:
        sizes = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        fused = "qkv_proj"
    elif ".mlp.gate_up_proj." in name:
        sizes = {"gate_proj": a.intermediate_size, "up_proj": a.intermediate_size}
        fused = "gate_up_proj"
    else:
        return None
    parts, start = {}, 0
    for part, size in sizes.items():
        parts[name.replace(fused, part)] = slice(start, start + size)
        start += size
    return parts
