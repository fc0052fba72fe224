"""What the tensors of a checkpoint are called, and where fused ones keep what others store apart.

Every family's names map to one set: those of Hugging Face's Llama, `experts.*` (stacked, one expert after another)
and `router.*` for a mixture, `linear_attn.*`, `conv.*` and `mamba.*` for what is recurrent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.architecture.architecture import (
    Architecture,
    Attention,
    DeltaNet,
    Experts,
    Layer,
    Mamba2,
    Mlp,
    Recurrent,
    ShortConv,
)
from tempo_mlx.architecture.families import FAMILIES

# Not weights of the language model: buffers of older transformers versions, what sees and hears, and the heads that
# guess more than one token ahead.
IGNORED = re.compile(
    r".*\.rotary_emb\.inv_freq|blk\.\d+\.nextn\..*|rope_freqs\.weight|rope_factors_(long|short)\.weight|mtp\..*|model\.mtp\..*|"
    r"(model\.)?(vision_tower|multi_modal_projector|vision_model|visual|audio_tower|embed_vision|embed_audio|"
    r"audio_model|vision_encoder|patch_merger|pre_mm_projector_norm)\..*|.*\.attention\.(bias|masked_bias)|"
    r".*\.act_fn\.(beta|eps)"
)
_PREFIXES = ("language_model.", "model.language_model.")
# Of mixtures, the same in all families.
_EXPERT_NAMES = (
    (r"\.(block_sparse_moe|feed_forward|mlp|mixer)\.experts\.", ".experts."),
    (r"\.(block_sparse_moe|feed_forward|mlp|mixer)\.switch_mlp\.", ".experts."),
    (r"\.experts\.switch_glu\.", ".experts."),
    (r"\.experts\.fc1\.", ".experts.up_proj."),
    (r"\.experts\.fc2\.", ".experts.down_proj."),
    (r"\.experts\.(\d+\.)?w1\b", r".experts.\1gate_proj"),
    (r"\.experts\.(\d+\.)?w2\b", r".experts.\1down_proj"),
    (r"\.experts\.(\d+\.)?w3\b", r".experts.\1up_proj"),
    (r"\.(block_sparse_moe|feed_forward|mlp|mixer)\.(gate|router)\.(weight|bias)$", r".router.\3"),
    (r"\.(block_sparse_moe|mlp|mixer)\.(gate|moe_statics)\.e_score_correction_bias$", ".router.correction"),
    (r"\.feed_forward\.expert_bias$", ".router.correction"),
    (r"\.(mlp|mixer|feed_forward|block_sparse_moe)\.shared_experts?\.", ".mlp."),
    (r"\.mlp\.shared_expert_gate\.", ".mlp.row_gate."),
)
_PATTERNS = {pattern: re.compile(pattern) for pattern, _ in _EXPERT_NAMES} | {
    pattern: re.compile(pattern) for family in FAMILIES.values() for pattern, _ in family.names
}
_GUESSING_AHEAD = (
    "deepseek_v3",
    "glm4_moe",
    "glm4_moe_lite",
)  # one more layer, which guesses the token after the next
_STACKED = re.compile(r"(.*\.experts)\.(\d{1,5})\.(\w+\.\w+)")


def from_huggingface(name: str) -> str:
    """The name without the prefixes that multimodal checkpoints put before their language model."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            return rest if rest.startswith(("model.", "lm_head.", "backbone.")) else f"model.{rest}"
    return name


def own_name(name: str, a: Architecture) -> str | None:
    """Our name of a tensor that its family calls `name`; None: the model does without it."""
    for pattern, ours in (*FAMILIES[a.family].names, *_EXPERT_NAMES):
        name = _PATTERNS[pattern].sub(ours, name)
    match = re.match(r"model\.layers\.(\d+)\.(self_attn|norm)\.?(.*)", name)
    if match is not None and int(match[1]) < len(a.layers):
        layer, part = a.layers[int(match[1])], match[3]
        shares = layer.attention is not None and layer.attention.kv_from is not None
        if shares and part.startswith(("k_proj", "v_proj", "k_norm", "v_norm")):
            return None
        if match[2] == "norm":  # Nemotron-H: one norm a layer, whatever it is
            place = "input" if layer.mlp is None and layer.experts is None else "post_attention"
            return f"model.layers.{match[1]}.{place}_layernorm.{part}"
    elif a.family in _GUESSING_AHEAD and name.startswith(f"model.layers.{len(a.layers)}."):
        return None
    return name


def of_expert(name: str) -> tuple[str, int] | None:
    """The stacked tensor that a single expert's is a part of, and its place there."""
    match = _STACKED.fullmatch(name)
    return None if match is None else (f"{match[1]}.{match[3]}", int(match[2]))


# Shapes


def expected_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor the model needs, by name, and its shape."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    if a.per_layer_input:
        width = a.per_layer_input * len(a.layers)
        shapes["model.embed_tokens_per_layer.weight"] = (a.per_layer_vocabulary, width)
        shapes["model.per_layer_model_projection.weight"] = (width, a.hidden_size)
        shapes["model.per_layer_projection_norm.weight"] = (a.per_layer_input,)
    if a.altup is not None:
        for index in range(a.altup.inputs - 1):
            for name in ("altup_projections", "altup_unembed_projections"):
                shapes[f"model.{name}.{index}.weight"] = (a.hidden_size, a.hidden_size)
    for index, layer in enumerate(a.layers):
        parts = dict(_layer_shapes(a, layer))
        shapes |= {f"model.layers.{index}.{part}": shape for part, shape in parts.items()}
    shapes |= _norm_shapes(a, "model.norm")
    if not a.tie_word_embeddings:
        shapes["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    if a.head_bias:
        shapes["lm_head.bias"] = (a.vocab_size,)
    return shapes


def norm_names(a: Architecture, layer: Layer) -> dict[str, str]:
    """Which norms a layer has: before and after what they stand -> name."""
    if a.norm_placement in ("parallel", "parallel2"):
        second = {} if a.norm_placement == "parallel" else {"before_mlp": "post_attention_layernorm"}
        return {"before_attention": "input_layernorm", **second}
    names = {
        "pre": {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"},
        "post": {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"},
        "sandwich": {
            "before_attention": "input_layernorm", "after_attention": "post_attention_layernorm",
            "before_mlp": "pre_feedforward_layernorm", "after_mlp": "post_feedforward_layernorm",
        },
    }[a.norm_placement]  # fmt: skip
    mixes = layer.attention is not None or layer.recurrent is not None
    feeds = layer.mlp is not None or layer.experts is not None
    return {place: name for place, name in names.items() if (feeds if place.endswith("mlp") else mixes)}


def _norm_shapes(a: Architecture, name: str) -> dict[str, tuple[int, ...]]:
    kinds = {"weight": a.norm_weight, "bias": a.norm_bias}
    return {f"{name}.{kind}": (a.hidden_size,) for kind, there in kinds.items() if there}


def _layer_shapes(a: Architecture, layer: Layer) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in norm_names(a, layer).values():
        yield from _norm_shapes(a, name).items()
    if layer.attention is not None:
        yield from _attention_shapes(a, layer.attention)
    if layer.recurrent is not None:
        yield from _recurrent_shapes(a, layer.recurrent)
    if layer.mlp is not None:
        yield from _mlp_shapes(a, layer.mlp)
    if layer.experts is not None:
        yield from _experts_shapes(a, layer.experts)
    if a.layer_scalar:
        yield "layer_scalar", (1,)
    if a.per_layer_input:
        yield "per_layer_input_gate.weight", (a.per_layer_input, a.hidden_size)
        yield "per_layer_projection.weight", (a.hidden_size, a.per_layer_input)
        yield "post_per_layer_input_norm.weight", (a.hidden_size,)
    if a.altup is not None:
        yield from _altup_shapes(a)


def _altup_shapes(a: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    assert a.altup is not None
    inputs, rank = a.altup.inputs, a.altup.laurel_rank
    yield "altup.correct_output_scale", (a.hidden_size,)
    yield "altup.correction_coefs.weight", (inputs, inputs)
    yield "altup.prediction_coefs.weight", (inputs * inputs, inputs)
    yield "altup.modality_router.weight", (inputs, a.hidden_size)
    yield "altup.router_norm.weight", (a.hidden_size,)
    yield "laurel.linear_left.weight", (rank, a.hidden_size)
    yield "laurel.linear_right.weight", (a.hidden_size, rank)
    yield "laurel.post_laurel_norm.weight", (a.hidden_size,)


def _attention_shapes(a: Architecture, part: Attention) -> Iterator[tuple[str, tuple[int, ...]]]:
    if part.latent is not None:
        yield from _latent_shapes(a, part)
        return
    heads, groups = part.num_attention_heads, part.num_key_value_heads
    wide, narrow = heads * part.head_dim, groups * part.head_dim
    linears = {"q_proj": (wide * (2 if part.gated else 1), part.qkv_bias)}
    if part.kv_from is None:
        linears["k_proj"] = (narrow, part.qkv_bias)
        if not part.keys_are_values:
            linears["v_proj"] = (narrow, part.qkv_bias)
    for name, (rows, bias) in linears.items():
        yield f"self_attn.{name}.weight", (rows, a.hidden_size)
        if bias:
            yield f"self_attn.{name}.bias", (rows,)
    yield "self_attn.o_proj.weight", (a.hidden_size, wide)
    if part.output_bias:
        yield "self_attn.o_proj.bias", (a.hidden_size,)
    if part.sinks:
        yield "self_attn.sinks", (heads,)
    if part.qk_norm in ("head", "heads", "projection"):
        sizes = {"head": (part.head_dim,) * 2, "projection": (wide, narrow)}
        query, key = sizes.get(part.qk_norm, (0, 0))
        yield "self_attn.q_norm.weight", (heads, part.head_dim) if part.qk_norm == "heads" else (query,)
        if part.kv_from is None:
            yield "self_attn.k_norm.weight", (groups, part.head_dim) if part.qk_norm == "heads" else (key,)


def _latent_shapes(a: Architecture, part: Attention) -> Iterator[tuple[str, tuple[int, ...]]]:
    latent, heads = part.latent, part.num_attention_heads
    assert latent is not None
    rows = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
    if latent.q_lora_rank is None:
        yield "self_attn.q_proj.weight", (rows, a.hidden_size)
    else:
        yield "self_attn.q_a_proj.weight", (latent.q_lora_rank, a.hidden_size)
        yield "self_attn.q_a_layernorm.weight", (latent.q_lora_rank,)
        yield "self_attn.q_b_proj.weight", (rows, latent.q_lora_rank)
    width = latent.kv_lora_rank + latent.qk_rope_head_dim
    yield "self_attn.kv_a_proj_with_mqa.weight", (width, a.hidden_size)
    yield "self_attn.kv_a_layernorm.weight", (latent.kv_lora_rank,)
    both = heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    yield "self_attn.kv_b_proj.weight", (both, latent.kv_lora_rank)
    yield "self_attn.o_proj.weight", (a.hidden_size, heads * latent.v_head_dim)
    if part.output_bias:
        yield "self_attn.o_proj.bias", (a.hidden_size,)
    if part.qkv_bias:
        yield "self_attn.kv_a_proj_with_mqa.bias", (width,)
        if latent.q_lora_rank is not None:
            yield "self_attn.q_a_proj.bias", (latent.q_lora_rank,)


def _mlp_shapes(a: Architecture, part: Mlp) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, size = part.intermediate_size, a.hidden_size
    linears = {"gate_proj": (width, size)} if part.gated else {}
    for name, shape in {**linears, "up_proj": (width, size), "down_proj": (size, width)}.items():
        yield f"mlp.{name}.weight", shape
        if part.bias:
            yield f"mlp.{name}.bias", shape[:1]
    if part.row_gate:
        yield "mlp.row_gate.weight", (1, size)
    if part.hidden_act == "xielu":
        yield "mlp.act_fn.alpha_p", (1,)
        yield "mlp.act_fn.alpha_n", (1,)


def _experts_shapes(a: Architecture, part: Experts) -> Iterator[tuple[str, tuple[int, ...]]]:
    count, width, size = part.count, part.intermediate_size, a.hidden_size
    linears = {"gate_proj": (width, size)} if part.gated else {}
    for name, shape in {**linears, "up_proj": (width, size), "down_proj": (size, width)}.items():
        yield f"experts.{name}.weight", (count, *shape)
        if part.bias:
            yield f"experts.{name}.bias", (count, shape[0])
    yield "router.weight", (count, size)
    if part.bias:
        yield "router.bias", (count,)
    if part.correction:
        yield "router.correction", (count,)
    if part.own_norm:
        yield "router.scale", (size,)
        yield "router.per_expert_scale", (count,)
        for name in (
            "pre_feedforward_layernorm_2",
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
        ):
            yield f"{name}.weight", (size,)


def _recurrent_shapes(a: Architecture, part: Recurrent) -> Iterator[tuple[str, tuple[int, ...]]]:
    size = a.hidden_size
    if isinstance(part, ShortConv):
        for name, shape in (("in_proj", (3 * size, size)), ("out_proj", (size, size))):
            yield f"conv.{name}.weight", shape
            if part.bias:
                yield f"conv.{name}.bias", shape[:1]
        yield "conv.conv.weight", (size, 1, part.kernel)
        if part.bias:
            yield "conv.conv.bias", (size,)
    elif isinstance(part, DeltaNet):
        values = part.value_heads * part.value_dim
        rows = {"qkv": part.channels, "z": values, "b": part.value_heads, "a": part.value_heads}
        for name, count in rows.items():
            yield f"linear_attn.in_proj_{name}.weight", (count, size)
        yield "linear_attn.conv1d.weight", (part.channels, 1, part.kernel)
        yield "linear_attn.A_log", (part.value_heads,)
        yield "linear_attn.dt_bias", (part.value_heads,)
        yield "linear_attn.norm.weight", (part.value_dim,)
        yield "linear_attn.out_proj.weight", (size, values)
    else:
        yield from _mamba_shapes(size, part)


def _mamba_shapes(size: int, part: Mamba2) -> Iterator[tuple[str, tuple[int, ...]]]:
    rows = part.inner + part.channels + part.heads
    for name, shape in (("in_proj", (rows, size)), ("out_proj", (size, part.inner))):
        yield f"mamba.{name}.weight", shape
        if part.bias:
            yield f"mamba.{name}.bias", shape[:1]
    yield "mamba.conv1d.weight", (part.channels, 1, part.kernel)
    if part.conv_bias:
        yield "mamba.conv1d.bias", (part.channels,)
    for name in ("A_log", "D", "dt_bias"):
        yield f"mamba.{name}", (part.heads,)
    if part.norm is not None:
        yield "mamba.norm.weight", (part.inner,)


# Fused tensors


@dataclass(frozen=True)
class Part:
    """What a fused tensor holds of another: these indices of `axis`, and then the last two axes exchanged."""

    index: slice | NDArray[np.intp]
    axis: int = 0
    transposed: bool = False


def fused_parts(name: str, shape: tuple[int, ...], a: Architecture) -> dict[str, Part] | None:
    """Where a fused tensor keeps what others store apart: name -> part. None: it is not fused."""
    stack = re.fullmatch(r"model\.(altup_(?:un)?(?:embed_)?projections)\.weight", name)
    if stack is not None:  # llama.cpp keeps Gemma 3n's as one
        return {
            f"model.{stack[1]}.{index}.weight": Part(slice(index, index + 1)) for index in range(shape[0])
        }
    match = re.match(r"model\.layers\.(\d+)\.", name)
    if match is None or int(match[1]) >= len(a.layers):
        return None
    layer = a.layers[int(match[1])]
    if layer.experts is not None and ".experts." in name:
        return _expert_parts(name, shape, layer.experts)
    if ".self_attn.qkv_proj." in name and layer.attention is not None:
        return _qkv_parts(name, layer.attention, a)
    if ".mlp.gate_up_proj." in name and layer.mlp is not None:
        width = layer.mlp.intermediate_size
        return _sections(name, "gate_up_proj", {"gate_proj": width, "up_proj": width})
    if isinstance(layer.recurrent, DeltaNet) and (".in_proj_qkvz." in name or ".in_proj_ba." in name):
        return _delta_parts(name, layer.recurrent)
    return None


def _sections(name: str, fused: str, sizes: dict[str, int], axis: int = 0) -> dict[str, Part]:
    parts, start = {}, 0
    for part, size in sizes.items():
        parts[name.replace(fused, part)] = Part(slice(start, start + size), axis)
        start += size
    return parts


def _qkv_parts(name: str, part: Attention, a: Architecture) -> dict[str, Part]:
    wide, narrow = (n * part.head_dim for n in (part.num_attention_heads, part.num_key_value_heads))
    if a.family == "gpt_neox":  # query, key and value of each head together
        rows = np.arange(3 * wide).reshape(part.num_attention_heads, 3, part.head_dim)
        return {
            name.replace("qkv_proj", f"{letter}_proj"): Part(rows[:, place].reshape(-1))
            for place, letter in enumerate("qkv")
        }
    return _sections(name, "qkv_proj", {"q_proj": wide, "k_proj": narrow, "v_proj": narrow})


def _expert_parts(name: str, shape: tuple[int, ...], part: Experts) -> dict[str, Part] | None:
    """Stacked gates and inputs in one tensor (n, 2 F, E); Llama 4's and Gpt-oss's are (n, E, 2 F), the latter's with
    gates and inputs in turn. Those that are packed (NAME.weight) have their inputs last in every family."""
    width = part.intermediate_size
    stored_across = part.stored in ("across", "turns") and not name.endswith(".weight")
    if name.endswith(".down_proj"):
        return {f"{name}.weight": Part(slice(None), 1, stored_across)}
    if name.endswith(".down_proj_bias"):
        return {name.replace("_bias", ".bias"): Part(slice(None), 1)}
    stem = re.sub(r"gate_up_proj(\.weight|_bias)?$", "", name)
    if stem == name or len(shape) < 2:
        return None
    gates: slice | NDArray[np.intp] = slice(0, width)
    inputs: slice | NDArray[np.intp] = slice(width, 2 * width)
    if part.stored == "turns":
        gates, inputs = slice(0, 2 * width, 2), slice(1, 2 * width, 2)
    if name.endswith("_bias"):
        return {f"{stem}gate_proj.bias": Part(gates, 1), f"{stem}up_proj.bias": Part(inputs, 1)}
    axis = 2 if stored_across else 1
    return {
        f"{stem}gate_proj.weight": Part(gates, axis, stored_across),
        f"{stem}up_proj.weight": Part(inputs, axis, stored_across),
    }


def _delta_parts(name: str, part: DeltaNet) -> dict[str, Part]:
    """Qwen3-Next keeps what belongs to a key head together: query, key, values, z; and b, a."""
    share = part.value_heads // part.key_heads
    keys, values = part.key_dim, share * part.value_dim
    if ".in_proj_ba." in name:
        rows = np.arange(2 * part.value_heads).reshape(part.key_heads, 2, share)
        return {
            name.replace("in_proj_ba", f"in_proj_{letter}"): Part(rows[:, place].reshape(-1))
            for place, letter in enumerate("ba")
        }
    mine = np.arange(part.key_heads * 2 * (keys + values)).reshape(part.key_heads, -1)
    query, key, value, z = np.split(mine, [keys, 2 * keys, 2 * keys + values], axis=1)
    mixed = np.concatenate([query.reshape(-1), key.reshape(-1), value.reshape(-1)])
    return {
        name.replace("in_proj_qkvz", "in_proj_qkv"): Part(mixed),
        name.replace("in_proj_qkvz", "in_proj_z"): Part(z.reshape(-1)),
    }
