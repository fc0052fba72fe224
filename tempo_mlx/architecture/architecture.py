"""What a model is: the one description both backends build from.

Families (Llama, Qwen, Gemma, ...) differ only by the values of these fields, and so do the layers of one model.
Names follow Hugging Face configs where a field exists there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tempo_mlx.errors import ModelError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2", "xielu"]
Norm = Literal["rms", "layer"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    `inverse_frequencies`: one angle per position step and rotated pair, (rotated dims / 2,), with every
    position-independent scaling (linear, llama3, yarn) already applied. `attention_factor` multiplies cos
    and sin. `long_inverse_frequencies` and `long_attention_factor` replace the first two for a sequence that is
    longer than `original_max_position_embeddings` (longrope). `dynamic_base`: theta of dynamic NTK scaling, with
    `dynamic_factor`.
    Rotation pairs dimension i with i + rotated/2 (the Hugging Face layout); `interleaved`: 2i with 2i + 1.
    """

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    long_inverse_frequencies: tuple[float, ...] | None = None
    long_attention_factor: float = 1.0
    original_max_position_embeddings: int | None = None
    dynamic_base: float | None = None
    dynamic_factor: float | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class QueryScaling:
    """Queries grow with their position p: times 1 + beta log(1 + floor((p + offset) / period)) (Llama 4)."""

    beta: float
    period: float
    offset: int = 0


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are made of one small vector of
    `kv_lora_rank` numbers, which is what a cache holds, beside `qk_rope_head_dim` that are rotated and that all
    heads share."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class Attention:
    """Softmax attention of one layer.

    rope: index into Architecture.ropes (None: no positions). sliding_window, attention_chunk: how many logical
    positions it sees, its own included, and blocks of positions that see each other. qk_norm: of each head with
    weights for a head (`head`) or for all (`heads`), of a head without weights (`plain`), or of all heads at once
    (`projection`). kv_from: the earlier layer whose keys and values are used. sinks: one more column of the
    softmax per head, which takes part in the sum and holds nothing. gated: the output times the sigmoid of a
    projection. keys_are_values: no value projection (before the norms).
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: int | None = 0
    sliding_window: int | None = None
    attention_chunk: int | None = None
    scale: float = 1.0
    softcap: float | None = None
    qk_norm: Literal["head", "heads", "plain", "projection"] | None = None
    norm_after_rope: bool = False
    value_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    gated: bool = False
    keys_are_values: bool = False
    kv_from: int | None = None
    query_scaling: QueryScaling | None = None
    clip_qkv: float | None = None
    latent: Latent | None = None
    input_scale: float = 1.0
    key_scale: float = 1.0
    output_scale: float = 1.0

    @property
    def cached(self) -> tuple[int, int, int]:
        """Heads, and numbers of a key and of a value, that a slot takes in the cache; a latent has no values."""
        if self.latent is not None:
            return 1, self.latent.kv_lora_rank + self.latent.qk_rope_head_dim, 0
        return self.num_key_value_heads, self.head_dim, self.head_dim

    def __post_init__(self) -> None:
        if self.head_dim < 1:
            raise ModelError(
                f"The model's {self.num_attention_heads} attention heads are more than its hidden_size."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"The model's {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly."
            )


@dataclass(frozen=True)
class DeltaNet:
    """Gated DeltaNet (arXiv 2412.06464): a state (key_dim, value_dim) a value head, S = a (I - b k k^T) S + b k v^T."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def channels(self) -> int:
        """Of the convolution before it: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def numbers(self) -> int:
        """Of the states of one row."""
        return self.channels * self.kernel + self.value_heads * self.key_dim * self.value_dim

    @property
    def inputs(self) -> int:
        """Of what the steps of one row need."""
        return self.channels + self.value_heads * (self.key_dim + self.value_dim + 2)

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise ModelError(
                f"The model's {self.value_heads} value heads cannot share {self.key_heads} key heads evenly."
            )


@dataclass(frozen=True)
class ShortConv:
    """LFM2's gated convolution over the last `kernel` rows."""

    channels: int
    kernel: int
    bias: bool = False

    @property
    def numbers(self) -> int:
        return self.channels * self.kernel

    @property
    def inputs(self) -> int:
        return self.channels


@dataclass(frozen=True)
class Mamba2:
    """Mamba 2 (arXiv 2405.21060): a state (head_dim, state) a head, S = exp(dt A) S + dt x B^T.

    norm: of the output, in `groups` parts: after the gate (`gated`), before it (`norm_first`), or none, where the
    gate is all. scales: of the input, of z, x, B, C and dt, and of the output (Falcon-H1).
    """

    heads: int
    head_dim: int
    state: int
    groups: int
    kernel: int
    conv_bias: bool = True
    bias: bool = False
    norm: Literal["gated", "norm_first"] | None = "gated"
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    scales: tuple[float, ...] = (1.0,) * 7

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.groups * self.state

    @property
    def numbers(self) -> int:
        return self.channels * self.kernel + self.inner * self.state

    @property
    def inputs(self) -> int:
        return self.channels + self.inner + self.heads * (self.state + 1)


Recurrent = DeltaNet | ShortConv | Mamba2


@dataclass(frozen=True)
class Mlp:
    """gated: down(act(gate x) * up x), otherwise down(act(up x)). sparsity: of the gate (Gemma 3n). row_gate: the
    output times the sigmoid of a number a row (Qwen's shared expert)."""

    intermediate_size: int
    hidden_act: Activation = "silu"
    gated: bool = True
    bias: bool = False
    sparsity: float = 0.0
    row_gate: bool = False
    gate_scale: float = 1.0
    output_scale: float = 1.0


@dataclass(frozen=True)
class Experts:
    """A mixture of MLPs, `active` of `count` for each row.

    router: scores are the softmax over all experts, the sigmoid of each, the softmax over those chosen
    (`chosen`), or Phi's sparse mixer. correction: a number for each expert that counts in the choice only.
    groups: experts are chosen within the best `groups_active` groups, a group being as good as its best `group_top`.
    limit: Gpt-oss's clamped gate. input_scaled: the weight scales what goes in (Llama 4). own_norm: Gemma 4's, whose
    router norms its input, with norms of their own around the experts and around the MLP beside them. stored: how
    files keep stacked weights: (n, out, in), or `across`: (n, in, out), or the same with gates and inputs in `turns`.
    """

    count: int
    active: int
    intermediate_size: int
    hidden_act: Activation = "silu"
    router: Literal["softmax", "sigmoid", "chosen", "sparsemixer"] = "softmax"
    normalised: bool = False
    scale: float = 1.0
    correction: bool = False
    groups: int = 1
    groups_active: int = 1
    group_top: int = 1
    bias: bool = False
    limit: float | None = None
    alpha: float = 1.702
    input_scaled: bool = False
    own_norm: bool = False
    jitter: float = 0.0
    gated: bool = True
    stored: Literal["rows", "across", "turns"] = "rows"

    def __post_init__(self) -> None:
        if self.active > self.count or self.count % self.groups or self.groups_active > self.groups:
            raise ModelError(
                f"The model uses {self.active} of {self.count} experts in {self.groups_active} of {self.groups} "
                "groups, which is not possible."
            )


@dataclass(frozen=True)
class Layer:
    """What one layer is made of; what it lacks is None. Attention and a recurrent part stand side by side (Falcon-H1),
    and so do experts and an MLP that every row uses."""

    attention: Attention | None = None
    recurrent: Recurrent | None = None
    mlp: Mlp | None = None
    experts: Experts | None = None


@dataclass(frozen=True)
class AltUp:
    """Gemma 3n: `inputs` streams of which layers compute one, and a low-rank detour around attention (laurel)."""

    inputs: int
    active: int
    laurel_rank: int
    correct_scale: bool


@dataclass(frozen=True)
class Architecture:
    """One decoder-only transformer.

    norm_placement: `pre`: before attention and before the MLP; `post`: after each; `sandwich`: both; `parallel`: one
    norm before both, which see the same; `parallel2`: the same with a norm each.
    per_layer_input: width of Gemma's embeddings of the token for each layer.
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # Gemma: 1.0, a stored weight w scales by 1 + w
    norm_bias: bool = False
    norm_weight: bool = True
    norm_placement: Literal["pre", "post", "sandwich", "parallel", "parallel2"] = "pre"
    embedding_norm: bool = False
    head_bias: bool = False
    final_logit_softcapping: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0  # logits are multiplied by it
    tie_word_embeddings: bool = False
    per_layer_input: int = 0
    per_layer_vocabulary: int = 0
    layer_scalar: bool = False
    altup: AltUp | None = None

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def recurrent(self) -> bool:
        """Whether any layer keeps a state, so that a row continues rows and does not only see them."""
        return any(layer.recurrent is not None for layer in self.layers)

    @property
    def attention(self) -> Attention | None:
        """That of the first layer which has one, as most others have it; None for a model without any."""
        return next((layer.attention for layer in self.layers if layer.attention is not None), None)

    @property
    def num_attention_heads(self) -> int:
        return 0 if self.attention is None else self.attention.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return 0 if self.attention is None else self.attention.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return 0 if self.attention is None else self.attention.head_dim

    @property
    def intermediate_size(self) -> int:
        """Of the widest MLP that every row goes through."""
        return max((layer.mlp.intermediate_size for layer in self.layers if layer.mlp is not None), default=0)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 < value < 2**31:
                raise ModelError(f"The model's {name} is {value!r}; a positive whole number is needed.")
        if self.head_bias and self.tie_word_embeddings:
            raise ModelError(
                "The model has tied embeddings and a bias of the head, which are not built together."
            )
        if not 0 < len(self.layers) <= 1024:
            raise ModelError(f"The model has {len(self.layers)} layers; between 1 and 1024 are supported.")
