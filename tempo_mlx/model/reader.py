"""Checkpoint tensors in the layout of the blocks: q, k, v in one weight, gate and up in one, experts stacked."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tempo_mlx.architecture.architecture import (
    Attention,
    DeltaNet,
    Experts,
    Layer,
    Mamba2,
    Mlp,
    Recurrent,
    ShortConv,
)
from tempo_mlx.architecture.names import norm_names
from tempo_mlx.arrays import Float32s
from tempo_mlx.cores import threads
from tempo_mlx.mlx import mx
from tempo_mlx.model.attention import SoftmaxAttention
from tempo_mlx.model.experts import ExpertLinear, Mixture, QuantizedExpertLinear, Router
from tempo_mlx.model.feedforward import ACTIVATIONS, FeedForward
from tempo_mlx.model.latent import LATENT_EPS, LatentAttention
from tempo_mlx.model.linear import (
    Concatenated,
    Embedding,
    LayerNorm,
    Linear,
    LowRank,
    Norm,
    QuantizedLinear,
    RMSNorm,
    fuse,
)
from tempo_mlx.model.recurrent import DeltaNetLayer, Mamba2Layer, RecurrentLayer, ShortConvLayer, Window
from tempo_mlx.model.streams import LayerStreams, OwnEmbeddings, OwnInput, Streams
from tempo_mlx.model.transformer import Parts
from tempo_mlx.weights import Checkpoint, Tensor
from tempo_mlx.weights.adapter import Adapted
from tempo_mlx.weights.tensor import (
    Array,
    DenseTensor,
    Layout,
    Packing,
    float32_to_bfloat16,
    kept_layout,
    unpack_bits,
)

PIECE = 1 << 20  # weights that a thread reads at once: less is slower, more is memory
Read = Callable[[Tensor], list[Array]]


def in_pieces(tensor: Tensor, read: Read) -> list[mx.array]:
    """What is read of a weight, by several threads, each some of its rows at a time.

    They write into MLX's own memory, so that nothing is there twice; what a device keeps elsewhere is copied there.
    bfloat16 comes as uint16.
    """
    count = tensor.shape[0]
    rows = max(1, PIECE * count // math.prod(tensor.shape))
    if rows >= count:
        return [mx.array(each) for each in read(tensor)]
    whole = [
        mx.zeros((count, *each.shape[1:]), getattr(mx, each.dtype.name))
        for each in read(tensor.rows(slice(1)))
    ]
    mx.eval(whole)
    views = [np.asarray(each) for each in whole]

    def fill(start: int) -> None:
        part = slice(start, start + rows)
        for view, each in zip(views, read(tensor.rows(part)), strict=True):
            view[part] = each

    with ThreadPoolExecutor(threads()) as pool:
        for _ in pool.map(fill, range(0, count, rows)):
            pass  # raises what one of them raised
    return [each if holds(each, view) else mx.array(view) for each, view in zip(whole, views, strict=True)]


def holds(array: mx.array, view: Array) -> bool:
    """Whether what was written to numpy's view of an array is what MLX finds in it, by a few rows."""
    step = max(1, len(view) // 8)
    return np.array_equal(np.array(array[::step]), view[::step])


class Reader:
    """Reads a layer at a time. A subclass may read a part of every weight (ranks/shards.py)."""

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype, packed: Packing) -> None:
        self.checkpoint = checkpoint
        self.architecture = checkpoint.architecture
        self.dtype = dtype
        self.packed = packed

    # Tensors

    def array(self, tensor: Tensor) -> mx.array:
        """A plain weight as an MLX array of the model's dtype."""
        if tensor.kind == "bfloat16":
            return mx.array(tensor.raw()).view(mx.bfloat16).astype(self.dtype)
        if tensor.layout is None:
            return mx.array(tensor.raw()).astype(self.dtype)
        return self.floats(in_pieces(tensor, lambda piece: [self.stored(piece.numpy())])[0])

    def stored(self, numbers: Float32s) -> Array:
        """As this model keeps them; uint16 for bfloat16."""
        if self.dtype == mx.bfloat16:
            return float32_to_bfloat16(numbers)
        return numbers.astype(np.float16 if self.dtype == mx.float16 else np.float32, copy=False)

    def floats(self, stored: mx.array) -> mx.array:
        return stored.view(mx.bfloat16) if self.dtype == mx.bfloat16 else stored

    def named(self, name: str) -> mx.array:
        return self.array(self.checkpoint.tensor(name))

    def wide(self, name: str) -> mx.array:
        """In float32, for what is computed in it whatever the model's dtype."""
        return mx.array(self.checkpoint.tensor(name).numpy())

    def linear(self, name: str, bias: bool = False) -> Linear:
        offset = self.checkpoint.tensor(f"{name}.bias") if bias else None
        return self.make_linear(self.checkpoint.tensor(f"{name}.weight"), offset)

    def make_linear(self, tensor: Tensor, bias: Tensor | None) -> Linear:
        if isinstance(tensor, Adapted) and kept_layout(tensor.tensor, self.packed) is not None:
            factors = tensor.factors()
            return LowRank(
                self.make_linear(tensor.tensor, None),
                mx.array(tensor.into).astype(self.dtype),
                mx.array(tensor.out_of).astype(self.dtype),
                None if factors is None else mx.array(factors).astype(self.dtype),
                None if bias is None else self.array(bias),
            )
        offset = None if bias is None else self.array(bias)
        if kept_layout(tensor, self.packed) is not None:
            return QuantizedLinear(*self.packed_parts(tensor), offset)
        return Linear(self.array(tensor), offset)

    def packed_parts(self, tensor: Tensor) -> tuple[mx.array, mx.array, mx.array | None, Layout]:
        layout = kept_layout(tensor, self.packed) or tensor.layout
        assert layout is not None

        def parts(piece: Tensor) -> list[Array]:
            packed, scales, biases, own = piece.quantized()
            if biases is None:
                return [packed, scales]
            if own != layout:
                packed = unpack_bits(packed, own.bits).view(np.uint32)
            return [packed, *(self.stored(DenseTensor(each).numpy()) for each in (scales, biases))]

        packed, scales, *biases = in_pieces(tensor, parts)
        if not biases:
            return packed, scales, None, layout
        return packed, self.floats(scales), self.floats(biases[0]), layout

    def expert_linear(self, name: str, bias: bool) -> ExpertLinear:
        tensor = self.checkpoint.tensor(f"{name}.weight")
        offset = self.named(f"{name}.bias") if bias else None
        if kept_layout(tensor, self.packed) is not None:
            return QuantizedExpertLinear(*self.packed_parts(tensor), offset)
        return ExpertLinear(self.array(tensor), offset)

    def norm(self, name: str) -> Norm:
        a = self.architecture
        weight = self.norm_weight(name) if a.norm_weight else None
        if a.norm == "layer":
            return LayerNorm(weight, self.named(f"{name}.bias") if a.norm_bias else None, a.norm_eps)
        return RMSNorm(self.ones(a.hidden_size) if weight is None else weight, a.norm_eps)

    def head_norm(self, name: str, part: Attention) -> Norm:
        """Of queries or keys."""
        a = self.architecture
        if part.qk_norm == "plain":
            return RMSNorm(self.ones(part.head_dim), a.norm_eps)
        weight = self.norm_weight(name)
        return LayerNorm(weight, None, a.norm_eps) if a.norm == "layer" else RMSNorm(weight, a.norm_eps)

    def norm_weight(self, name: str) -> mx.array:
        weight = self.checkpoint.tensor(f"{name}.weight").numpy() + np.float32(self.architecture.norm_offset)
        return mx.array(weight).astype(self.dtype)

    def ones(self, size: int) -> mx.array:
        return mx.ones(size, self.dtype)

    # Beside the layers

    def vocabulary(self) -> tuple[Embedding, Linear]:
        """The embedding and the head, which may be of one weight."""
        a = self.architecture
        embed = self.linear("model.embed_tokens")
        head = embed if a.tie_word_embeddings else self.linear("lm_head", a.head_bias)
        return self.embedding(embed, a.vocab_size), head

    def embedding(self, linear: Linear, tokens: int) -> Embedding:
        """Of so many tokens, with what `linear` has read of their rows."""
        return Embedding(linear, self.dtype)

    def beside_layers(self) -> dict[str, Any]:
        """What few families have, as keywords of Transformer."""
        a = self.architecture
        found: dict[str, Any] = {}
        if a.embedding_norm:
            found["embedding_norm"] = RMSNorm(self.ones(a.hidden_size), a.norm_eps)
        if a.per_layer_input:
            embed = self.embedding(self.linear("model.embed_tokens_per_layer"), a.per_layer_vocabulary)
            projection = self.linear("model.per_layer_model_projection")
            norm = RMSNorm(self.norm_weight("model.per_layer_projection_norm"), a.norm_eps)
            found["own"] = OwnEmbeddings(embed, projection, norm, len(a.layers), a.per_layer_input)
        if a.altup is not None:
            names = ("altup_projections", "altup_unembed_projections")
            into, out_of = (
                [self.linear(f"model.{name}.{i}") for i in range(a.altup.inputs - 1)] for name in names
            )
            found["streams"] = Streams(into, out_of)
        return found

    # Layers

    def block(self, index: int) -> Parts:
        a, prefix = self.architecture, f"model.layers.{index}"
        layer = a.layers[index]
        own = None
        if a.per_layer_input and layer.mlp is not None:
            own = OwnInput(
                self.linear(f"{prefix}.per_layer_input_gate"),
                self.linear(f"{prefix}.per_layer_projection"),
                RMSNorm(self.norm_weight(f"{prefix}.post_per_layer_input_norm"), a.norm_eps),
                ACTIVATIONS[layer.mlp.hidden_act],
            )
        return Parts(
            norms={place: self.norm(f"{prefix}.{name}") for place, name in norm_names(a, layer).items()},
            attention=None if layer.attention is None else self.attention(layer.attention, index),
            recurrent=None if layer.recurrent is None else self.recurrent(layer.recurrent, index),
            mlp=None if layer.mlp is None else self.mlp(layer.mlp, f"{prefix}.mlp"),
            experts=None if layer.experts is None else self.experts(layer.experts, prefix),
            expert_norms=self.expert_norms(layer, prefix),
            own=own,
            streams=None if a.altup is None else self.layer_streams(prefix),
            scalar=self.named(f"{prefix}.layer_scalar") if a.layer_scalar else None,
        )

    def attention(self, part: Attention, index: int) -> SoftmaxAttention | LatentAttention:
        a, name = self.architecture, f"model.layers.{index}.self_attn"
        if part.latent is not None:
            return self.latent(part, index, name)
        letters = (
            ["q"] if part.kv_from is not None else ["q", "k"] if part.keys_are_values else ["q", "k", "v"]
        )
        normed = part.qk_norm is not None
        return SoftmaxAttention(
            part,
            index,
            fuse([self.linear(f"{name}.{letter}_proj", part.qkv_bias) for letter in letters]),
            self.linear(f"{name}.o_proj", part.output_bias),
            self.head_norm(f"{name}.q_norm", part) if normed else None,
            self.head_norm(f"{name}.k_norm", part) if normed and part.kv_from is None else None,
            RMSNorm(self.ones(part.head_dim), a.norm_eps) if part.value_norm else None,
            self.wide(f"{name}.sinks") if part.sinks else None,
        )

    def latent(self, part: Attention, index: int, name: str) -> LatentAttention:
        sizes = part.latent
        assert sizes is not None
        query: tuple[Linear | RMSNorm, ...] = ()
        if sizes.q_lora_rank is None:
            query = (self.linear(f"{name}.q_proj"),)
        else:
            norm = RMSNorm(self.named(f"{name}.q_a_layernorm.weight"), LATENT_EPS)
            query = (self.linear(f"{name}.q_a_proj", part.qkv_bias), norm, self.linear(f"{name}.q_b_proj"))
        both = self.named(f"{name}.kv_b_proj.weight").reshape(
            part.num_attention_heads, -1, sizes.kv_lora_rank
        )
        return LatentAttention(
            part,
            index,
            query,
            self.linear(f"{name}.kv_a_proj_with_mqa", part.qkv_bias),
            RMSNorm(self.named(f"{name}.kv_a_layernorm.weight"), LATENT_EPS),
            both[:, : sizes.qk_nope_head_dim],
            both[:, sizes.qk_nope_head_dim :].swapaxes(1, 2),
            self.linear(f"{name}.o_proj", part.output_bias),
        )

    def mlp(self, part: Mlp, name: str) -> FeedForward:
        up: Linear | Concatenated = self.linear(f"{name}.up_proj", part.bias)
        if part.gated:
            up = fuse(
                [self.linear(f"{name}.gate_proj", part.bias), self.linear(f"{name}.up_proj", part.bias)]
            )
        xielu = None
        if part.hidden_act == "xielu":
            xielu = self.wide(f"{name}.act_fn.alpha_p"), self.wide(f"{name}.act_fn.alpha_n")
        gate = self.linear(f"{name}.row_gate") if part.row_gate else None
        return FeedForward(part, up, self.linear(f"{name}.down_proj", part.bias), gate, xielu)

    def experts(self, part: Experts, prefix: str) -> Mixture:
        parts = {n: self.expert_linear(f"{prefix}.experts.{n}_proj", part.bias) for n in ("up", "down")}
        gate = self.expert_linear(f"{prefix}.experts.gate_proj", part.bias) if part.gated else None
        bias = self.wide(f"{prefix}.router.bias") if part.bias else None
        router = Router(
            part,
            Linear(self.wide(f"{prefix}.router.weight"), bias),
            self.wide(f"{prefix}.router.correction") if part.correction else None,
            self.wide(f"{prefix}.router.scale") if part.own_norm else None,
            self.wide(f"{prefix}.router.per_expert_scale") if part.own_norm else None,
            self.architecture.norm_eps,
        )
        return Mixture(part, router, gate, parts["up"], parts["down"])

    def expert_norms(self, layer: Layer, prefix: str) -> tuple[Norm, Norm, Norm] | None:
        if layer.experts is None or not layer.experts.own_norm:
            return None
        names = (
            "pre_feedforward_layernorm_2",
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
        )
        before, after_mlp, after = (self.norm(f"{prefix}.{name}") for name in names)
        return before, after_mlp, after

    def recurrent(self, part: Recurrent, index: int) -> RecurrentLayer:
        prefix, eps = f"model.layers.{index}", self.architecture.norm_eps
        if isinstance(part, ShortConv):
            name = f"{prefix}.conv"
            window = self.window(f"{name}.conv", part.bias)
            ends = self.linear(f"{name}.in_proj", part.bias), self.linear(f"{name}.out_proj", part.bias)
            return ShortConvLayer(part, index, *ends, window)
        if isinstance(part, DeltaNet):
            name = f"{prefix}.linear_attn"
            inward = fuse([self.linear(f"{name}.in_proj_{each}") for each in ("qkv", "z", "b", "a")])
            rates = self.wide(f"{name}.A_log"), self.wide(f"{name}.dt_bias")
            norm = self.wide(f"{name}.norm.weight"), eps
            outward, window = self.linear(f"{name}.out_proj"), self.window(f"{name}.conv1d", False)
            return DeltaNetLayer(part, index, inward, outward, window, rates, norm)
        assert isinstance(part, Mamba2)
        name = f"{prefix}.mamba"
        scale = None if part.norm is None else self.wide(f"{name}.norm.weight")
        return Mamba2Layer(
            part,
            index,
            self.linear(f"{name}.in_proj", part.bias),
            self.linear(f"{name}.out_proj", part.bias),
            self.window(f"{name}.conv1d", part.conv_bias),
            (self.wide(f"{name}.A_log"), self.wide(f"{name}.dt_bias"), self.wide(f"{name}.D")),
            (scale, eps),
        )

    def window(self, name: str, bias: bool) -> Window:
        return Window(self.wide(f"{name}.weight"), self.wide(f"{name}.bias") if bias else None)

    def layer_streams(self, prefix: str) -> LayerStreams:
        a = self.architecture
        assert a.altup is not None
        names = {
            each: f"{prefix}.altup.{each}"
            for each in ("correction_coefs", "prediction_coefs", "modality_router")
        }
        names |= {each: f"{prefix}.laurel.{each}" for each in ("linear_left", "linear_right")}
        return LayerStreams(
            a.altup,
            {each: self.linear(name) for each, name in names.items()},
            RMSNorm(self.norm_weight(f"{prefix}.altup.router_norm"), a.norm_eps),
            self.named(f"{prefix}.altup.correct_output_scale"),
            RMSNorm(self.norm_weight(f"{prefix}.laurel.post_laurel_norm"), a.norm_eps),
        )
