"""What a config says that takes more than one key of a GGUF file, family by family.

Each rule gets the file's header and gives config keys. Where a number is llama.cpp's own and in no file, it is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from tempo_mlx.errors import ModelError

_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Header:
    """stated: metadata without the architecture's name before the key; shapes: of all tensors, rows first; factors: the
    numbers of those that scale rotary frequencies."""

    architecture: str
    stated: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, list[float]]

    @property
    def layers(self) -> int:
        """Without those that guess the tokens after the next. Raises: ModelError for none, or too many."""
        count = self.whole("block_count", 0) - self.whole("nextn_predict_layers", 0)
        if not 0 < count <= 1024:
            raise ModelError(f"The GGUF file has num_hidden_layers = {count}; 1 to 1024 are supported.")
        return count

    def number(self, key: str, default: Any = None) -> Any:
        """Raises: ModelError for a key that is missing and has no default, or is not one number."""
        if default is None and key not in self.stated:
            raise ModelError(
                f"The GGUF file lacks {self.architecture}.{key}; take another conversion of the model."
            )
        return plain(self.stated.get(key, default), f"{self.architecture}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        """Raises: ModelError for what is no whole number from 0."""
        value = self.number(key, default)
        if type(value) is not int or value < 0:
            raise ModelError(
                f"The GGUF file has {self.architecture}.{key} = {value!r}; a whole number is needed."
            )
        return value

    def each(self, key: str) -> list[Any]:
        """A number for each layer. Raises: ModelError for a list that is too short."""
        value = self.stated.get(key)
        if not isinstance(value, np.ndarray):
            return [self.number(key)] * self.layers
        if len(value) < self.layers:
            raise ModelError(
                f"The GGUF key {self.architecture}.{key} has {len(value)} values for {self.layers} layers."
            )
        return list(value.tolist()[: self.layers])

    def kinds(self) -> list[str]:
        """Which layers slide; a number says that all do but every so many."""
        pattern = self.stated.get("attention.sliding_window_pattern")
        if isinstance(pattern, np.ndarray):
            return [_SLIDING if each else _FULL for each in self.each("attention.sliding_window_pattern")]
        step = self.number("attention.sliding_window_pattern", 0)
        return [_FULL if not step or (index + 1) % step == 0 else _SLIDING for index in range(self.layers)]

    def holds(self, part: str) -> bool:
        """Whether any layer has this tensor."""
        return any(name.startswith("blk.") and name.split(".", 2)[2:] == [part] for name in self.shapes)


def plain(value: Any, key: str) -> Any:
    """A number; llama.cpp writes a list where layers may differ, and most families have equal layers only."""
    if isinstance(value, np.ndarray) and value.size and bool(np.all(value == value.flat[0])):
        value = value.flat[0].item()
    if type(value) not in (int, float, bool):
        raise ModelError(
            f"The GGUF key {key} is not one number; models with unequal layers are not supported."
        )
    # float32 in the file: 1e-05 is written as 9.999999747378752e-06
    return float(str(np.float32(value))) if type(value) is float else value


# Gemma


def _gemma_scale(header: Header, layers_by_width: int) -> dict[str, Any]:
    """The 27B models scale by the width of a head's share."""
    head_dim = header.number("attention.key_length")
    if header.layers == layers_by_width:
        head_dim = header.number("embedding_length") / max(header.number("attention.head_count"), 1)
    return {"query_pre_attn_scalar": head_dim, "hidden_activation": "gelu_pytorch_tanh"}


def gemma2(header: Header) -> dict[str, Any]:
    return {**_gemma_scale(header, 46), "sliding_window": header.number("attention.sliding_window", 4096)}


def gemma3(header: Header) -> dict[str, Any]:
    return {
        **_gemma_scale(header, 62),
        "rope_local_base_freq": header.number("rope.freq_base_swa", 10000.0),
        "sliding_window_pattern": header.number("attention.sliding_window_pattern", 6),
    }


def gemma3n(header: Header) -> dict[str, Any]:
    """The share of a gate that is set to zero is written as the quantile that it is of a normal distribution."""
    quantiles = header.each("activation_sparsity_scale")
    return {
        "layer_types": header.kinds(),
        "intermediate_size": header.each("feed_forward_length"),
        "activation_sparsity_pattern": [round(NormalDist().cdf(each), 6) for each in quantiles],
        "rope_local_base_freq": header.number("rope.freq_base_swa", 10000.0),
        "laurel_rank": header.shapes.get("blk.0.laurel_l.weight", (0,))[0],
        "vocab_size_per_layer_input": header.shapes.get("per_layer_token_embd.weight", (0,))[0],
    }


def gemma4(header: Header) -> dict[str, Any]:
    """Layers differ by whether they slide: in the size and number of heads, and in how they rotate."""
    kinds, head_dim = header.kinds(), header.number("attention.key_length_swa")
    config = {
        "layer_types": kinds,
        "head_dim": head_dim,
        "global_head_dim": header.number("attention.key_length"),
        "enable_moe_block": bool(header.number("expert_count", 0)),
        "vocab_size_per_layer_input": header.shapes.get("per_layer_token_embd.weight", (0,))[0],
    }
    groups = dict(zip(kinds, header.each("attention.head_count_kv"), strict=True))
    config["num_key_value_heads"] = groups.get(_SLIDING, groups.get(_FULL))
    config["num_global_key_value_heads"] = groups.get(_FULL)
    makers = header.layers - header.whole("attention.shared_kv_layers", 0)
    config["attention_k_eq_v"] = any(
        f"blk.{index}.attn_v.weight" not in header.shapes
        for index, kind in enumerate(kinds[:makers])
        if kind == _FULL
    )
    widths = header.each("feed_forward_length")
    config["intermediate_size"] = widths[0]
    config["use_double_wide_mlp"] = widths[-1] != widths[0]
    turning = header.factors.get("rope_freqs.weight")
    if turning is None:
        raise ModelError(
            "The GGUF file has no rope_freqs.weight, which a Gemma 4 needs; take another conversion of it."
        )
    config["rope_parameters"] = {  # what does not turn is divided by 1e30
        _FULL: {
            "rope_type": "proportional",
            "rope_theta": header.number("rope.freq_base"),
            "partial_rotary_factor": turning.count(1.0) / len(turning),
        },
        _SLIDING: {
            "rope_type": "default",
            "rope_theta": header.number("rope.freq_base_swa", 10000.0),
            "partial_rotary_factor": header.number("rope.dimension_count_swa", head_dim) / max(head_dim, 1),
        },
    }
    return config


# Windows, and latent attention


def phi3(header: Header) -> dict[str, Any]:
    original = header.number("rope.scaling.original_context_length", header.number("context_length", 0))
    return {
        "sliding_window": header.number("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": original,
    }


def exaone4(header: Header) -> dict[str, Any]:
    """Only the 32B has a window; llama.cpp's own files of it need not say which layers slide."""
    window = header.number("attention.sliding_window", 0) or None
    if window is None:
        return {"sliding_window": None, "layer_types": [_FULL] * header.layers}
    return {"sliding_window": window, **_stated_kinds(header)}


def olmo3(header: Header) -> dict[str, Any]:
    """YaRN is for the layers that do not slide."""
    own = "rope.freq_base_swa" in header.stated
    return {
        **_stated_kinds(header),
        **({"rope_local_base_freq": header.number("rope.freq_base_swa")} if own else {}),
    }


def _stated_kinds(header: Header) -> dict[str, Any]:
    told = "attention.sliding_window_pattern" in header.stated
    return {"layer_types": header.kinds()} if told else {}


def llama4(header: Header) -> dict[str, Any]:
    """llama.cpp has the chunk, the scale of queries without positions and which layers these are in its code, and the
    norm of queries and keys in all but the model of 128 experts."""
    window = header.number("attention.sliding_window", 8192)
    if window != 8192:  # 0: a MobileLLM, all of whose layers rotate and see everything
        raise ModelError(
            f"The GGUF file sets llama4.attention.sliding_window = {window}, not the 8192 of Llama 4 Scout and "
            "Maverick; take the model's safetensors, which tempo-mlx reads."
        )
    return {
        "sliding_window": None,
        "use_qk_norm": header.number("expert_count", 0) != 128, "attention_chunk_size": 8192,
        "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
        "no_rope_layers": [int((index + 1) % 4 != 0) for index in range(header.layers)],
    }  # fmt: skip


def stablelm(header: Header) -> dict[str, Any]:
    """As llama.cpp tells them: old files say of all that attention and MLP stand side by side."""
    return {
        "use_parallel_residual": not header.holds("ffn_norm.weight"),
        "use_qkv_bias": header.holds("attn_q.bias"),
        "qk_layernorm": header.holds("attn_q_norm.weight"),
    }


def latent(header: Header) -> dict[str, Any]:
    """The file says how wide heads are once made of the latent (or, of 2024, says only that), and has one key head."""
    rotated = header.number("rope.dimension_count")
    key = header.number("attention.key_length_mla", header.number("attention.key_length"))
    config: dict[str, Any] = {
        "num_key_value_heads": header.number("attention.head_count"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": header.number("attention.value_length_mla", header.number("attention.value_length")),
        "head_dim": rotated,
        "q_lora_rank": header.number("attention.q_lora_rank", 0) or None,
    }
    if header.number("expert_group_count", 0) > 1:  # read by DeepSeek-V2 alone
        config["topk_method"] = "group_limited_greedy"
    return config


# States


def lfm2(header: Header) -> dict[str, Any]:
    """Layers without attention have no key/value heads."""
    groups = header.each("attention.head_count_kv")
    return {
        "full_attn_idxs": [index for index, count in enumerate(groups) if count],
        "num_key_value_heads": max(groups, default=0),
    }


def delta_net(header: Header) -> dict[str, Any]:
    heads = header.number("ssm.time_step_rank")
    config = {"linear_value_head_dim": header.number("ssm.inner_size") // max(heads, 1)}
    if "attention.recurrent_layers" in header.stated:
        recurrent = header.each("attention.recurrent_layers")
        return {**config, "layer_types": ["linear_attention" if each else _FULL for each in recurrent]}
    return config


def granite_hybrid(header: Header) -> dict[str, Any]:
    return {**bamba(header), "num_local_experts": header.number("expert_count", 0)}


def bamba(header: Header) -> dict[str, Any]:
    groups = header.each("attention.head_count_kv")
    return {
        "layer_types": ["attention" if count else "mamba" for count in groups],
        "num_key_value_heads": max(groups, default=0),
        **_mamba(header),
    }


def falcon_h1(header: Header) -> dict[str, Any]:
    """Its multipliers are in the weights; llama.cpp norms what the gate has multiplied."""
    if "output.weight" not in header.shapes:
        raise ModelError(
            "The GGUF file has no output.weight, and its embeddings are multiplied by what the file does not say, so "
            "they are no head; take the model's safetensors, which tempo-mlx reads."
        )
    return {
        **_mamba(header),
        "mamba_rms_norm": header.holds("ssm_norm.weight"),
        "mamba_norm_before_gate": False,
    }


def _mamba(header: Header) -> dict[str, Any]:
    return {
        "mamba_d_head": header.number("ssm.inner_size") // max(header.number("ssm.time_step_rank"), 1),
        "mamba_conv_bias": header.holds("ssm_conv1d.bias"),
        "mamba_proj_bias": header.holds("ssm_in.bias"),
    }


def nemotron_h(header: Header) -> dict[str, Any]:
    """A layer is one thing: experts or an MLP where it has a width, attention where it has key/value heads."""
    groups, widths = header.each("attention.head_count_kv"), header.each("feed_forward_length")
    fed = "moe" if header.number("expert_count", 0) else "mlp"
    heads = header.number("ssm.time_step_rank")
    return {
        "layers_block_type": [
            fed if width else "attention" if count else "mamba"
            for count, width in zip(groups, widths, strict=True)
        ],
        "num_key_value_heads": max(groups, default=0),
        "intermediate_size": max(widths, default=0),
        "mamba_head_dim": header.number("ssm.inner_size") // max(heads, 1),
        "use_conv_bias": header.holds("ssm_conv1d.bias"),
        "use_bias": header.holds("ssm_in.bias"),
    }
