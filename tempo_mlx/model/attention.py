"""Attention of one layer: what it makes of the newest rows, and what it keeps of them in the cache.

Letters as in transformer.py: L new rows, S slots, H query heads, K key/value heads, D head dim, E model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tempo_mlx.architecture.architecture import Attention as Shape
from tempo_mlx.arrays import Ints
from tempo_mlx.mlx import mx
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.forward import Attention as MassWanted
from tempo_mlx.model.kernels import CompactBias, lattice_attention
from tempo_mlx.model.linear import Concatenated, Linear, Norm, RMSNorm
from tempo_mlx.model.rotation import Rotation

Kind = tuple[int | None, int | None, tuple[int, int, int]]  # window, chunk, and heads, of a layer's bias
Biases = dict[Kind, CompactBias | mx.array | None]  # who sees whom, as `lattice_attention` takes it


@dataclass(frozen=True)
class Share:
    """Those of a pass's rows, up to row `stop`, that are of one cache, where not all are of the same (together.py)."""

    stop: int
    cache: Cache
    biases: Biases


@dataclass(frozen=True)
class Rows:
    """What a pass knows of its L rows, the newest of the cache, before any layer runs: made once, used by all."""

    positions: Ints
    rotation: dict[tuple[int, int], Rotation]  # by kind of rope and head dim
    biases: Biases
    mass: MassWanted
    ahead: bool  # the CPU computes a layer while the next one is being described
    growth: dict[object, mx.array] = field(default_factory=dict)  # by query scaling: (L, 1), of queries
    shares: tuple[Share, ...] = ()  # none: all are of the cache that goes with them


def kind_of(part: Shape) -> Kind:
    """Layers of one kind have the same bias."""
    groups, width, _ = part.cached
    return part.sliding_window, part.attention_chunk, (part.num_attention_heads, groups, width)


class SoftmaxAttention:
    """x (L, E), normed -> (L, E) and the attention mass. `qkv`: E -> (H + 2K) D, without what the layer lacks."""

    def __init__(
        self,
        part: Shape,
        index: int,
        qkv: Linear | Concatenated,
        output: Linear,
        query_norm: Norm | None = None,
        key_norm: Norm | None = None,
        value_norm: RMSNorm | None = None,
        sinks: mx.array | None = None,
    ) -> None:
        self.part, self.index = part, index
        self.qkv, self.output, self.sinks = qkv, output, sinks
        self.query_norm, self.key_norm, self.value_norm = query_norm, key_norm, value_norm
        self.kind = kind_of(part)
        self.usual = not (part.gated or part.keys_are_values or part.value_norm or part.norm_after_rope)
        self.usual = self.usual and part.kv_from is None and part.clip_qkv is None and part.key_scale == 1.0
        self.usual = self.usual and part.query_scaling is None

    def __call__(self, x: mx.array, rows: Rows, cache: Cache) -> tuple[mx.array, mx.array | None]:
        part = self.part
        q, gate, k, v = self.projected(x, rows)
        out, mass = attend(self, q, k, v, rows, cache, self.sinks)
        if gate is not None:
            out = out * mx.sigmoid(gate)
        y = self.output(out)
        return y if part.output_scale == 1.0 else y * part.output_scale, mass

    def projected(
        self, x: mx.array, rows: Rows
    ) -> tuple[mx.array, mx.array | None, mx.array | None, mx.array | None]:
        """x (L, E) -> queries (H, L, D), what gates the output (L, H D), keys and values (K, L, D), None where another
        layer's are read.
        """
        x = x if self.part.input_scale == 1.0 else x * self.part.input_scale
        if not self.usual:
            return self.unusual(x, rows)
        q, k, v = self.project(x, rows)
        return q, None, k, v

    def project(self, x: mx.array, rows: Rows) -> tuple[mx.array, mx.array, mx.array]:
        """x (L, E) -> queries (H, L, D), keys and values (K, L, D)."""
        part = self.part
        heads, groups = part.num_attention_heads, part.num_key_value_heads
        rotation = self.rotation(rows)
        count = x.shape[0]
        qk, v = mx.split(
            self.qkv(x).reshape(count, heads + 2 * groups, part.head_dim), [heads + groups], axis=1
        )
        if self.query_norm is not None and self.key_norm is not None:
            q, k = mx.split(qk, [heads], axis=1)
            if part.qk_norm == "projection":
                q, k = q.reshape(count, -1), k.reshape(count, -1)
            qk = mx.concatenate([self.query_norm(q), self.key_norm(k)], axis=1)
            qk = qk.reshape(count, heads + groups, part.head_dim)
        if rotation is not None:
            qk = rotation(qk)
        q, k = mx.split(qk.transpose(1, 0, 2), [heads])  # (H, L, D), (K, L, D)
        return q, k, v.transpose(1, 0, 2)

    def rotation(self, rows: Rows) -> Rotation | None:
        return None if self.part.rope is None else rows.rotation[self.part.rope, self.part.head_dim]

    def unusual(
        self, x: mx.array, rows: Rows
    ) -> tuple[mx.array, mx.array | None, mx.array | None, mx.array | None]:
        """`projected` where a layer is not as most are."""
        part = self.part
        wide, narrow = (n * part.head_dim for n in (part.num_attention_heads, part.num_key_value_heads))
        y = self.qkv(x)
        gate = None
        if part.gated:
            q, y = mx.split(y, [2 * wide], axis=-1)
            q, gate = (
                t.reshape(len(x), -1) for t in mx.split(q.reshape(len(x), -1, 2 * part.head_dim), 2, axis=-1)
            )
        else:
            q, y = mx.split(y, [wide], axis=-1)
        q = self.heads(q, self.query_norm, rows)
        if part.query_scaling is not None:
            q = q * rows.growth[part.query_scaling].astype(q.dtype)
        if part.kv_from is not None:
            return q, gate, None, None
        k, v = (y, y) if part.keys_are_values else mx.split(y, [narrow], axis=-1)
        v = self.clipped(v).reshape(len(x), -1, part.head_dim)
        v = v if self.value_norm is None else self.value_norm(v)
        k = self.heads(k if part.key_scale == 1.0 else k * part.key_scale, self.key_norm, rows)
        return q, gate, k, v.transpose(1, 0, 2)

    def heads(self, y: mx.array, norm: Norm | None, rows: Rows) -> mx.array:
        """Queries or keys (L, heads D) as (heads, L, D), normed and rotated as the layer does."""
        part = self.part
        if part.qk_norm == "projection" and norm is not None:
            y = norm(y)
        y = self.clipped(y).reshape(len(y), -1, part.head_dim)
        norm = None if part.qk_norm == "projection" else norm
        if norm is not None and not part.norm_after_rope:
            y = norm(y)
        rotation = self.rotation(rows)
        y = y if rotation is None else rotation(y)
        if norm is not None and part.norm_after_rope:
            y = norm(y)
        return y.transpose(1, 0, 2)

    def clipped(self, y: mx.array) -> mx.array:
        bound = self.part.clip_qkv
        return y if bound is None else mx.clip(y, -bound, bound)

    def remember(self, x: mx.array, rows: Rows, cache: Cache) -> None:
        """Only write what later rows would see of x (L, E): its keys and values."""
        _, _, k, v = self.projected(x, rows)
        if k is not None:
            cache.append(self.index, k, v)

    def linears(self) -> list[Linear | Concatenated]:
        return [self.qkv, self.output]

    def arrays(self) -> list[mx.array]:
        return [*self.qkv.arrays(), *self.output.arrays(), *([] if self.sinks is None else [self.sinks])]


class Attending(Protocol):
    part: Shape
    index: int
    kind: Kind


def attend(
    layer: Attending,
    q: mx.array,
    k: mx.array | None,
    v: mx.array | None,
    rows: Rows,
    cache: Cache,
    sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array | None]:
    """Write keys and values of the newest rows, and what their queries find in their cache: (L, H D), and the mass.

    k: None where another layer's are read. v: None where keys begin with the values, or there are no keys.
    """
    if not rows.shares:
        return attend_in(layer, q, k, v, cache, rows.biases, rows.mass, sinks)
    cuts = [share.stop for share in rows.shares[:-1]]
    own_k, own_v = (
        [None] * len(rows.shares) if each is None else mx.split(each, cuts, axis=1) for each in (k, v)
    )
    parts = zip(rows.shares, mx.split(q, cuts, axis=1), own_k, own_v, strict=True)
    outs = [attend_in(layer, q, k, v, own.cache, own.biases, False, sinks)[0] for own, q, k, v in parts]
    return mx.concatenate(outs), None


def attend_in(
    layer: Attending,
    q: mx.array,
    k: mx.array | None,
    v: mx.array | None,
    cache: Cache,
    biases: Biases,
    mass: MassWanted,
    sinks: mx.array | None,
) -> tuple[mx.array, mx.array | None]:
    """`attend` of rows that are all of one cache."""
    part = layer.part
    if k is not None:
        keys, values = cache.append(layer.index, k, v)  # (K, S, D)
    else:
        assert part.kv_from is not None
        keys, values = cache.of(part.kv_from)
    if part.latent is not None:
        values = keys[..., : part.latent.kv_lora_rank]
    bias, scale, cap = biases[layer.kind], part.scale, part.softcap
    return lattice_attention(q, keys, values, bias, scale=scale, softcap=cap, mass=mass, sinks=sinks)


def growth(part: Shape, positions: Ints) -> mx.array:
    """(L, 1): what queries at these positions are multiplied with."""
    scaling = part.query_scaling
    assert scaling is not None
    turns = np.floor((positions + scaling.offset).astype(np.float32) / np.float32(scaling.period))
    return mx.array((1 + scaling.beta * np.log1p(turns)).astype(np.float32)[:, None])
