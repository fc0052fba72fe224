"""Rotary frequencies of every scaling in use: linear, dynamic, llama3, yarn, longrope.

Formulas and their float32 rounding follow transformers (modeling_rope_utils.py): at position 10,000 one ulp
in a frequency already moves an angle by 6e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tempo_mlx.architecture.architecture import Rope
from tempo_mlx.arrays import Float32s
from tempo_mlx.errors import ModelError

_KEYS = {
    "default": (),
    "linear": ("factor",),
    "proportional": ("factor",),
    "dynamic": ("factor", "alpha"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", "short_mscale", "long_mscale"),
}
# Read elsewhere, or without effect on text: sections of positions in an image, which are all the same for a token.
_SHARED = (
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "max_position_embeddings", "llama_4_scaling_beta", "mrope_section", "mrope_interleaved", "finetuned",
    "rope_ratio", "attn_factor",
)  # fmt: skip
_Get = Callable[..., Any]


@np.errstate(all="ignore")  # absurd settings overflow; what is not finite is refused below
def build_rope(
    parameters: Mapping[str, Any], head_dim: int, max_position_embeddings: int, family: str
) -> Rope:
    """The rotary embedding that `parameters` (a config's rope_parameters) describe.

    Raises: ModelError naming the key that is unknown, missing or out of range.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "su" or (kind == "yarn" and family == "phi3"):  # names that Phi-3 used for it
        kind = "longrope"
    if kind == "mrope":  # Qwen2-VL's name: the positions of text are one number
        kind = "default"
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ModelError(
            f"The model's rope type {kind!r} is not supported; supported are {', '.join(_KEYS)}."
        )
    for key, value in parameters.items():
        if key not in _SHARED and key not in _KEYS[kind] and value is not None and key not in _all_keys():
            raise ModelError(f"The model's rope settings have the unknown key {key!r}; the model is refused.")

    def get(key: str, default: float | None = None) -> float:
        value = parameters.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise ModelError(f"The model's rope setting {key} is {value!r}; a positive number is needed.")
        return float(value)

    if head_dim > 4096:
        raise ModelError(f"The model's head_dim is {head_dim}; at most 4096 are supported.")
    if kind == "proportional":
        return _proportional(
            get("rope_theta"), head_dim, get("partial_rotary_factor", 1.0), get("factor", 1.0)
        )
    rotated = int(head_dim * get("partial_rotary_factor", 1.0))
    if not 2 <= rotated <= head_dim or rotated % 2 or head_dim % 2:
        raise ModelError(
            f"The model rotates {rotated} of {head_dim} dimensions of a head; an even part is needed."
        )
    base = get("rope_theta")
    plain = _frequencies(base, rotated)
    original = int(get("original_max_position_embeddings", max_position_embeddings))
    if original < 1:
        raise ModelError("The model's rope setting original_max_position_embeddings is below 1.")
    if kind == "linear":
        return Rope(_floats(plain / np.float32(get("factor"))))
    if kind == "dynamic" and parameters.get("alpha"):  # Hunyuan: one base for every length
        return Rope(_floats(_frequencies(base * get("alpha") ** (rotated / (rotated - 2)), rotated)))
    if kind == "dynamic":
        return Rope(
            _floats(plain), original_max_position_embeddings=max_position_embeddings,
            dynamic_base=base, dynamic_factor=get("factor"),
        )  # fmt: skip
    if kind == "llama3":
        return Rope(_floats(_llama3(plain, original, get)))
    if kind == "yarn":
        return _yarn(base, rotated, original, max_position_embeddings, parameters, get)
    if kind == "longrope":
        rope = _longrope(base, rotated, original, max_position_embeddings, parameters, get)
        return _own_scale(rope, get) if family == "phimoe" else rope
    return Rope(_floats(plain))


def _all_keys() -> set[str]:
    """Settings of other rope types are left in many configs and are not read."""
    return {key for keys in _KEYS.values() for key in keys}


def _floats(values: Float32s) -> tuple[float, ...]:
    if not np.all(np.isfinite(values)):
        raise ModelError(
            "The model's rope settings give frequencies that are not finite; the model is refused."
        )
    return tuple(float(each) for each in values)


def _powers(base: float, rotated: int) -> Float32s:
    exponents = np.arange(0, rotated, 2).astype(np.float32) / np.float32(rotated)
    return np.asarray(np.power(base, exponents.astype(np.float64)), np.float32)


def _frequencies(base: float, rotated: int) -> Float32s:
    return np.asarray(np.float32(1.0) / _powers(base, rotated), np.float32)


def _proportional(base: float, head_dim: int, share: float, factor: float) -> Rope:
    """Gemma 4: pairs over the whole head, of which the first `share` turn."""
    turning = int(share * head_dim // 2)
    exponents = np.arange(0, 2 * turning, 2).astype(np.float32) / np.float32(head_dim)
    turns = np.asarray(
        np.float32(1.0) / np.power(base, exponents.astype(np.float64)).astype(np.float32), np.float32
    )
    still = np.zeros(head_dim // 2 - turning, np.float32)
    return Rope(_floats(np.concatenate([turns, still]) / np.float32(factor)))


def yarn_attention_scale(parameters: Mapping[str, Any]) -> float:
    """DeepSeek's: what yarn multiplies the scale of latent attention with."""
    weight, factor = parameters.get("mscale_all_dim"), parameters.get("factor")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default" or not weight or not factor or factor <= 1:
        return 1.0
    return float((0.1 * weight * math.log(factor) + 1.0) ** 2)


def _llama3(plain: Float32s, original: int, get: _Get) -> Float32s:
    """Source: Llama 3.1, as in transformers: long waves divided by `factor`, a smooth ramp between."""
    factor, low, high = get("factor"), get("low_freq_factor"), get("high_freq_factor")
    if high <= low:
        raise ModelError(f"The model's rope has high_freq_factor {high}, not above low_freq_factor {low}.")
    wavelength = np.float32(2 * math.pi) / plain
    long = wavelength > original / low
    scaled = np.where(long, plain / np.float32(factor), plain)
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    ramp = (1 - smooth) * scaled / np.float32(factor) + smooth * scaled
    return np.where(~long & (wavelength >= original / high), ramp, scaled).astype(np.float32)


def _yarn(
    base: float, rotated: int, original: int, limit: int, parameters: Mapping[str, Any], get: _Get
) -> Rope:
    """Source: YaRN, arXiv 2309.00071."""
    factor = get("factor", limit / original)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        attention = get("attention_factor")
    elif parameters.get("mscale") and parameters.get("mscale_all_dim"):
        attention = mscale(get("mscale")) / mscale(get("mscale_all_dim"))
    else:
        attention = mscale(1.0)

    def turning(rotations: float) -> float:
        """The dimension that turns this often over the original context."""
        return rotated * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    if base <= 1.0:
        raise ModelError(f"The model's rope_theta is {base}; yarn needs more than 1.")
    low, high = turning(get("beta_fast", 32.0)), turning(get("beta_slow", 1.0))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001
    ramp = np.clip(
        (np.arange(rotated // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1
    )
    keep = np.float32(1) - ramp
    powers = _powers(base, rotated)
    scaled = np.float32(1) / (np.float32(factor) * powers)
    return Rope(_floats(scaled * (1 - keep) + np.float32(1) / powers * keep), attention)


def _own_scale(rope: Rope, get: _Get) -> Rope:
    """Phi-3.5-MoE states what cos and sin are multiplied by, on either side of the original context."""
    short = get("short_mscale", rope.attention_factor)
    return replace(rope, attention_factor=short, long_attention_factor=get("long_mscale", short))


def _longrope(
    base: float, rotated: int, original: int, limit: int, parameters: Mapping[str, Any], get: _Get
) -> Rope:
    """Source: LongRoPE, arXiv 2402.13753: one factor a dimension, another set beyond the original context."""
    factor = get("factor", limit / original)
    default = 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    attention = get("attention_factor", default)
    powers = _powers(base, rotated)

    def frequencies(key: str) -> tuple[float, ...]:
        values = parameters.get(key)
        if (
            not isinstance(values, list)
            or len(values) != rotated // 2
            or not all(type(each) in (int, float) and 0 < each < 1e30 for each in values)
        ):
            raise ModelError(
                f"The model's rope setting {key} must be a list of {rotated // 2} positive numbers."
            )
        return _floats(np.float32(1) / (np.array(values, np.float32) * powers))

    short, long = frequencies("short_factor"), frequencies("long_factor")
    if short == long:
        return Rope(short, attention)
    return Rope(
        short, attention, long_inverse_frequencies=long, long_attention_factor=attention,
        original_max_position_embeddings=original,
    )  # fmt: skip
