"""The MLP of a block: rows in, rows out, each for itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

from tempo_mlx.architecture.architecture import Mlp
from tempo_mlx.mlx import mx
from tempo_mlx.model.device import fused
from tempo_mlx.model.exponential import gated_silu
from tempo_mlx.model.linear import Concatenated, Linear

Gate = Callable[[mx.array, mx.array], mx.array]
TWICE = 2 * (2 / math.pi) ** 0.5  # since (1 + tanh z) / 2 is the sigmoid of 2 z
ACTIVATIONS: dict[str, Gate] = {  # of the gate, times what it lets through
    "silu": gated_silu,
    "gelu": fused(lambda x, up: x * (1 + mx.erf(x / 2**0.5)) / 2 * up),
    "gelu_tanh": fused(lambda x, up: mx.sigmoid(x * (TWICE + TWICE * 0.044715 * (x * x))) * (x * up)),
    "relu2": fused(lambda x, up: mx.square(mx.maximum(x, 0)) * up),
}


class FeedForward:
    """x (L, E) -> (L, E): down(act(gate x) up x), or down(act(up x)). `gate_up`: E -> 2 F, or E -> F."""

    def __init__(
        self,
        part: Mlp,
        gate_up: Linear | Concatenated,
        down: Linear,
        row_gate: Linear | None = None,
        xielu: tuple[mx.array, mx.array] | None = None,
    ) -> None:
        self.part, self.gate_up, self.down, self.row_gate = part, gate_up, down, row_gate
        self.activation = ACTIVATIONS.get(part.hidden_act, gated_silu)
        self.xielu = xielu
        self.plain = part.gated and not part.sparsity and part.gate_scale == part.output_scale == 1.0
        self.plain = self.plain and row_gate is None

    def __call__(self, x: mx.array) -> mx.array:
        if self.plain:
            gate, up = mx.split(self.gate_up(x), 2, axis=-1)  # (L, F) each
            return self.down(self.activation(gate, up))
        y = self.down(self.inner(self.gate_up(x)))
        y = y if self.part.output_scale == 1.0 else y * self.part.output_scale
        return y if self.row_gate is None else y * mx.sigmoid(self.row_gate(x))

    def inner(self, y: mx.array) -> mx.array:
        """(L, 2 F) or (L, F) -> (L, F), what `down` is given."""
        part = self.part
        if not part.gated:
            return self._xielu(y) if self.xielu is not None else self.activation(y, mx.array(1.0, y.dtype))
        gate, up = mx.split(y, 2, axis=-1)
        gate = gate if part.gate_scale == 1.0 else gate * part.gate_scale
        return self.activation(sparse(gate, part.sparsity) if part.sparsity else gate, up)

    def _xielu(self, x: mx.array, beta: float = 0.5) -> mx.array:
        """Source: arXiv 2411.13010."""
        assert self.xielu is not None
        positive, negative = (mx.logaddexp(each, mx.array(0.0, each.dtype)) for each in self.xielu)
        below = mx.expm1(mx.minimum(x, -1e-6)) - x
        y = mx.where(x > 0, positive * x * x + beta * x, (beta + negative) * below + beta * x)
        return y.astype(x.dtype)

    def linears(self) -> list[Linear | Concatenated]:
        return [self.gate_up, self.down]

    def arrays(self) -> list[mx.array]:
        gate = [] if self.row_gate is None else self.row_gate.arrays()
        return [*self.gate_up.arrays(), *self.down.arrays(), *gate, *(self.xielu or ())]


def sparse(gate: mx.array, share: float) -> mx.array:
    """Gemma 3n: what is above the quantile `share` of a normal distribution with the row's mean and deviation."""
    mean = gate.mean(axis=-1, keepdims=True)
    deviation = mx.sqrt(mx.square(gate - mean).mean(axis=-1, keepdims=True))
    return mx.maximum(gate - (mean + deviation * NormalDist().inv_cdf(share)), 0)
