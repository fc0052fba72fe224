"""What a decoder chooses from, computed where the model computes, and passes that are under way before they are asked
for.

Instead of the logits of every row, (k, V) float32, about a kilobyte comes back: the best tokens of the rows' mixture,
and each row's log-probabilities of them. What a decoder makes of those is what it makes of whole distributions.

Shapes: k rows, V vocabulary, W tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.mlx import begin, mx
from tempo_mlx.model import device
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.failures import told_failures
from tempo_mlx.model.forward import Attention, Best, Choice, Chooser, Model, Pass
from tempo_mlx.model.transformer import Transformer

BEYOND = (
    8  # tokens more than asked for, so that of equally probable ones at the border the lower ids are there
)
LARGEST_PLACE = 1.0 - 2.0**-23  # in float32, times a sum, less than the sum


@dataclass(frozen=True)
class Queued:
    """A pass that is being computed: tokens (W,), log_probs (k, W), normal (k,), which is finite if the row is."""

    tokens: mx.array
    log_probs: mx.array
    normal: mx.array
    attention_mass: mx.array | None

    @told_failures()
    def read(self) -> Best:
        tokens = np.array(self.tokens.astype(mx.int32)).astype(np.int64)
        order = np.argsort(tokens)
        mass = None if self.attention_mass is None else np.array(self.attention_mass.astype(mx.float32))
        return Best(tokens[order], np.array(self.log_probs)[:, order], np.array(self.normal), mass)


class OnDevice:
    """See `model.forward.Chooser`."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    @told_failures()
    def begin(
        self,
        tokens: Sequence[int] | Pass,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: Cache,
        choice: Choice,
        *,
        parents: Float32s | None = None,
        attention: Attention = False,
    ) -> Queued:
        given = tokens.tokens if isinstance(tokens, Queued) else mx.array(np.asarray(tokens, np.int32))
        logits, mass = self.model.described(
            given, positions, bias, cache, parents=parents, attention=attention
        )
        assert logits is not None
        queued = Queued(*chosen(logits, choice), mass)
        wanted = (queued.tokens, queued.log_probs, queued.normal, *(() if mass is None else (mass,)))
        begin(*wanted, *cache.arrays())
        return queued


def chosen(logits: mx.array, choice: Choice) -> tuple[mx.array, mx.array, mx.array]:
    """Of logits (k, V) float32: tokens (W,), their log-probabilities (k, W), and what those are normalised by, (k,)."""
    scaled = logits - logits.max(axis=-1, keepdims=True)
    if choice.scale != 1.0:
        scaled = scaled * choice.scale
    normal = mx.logsumexp(scaled, axis=-1)
    joint = scaled
    if len(logits) > 1:
        with np.errstate(divide="ignore"):  # a row of no weight
            shares = mx.array(np.log(choice.weights).astype(np.float32)) - normal
        joint = scaled + shares[:, None]
    if choice.excluded:  # and the best of the others does not underflow, however improbable it is
        joint = mx.array(joint)
        joint[:, mx.array(choice.excluded)] = -mx.inf
        joint = joint - joint.max()
    mixed = joint.reshape(-1) if len(logits) == 1 else mx.exp(joint).sum(axis=0)
    tokens = best(mixed, choice.count) if choice.place is None else drawn(mixed, choice.place)
    return tokens, mx.take(scaled, tokens, axis=1) - normal[:, None], normal


def best(mixed: mx.array, count: int) -> mx.array:
    """The most probable tokens, in no order."""
    if count == 1:
        return mx.argmax(mixed, keepdims=True)
    rest = max(0, mixed.size - count - BEYOND)
    return mx.argpartition(mixed, rest)[rest:] if rest else mx.arange(mixed.size)


def drawn(mixed: mx.array, place: float) -> mx.array:
    """The token at `place`, 0..1, of one row's cumulated probabilities; as decode/selection.py draws it."""
    mass = mx.exp(mixed)
    cumulative = mx.cumsum(mass)
    past = cumulative > cumulative[-1] * min(place, LARGEST_PLACE)
    return mx.argmax(past & (mass > 0), keepdims=True)


def chooser_of(model: Model) -> Chooser | None:
    """None where distributions are to be had at once: on the CPU, and of models that are no MLX transformer alone."""
    return OnDevice(model) if isinstance(model, Transformer) and device.on_gpu() else None
