"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): what a slot keeps is one small vector for all heads.

Keys and values would be products of it. Instead the queries are taken into the space of the latent and what attention
finds there is taken out of it, so that nothing is made of a slot again: one key/value head of C + R numbers, C of the
latent, R rotated; its first C are the values.
"""

from __future__ import annotations

from tempo_mlx.architecture.architecture import Attention as Shape
from tempo_mlx.mlx import mx
from tempo_mlx.model.attention import Rows, attend, kind_of
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.linear import Concatenated, Linear, RMSNorm

LATENT_EPS = 1e-6  # of the norms inside, whatever the model's own is


class LatentAttention:
    """x (L, E), normed -> (L, E) and the attention mass. query: the linears and norms that make queries of x."""

    def __init__(
        self,
        part: Shape,
        index: int,
        query: tuple[Linear | RMSNorm, ...],
        latent: Linear,
        latent_norm: RMSNorm,
        into: mx.array,
        out_of: mx.array,
        output: Linear,
    ) -> None:
        """into (H, nope, C), out_of (H, C, value dim): the two parts of `kv_b_proj`."""
        assert part.latent is not None
        self.part, self.index, self.sizes = part, index, part.latent
        self.query, self.latent, self.latent_norm = query, latent, latent_norm
        self.into, self.out_of, self.output = into, out_of, output
        self.kind = kind_of(part)

    def __call__(self, x: mx.array, rows: Rows, cache: Cache) -> tuple[mx.array, mx.array | None]:
        part, sizes = self.part, self.sizes
        q = x
        for step in self.query:
            q = step(q)
        q = q.reshape(len(x), part.num_attention_heads, -1)
        plain, turning = mx.split(q, [sizes.qk_nope_head_dim], axis=-1)
        turning = rows.rotation[part.rope or 0, sizes.qk_rope_head_dim](turning)
        inside = plain.transpose(1, 0, 2) @ self.into  # (H, L, C)
        q = mx.concatenate([inside, turning.transpose(1, 0, 2)], axis=-1)
        if part.query_scaling is not None:
            q = q * rows.growth[part.query_scaling].astype(q.dtype)
        out, mass = attend(self, q, self.kept(x, rows), None, rows, cache)
        out = out.reshape(len(x), part.num_attention_heads, -1).transpose(1, 0, 2) @ self.out_of
        return self.output(out.transpose(1, 0, 2).reshape(len(x), -1)), mass

    def kept(self, x: mx.array, rows: Rows) -> mx.array:
        """(1, L, C + R): the latent of x (L, E), and what is rotated."""
        sizes = self.sizes
        small, turning = mx.split(self.latent(x), [sizes.kv_lora_rank], axis=-1)
        turning = rows.rotation[self.part.rope or 0, sizes.qk_rope_head_dim](turning[:, None])[:, 0]
        return mx.concatenate([self.latent_norm(small), turning], axis=-1)[None]

    def remember(self, x: mx.array, rows: Rows, cache: Cache) -> None:
        cache.append(self.index, self.kept(x, rows), None)

    def linears(self) -> list[Linear | Concatenated]:
        return [*(step for step in self.query if isinstance(step, Linear)), self.latent, self.output]

    def arrays(self) -> list[mx.array]:
        return [*(a for linear in self.linears() for a in linear.arrays()), self.into, self.out_of]
