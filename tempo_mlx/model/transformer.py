"""The MLX transformer: one model for every family, reading top-down.

Position is not slot. Rows come with explicit logical positions, and with an additive bias that says which slots
each row sees and how strongly. Letters: L new rows, S slots, H query heads, K key/value heads, D head dim, E
model dim, F MLP dim, V vocabulary. There is no batch axis: a parallel set *is* the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.mlx import mx
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.exponential import gated_silu
from tempo_mlx.model.forward import Attention, Forward, Logits
from tempo_mlx.model.kernels import CompactBias, lattice_attention, layer_bias
from tempo_mlx.model.linear import Linear, RMSNorm
from tempo_mlx.model.rope import rotations
from tempo_mlx.model.rotation import FEW, Rotation

ACTIVATIONS: dict[
    str, Callable[[mx.array, mx.array], mx.array]
] = {  # of the gate, times what it lets through
    "silu": gated_silu,
    "gelu": lambda x, up: x * (1 + mx.erf(x / 2**0.5)) / 2 * up,
    "gelu_tanh": lambda x, up: 0.5 * x * (1 + mx.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x))) * up,
}


class Block:
    """One layer. Norms that a family does not have are None."""

    def __init__(self, architecture: Architecture, index: int, weights: dict[str, Any]) -> None:
        self.architecture = architecture
        self.index = index
        self.qkv: Linear = weights["qkv"]  # E -> (H + 2K) D
        self.output: Linear = weights["output"]  # H D -> E
        self.gate_up: Linear = weights["gate_up"]  # E -> 2 F
        self.down: Linear = weights["down"]  # F -> E
        self.query_norm: RMSNorm | None = weights["query_norm"]
        self.key_norm: RMSNorm | None = weights["key_norm"]
        self.before_attention: RMSNorm | None = weights["before_attention"]
        self.after_attention: RMSNorm | None = weights["after_attention"]
        self.before_mlp: RMSNorm | None = weights["before_mlp"]
        self.after_mlp: RMSNorm | None = weights["after_mlp"]
        self.activation = ACTIVATIONS[architecture.hidden_act]

    def __call__(
        self,
        x: mx.array,
        rotation: Rotation | None,
        bias: CompactBias | mx.array | None,
        cache: Cache,
        attention: Attention,
    ) -> tuple[mx.array, mx.array | None]:
        """x (L, E) -> (L, E) and, where asked for, the attention mass (S,)."""
        scale = self.architecture.residual_scale
        y = self.before_attention(x) if self.before_attention else x
        y, mass = self.attention(y, rotation, bias, cache, attention)
        y = self.after_attention(y) if self.after_attention else y
        x = x + (y if scale == 1.0 else y * scale)
        y = self.before_mlp(x) if self.before_mlp else x
        gate, up = mx.split(self.gate_up(y), 2, axis=-1)  # (L, F) each
        y = self.down(self.activation(gate, up))
        y = self.after_mlp(y) if self.after_mlp else y
        return x + (y if scale == 1.0 else y * scale), mass

    def attention(
        self,
        x: mx.array,
        rotation: Rotation | None,
        bias: CompactBias | mx.array | None,
        cache: Cache,
        attention: Attention,
    ) -> tuple[mx.array, mx.array | None]:
        a = self.architecture
        q, k, v = self.project(x, rotation)
        keys, values = cache.append(self.index, k, v)  # (K, S, D)
        out, mass = lattice_attention(
            q,
            keys,
            values,
            bias,
            scale=a.scale,
            softcap=a.attention_logit_softcapping,
            mass=attention,
        )
        return self.output(out), mass

    def project(self, x: mx.array, rotation: Rotation | None) -> tuple[mx.array, mx.array, mx.array]:
        """x (L, E), normed -> queries (H, L, D), keys and values (K, L, D)."""
        a = self.architecture
        heads, groups = a.num_attention_heads, a.num_key_value_heads
        rows = x.shape[0]
        qkv = self.qkv(x)  # (L, (H + 2K) D)
        if a.qk_norm == "projection":
            q, k, v = mx.split(qkv, [heads * a.head_dim, (heads + groups) * a.head_dim], axis=-1)
            qkv = mx.concatenate([self.query_norm(q), self.key_norm(k), v], axis=-1)  # type: ignore[misc]
        qkv = qkv.reshape(rows, heads + 2 * groups, a.head_dim)
        qk, v = mx.split(qkv, [heads + groups], axis=1)
        if a.qk_norm == "head":
            qk = mx.concatenate([self.query_norm(qk[:, :heads]), self.key_norm(qk[:, heads:])], axis=1)  # type: ignore[misc]
        if rotation is not None:
            qk = rotation(qk)
        q, k = mx.split(qk.transpose(1, 0, 2), [heads])  # (H, L, D), (K, L, D)
        return q, k, v.transpose(1, 0, 2)

    def remember(self, x: mx.array, rotation: Rotation | None, cache: Cache) -> None:
        """Only write what later rows would see of x (L, E): its keys and values."""
        y = self.before_attention(x) if self.before_attention else x
        _, k, v = self.project(y, rotation)
        cache.append(self.index, k, v)


@dataclass(frozen=True)
class Rows:
    """What a pass knows of its L rows, the newest of the cache, before any layer runs: made once, used by all."""

    rotation: list[Rotation]  # by kind of rope
    biases: dict[
        int | None, CompactBias | mx.array | None
    ]  # by window: who sees whom, as `lattice_attention` takes it
    attention: Attention
    ahead: bool  # the CPU computes a layer while the next one is being described


class Transformer:
    """Embedding, blocks, final norm, head. Built by `load.py`; every array is (out, in) as in the checkpoint."""

    def __init__(
        self,
        architecture: Architecture,
        embed: Callable[[mx.array], mx.array],
        blocks: list[Block],
        norm: RMSNorm,
        head: Linear,
        info: dict[str, Any],
        dtype: mx.Dtype,
        kv_bits: int | None = None,
    ) -> None:
        self.architecture = architecture
        self.embed = embed
        self.blocks = blocks
        self.norm = norm
        self.head = head
        self.info = info
        self.dtype = dtype
        self.kv_bits = kv_bits

    def new_cache(self) -> Cache:
        a = self.architecture
        return Cache(a.num_hidden_layers, a.num_key_value_heads, a.head_dim, self.dtype, self.kv_bits)

    def embeddings(self, tokens: Sequence[int]) -> Float32s:
        """(n, E): the input embeddings of `tokens`."""
        return np.array(self.embed(mx.array(list(tokens))).astype(mx.float32))

    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: Cache,
        *,
        logits: Logits = "all",
        attention: Attention = False,
    ) -> Forward:
        """Run L rows and append them to the cache. See `model.forward` for the contract."""
        positions = np.asarray(positions, np.int64)
        cache.reserve(positions)
        rows = self.rows(positions, bias, cache, attention)
        x, masses = self.run_layers(self.embedded(tokens), rows, cache)
        cache.commit()
        out = None if logits == "none" else self.logits(x if logits == "all" else x[-1:])
        mass = (
            mx.stack([m for m in masses if m is not None]) if attention else None
        )  # (layers, S), or (layers, L, S) for "rows"
        mx.eval(*cache.arrays(), *(y for y in (out, mass) if y is not None))
        return Forward(
            None if out is None else np.array(out, copy=False),
            None if mass is None else np.array(mass.astype(mx.float32)),
        )

    def embedded(self, tokens: Sequence[int] | Ints) -> mx.array:
        """(L, E): what the first layer is given."""
        x = self.embed(mx.array(np.asarray(tokens, np.int32)))
        scale = self.architecture.embedding_scale
        return x if scale == 1.0 else x * mx.array(scale, x.dtype)

    def rows(
        self,
        positions: Ints,
        bias: Float32s | None,
        cache: Cache,
        attention: Attention = False,
    ) -> Rows:
        """Of the newest rows of `cache`, at these positions (L,), with this bias (L, S)."""
        a = self.architecture
        shape = a.num_attention_heads, a.num_key_value_heads, a.head_dim
        turns = rotations(a.ropes, positions, cache.positions)
        return Rows(
            rotation=[Rotation(cos, sin, a.head_dim) for cos, sin in turns],
            biases={
                window: layer_bias(bias, positions, cache.positions, window, shape, attention)
                for window in {layer.sliding_window for layer in a.layers}
            },
            attention=attention,
            ahead=mx.default_device().type == mx.cpu and len(positions) <= FEW,
        )

    def run_layers(
        self, x: mx.array, rows: Rows, cache: Cache, first: int = 0, stop: int | None = None
    ) -> tuple[mx.array, list[mx.array | None]]:
        """x (L, E), the input of layer `first` -> what the layer before `stop` gives, and the masses of each."""
        masses = []
        for block, layer in zip(self.blocks[first:stop], self.architecture.layers[first:stop], strict=True):
            rope = None if layer.rope is None else rows.rotation[layer.rope]
            x, mass = block(x, rope, rows.biases[layer.sliding_window], cache, rows.attention)
            masses.append(mass)
            if rows.ahead:
                mx.async_eval(x)  # type: ignore[no-untyped-call]
        return x, masses

    def remember(self, x: mx.array, rows: Rows, cache: Cache, first: int) -> None:
        """Write keys and values as if x (L, E) were the input of every layer from `first` on (CALM, arXiv
        2207.07061)."""
        for block, layer in zip(self.blocks[first:], self.architecture.layers[first:], strict=True):
            block.remember(x, None if layer.rope is None else rows.rotation[layer.rope], cache)

    def logits(self, x: mx.array, head: Linear | None = None) -> mx.array:
        """x (L, E) -> (L, V) float32; or what another head, of some of the vocabulary, makes of it."""
        a = self.architecture
        y = (head or self.head)(self.norm(x)).astype(mx.float32)
        if a.logits_scale != 1.0:
            y = y * a.logits_scale
        if a.final_logit_softcapping is not None:
            y = mx.tanh(y / a.final_logit_softcapping) * a.final_logit_softcapping
        return y
