"""The three kinds of weights a block is made of."""

from __future__ import annotations

import platform
from dataclasses import asdict
from itertools import groupby

from tempo_mlx import blas, few_rows
from tempo_mlx.mlx import mx
from tempo_mlx.model import device
from tempo_mlx.weights.tensor import Layout

TILE = 8  # rows that OpenBLAS's kernels for x86-64 take at once; 5 to 7 take up to half as long again as 8 (measured)


def fills_tiles(x: mx.array) -> bool:
    """Whether OpenBLAS multiplies rows x (L, in) sooner with rows of zeros under them, up to a whole tile."""
    library = blas.ensure()
    return (
        len(x) % TILE > TILE // 2
        and (few_rows.ROWS if library.few_rows else 0) < len(x) < 4 * TILE
        and x.dtype == mx.float32
        and not device.on_gpu()
        and library.name == "OpenBLAS"
        and platform.machine() == "x86_64"
    )


class Linear:
    """x (L, in) -> (L, out). `weight` is (out, in) as stored."""

    def __init__(self, weight: mx.array, bias: mx.array | None = None) -> None:
        self.weight = weight
        self.transposed = weight.T  # a view
        self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        if self.bias is not None and device.on_gpu():
            return mx.addmm(self.bias, x, self.transposed)  # one operation there
        if fills_tiles(x):
            y = (mx.pad(x, [(0, -len(x) % TILE), (0, 0)]) @ self.transposed)[: len(x)]
        else:
            y = x @ self.transposed
        return y if self.bias is None else y + self.bias

    def arrays(self) -> list[mx.array]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def choose(self, index: mx.array) -> Linear:
        """The linear whose outputs are some of this one's."""
        return Linear(self.weight[index], None if self.bias is None else self.bias[index])


class QuantizedLinear(Linear):
    """A Linear whose weight stays in one of MLX's layouts: packed (out, in * bits / 32); scales and, if affine, biases
    (out, in / group).
    """

    def __init__(
        self,
        packed: mx.array,
        scales: mx.array,
        biases: mx.array | None,
        layout: Layout,
        bias: mx.array | None = None,
    ) -> None:
        self.packed, self.scales, self.biases = packed, scales, biases
        self.layout, self.bias = layout, bias
        self._options = asdict(layout)  # as MLX's functions want it

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.quantized_matmul(x, self.packed, self.scales, self.biases, transpose=True, **self._options)
        return y if self.bias is None else y + self.bias

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.packed, self.scales, self.biases, self.bias) if a is not None]

    def choose(self, index: mx.array) -> Linear:
        bias = None if self.bias is None else self.bias[index]
        biases = None if self.biases is None else self.biases[index]
        return QuantizedLinear(self.packed[index], self.scales[index], biases, self.layout, bias)

    def rows(self, index: mx.array) -> mx.array:
        biases = None if self.biases is None else self.biases[index]
        return mx.dequantize(self.packed[index], self.scales[index], biases, **self._options)


class LowRank(Linear):
    """A linear without bias, and beside it an adapter: (linear(x) + x A B) * factors + bias."""

    def __init__(
        self,
        linear: Linear,
        into: mx.array,
        out_of: mx.array,
        factors: mx.array | None,
        bias: mx.array | None,
    ) -> None:
        self.linear, self.into, self.out_of, self.factors, self.bias = linear, into, out_of, factors, bias

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x) + (x @ self.into) @ self.out_of
        if self.factors is not None:
            y = y * self.factors
        return y if self.bias is None else y + self.bias

    def arrays(self) -> list[mx.array]:
        own = (self.into, self.out_of, self.factors, self.bias)
        return [*self.linear.arrays(), *(a for a in own if a is not None)]

    def choose(self, index: mx.array) -> Linear:
        factors, bias = (None if each is None else each[index] for each in (self.factors, self.bias))
        return LowRank(self.linear.choose(index), self.into, self.out_of[:, index], factors, bias)


class Embedding:
    """Token ids (L,) -> (L, E), from the same weight a tied head uses."""

    def __init__(self, linear: Linear, dtype: mx.Dtype) -> None:
        self.linear = linear
        self.dtype = dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        if isinstance(self.linear, QuantizedLinear):
            return self.linear.rows(tokens).astype(self.dtype)
        return self.linear.weight[tokens].astype(self.dtype)


class RMSNorm:
    """x / rms(x) * weight, over the last axis (E)."""

    def __init__(self, weight: mx.array, eps: float) -> None:
        self.weight = weight
        self.eps = eps
        size = weight.shape[0]
        self.scaled: mx.array = weight * size**0.5  # the mean of the squares is their sum / E
        self.least = mx.array(eps * size, mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype != mx.float32 or device.on_gpu():
            return mx.fast.rms_norm(x, self.weight, self.eps)
        return x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + self.least) * self.scaled


class LayerNorm:
    """(x - mean) / deviation * weight + bias, over the last axis; float32 inside."""

    def __init__(self, weight: mx.array | None, bias: mx.array | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: mx.array) -> mx.array:
        if self.weight is not None and self.weight.ndim > 1:  # of every head its own
            return mx.fast.layer_norm(x, None, self.bias, self.eps) * self.weight
        return mx.fast.layer_norm(x, self.weight, self.bias, self.eps)


Norm = RMSNorm | LayerNorm


class Concatenated:
    """Several linears over one input, their outputs side by side: for parts that cannot share one weight."""

    def __init__(self, parts: list[Linear]) -> None:
        self.parts = parts

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([part(x) for part in self.parts], axis=-1)

    def arrays(self) -> list[mx.array]:
        return [a for part in self.parts for a in part.arrays()]


def fuse(parts: list[Linear]) -> Linear | Concatenated:
    """As few products instead of several as can be: neighbours with the same layout become one."""
    runs = [list(run) for _, run in groupby(parts, _kind)]
    joined = [_joined(run) for run in runs]
    return joined[0] if len(joined) == 1 else Concatenated(joined)


def _kind(part: Linear) -> object:
    """Parts of one kind can be one product; one with an adapter stays alone."""
    return part.layout if isinstance(part, QuantizedLinear) else part if isinstance(part, LowRank) else None


def _joined(parts: list[Linear]) -> Linear:
    """Of one kind, which have all a bias or none."""
    if len(parts) == 1:
        return parts[0]
    biases = [p.bias for p in parts if p.bias is not None]
    bias = mx.concatenate(biases) if biases else None
    packed = [p for p in parts if isinstance(p, QuantizedLinear)]
    if not packed:
        return Linear(mx.concatenate([p.weight for p in parts]), bias)
    offsets = [p.biases for p in packed if p.biases is not None]
    return QuantizedLinear(
        mx.concatenate([p.packed for p in packed]),
        mx.concatenate([p.scales for p in packed]),
        mx.concatenate(offsets) if offsets else None,
        packed[0].layout,
        bias,
    )
