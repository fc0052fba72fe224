"""From a Hugging Face config.json to an Architecture: one table row per family, no subclasses.

Everything a config says is either understood, known not to change the computation, or refused by name.
Defaults are those of transformers' config classes, since a config.json leaves out what equals them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tempo_mlx.architecture.architecture import Activation, Architecture, Layer, Rope
from tempo_mlx.architecture.rope_scaling import build_rope
from tempo_mlx.errors import ModelError

_COMMON = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "  # noqa: SIM905
    "head_dim max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta rope_scaling "
    "rope_parameters".split()
)

# Says who made the file, how it was trained, or which tokens are special: nothing the forward pass uses.
_INERT = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache initializer_range "  # noqa: SIM905
    "pretraining_tp bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id "
    "cache_implementation attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop "
    "output_attentions output_hidden_states return_dict return_dict_in_generate auto_map quantization "
    "quantization_config is_llama_config transformers.js_config unsloth_version unsloth_fixed "
    "tokenizer_class id2label label2id problem_type chunk_size_feed_forward is_encoder_decoder name_or_path "
    "max_window_layers attn_implementation mm_tokens_per_image boi_token_index eoi_token_index "
    "image_token_index vision_config "
    "use_logits_to_keep num_logits_to_keep keys_to_ignore_at_inference finetuning_task task_specific_params "
    "prefix max_length min_length do_sample temperature top_k top_p typical_p repetition_penalty num_beams "
    "length_penalty no_repeat_ngram_size early_stopping num_return_sequences model_max_length".split()
)
# Values under which a key of some other model code does nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
        "partial_rotary_factor": (1,),
        "torchscript": (False,),
    }
)
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """`defaults`: what a config.json of this family leaves out; with `_COMMON`, all the keys it understands.
    `fields`: what every model of the family has, as fields of Architecture. `ignored`: keys its transformers
    class does not use."""

    defaults: Mapping[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()


_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "rope_theta": 10000.0,
}  # fmt: skip
_QWEN = {
    **_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
_GEMMA = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False, "rope_theta": 10000.0, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "layer_types": None, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip
_GEMMA_FIELDS = {"norm_offset": 1.0, "norm_placement": "sandwich"}


def _without(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(_LLAMA),
        "mistral": Family(
            {
                **_without(_LLAMA, "attention_bias", "mlp_bias"), "intermediate_size": 14336,
                "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096,
            }
        ),
        "qwen2": Family(_without(_QWEN, "attention_bias", "mlp_bias"), {"qkv_bias": True}),
        "qwen3": Family({**_without(_QWEN, "mlp_bias"), "head_dim": 128}, {"qk_norm": "head"}),
        "gemma2": Family(_GEMMA, _GEMMA_FIELDS, frozenset({"hidden_act", "sliding_window_size"})),
        "gemma3_text": Family(
            {
                **_GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
                "final_logit_softcapping": None, "attn_logit_softcapping": None,
                "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6,
            },
            {**_GEMMA_FIELDS, "qk_norm": "head"},
            frozenset({"hidden_act"}),
        ),
        "phi3": Family(
            {
                **_without(_LLAMA, "attention_bias", "mlp_bias"), "vocab_size": 32064, "hidden_size": 3072,
                "intermediate_size": 8192, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                "original_max_position_embeddings": 4096, "sliding_window": None,
                "partial_rotary_factor": 1.0,
            }
        ),
        "smollm3": Family(
            {
                **_LLAMA, "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36,
                "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768,
                "tie_word_embeddings": True, "rope_theta": 2000000.0, "use_sliding_window": False,
                "sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4,
                "layer_types": None,
            }
        ),
        "olmo2": Family(
            {**_without(_LLAMA, "mlp_bias"), "vocab_size": 50304, "rms_norm_eps": 1e-5},
            {"norm_placement": "post", "qk_norm": "projection"},
        ),
        "granite": Family(
            {
                **_LLAMA, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
                "attention_multiplier": 1.0,
            }
        ),
    }
)  # fmt: skip


class Config:
    """A family's config with its defaults filled in; a read checks the value, and names what it refuses."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def fail(self, key: str, needed: str) -> ModelError:
        return ModelError(
            f"The model's config has {key} = {_shown(self.values.get(key))}; {needed} is needed."
        )

    def integer(self, key: str, most: int = 2**31 - 1) -> int:
        value = self.values.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not 0 < value <= most:
            raise self.fail(key, f"a whole number from 1 to {most}")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.integer(key)

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.fail(key, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
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


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: Gemma 3's vision models keep it in a table of its own."""
    if not isinstance(config, dict):
        raise ModelError("The model's config.json is not a table of settings; fetch the model again.")
    nested = config.get("text_config")
    if config.get("model_type") == "gemma3" and isinstance(nested, dict):
        return {
            "tie_word_embeddings": config.get("tie_word_embeddings", True),
            **nested,
            "model_type": "gemma3_text",
        }
    return config


def architecture_from_config(config: Mapping[str, Any]) -> Architecture:
    """The Architecture that a config.json describes.

    Raises: ModelError naming the architecture, or the key, that is not supported or makes no sense.
    """
    config = text_config(config)
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(
            f"The model's architecture {_shown(model_type)} is not supported; supported are "
            f"{', '.join(FAMILIES)}."
        )
    _refuse_unknown_keys(config, family, str(model_type))
    values = Config({**family.defaults, **config})
    heads = values.integer("num_attention_heads")
    head_dim = values.optional_integer("head_dim") or values.integer("hidden_size") // heads
    layers, ropes = _layers(values, head_dim, str(model_type))
    fields = {
        "qkv_bias": values.flag("attention_bias"),
        "output_bias": values.flag("attention_bias"),
        "mlp_bias": values.flag("mlp_bias"),
        **_scales(values),
        **family.fields,
    }
    return Architecture(
        family=str(model_type),
        vocab_size=values.integer("vocab_size"),
        hidden_size=values.integer("hidden_size"),
        intermediate_size=values.integer("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=values.optional_integer("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position_embeddings=values.integer("max_position_embeddings"),
        layers=layers,
        ropes=ropes,
        rms_norm_eps=values.number("rms_norm_eps"),
        hidden_act=_activation(values),
        tie_word_embeddings=values.flag("tie_word_embeddings"),
        **fields,
    )


def _refuse_unknown_keys(config: Mapping[str, Any], family: Family, name: str) -> None:
    understood = _COMMON | _INERT | family.ignored | set(family.defaults)
    for key, value in config.items():
        if key in understood or key.startswith("_"):
            continue
        if value is None or value is False or value in ("", [], {}) or value in _NEUTRAL.get(key, ()):
            continue
        raise ModelError(
            f"The model's config sets {key} = {_shown(value)}, which tempo-mlx does not know for {name}; "
            "it might change the computation, so the model is refused (remove the key if it does not)."
        )


def _activation(values: Config) -> Activation:
    key = "hidden_activation" if "hidden_activation" in values.values else "hidden_act"
    name = values.values[key]
    if name is None and key == "hidden_activation":  # early Gemma configs; transformers takes tanh GELU
        name = "gelu_pytorch_tanh"
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise values.fail(key, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _scales(values: Config) -> dict[str, float | None]:
    """Gemma's and Granite's multipliers, as far as the family has them."""
    have = values.values
    scales: dict[str, float | None] = {}
    if "query_pre_attn_scalar" in have:
        scales["attention_scale"] = values.number("query_pre_attn_scalar") ** -0.5
        scales["embedding_scale"] = math.sqrt(values.integer("hidden_size"))
        scales["attention_logit_softcapping"] = values.optional_number("attn_logit_softcapping")
        scales["final_logit_softcapping"] = values.optional_number("final_logit_softcapping")
    if "attention_multiplier" in have:
        scales["attention_scale"] = values.number("attention_multiplier")
        scales["embedding_scale"] = values.number("embedding_multiplier")
        scales["residual_scale"] = values.number("residual_multiplier")
        scales["logits_scale"] = 1.0 / values.number("logits_scaling")
    return scales


def _layers(values: Config, head_dim: int, name: str) -> tuple[tuple[Layer, ...], tuple[Rope, ...]]:
    count = values.integer("num_hidden_layers", most=1024)
    window = values.optional_integer("sliding_window")
    sliding = _sliding_layers(values, count, name)
    rotary = _rotary_layers(values, count)
    full, local = _rope_parameters(values)
    limit = values.integer("max_position_embeddings")
    ropes = [build_rope(full, head_dim, limit, name)]
    if local is not None:
        ropes.append(build_rope(local, head_dim, limit, name))
    layers = tuple(
        Layer((1 if slides and local is not None else 0) if rotates else None, window if slides else None)
        for slides, rotates in zip(sliding, rotary, strict=True)
    )
    return layers, tuple(ropes)


def _sliding_layers(values: Config, count: int, name: str) -> list[bool]:
    have = values.values
    if have.get("sliding_window") is None or not have.get("use_sliding_window", True):
        return [False] * count
    if "layer_types" not in have:  # Mistral, Phi-3: the window is everybody's
        return [True] * count
    kinds = values.choices("layer_types", count, ("sliding_attention", "full_attention"))
    if kinds is not None:
        return [kind == "sliding_attention" for kind in kinds]
    if name in ("gemma2", "gemma3_text"):
        every = values.integer("sliding_window_pattern") if name == "gemma3_text" else 2
        return [(index + 1) % every != 0 for index in range(count)]
    if name == "smollm3":
        return [not rotates for rotates in _rotary_layers(values, count)]
    first = have["max_window_layers"]
    if type(first) is not int or first < 0:
        raise values.fail("max_window_layers", "a whole number")
    return [index >= first for index in range(count)]


def _rotary_layers(values: Config, count: int) -> list[bool]:
    if "no_rope_layers" not in values.values:
        return [True] * count
    stated = values.choices("no_rope_layers", count, (0, 1))  # 1 means: rotates
    if stated is not None:
        return [bool(each) for each in stated]
    every = values.integer("no_rope_layer_interval")
    return [(index + 1) % every != 0 for index in range(count)]


def _rope_parameters(values: Config) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Rope settings of full-attention layers, and of sliding ones where they differ (Gemma 3), from the old
    keys (rope_theta, rope_scaling) or transformers 5's rope_parameters."""
    stated = values.table("rope_parameters") or {}
    nested = {
        key: stated[key] for key in ("full_attention", "sliding_attention") if stated.get(key) is not None
    }
    if any(not isinstance(each, dict) for each in nested.values()):
        raise values.fail("rope_parameters", "a table of rope settings")
    if nested and "rope_local_base_freq" not in values.values:
        raise values.fail("rope_parameters", "one table for all layers (this family has one kind of rope)")
    common = {"rope_theta": values.number("rope_theta")}
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):
        if key in values.values:
            common[key] = values.values[key]
    scaling = values.table("rope_scaling") or {}
    full = {**common, **(nested.get("full_attention", {}) if nested else stated), **scaling}
    if "original_max_position_embeddings" in values.values:  # Phi-3: the config's own field wins
        full["original_max_position_embeddings"] = values.values["original_max_position_embeddings"]
    if "rope_local_base_freq" not in values.values:
        return full, None
    local = {"rope_theta": values.number("rope_local_base_freq"), **nested.get("sliding_attention", {})}
    return full, local


def _shown(value: Any) -> str:
    """The value, short enough for one sentence."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
