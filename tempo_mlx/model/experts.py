"""Mixtures of experts: each row goes through a few of many MLPs, chosen by a router.

The rows' experts are gathered into one product (`gather_mm`, or `gather_qmm` where weights stay packed); many rows are
sorted by expert first, so that each one's weights are read once. L rows, n experts, k of them for a row.
"""

from __future__ import annotations

from dataclasses import asdict

from tempo_mlx.architecture.architecture import Experts
from tempo_mlx.mlx import mx
from tempo_mlx.model import device
from tempo_mlx.model.feedforward import ACTIVATIONS
from tempo_mlx.model.linear import Linear
from tempo_mlx.weights.tensor import Layout

SORTED_FROM = 64  # rows times k: fewer are gathered as they stand


class ExpertLinear:
    """One weight (out, in) for each expert, (n, out, in); bias (n, out)."""

    def __init__(self, weight: mx.array, bias: mx.array | None = None) -> None:
        self.transposed, self.bias = weight.swapaxes(1, 2), bias

    def __call__(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        """x (..., 1, in), chosen (...) -> (..., 1, out)."""
        if x.dtype == mx.float32 or device.on_gpu():
            y = mx.gather_mm(x, self.transposed, rhs_indices=chosen, sorted_indices=ordered)
        else:
            y = self.widened(x, chosen, ordered)
        return self.biased(y, chosen)

    def widened(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        """The same by products in float32, the only ones that MLX gathers on a CPU: of the experts that are chosen, or
        of all where as many are."""
        wide = x.astype(mx.float32)
        if chosen.size < len(self.transposed):
            y = wide @ self.transposed[chosen].astype(mx.float32)
        else:
            weights = self.transposed.astype(mx.float32)
            y = mx.gather_mm(wide, weights, rhs_indices=chosen, sorted_indices=ordered)
        return y.astype(x.dtype)

    def biased(self, y: mx.array, chosen: mx.array) -> mx.array:
        return y if self.bias is None else y + self.bias[chosen][..., None, :]

    def arrays(self) -> list[mx.array]:
        return [self.transposed] if self.bias is None else [self.transposed, self.bias]


class QuantizedExpertLinear(ExpertLinear):
    """The same with weights in one of MLX's layouts."""

    def __init__(
        self,
        packed: mx.array,
        scales: mx.array,
        biases: mx.array | None,
        layout: Layout,
        bias: mx.array | None = None,
    ) -> None:
        self.packed, self.scales, self.biases, self.bias = packed, scales, biases, bias
        self._options = asdict(layout)

    def __call__(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        y = mx.gather_qmm(
            x,
            self.packed,
            self.scales,
            self.biases,
            rhs_indices=chosen,
            transpose=True,
            sorted_indices=ordered,
            **self._options,
        )
        return self.biased(y, chosen)

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.packed, self.scales, self.biases, self.bias) if a is not None]


class Mixture:
    """x (L, E) -> (L, E)."""

    def __init__(
        self,
        part: Experts,
        router: Router,
        gate: ExpertLinear | None,
        up: ExpertLinear,
        down: ExpertLinear,
    ) -> None:
        self.part, self.router, self.gate, self.up, self.down = part, router, gate, up, down
        self.activation = ACTIVATIONS[part.hidden_act]

    def __call__(self, x: mx.array, seen: mx.array) -> mx.array:
        """seen (L, E): what the router is given, which is x but in Gemma 4."""
        chosen, shares = self.router(seen)  # (L, k) each
        rows, count = chosen.shape
        given = (
            x[:, None] * shares[..., None].astype(x.dtype)
            if self.part.input_scaled
            else mx.repeat(x[:, None], count, axis=1)
        )
        flat, which = given.reshape(rows * count, 1, -1), chosen.reshape(-1)
        ordered = rows * count >= SORTED_FROM
        if ordered:
            order = mx.argsort(which)
            y = self.apply(flat[order], which[order], True)[mx.argsort(order)]
        else:
            y = self.apply(flat, which, False)
        y = y.reshape(rows, count, -1)
        return (
            y.sum(axis=1) if self.part.input_scaled else (y * shares[..., None].astype(y.dtype)).sum(axis=1)
        )

    def apply(self, x: mx.array, chosen: mx.array, ordered: bool) -> mx.array:
        part = self.part
        up = self.up(x, chosen, ordered)
        if self.gate is None:
            return self.down(self.activation(up, mx.array(1.0, up.dtype)), chosen, ordered)
        gate = self.gate(x, chosen, ordered)
        if part.limit is not None:
            return self.down(_limited(gate, up, part.limit, part.alpha), chosen, ordered)
        return self.down(self.activation(gate, up), chosen, ordered)

    def arrays(self) -> list[mx.array]:
        parts = [self.up, self.down] if self.gate is None else [self.gate, self.up, self.down]
        return [*self.router.arrays(), *(a for part in parts for a in part.arrays())]


@device.fused
def _limited(gate: mx.array, up: mx.array, limit: float, alpha: float) -> mx.array:
    """gpt-oss's activation."""
    gate, up = mx.minimum(gate, limit), mx.clip(up, -limit, limit)
    return (up + 1) * gate * mx.sigmoid(gate * alpha)


class Router:
    """Which experts a row goes through, best first, and with what weights. Ties go to the lower number, everywhere."""

    def __init__(
        self,
        part: Experts,
        linear: Linear,
        correction: mx.array | None = None,
        scale: mx.array | None = None,
        per_expert: mx.array | None = None,
        eps: float = 0.0,
    ) -> None:
        """scale (E,), per_expert (n,): Gemma 4's, whose router norms its input with `eps`."""
        self.part, self.linear, self.correction = part, linear, correction
        # A softmax over all experts, normalised over the chosen, is one over those alone: fewer operations.
        normalised = part.router == "softmax" and part.normalised and correction is None and part.groups == 1
        self.softmax_over_chosen = part.router == "chosen" or normalised
        self.scale, self.per_expert, self.eps = scale, per_expert, eps

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        part = self.part
        if self.scale is not None:
            y = x.astype(mx.float32)
            y = y * mx.rsqrt(mx.square(y).mean(axis=-1, keepdims=True) + self.eps)
            x = y * self.scale * x.shape[-1] ** -0.5
        scores = self.linear(x.astype(mx.float32)).astype(mx.float32)
        if part.router == "sparsemixer":
            return sparsemixer(scores, part.jitter)
        if self.softmax_over_chosen:
            chosen = best(scores, part.active)
            shares = mx.softmax(mx.take_along_axis(scores, chosen, axis=1), axis=-1)
        else:
            shares = mx.sigmoid(scores) if part.router == "sigmoid" else mx.softmax(scores, axis=-1)
            ranking = shares if self.correction is None else shares + self.correction
            chosen = best(self.within_groups(ranking), part.active)
            shares = mx.take_along_axis(shares, chosen, axis=1)
            if part.normalised:
                shares = shares / (shares.sum(axis=-1, keepdims=True) + 1e-20)
        shares = shares if part.scale == 1.0 else shares * part.scale
        return chosen, shares if self.per_expert is None else shares * self.per_expert[chosen]

    def within_groups(self, ranking: mx.array) -> mx.array:
        """-inf outside the best groups, a group being as good as the sum of its best few."""
        part = self.part
        if part.groups == 1:
            return ranking
        grouped = ranking.reshape(len(ranking), part.groups, -1)
        good = mx.sort(grouped, axis=-1)[..., -part.group_top :].sum(axis=-1)
        inside = mx.zeros(good.shape, mx.bool_)
        inside = mx.put_along_axis(inside, best(good, part.groups_active), mx.array(True), axis=1)
        return mx.where(inside[..., None], grouped, -mx.inf).reshape(ranking.shape)

    def arrays(self) -> list[mx.array]:
        own = (self.correction, self.scale, self.per_expert)
        return [*self.linear.arrays(), *(a for a in own if a is not None)]


def best(scores: mx.array, count: int) -> mx.array:
    """The places of the highest in each row, in order: MLX's sort keeps equal ones in theirs."""
    return mx.argsort(-scores, axis=-1)[:, :count]


def sparsemixer(scores: mx.array, jitter: float) -> tuple[mx.array, mx.array]:
    """Phi-3.5-MoE's choice of two; source: arXiv 2409.12136."""
    chosen, shares, left = [], [], scores
    for _ in range(2):
        top = left.max(axis=-1, keepdims=True)
        near = (top - scores) / mx.maximum(mx.abs(scores), top) <= 2 * jitter
        place = best(left, 1)
        chosen.append(place)
        weights = mx.softmax(mx.where(near, left, -mx.inf), axis=-1)
        shares.append(mx.take_along_axis(weights, place, axis=1))
        left = mx.put_along_axis(left, place, mx.array(-mx.inf), axis=1)
    return mx.concatenate(chosen, axis=1), mx.concatenate(shares, axis=1)
