"""Reading a config.json: values with their types checked, and the language model's part of a wrapper.

Which keys stop a load is decided by what forward passes read: a key that some decoder's forward reads and this
family's does not is refused by name, unless its value is the one under which it does nothing there. What no forward
reads (training, generation, who made the file) never matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tempo_mlx.errors import ModelError

# Keys that the forward passes of other decoders read, and the values under which those do what ours do.
_ELSEWHERE: Mapping[str, tuple[Any, ...]] = {
    "activation_function": (), "alibi": (False,), "alibi_bias_max": (), "apply_residual_connection_post_layernorm": (
        False,), "attention_chunk_size": (0,), "attention_logit_cap": (0,), "attention_softmax_in_fp32": (True, False),
    "attn_pdrop": (0, 0.0, 0.1), "attn_temperature_tuning": (False,), "clip_qkv": (), "cross_attention_layers": ([],),
    "full_attn_mod": (1,), "interpolate_factor": (1,), "is_causal": (True,), "is_decoder": (True, False),
    "layer_drop": (0,), "logit_scale": (1, 1.0), "logits_soft_cap": (0,), "moe_layers": ([],),
    "moe_layer_frequency": (0,), "mup_base_width": (), "multi_query": (False,), "n_routed_experts": (0, 1),
    "new_decoder_architecture": (False,), "no_rope_layers": ([],), "num_experts": (0, 1), "num_local_experts": (0, 1),
    "num_kv_shared_layers": (0,), "parallel_attn": (False,), "partial_rotary_factor": (1, 1.0),
    "position_embedding_type": ("rope", "rotary", "absolute"), "qk_layernorm": (False,), "qk_norm": (False,),
    "query_pre_attn_scalar": (), "residual_in_fp32": (True, False), "rope_interleaved": (False,),
    "rope_traditional": (False,), "rotary_pct": (1, 1.0), "scale_attn_weights": (True,),
    "scale_depth": (1, 1.0), "scale_emb": (1, 1.0), "softcap": (0,), "torchscript": (False,), "use_alibi": (False,),
    "use_bidirectional_attention": (False,), "use_mem_rope": (False,), "use_parallel_residual": (False,),
    "use_qk_norm": (False,), "use_sliding_window": (False,), "rope_percentage": (1, 1.0), "width_scale": (1, 1.0),
}  # fmt: skip
# Read by several families, and without effect where the family does not read them.
_HARMLESS = frozenset(
    {
        "attention_bias", "mlp_bias", "use_bias", "head_dim", "hidden_act", "hidden_activation", "layer_types",
        "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon",
        "max_window_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok",
        "original_max_position_embeddings", "rms_norm_eps", "sliding_window", "sliding_window_pattern",
        "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq",
        "decoder_sparse_step", "mlp_only_layers", "no_rope_layer_interval", "shared_expert_intermediate_size",
        "attention_out_bias", "chunk_size", "use_cache",
    }
)  # fmt: skip

_ENDS = "eos_token_id"


class Config:
    """A family's config with its defaults filled in; a read checks the value, and names what it refuses."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def stated(self, key: str) -> bool:
        return self.values.get(key) is not None

    def fail(self, key: str, needed: str) -> ModelError:
        return ModelError(
            f"The model's config has {key} = {shown(self.values.get(key))}; {needed} is needed."
        )

    def integer(self, key: str, most: int = 2**31 - 1, least: int = 1) -> int:
        value = self.values.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise self.fail(key, f"a whole number from {least} to {most}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """None for what is absent, null or 0."""
        return self.integer(key) if self.values.get(key) else None

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.fail(key, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.fail(key, "true or false")
        return value

    def table(self, key: str) -> Mapping[str, Any] | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, "a table")
        return value

    def choices(self, key: str, length: int, allowed: tuple[Any, ...]) -> list[Any] | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < length or any(each not in allowed for each in value):
            raise self.fail(key, f"a list of {length} values out of {allowed}")
        return value[:length]

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        value = self.values.get(key)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(type(each) in (int, float) for each in value)
        ):
            raise self.fail(key, f"a list of {length} numbers")
        return tuple(float(each) for each in value)

    def places(self, key: str) -> list[int]:
        """A list of numbers of layers."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(type(each) is int for each in value):
            raise self.fail(key, "a list of layers")
        return value

    def one_of(self, key: str, allowed: Iterable[Any]) -> None:
        """Refuse any other value than those that are supported."""
        allowed = tuple(allowed)
        if self.values.get(key) not in allowed:
            raise self.fail(key, " or ".join(repr(each) for each in allowed))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: models that see or hear keep it in a table of its own.

    What stands beside that table (quantization, special tokens, whether the head is tied) goes for it too, where it
    does not say otherwise itself. Of quantization and tie it is what stands outside that counts: they are the
    wrapper's, and what stands inside may be left over from before. A text may end as either says.
    """
    if not isinstance(config, dict):
        raise ModelError("The model's config.json is not a table of settings; the model is refused.")
    if "model_type" not in config and "rope_ntk_beta" in config:
        return _of_openai(config)
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return config
    outer = {
        key: value for key, value in config.items() if key != "text_config" and not isinstance(value, dict)
    }
    outer |= {key: config[key] for key in ("quantization", "quantization_config") if key in config}
    inner = {key: value for key, value in nested.items() if value is not None or key not in outer}
    for keys in (("tie_word_embeddings",), ("quantization", "quantization_config")):
        if any(outer.get(key) is not None for key in keys):
            inner = {key: value for key, value in inner.items() if key not in keys}
    both = [config[_ENDS] for config in (outer, inner) if config.get(_ENDS) is not None]
    if len(both) == 2:
        inner[_ENDS] = [end for ends in both for end in (ends if isinstance(ends, list) else [ends])]
    return {**outer, **inner, "model_type": nested.get("model_type", outer.get("model_type"))}


def _of_openai(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json beside gpt-oss' original weights, in transformers' words."""
    words = {
        "num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok",
        "rope_scaling_factor": "factor", "rope_ntk_alpha": "beta_slow", "rope_ntk_beta": "beta_fast",
        "initial_context_length": "original_max_position_embeddings",
    }  # fmt: skip
    found = {words.get(key, key): value for key, value in config.items()}
    yarn = ("factor", "beta_slow", "beta_fast", "original_max_position_embeddings")
    scaling = {"rope_type": "yarn", "truncate": False} | {key: found.pop(key, None) for key in yarn}
    context = scaling["original_max_position_embeddings"]
    return {**found, "model_type": "gpt_oss", "max_position_embeddings": context, "rope_scaling": scaling}


def refuse_what_matters(
    config: Mapping[str, Any], understood: frozenset[str], matters: frozenset[str], name: str
) -> None:
    """Raises ModelError naming the first key that some forward pass reads, and this family's does not.

    understood: keys the family reads or is known to ignore; matters: keys that any family of ours reads.
    """
    for key, value in config.items():
        if key in understood or key.startswith("_") or value is None or key in _HARMLESS:
            continue
        if key in _ELSEWHERE:
            neutral = _ELSEWHERE[key]
        elif key in matters:
            neutral = (0, 0.0, False, "", [], {})
        else:
            continue
        if not any(type(value) is type(each) and value == each for each in neutral):
            raise ModelError(
                f"The model's config sets {key} = {shown(value)}, which tempo-mlx does not know for {name}; "
                "it might change the computation, so the model is refused (remove the key if it does not)."
            )


def shown(value: Any) -> str:
    """The value, short enough for one sentence."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
