"""From a Hugging Face config.json to an Architecture: one table row per family, no subclasses.

Everything a config says is either understood, known not to change the computation, or refused by name. The rows are
in dense.py, sparse.py and hybrid.py, what their values become in layers.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tempo_mlx.architecture.architecture import AltUp, Architecture
from tempo_mlx.architecture.config import Config, refuse_what_matters, shown, text_config
from tempo_mlx.architecture.dense import DENSE
from tempo_mlx.architecture.hybrid import HYBRID
from tempo_mlx.architecture.layers import Family, read_layers
from tempo_mlx.architecture.sparse import SPARSE
from tempo_mlx.architecture.states import mamba_head_dim
from tempo_mlx.errors import ModelError

__all__ = ["FAMILIES", "Family", "architecture_from_config", "text_config"]

# Other names of the same: of a wrapper whose text config has no model_type of its own, or of an older release.
_SAME = {
    "gemma3": "gemma3_text", "gemma3n": "gemma3n_text", "gemma4": "gemma4_text", "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "qwen3_vl": "qwen3_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text", "qwen2_vl": "qwen2_5_vl_text", "qwen2_vl_text": "qwen2_5_vl_text",
    "glm4v": "glm4v_text", "mistral3": "mistral", "gemma4_unified": "gemma4_text",
}  # fmt: skip
NORM_KEYS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon")
_COMMON = frozenset({"rope_scaling", "rope_parameters", "head_dim", "model_type"})

FAMILIES: Mapping[str, Family] = MappingProxyType({**DENSE, **SPARSE, **HYBRID})
_MATTERS = frozenset(key for family in FAMILIES.values() for key in family.defaults)


def family_of(config: Mapping[str, Any]) -> str:
    """The row of the table for a text config. Raises ModelError naming the architecture that has none."""
    model_type = config.get("model_type")
    name = _SAME.get(model_type, model_type) if isinstance(model_type, str) else None
    if name not in FAMILIES:
        raise ModelError(
            f"The model's architecture {shown(model_type)} is not supported; docs/models.md lists those that are."
        )
    return str(name)


def architecture_from_config(config: Mapping[str, Any]) -> Architecture:
    """The Architecture that a config.json describes.

    Raises: ModelError naming the architecture, or the key, that is not supported or makes no sense.
    """
    config = text_config(config)
    name = family_of(config)
    family = FAMILIES[name]
    config = {family.aliases.get(key, key): value for key, value in config.items()}
    understood = _COMMON | family.ignored | set(family.defaults)
    refuse_what_matters(config, frozenset(understood), _MATTERS, name)
    stated = {key: value for key, value in config.items() if key not in family.ignored}
    stated = {key: value for key, value in stated.items() if value is not None or key not in _NEVER_NULL}
    defaults = dict(family.defaults)
    if any(stated.get(key) is not None for key in ("rope_theta", "rope_scaling", "rope_parameters")):
        defaults.pop("rope_parameters", None)
    values = Config({**defaults, **{key: stated[key] for key in stated if key in understood}})
    _check_supported(values, family)
    layers, ropes = read_layers(values, family, name)
    fixed = {key: each for key, each in family.model.items() if key not in _READ_ELSEWHERE}
    return Architecture(
        family=name,
        vocab_size=values.integer("vocab_size"),
        hidden_size=values.integer("hidden_size"),
        max_position_embeddings=_context(values),
        layers=layers,
        ropes=ropes,
        norm_eps=values.number(next(key for key in NORM_KEYS if key in family.defaults)),
        tie_word_embeddings=values.flag("tie_word_embeddings"),
        **{**_scales(values, family), **_extras(values), **fixed, **_placement(values, family)},
    )


_READ_ELSEWHERE = ("scaled_embedding", "reversed_rope", "norm_placement")


_NEVER_NULL = (
    "rope_theta",
    "rope_local_base_freq",
)  # null there means what a default or rope_parameters says


def _context(values: Config) -> int:
    """How many positions there are: YaRN multiplies those it is given, and configs may state these alone."""
    context = values.integer("max_position_embeddings")
    scaling = {**(values.table("rope_parameters") or {}), **(values.table("rope_scaling") or {})}
    kind, factor, original = (
        scaling.get(key) for key in ("rope_type", "factor", "original_max_position_embeddings")
    )
    kind = kind or scaling.get("type")
    if kind == "yarn" and isinstance(factor, (int, float)) and type(original) is int and 1 < factor < 1e4:
        return max(context, min(int(factor * original), 2**31 - 1))
    return context


def _check_supported(values: Config, family: Family) -> None:
    """Parts that a config can ask for and that are not built."""
    if "hidden_act" in family.mlp:  # Gemma 1, whose first configs say gelu and mean its approximation
        values.one_of("hidden_act", ("gelu", "gelu_new", "gelu_pytorch_tanh"))
    for key in ("qk_layernorm", "lm_head_bias", "projectors_bias"):
        if key in values and key != "lm_head_bias":
            values.one_of(key, (False, None))
    if "moe_latent_size" in values:
        values.one_of("moe_latent_size", (None,))
    if "use_bidirectional_attention" in values:
        values.one_of("use_bidirectional_attention", (None, False, "vision"))
    if "mamba_d_ssm" in values:
        heads = values.integer("mamba_n_heads")
        values.one_of("mamba_d_ssm", (heads * mamba_head_dim(values, heads),))


def _placement(values: Config, family: Family) -> dict[str, Any]:
    """Where norms stand, which a config can choose in GPT-NeoX and StableLM."""
    if "use_parallel_residual" in values:
        parallel = family.model.get("norm_placement", "parallel")
        return {"norm_placement": parallel if values.flag("use_parallel_residual") else "pre"}
    return {"norm_placement": family.model["norm_placement"]} if "norm_placement" in family.model else {}


def _scales(values: Config, family: Family) -> dict[str, float | None]:
    """Multipliers of embeddings, residuals and logits, as far as the family has them."""
    scales: dict[str, float | None] = {}
    if family.model.get("scaled_embedding"):
        scales["embedding_scale"] = math.sqrt(values.integer("hidden_size"))
    for key, field in (("embedding_multiplier", "embedding_scale"), ("residual_multiplier", "residual_scale"),
                       ("logit_scale", "logits_scale"), ("lm_head_multiplier", "logits_scale")):  # fmt: skip
        if key in values:
            scales[field] = values.number(key)
    if "logits_scaling" in values:
        scales["logits_scale"] = 1.0 / values.number("logits_scaling")
    if "final_logit_softcapping" in values:
        scales["final_logit_softcapping"] = values.optional_number("final_logit_softcapping")
    return scales


def _extras(values: Config) -> dict[str, Any]:
    """Gemma's embeddings for each layer, its several streams, and a head with a bias."""
    extras: dict[str, Any] = {}
    if values.values.get("hidden_size_per_layer_input"):
        extras["per_layer_input"] = values.integer("hidden_size_per_layer_input")
        extras["per_layer_vocabulary"] = values.integer("vocab_size_per_layer_input")
    if "laurel_rank" in values:
        extras["altup"] = AltUp(
            inputs=values.integer("altup_num_inputs"),
            active=values.integer("altup_active_idx", least=0),
            laurel_rank=values.integer("laurel_rank"),
            correct_scale=values.flag("altup_correct_scale"),
        )
    if "lm_head_bias" in values:
        extras["head_bias"] = values.flag("lm_head_bias")
    return extras
