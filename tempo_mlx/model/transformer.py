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
from tempo_mlx.mlx import begin, mx
from tempo_mlx.model import device
from tempo_mlx.model.attention import Biases, Rows, Share, SoftmaxAttention, growth, kind_of
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.experts import Mixture
from tempo_mlx.model.failures import told_failures
from tempo_mlx.model.feedforward import FeedForward
from tempo_mlx.model.forward import Attention, Forward, Logits
from tempo_mlx.model.kernel_check import use_kernel
from tempo_mlx.model.kernels import layer_bias
from tempo_mlx.model.latent import LatentAttention
from tempo_mlx.model.linear import Concatenated, Linear, Norm
from tempo_mlx.model.recurrent import RecurrentLayer
from tempo_mlx.model.rope import rotations
from tempo_mlx.model.rotation import FEW, Rotation
from tempo_mlx.model.states import States
from tempo_mlx.model.streams import LayerStreams, OwnEmbeddings, OwnInput, Streams


@dataclass(frozen=True)
class Parts:
    """What a block is built of. What a layer does not have is None, or not in the table of norms."""

    norms: dict[str, Norm]  # before_attention, after_attention, before_mlp, after_mlp
    attention: SoftmaxAttention | LatentAttention | None = None
    recurrent: RecurrentLayer | None = None
    mlp: FeedForward | None = None
    experts: Mixture | None = None
    expert_norms: tuple[Norm, Norm, Norm] | None = None  # before experts, after MLP, after experts: Gemma 4's
    own: OwnInput | None = None
    streams: LayerStreams | None = None
    scalar: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        parts = (self.attention, self.recurrent, self.mlp, self.experts, self.streams)
        return [a for part in parts if part is not None for a in part.arrays()]


class Block:
    """One layer: x (L, E) -> (L, E) and, where asked for, the attention mass (S,)."""

    def __init__(self, architecture: Architecture, index: int, parts: Parts) -> None:
        self.index, self.parts = index, parts
        self.scale = architecture.residual_scale
        self.parallel = architecture.norm_placement.startswith("parallel")
        self.attention, self.recurrent = parts.attention, parts.recurrent
        self.mlp, self.experts = parts.mlp, parts.experts
        self.before_attention = parts.norms.get("before_attention")
        self.after_attention = parts.norms.get("after_attention")
        self.before_mlp = parts.norms.get("before_mlp")
        self.after_mlp = parts.norms.get("after_mlp")
        self.usual = (
            parts.streams is None and parts.own is None and parts.scalar is None and not self.parallel
        )

    def __call__(
        self, x: mx.array, rows: Rows, cache: Cache, own: mx.array | None = None
    ) -> tuple[mx.array, mx.array | None]:
        if not self.usual:
            return self.unusual(x, rows, cache, own)
        y, mass = self.mixed(self.before_attention(x) if self.before_attention else x, rows, cache)
        return self.fed(self.added(x, y, self.after_attention)), mass

    def added(self, x: mx.array, y: mx.array | None, norm: Norm | None) -> mx.array:
        """x (L, E) and what a part made of it; x alone where the layer has no such part."""
        if y is None:
            return x
        y = norm(y) if norm else y
        return x + (y if self.scale == 1.0 else y * self.scale)

    def mixed(self, x: mx.array, rows: Rows, cache: Cache) -> tuple[mx.array | None, mx.array | None]:
        """What attention and the recurrent part make of x (L, E), normed."""
        y = None if self.recurrent is None else self.recurrent(x, cache)
        if self.attention is None:
            return y, None
        found, mass = self.attention(x, rows, cache)
        return (found if y is None else y + found), mass

    def fed(self, x: mx.array) -> mx.array:
        """x (L, E) and what MLP and experts add to it."""
        return self.added(x, self.feed(self.before_mlp(x) if self.before_mlp else x, x), self.after_mlp)

    def feed(self, y: mx.array, x: mx.array) -> mx.array | None:
        """y: x (L, E), normed."""
        found = None if self.mlp is None else self.mlp(y)
        if self.experts is None:
            return found
        if self.parts.expert_norms is None:
            chosen = self.experts(y, y)
        else:
            before, after_mlp, after = self.parts.expert_norms
            if found is not None:
                found = after_mlp(found)
            chosen = after(self.experts(before(x), x))
        return chosen if found is None else chosen + found

    def unusual(
        self, x: mx.array, rows: Rows, cache: Cache, own: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """Layers whose parts stand otherwise than one after another."""
        if self.parallel:
            normed = self.before_attention(x) if self.before_attention else x
            mixed, mass = self.mixed(normed, rows, cache)
            fed = self.feed(self.before_mlp(x) if self.before_mlp else normed, x)
            return self.added(self.added(x, mixed, None), fed, None), mass
        streams, predicted = self.parts.streams, None
        if streams is not None:
            predicted = streams.predict(x)  # (T, L, E)
            x = predicted[streams.altup.active]
        normed = self.before_attention(x) if self.before_attention else x
        y, mass = self.mixed(normed, rows, cache)
        x = self.added(x, y, self.after_attention)
        if streams is not None:
            x = (x + streams.detour(normed)) / 2**0.5
        x = self.fed(x)
        if self.parts.own is not None:
            assert own is not None
            mine = own[:, self.index]
            if streams is not None and predicted is not None:
                return streams.correct(predicted, x, mine, self.parts.own), mass
            x = x + self.parts.own(x, mine)
        return (x if self.parts.scalar is None else x * self.parts.scalar), mass

    def linears(self) -> list[Linear | Concatenated]:
        """The products that every row takes part in."""
        parts = (self.attention, self.recurrent, self.mlp)
        return [linear for part in parts if part is not None for linear in part.linears()]

    def remember(self, x: mx.array, rows: Rows, cache: Cache) -> None:
        """Only write what later rows would see of x (L, E): its keys and values."""
        if self.attention is not None:
            self.attention.remember(self.before_attention(x) if self.before_attention else x, rows, cache)


class Transformer:
    """Embedding, blocks, final norm, head. Built by `mlx_backend.py`; every array is (out, in) as in the checkpoint."""

    def __init__(
        self,
        architecture: Architecture,
        embed: Callable[[mx.array], mx.array],
        blocks: list[Block],
        norm: Norm,
        head: Linear,
        info: dict[str, Any],
        dtype: mx.Dtype,
        kv_bits: int | None = None,
        *,
        embedding_norm: Norm | None = None,
        own: OwnEmbeddings | None = None,
        streams: Streams | None = None,
    ) -> None:
        self.architecture = architecture
        self.embed = embed
        self.blocks = blocks
        self.norm = norm
        self.head = head
        self.info = info
        self.dtype = dtype
        self.kv_bits = kv_bits
        self.embedding_norm, self.own, self.streams = embedding_norm, own, streams
        parts = [layer.attention for layer in architecture.layers if layer.attention is not None]
        self.kinds = {kind_of(part) for part in parts}
        self.turning = {
            (part.rope, part.latent.qk_rope_head_dim if part.latent else part.head_dim)
            for part in parts
            if part.rope is not None
        }
        self.growing = {part.query_scaling: part for part in parts if part.query_scaling}

    def new_cache(self) -> Cache:
        layers = [layer.attention for layer in self.architecture.layers]
        shapes = {
            i: part.cached for i, part in enumerate(layers) if part is not None and part.kv_from is None
        }
        recurrences = {
            key: each
            for block in self.blocks
            if block.recurrent is not None
            for key, each in block.recurrent.recurrences().items()
        }
        return Cache(shapes, self.dtype, self.kv_bits, States(recurrences) if recurrences else None)

    def embeddings(self, tokens: Sequence[int]) -> Float32s:
        """(n, E): the input embeddings of `tokens`."""
        return np.array(self.embed(mx.array(list(tokens))).astype(mx.float32))

    @told_failures()
    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: Cache,
        *,
        parents: Float32s | None = None,
        logits: Logits = "all",
        attention: Attention = False,
    ) -> Forward:
        """Run L rows and append them to the cache. See `model.forward` for the contract."""
        out, mass = self.described(
            tokens, positions, bias, cache, parents=parents, logits=logits, attention=attention
        )
        mx.eval(*cache.arrays(), *(y for y in (out, mass) if y is not None))
        return Forward(
            None if out is None else np.array(out, copy=False),
            None if mass is None else np.array(mass.astype(mx.float32)),
        )

    def described(
        self,
        tokens: Sequence[int] | Ints | mx.array,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: Cache,
        *,
        parents: Float32s | None = None,
        logits: Logits = "all",
        attention: Attention = False,
    ) -> tuple[mx.array | None, mx.array | None]:
        """Logits and attention mass of `forward`, and what it writes into the cache, as MLX is to compute them."""
        positions = np.asarray(positions, np.int64)
        cache.reserve(positions, parents)
        x, masses = self.through(tokens, self.rows(positions, bias, cache, attention), cache)
        cache.commit()
        out = None if logits == "none" else self.logits(x if logits == "all" else x[-1:])
        shares = [m for m in masses if m is not None]
        return out, mx.stack(shares) if shares else None  # (layers, S), or (layers, L, S) for "rows"

    def through(
        self, tokens: Sequence[int] | Ints | mx.array, rows: Rows, cache: Cache
    ) -> tuple[mx.array, list[mx.array | None]]:
        """Tokens (L,) -> what the last layer gives (L, E), and the masses of each."""
        ids = as_ids(tokens)
        x = self.embedded(ids)
        own = None if self.own is None else self.own(ids, x)
        x = x if self.streams is None else self.streams.split(x)
        x, masses = self.run_layers(x, rows, cache, own=own)
        return x if self.streams is None else self.streams.join(x), masses

    def embedded(self, tokens: Sequence[int] | Ints | mx.array) -> mx.array:
        """(L, E): what the first layer is given."""
        x = self.embed(as_ids(tokens))
        scale = self.architecture.embedding_scale
        x = x if scale == 1.0 else x * mx.array(scale, x.dtype)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def rows(
        self,
        positions: Ints,
        bias: Float32s | None,
        cache: Cache,
        attention: Attention = False,
    ) -> Rows:
        """Of the newest rows of `cache`, at these positions (L,), with this bias (L, S)."""
        turns = rotations(self.architecture.ropes, positions, cache.positions)
        return self.rows_of(positions, turns, self.biases(positions, bias, cache, attention), attention)

    def rows_of(
        self,
        positions: Ints,
        turns: Sequence[tuple[Float32s, Float32s]],
        biases: Biases,
        attention: Attention = False,
        shares: tuple[Share, ...] = (),
    ) -> Rows:
        """turns: of each rope, see `rotations`."""
        return Rows(
            positions=positions,
            rotation={
                (rope, width): Rotation(*turns[rope], width, self.architecture.ropes[rope].interleaved)
                for rope, width in self.turning
            },
            biases=biases,
            mass=attention,
            ahead=not device.on_gpu() and len(positions) <= FEW,
            growth={scaling: growth(part, positions) for scaling, part in self.growing.items()},
            shares=shares,
        )

    def biases(
        self, positions: Ints, bias: Float32s | None, cache: Cache, attention: Attention = False
    ) -> Biases:
        """Of each kind of layer, that of the newest rows of `cache`."""
        return {
            (window, chunk, shape): layer_bias(
                bias,
                positions,
                cache.positions,
                window,
                shape,
                attention,
                chunk,
                use_kernel(shape, self.dtype),
            )
            for window, chunk, shape in self.kinds
        }

    def run_layers(
        self,
        x: mx.array,
        rows: Rows,
        cache: Cache,
        first: int = 0,
        stop: int | None = None,
        own: mx.array | None = None,
    ) -> tuple[mx.array, list[mx.array | None]]:
        """x (L, E), the input of layer `first` -> what the layer before `stop` gives, and the masses of each."""
        masses = []
        for block in self.blocks[first:stop]:
            x, mass = block(x, rows, cache, own)
            masses.append(mass)
            if rows.ahead:
                begin(x)
        return x, masses

    def remember(self, x: mx.array, rows: Rows, cache: Cache, first: int) -> None:
        """Write keys and values as if x (L, E) were the input of every layer from `first` on (CALM, arXiv
        2207.07061)."""
        for block in self.blocks[first:]:
            block.remember(x, rows, cache)

    def logits(self, x: mx.array, head: Linear | None = None) -> mx.array:
        """x (L, E) -> (L, V) float32; or what another head, of some of the vocabulary, makes of it."""
        a = self.architecture
        y = (head or self.head)(self.norm(x)).astype(mx.float32)
        if a.logits_scale != 1.0:
            y = y * a.logits_scale
        if a.final_logit_softcapping is not None:
            y = mx.tanh(y / a.final_logit_softcapping) * a.final_logit_softcapping
        return y


def as_ids(tokens: Sequence[int] | Ints | mx.array) -> mx.array:
    return tokens if isinstance(tokens, mx.array) else mx.array(np.asarray(tokens, np.int32))
