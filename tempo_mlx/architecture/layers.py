"""From a config's values to the layers of a model: attention, recurrent part, MLP and experts of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tempo_mlx.architecture.architecture import (
    Activation,
    Attention,
    Experts,
    Latent,
    Layer,
    Mlp,
    QueryScaling,
    Recurrent,
    Rope,
)
from tempo_mlx.architecture.config import Config
from tempo_mlx.architecture.rope_scaling import build_rope, yarn_attention_scale

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2", "xielu": "xielu",
}  # fmt: skip
_KINDS = {
    "mamba": "linear_attention",
    "conv": "linear_attention",
    "attention": "full_attention",
}  # other names
_ALLOWED = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
    "mlp",
    "moe",
    *_KINDS,
)


@dataclass(frozen=True)
class Family:
    """One row of the table: what models of a `model_type` have in common.

    defaults: what a config.json of the family leaves out, which are all the keys its forward pass reads. example:
    models people know. model, attention, mlp, experts: fields of Architecture, Attention, Mlp and Experts that every
    model of the family has. names: tensor names as patterns, and ours for them. aliases: older names of keys.
    ignored: keys that the family's config has and its forward does not use. kinds: of the layers, where layer_types
    does not say: a function of their number and the config. rotates: the kinds of attention that have positions.
    """

    defaults: Mapping[str, Any]
    example: str
    model: Mapping[str, Any] = field(default_factory=dict)
    attention: Mapping[str, Any] = field(default_factory=dict)
    mlp: Mapping[str, Any] = field(default_factory=dict)
    experts: Mapping[str, Any] | None = None
    names: tuple[tuple[str, str], ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    kinds: Callable[[Config, int], list[str]] | None = None
    rotates: tuple[str, ...] = ("full_attention", "sliding_attention", "chunked_attention")
    interleaved: bool = False
    recurrent: Callable[[Config], Recurrent] | None = None


def read_layers(values: Config, family: Family, name: str) -> tuple[tuple[Layer, ...], tuple[Rope, ...]]:
    """All layers, and the rotary embeddings that their attention refers to."""
    kinds = layer_kinds(values, family)
    ropes: list[Rope] = []
    places: dict[tuple[str, int], int] = {}
    layers: list[Layer] = []
    rotary = rotary_layers(values, len(kinds))
    for index, kind in enumerate(kinds):
        attention = None
        if kind in ("full_attention", "sliding_attention", "chunked_attention") or "mamba_d_ssm" in values:
            attention = _attention(values, family, index, kinds, layers)
            head_dim = attention.latent.qk_rope_head_dim if attention.latent else attention.head_dim
            rotates = kind in family.rotates or (
                "sliding_window" in values and not values.stated("sliding_window")
            )
            if family.rotates and rotates and rotary[index] and _has_positions(values):
                if (kind, head_dim) not in places:
                    rope = _rope(values, family, kind, head_dim, name)
                    if rope not in ropes:
                        ropes.append(rope)
                    places[kind, head_dim] = ropes.index(rope)
                attention = replace(attention, rope=places[kind, head_dim])
            else:
                attention = replace(attention, rope=None, qk_norm=_norm_without_positions(attention))
        recurrent = None
        if family.recurrent is not None and (kind == "linear_attention" or "mamba_d_ssm" in values):
            recurrent = family.recurrent(values)
        mlp, experts = _feed_forward(values, family, index, kind)
        layers.append(Layer(attention, recurrent, mlp, experts))
    return tuple(layers), tuple(ropes)


def layer_kinds(values: Config, family: Family) -> list[str]:
    """What each layer is: full_attention, sliding_attention, chunked_attention, linear_attention, mlp or moe."""
    count = number_of_layers(values)
    stated = values.choices("layer_types", count, _ALLOWED) if "layer_types" in values else None
    if stated is None:
        if family.kinds is not None:
            stated = family.kinds(values, count)
        else:  # Mistral, Phi-3: the window, if there is one, is everybody's
            windowed = "layer_types" not in values and values.values.get("sliding_window")
            stated = ["sliding_attention" if windowed else "full_attention"] * count
    kinds = [_KINDS.get(kind, kind) for kind in stated]
    if not values.flag("use_sliding_window", True):
        kinds = ["full_attention" if kind == "sliding_attention" else kind for kind in kinds]
    return kinds


def _norm_without_positions(attention: Attention) -> Any:
    """Llama 4 norms only what it rotates."""
    return None if attention.qk_norm == "plain" and attention.norm_after_rope else attention.qk_norm


def _has_positions(values: Config) -> bool:
    return "position_embedding_type" not in values or values.values["position_embedding_type"] == "rope"


def number_of_layers(values: Config) -> int:
    """Nemotron-H need not say how many layers it lists."""
    blocks = values.values.get("layers_block_type")
    return (
        len(blocks) if isinstance(blocks, list) and blocks else values.integer("num_hidden_layers", most=1024)
    )


def rotary_layers(values: Config, count: int) -> list[bool]:
    if "no_rope_layers" not in values:
        return [True] * count
    stated = values.choices("no_rope_layers", count, (0, 1)) if values.values["no_rope_layers"] else None
    if stated is not None:  # 1 means: rotates
        return [bool(each) for each in stated]
    every = values.integer("no_rope_layer_interval")
    return [(index + 1) % every != 0 for index in range(count)]


# Rotary embedding


def rope_parameters(values: Config, kind: str) -> dict[str, Any]:
    """Rope settings of one kind of layer, from the old keys (rope_theta, rope_scaling) or transformers 5's
    rope_parameters, which may have a table for each kind."""
    stated = values.table("rope_parameters") or {}
    nested = {key: each for key, each in stated.items() if key in _ALLOWED and each is not None}
    if any(not isinstance(each, dict) for each in nested.values()):
        raise values.fail("rope_parameters", "a table of rope settings")
    local = kind == "sliding_attention" and "rope_local_base_freq" in values
    if nested and "rope_local_base_freq" not in values:
        raise values.fail("rope_parameters", "one table for all layers (this family has one kind of rope)")
    common = {"rope_theta": values.number("rope_local_base_freq" if local and values.stated("rope_local_base_freq")
                                          else "rope_theta")}  # fmt: skip
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):
        if key in values and not local:
            common[key] = values.values[key]
    scaling = {} if local else values.table("rope_scaling") or {}
    found = {**common, **(nested.get(kind, {}) if nested else {} if local else stated), **scaling}
    if "original_max_position_embeddings" in values and not local:  # Phi-3: the config's own field wins
        found["original_max_position_embeddings"] = values.values["original_max_position_embeddings"]
    if "partial_rotary_factor" not in values:
        found.pop("partial_rotary_factor", None)  # of no effect in families that do not read it
    return found


def _rope(values: Config, family: Family, kind: str, head_dim: int, name: str) -> Rope:
    limit = values.integer("max_position_embeddings")
    rope = build_rope(rope_parameters(values, kind), head_dim, limit, name)
    if family.model.get("reversed_rope"):
        rope = replace(rope, inverse_frequencies=tuple(-each for each in rope.inverse_frequencies))
    interleaved = values.flag("rope_interleave", family.interleaved)
    return replace(rope, interleaved=True) if interleaved else rope


# Attention


def _attention(
    values: Config, family: Family, index: int, kinds: list[str], earlier: list[Layer]
) -> Attention:
    kind = kinds[index]
    heads = values.integer("num_attention_heads")
    own = _own_sizes(values, index, kind)
    head_dim = (
        own.get("head_dim") or values.optional_integer("head_dim") or values.integer("hidden_size") // heads
    )
    groups = own.get("num_key_value_heads") or values.optional_integer("num_key_value_heads") or heads
    window = values.optional_integer("sliding_window") if kind == "sliding_attention" else None
    bias = values.flag("attention_bias") if "attention_bias" in values else values.flag("use_bias")
    fields: dict[str, Any] = {
        "scale": _attention_scale(values, head_dim),
        "softcap": values.optional_number("attn_logit_softcapping"),
        "qkv_bias": bias,
        "output_bias": bias,
        "clip_qkv": values.optional_number("clip_qkv"),
        "query_scaling": _query_scaling(values, kind, index),
        "sliding_window": window,
        "attention_chunk": values.optional_integer("attention_chunk_size")
        if kind == "chunked_attention"
        else None,
    }
    for key, name in (("attention_in_multiplier", "input_scale"), ("key_multiplier", "key_scale"),
                      ("attention_out_multiplier", "output_scale")):  # fmt: skip
        if key in values:
            fields[name] = values.number(key)
    for key in ("use_qkv_bias", "qkv_bias"):
        if key in values:
            fields["qkv_bias"] = values.flag(key)
    if "attention_out_bias" in values:
        fields["output_bias"] = values.flag("attention_out_bias")
    if values.flag("attention_k_eq_v") and kind == "full_attention":
        fields["keys_are_values"] = True
    if shared := values.values.get("num_kv_shared_layers"):
        fields["kv_from"] = _shared_from(values, kinds, index, shared)
    fields |= family.attention
    if "use_qk_norm" in values and not values.flag("use_qk_norm"):
        fields["qk_norm"] = None
    if "kv_lora_rank" in values:
        latent = _latent(values)
        scale = 1 / math.sqrt(latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        fields |= {"latent": latent, "output_bias": bias}
        fields["scale"] = scale * yarn_attention_scale(rope_parameters(values, kind))
        groups = heads
    return Attention(heads, groups, head_dim, **fields)


def _own_sizes(values: Config, index: int, kind: str) -> Mapping[str, Any]:
    """Gemma 4: full-attention layers have heads of their own size and number."""
    table = values.table("per_layer_config") if "per_layer_config" in values else None
    if table is not None:
        own: Any = next((each for key, each in table.items() if str(key).isdigit() and int(key) == index), {})
        if not isinstance(own, dict) or not all(type(each) is int and each > 0 for each in own.values()):
            raise values.fail("per_layer_config", "a table of sizes for each layer it names")
        return own
    if "global_head_dim" in values and kind == "full_attention":
        groups = values.optional_integer("num_global_key_value_heads")
        sizes: dict[str, Any] = {"head_dim": values.integer("global_head_dim")}
        return sizes | ({"num_key_value_heads": groups} if groups and values.flag("attention_k_eq_v") else {})
    return {}


def _attention_scale(values: Config, head_dim: int) -> float:
    if "query_pre_attn_scalar" in values:
        return 1 / math.sqrt(values.number("query_pre_attn_scalar"))
    if "attention_multiplier" in values:
        return values.number("attention_multiplier")
    return 1 / math.sqrt(max(head_dim, 1))


def _query_scaling(values: Config, kind: str, index: int) -> QueryScaling | None:
    if "attn_temperature_tuning" in values:  # Llama 4: of layers without positions
        rotates = rotary_layers(values, index + 1)[index]
        if not values.values["attn_temperature_tuning"] or rotates:
            return None
        return QueryScaling(values.number("attn_scale"), values.number("floor_scale"), offset=1)
    if "llama_4_scaling" not in values:
        return None
    stated = rope_parameters(values, kind)
    beta, period = stated.get("llama_4_scaling_beta"), stated.get("original_max_position_embeddings")
    if beta is None or not period:
        return None
    return QueryScaling(float(beta), float(period))


def _shared_from(values: Config, kinds: list[str], index: int, shared: Any) -> int | None:
    """The last layer of this kind that makes keys and values, for the last `shared` layers."""
    first = len(kinds) - values.integer("num_kv_shared_layers", most=len(kinds) - 1)
    if index < first:
        return None
    makers = [earlier for earlier in range(first) if kinds[earlier] == kinds[index]]
    if not makers:
        raise values.fail("num_kv_shared_layers", f"a layer of kind {kinds[index]} before those that share")
    return makers[-1]


def _latent(values: Config) -> Latent:
    return Latent(
        q_lora_rank=values.optional_integer("q_lora_rank"),
        kv_lora_rank=values.integer("kv_lora_rank"),
        qk_nope_head_dim=values.integer("qk_nope_head_dim"),
        qk_rope_head_dim=values.integer("qk_rope_head_dim"),
        v_head_dim=values.integer("v_head_dim"),
    )


# Feed-forward


def activation(values: Config) -> Activation:
    key = next(each for each in ("hidden_activation", "mlp_hidden_act", "hidden_act") if each in values)
    name = values.values[key]
    if name is None and key == "hidden_activation":  # early Gemma configs; transformers takes tanh GELU
        name = "gelu_pytorch_tanh"
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise values.fail(key, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _feed_forward(values: Config, family: Family, index: int, kind: str) -> tuple[Mlp | None, Experts | None]:
    if "layers_block_type" in values and kind not in ("mlp", "moe"):  # Nemotron-H: a layer is one thing
        return None, None
    bias = (
        values.flag("mlp_bias")
        if "mlp_bias" in values
        else values.flag("use_bias") and "mamba_n_heads" not in values
    )
    common: dict[str, Any] = {"hidden_act": activation(values), "bias": bias, **family.mlp}
    sparse = family.experts is not None and kind != "mlp" and _is_sparse(values, index)
    if not sparse:
        width = _width(values, index)
        if "mlp_multipliers" in values:
            gate, down = values.numbers("mlp_multipliers", 2)
            common |= {"gate_scale": gate, "output_scale": down}
        if "activation_sparsity_pattern" in values:
            common["sparsity"] = _sparsity(values, index)
        return Mlp(width, **common), None
    experts = _experts(values, family)
    shared = _shared_width(values)
    gate = bool(family.experts and family.experts.get("row_gate"))
    return (Mlp(shared, **{**common, "row_gate": gate}) if shared else None), experts


def _sparsity(values: Config, index: int) -> float:
    """Gemma 3n: by default of the first ten layers, where there are more."""
    count = values.integer("num_hidden_layers")
    if values.stated("activation_sparsity_pattern"):
        return values.numbers("activation_sparsity_pattern", count)[index]
    return 0.95 if count > 10 and index < 10 else 0.0


def _is_sparse(values: Config, index: int) -> bool:
    if _number_of_experts(values) == 0:
        return False
    if values.stated("mlp_layer_types"):
        kinds = values.choices("mlp_layer_types", number_of_layers(values), ("dense", "sparse"))
        return bool(kinds and kinds[index] == "sparse")
    if values.stated("first_k_dense_replace"):
        every = values.integer("moe_layer_freq") if values.stated("moe_layer_freq") else 1
        return index >= values.integer("first_k_dense_replace", least=0) and index % every == 0
    if values.stated("num_dense_layers"):
        return index >= values.integer("num_dense_layers", least=0)
    if "moe_layer_start_index" in values:
        last = values.integer("moe_layer_end_index", least=-1)
        within = values.integer("moe_layer_start_index", least=0) <= index and (last == -1 or index <= last)
        return within and (index + 1) % values.integer("moe_layer_interval") == 0
    if values.stated("moe_layers"):
        return index in values.places("moe_layers")
    if "interleave_moe_layer_step" in values:
        return (index + 1) % values.integer("interleave_moe_layer_step") == 0
    if "decoder_sparse_step" in values:
        dense = values.places("mlp_only_layers") if values.stated("mlp_only_layers") else []
        return index not in dense and (index + 1) % values.integer("decoder_sparse_step") == 0
    return True


def _number_of_experts(values: Config) -> int:
    for key in ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"):
        if key in values:
            return values.integer(key, most=2**20, least=0) if values.values[key] is not None else 0
    return 0


def _experts(values: Config, family: Family) -> Experts:
    fields = {key: each for key, each in (family.experts or {}).items() if key != "row_gate"}
    active = next(key for key in ("num_experts_per_tok", "top_k_experts", "moe_k") if key in values)
    if "norm_topk_prob" in values:
        fields["normalised"] = values.flag("norm_topk_prob")
    if "routed_scaling_factor" in values:
        fields["scale"] = values.number("routed_scaling_factor")
    if "use_expert_bias" in values:
        fields["correction"] = values.flag("use_expert_bias")
    if "swiglu_limit" in values:
        fields |= {"limit": values.number("swiglu_limit"), "alpha": values.number("swiglu_alpha")}
    if "router_jitter_noise" in values and fields.get("router") == "sparsemixer":
        fields["jitter"] = values.number("router_jitter_noise")
    if values.stated("n_group") and values.stated("topk_group"):
        grouped = values.values.get("topk_method", "") in ("", None, "noaux_tc", "group_limited_greedy")
        if grouped:
            fields |= {"groups": values.integer("n_group"), "groups_active": values.integer("topk_group")}
    if values.values.get("topk_method") == "greedy":
        fields["groups"] = fields["groups_active"] = 1
    width = values.integer(
        "moe_intermediate_size" if "moe_intermediate_size" in values else "intermediate_size"
    )
    fields.setdefault("hidden_act", activation(values))
    return Experts(_number_of_experts(values), values.integer(active), width, **fields)


def _shared_width(values: Config) -> int | None:
    """Of the MLP beside the experts that every row uses."""
    for key in (
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ):
        if key in values:
            return values.optional_integer(key)
    if "enable_moe_block" in values or "interleave_moe_layer_step" in values:
        return values.integer("intermediate_size")
    for key in ("n_shared_experts", "moe_num_shared_experts"):
        if key in values:
            count = values.optional_integer(key)
            return count * values.integer("moe_intermediate_size") if count else None
    return None


def _width(values: Config, index: int) -> int:
    """Of the MLP of a layer without experts."""
    have = values.values
    if "shared_intermediate_size" in values:
        return values.integer("shared_intermediate_size")
    if "intermediate_size_mlp" in values:
        return values.integer("intermediate_size_mlp")
    if isinstance(have.get("intermediate_size"), list) and "laurel_rank" in values:
        width = values.numbers("intermediate_size", values.integer("num_hidden_layers"))[index]
        if not 0 < width < 2**31 or width != int(width):
            raise values.fail("intermediate_size", "whole numbers")
        return int(width)
    width = values.integer("intermediate_size")
    if values.flag("use_double_wide_mlp") and have.get("num_kv_shared_layers"):
        first = values.integer("num_hidden_layers") - values.integer("num_kv_shared_layers")
        width *= 2 if index >= first else 1
    if values.flag("block_auto_adjust_ff_dim"):  # LFM2
        width = int(2 * width / 3)
        if values.stated("block_ffn_dim_multiplier"):
            step = values.integer("block_multiple_of")
            width = -(-int(values.number("block_ffn_dim_multiplier") * width) // step) * step
    return width
