"""What Gemma 3n and 4 have beside their layers: an embedding of the token for each layer, and several streams of rows
of which a layer computes one (AltUp, arXiv 2301.13310). T streams, L rows, E model dim, P width of a layer's embedding.
"""

from __future__ import annotations

import math

from tempo_mlx.architecture.architecture import AltUp
from tempo_mlx.mlx import mx
from tempo_mlx.model.feedforward import Gate
from tempo_mlx.model.linear import Embedding, Linear, RMSNorm


class OwnEmbeddings:
    """tokens (L,), x (L, E): the input embeddings -> (L, layers, P), what each layer is given of its own."""

    def __init__(self, embed: Embedding, projection: Linear, norm: RMSNorm, layers: int, width: int) -> None:
        self.embed, self.projection, self.norm = embed, projection, norm
        self.layers, self.width = layers, width

    def __call__(self, tokens: mx.array, x: mx.array) -> mx.array:
        shape = (len(tokens), self.layers, self.width)
        found = (self.embed(tokens) * math.sqrt(self.width)).reshape(shape)
        projected = self.norm((self.projection(x) / math.sqrt(x.shape[-1])).reshape(shape))
        return (projected + found) * math.sqrt(0.5)


class OwnInput:
    """x (L, E), own (L, P) -> (L, E): what a layer adds because of the token's embedding for it."""

    def __init__(self, gate: Linear, projection: Linear, norm: RMSNorm, activation: Gate) -> None:
        self.gate, self.projection, self.norm, self.activation = gate, projection, norm, activation

    def __call__(self, x: mx.array, own: mx.array) -> mx.array:
        return self.norm(self.projection(self.activation(self.gate(x), own)))


class LayerStreams:
    """A layer's part of AltUp: guesses what the layer would make of every stream, and corrects them by what it made of
    one. Also the low-rank detour around attention (laurel)."""

    def __init__(
        self,
        altup: AltUp,
        linears: dict[str, Linear],
        router_norm: RMSNorm,
        output_scale: mx.array,
        laurel_norm: RMSNorm,
    ) -> None:
        self.altup, self.linears, self.router_norm = altup, linears, router_norm
        self.output_scale, self.laurel_norm = output_scale, laurel_norm

    def predict(self, x: mx.array) -> mx.array:
        """x (T, L, E) -> (T, L, E)."""
        mixing = self.linears["prediction_coefs"](self.modalities(x[self.altup.active]))
        mixing = mixing.reshape(-1, self.altup.inputs, self.altup.inputs)  # (L, to, from)
        return x + (mixing @ x.swapaxes(0, 1)).swapaxes(0, 1)

    def correct(self, predicted: mx.array, x: mx.array, own: mx.array, add: OwnInput) -> mx.array:
        """predicted (T, L, E), x (L, E): what the layer made of the active one -> (T, L, E)."""
        scale = self.linears["correction_coefs"](self.modalities(x)) + 1.0  # (L, T)
        streams = predicted + (x - predicted[self.altup.active])[None] * scale.T[..., None]
        first = streams[self.altup.active]
        first = first * self.output_scale if self.altup.correct_scale else first
        return mx.concatenate([streams[:1], streams[1:] + add(first, own)[None]])

    def modalities(self, x: mx.array) -> mx.array:
        return mx.tanh(self.linears["modality_router"](self.router_norm(x) * x.shape[-1] ** -1.0))

    def detour(self, x: mx.array) -> mx.array:
        return x + self.laurel_norm(self.linears["linear_right"](self.linears["linear_left"](x)))

    def arrays(self) -> list[mx.array]:
        return [a for linear in self.linears.values() for a in linear.arrays()]


class Streams:
    """The first T streams of the input embeddings, and the last ones as one again."""

    def __init__(self, into: list[Linear], out_of: list[Linear]) -> None:
        self.into, self.out_of = into, out_of

    def split(self, x: mx.array) -> mx.array:
        return mx.stack([x, *(as_large(linear(x), x) for linear in self.into)])

    def join(self, x: mx.array) -> mx.array:
        rest = [as_large(linear(x[i + 1]), x[0]) for i, linear in enumerate(self.out_of)]
        return mx.stack([x[0], *rest]).mean(axis=0)


def as_large(x: mx.array, like: mx.array) -> mx.array:
    """x scaled to the root mean square of `like`, row by row."""
    wanted = mx.sqrt(mx.square(like).mean(axis=-1, keepdims=True))
    return x * wanted / mx.sqrt(mx.maximum(mx.square(x).mean(axis=-1, keepdims=True), 1e-5))
