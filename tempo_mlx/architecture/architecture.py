"""What a model is: the one description both backends build from.

Families (Llama, Qwen, Gemma, ...) differ only by the values of these fields. Names follow Hugging Face
configs where a field exists there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tempo_mlx.errors import ModelError

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    `inverse_frequencies`: one angle per position step and rotated pair, (rotated dims / 2,), with every
    position-independent scaling (linear, llama3, yarn) already applied. `attention_factor` multiplies cos
    and sin. `long_inverse_frequencies` and `long_attention_factor` replace the first two for a sequence that is
    longer than `original_max_position_embeddings` (longrope). `dynamic_base`: theta of dynamic NTK scaling, with
    `dynamic_factor`.
    Rotation pairs dimension i with i + rotated/2 (the Hugging Face layout).
    """

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    long_inverse_frequencies: tuple[float, ...] | None = None
    long_attention_factor: float = 1.0
    original_max_position_embeddings: int | None = None
    dynamic_base: float | None = None
    dynamic_factor: float | None = None


@dataclass(frozen=True)
class Layer:
    """What differs from layer to layer: its rotary embedding (None: no positions) and its attention window."""

    rope: int | None  # index into Architecture.ropes
    sliding_window: int | None = None  # counts logical positions; None: sees everything


@dataclass(frozen=True)
class Architecture:
    """One decoder-only transformer."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    rms_norm_eps: float = 1e-5
    norm_offset: float = 0.0  # Gemma: 1.0, a stored weight w scales by 1 + w
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    qk_norm: Literal["head", "projection"] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    hidden_act: Activation = "silu"
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0  # logits are multiplied by it
    tie_word_embeddings: bool = False

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def scale(self) -> float:
        return self.attention_scale if self.attention_scale is not None else self.head_dim**-0.5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 < value < 2**31:
                raise ModelError(f"The model's {name} is {value!r}; a positive whole number is needed.")
        if not 0 < len(self.layers) <= 1024:
            raise ModelError(f"The model has {len(self.layers)} layers; between 1 and 1024 are supported.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"The model's {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly."
            )
