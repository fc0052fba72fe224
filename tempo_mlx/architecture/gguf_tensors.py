"""What the tensors of a GGUF file are among ours, and what llama.cpp's converter did to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.architecture.architecture import Architecture, DeltaNet, Layer, Mamba2
from tempo_mlx.architecture.gguf import Row
from tempo_mlx.errors import ModelError

# llama.cpp's names (gguf-py, tensor_mapping.py) of the parts of a layer. The norms around attention and MLP
# depend on where the architecture puts them, and what is recurrent on its kind.
_PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_qkv": "self_attn.qkv_proj", "attn_norm": "input_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "router",
    "ffn_gate_exps": "experts.gate_proj", "ffn_up_exps": "experts.up_proj", "ffn_down_exps": "experts.down_proj",
    "ffn_gate_up_exps": "experts.gate_up_proj",
    "ffn_gate_shexp": "mlp.gate_proj", "ffn_up_shexp": "mlp.up_proj", "ffn_down_shexp": "mlp.down_proj",
    "ffn_gate_inp_shexp": "mlp.row_gate", "exp_probs_b": "router.correction", "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj",
    # latent attention; mlx-lm's names for the two parts of kv_b_proj
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj", "attn_k_b": "self_attn.embed_q", "attn_v_b": "self_attn.unembed_out",
    # Gemma 3n and 4
    "inp_gate": "per_layer_input_gate", "proj": "per_layer_projection", "post_norm": "post_per_layer_input_norm",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2", "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2", "altup_correct_coef": "altup.correction_coefs",
    "altup_predict_coef": "altup.prediction_coefs", "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm", "laurel_l": "laurel.linear_left", "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}  # fmt: skip
_STATES = {
    "ssm_conv1d": "conv1d", "ssm_norm": "norm", "ssm_out": "out_proj", "ssm_in": "in_proj", "ssm_dt": "dt",
    "ssm_a": "A_log", "ssm_d": "D",
}  # fmt: skip
_DELTA = {
    **_STATES, "attn_qkv": "in_proj_qkv", "attn_gate": "in_proj_z", "ssm_alpha": "in_proj_a",
    "ssm_beta": "in_proj_b", "ssm_ba": "in_proj_ba", "ssm_in": "in_proj_qkvz",
}  # fmt: skip
_NORMS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "pre": {"ffn_norm": "post_attention_layernorm"},
        "parallel": {},
        "parallel2": {"ffn_norm": "post_attention_layernorm"},
        "post": {
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        "sandwich": {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    }
)
_TOP = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "token_embd_norm": "model.norm", "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
    "altup_proj": "model.altup_projections", "altup_unembd_proj": "model.altup_unembed_projections",
}  # fmt: skip
_LAYER = re.compile(r"blk\.(\d{1,4})\.([\w.]+?)(?:\.(weight|bias|scale))?")
_ROTATED = re.compile(r"self_attn\.([qk])_proj\.(?:weight|bias)")
# Ours that have no weight or bias at their end, or another word for it.
_WHOLE = {
    "self_attn.sinks.weight": "self_attn.sinks", "router.correction.bias": "router.correction",
    "layer_output_scale.weight": "layer_scalar", "altup_correct_scale.weight": "altup.correct_output_scale",
    "experts.down_proj.scale": "router.per_expert_scale", "linear_attn.dt.bias": "linear_attn.dt_bias",
    "mamba.dt.bias": "mamba.dt_bias", "post_attention_layernorm": "post_attention_layernorm.weight",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Our name of a tensor, and what makes it ours: its rows and its columns in this order, `subtract` taken off, the
    logarithm of what it is below zero, and another shape."""

    name: str
    rows: NDArray[np.intp] | None = None
    columns: NDArray[np.intp] | None = None
    subtract: float = 0.0
    logarithm: bool = False
    shape: tuple[int, ...] | None = None


def guesses_ahead(name: str, a: Architecture, block_count: int) -> bool:
    """Whether the tensor is of the layers behind the last that guess the token after the next."""
    match = _LAYER.fullmatch(name)
    return match is not None and len(a.layers) <= int(match[1]) < block_count


def learned_activations(metadata: Mapping[str, Any], a: Architecture) -> dict[str, NDArray[np.float32]]:
    """What Apertus' activation learned, which llama.cpp keeps in the metadata, a number for each layer.

    Raises: ModelError for an activation of other constants, or without a number for each layer.
    """
    if all(layer.mlp is None or layer.mlp.hidden_act != "xielu" for layer in a.layers):
        return {}
    each = {key: np.asarray(metadata.get(f"xielu.{key}", ()), np.float32).reshape(-1) for key in _XIELU}
    for key, constant in _XIELU.items():
        if each[key].size != len(a.layers) or (constant and np.any(abs(each[key] - constant) > 1e-5)):
            raise ModelError(
                f"The GGUF file has xielu.{key} = {each[key].tolist()[:4]}; {constant or 'a number'} is needed for "
                f"each of {len(a.layers)} layers."
            )
    return {
        f"model.layers.{index}.mlp.act_fn.{key}": each[key][index : index + 1]
        for index in range(len(a.layers))
        for key in ("alpha_p", "alpha_n")
    }


_XIELU = {"alpha_p": None, "alpha_n": None, "beta": 0.5, "eps": -1e-6}


def place_of(name: str, shape: tuple[int, ...], a: Architecture, row: Row) -> Place | None:
    """Where a tensor of the file belongs; None for one that has no place in the architecture."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        ours = f"{_TOP[stem]}.{kind}"
        return Place(ours, subtract=a.norm_offset if ours == "model.norm.weight" else 0.0)
    match = _LAYER.fullmatch(name)
    if match is None or int(match[1]) >= len(a.layers):
        return None
    layer = a.layers[int(match[1])]
    own = _name(match[2], layer, a, row)
    if own is None:
        return None
    own = own if match[3] is None else f"{own}.{match[3]}"
    own = _WHOLE.get(own, own)
    return _changed(f"model.layers.{int(match[1])}.", own, shape, layer, a, row)


def _name(part: str, layer: Layer, a: Architecture, row: Row) -> str | None:
    if isinstance(layer.recurrent, DeltaNet) and part in _DELTA:
        return f"linear_attn.{_DELTA[part]}"
    if isinstance(layer.recurrent, Mamba2) and part in _STATES:
        return f"mamba.{_STATES[part]}"
    norms = _NORMS.get(a.norm_placement, {})
    whole = part if f"{part}.weight" in _WHOLE else None
    return row.parts.get(part) or _PARTS.get(part) or norms.get(part) or whole


def _changed(before: str, own: str, shape: tuple[int, ...], layer: Layer, a: Architecture, row: Row) -> Place:
    name = before + own
    rotated = _ROTATED.fullmatch(own)
    if rotated is not None and row.permuted and layer.attention is not None:
        part = layer.attention
        heads = part.num_attention_heads if rotated[1] == "q" else part.num_key_value_heads
        return Place(name, rows=_halves(shape[0], heads))
    if own.startswith("linear_attn.") and isinstance(layer.recurrent, DeltaNet):
        return _delta_place(name, own, shape, layer.recurrent, row.tiled)
    if own.startswith("self_attn.qkv_proj.") and a.family == "gpt_neox" and layer.attention is not None:
        return Place(name, rows=_by_head(shape[0], layer.attention.num_attention_heads))
    if own in ("mamba.A_log", "mamba.D", "mamba.norm.weight", "router.correction"):
        return Place(name, shape=(int(np.prod(shape)),), logarithm=own == "mamba.A_log")
    if own in ("conv.conv.weight", "mamba.conv1d.weight"):
        return Place(name, shape=_one_channel(shape))
    if own == "mlp.row_gate.weight":
        return Place(name, shape=(1, shape[-1]))
    return Place(name, subtract=a.norm_offset if own.endswith("norm.weight") else 0.0)


def _halves(rows: int, heads: int) -> NDArray[np.intp] | None:
    """The rows of heads whose neighbours rotate together, with first all the first of a pair, then the second."""
    if rows % (2 * heads):
        return None
    return np.asarray(np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1))


def _by_head(rows: int, heads: int) -> NDArray[np.intp] | None:
    """All queries, keys and values in turn, as Hugging Face has them: those of each head together."""
    if rows % (3 * heads):
        return None
    return np.asarray(np.arange(rows).reshape(3, heads, -1).swapaxes(0, 1).reshape(-1))


def _one_channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """llama.cpp leaves out the axis of a convolution's one input channel."""
    return (shape[0], 1, shape[-1]) if len(shape) == 2 else shape


def _delta_place(name: str, own: str, shape: tuple[int, ...], part: DeltaNet, tiled: bool) -> Place:
    """Hugging Face keeps the value heads of a key head together; in llama.cpp's files of Qwen3.5 the first of each key
    head come first, then the second of each."""
    leaf, inner = own.removeprefix("linear_attn."), part.value_heads * part.value_dim
    sizes = {"in_proj_qkv.weight": part.channels, "conv1d.weight": part.channels, "in_proj_z.weight": inner}
    sizes |= dict.fromkeys(("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"), part.value_heads)
    across = leaf == "out_proj.weight"
    order = None
    if tiled and (shape[-1] == inner if across else sizes.get(leaf) == shape[0]):
        order = _untiled(part, sizes.get(leaf, inner))
    return Place(
        name, None if across else order, order if across else None, logarithm=leaf == "A_log",
        shape=_one_channel(shape) if leaf == "conv1d.weight" else None,
    )  # fmt: skip


def _untiled(part: DeltaNet, size: int) -> NDArray[np.intp]:
    """The order of `size` rows: value heads, or their values, with queries and keys before them if there are more."""
    heads: NDArray[np.intp] = np.arange(part.value_heads).reshape(-1, part.key_heads).T.reshape(-1)
    if size == part.value_heads:
        return heads
    before = size - part.value_heads * part.value_dim
    values = (heads[:, None] * part.value_dim + np.arange(part.value_dim)).reshape(-1)
    return np.concatenate([np.arange(before), before + values])
