"""Layers with a state instead of slots: Gated DeltaNet, short convolution, Mamba 2.

A layer projects its rows, runs them through a convolution (a state of the last W inputs) and, but for LFM2's, through a
recurrence with a matrix for a state (states.py runs both). For a prompt both go in chunks, by products of matrices.

L rows, W kernel width, C channels, H heads, N key or state dim, P value or head dim.
"""

from __future__ import annotations

import numpy as np

from tempo_mlx.architecture.architecture import DeltaNet, Mamba2, ShortConv
from tempo_mlx.mlx import mx
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.linear import Concatenated, Linear
from tempo_mlx.model.states import Inputs, Recurrence, State

CHUNK = 64  # rows of a chain that are products of matrices together
CONVOLUTION, MATRIX = 0, 1  # the two recurrences of a layer


class Window:
    """A convolution as a recurrence. state (W, C): the newest inputs, the latest first; weight (C, 1, W)."""

    def __init__(self, weight: mx.array, bias: mx.array | None) -> None:
        self.taps = weight[:, 0].T.astype(mx.float32)[::-1]  # (W, C), the latest first
        self.bias = None if bias is None else bias.astype(mx.float32)

    def start(self) -> State:
        return mx.zeros(self.taps.shape)

    def advance(self, states: State, inputs: Inputs) -> State:
        return mx.concatenate([inputs[0][:, None], states[:, :-1]], axis=1)

    def read(self, states: State, queries: Inputs, inputs: Inputs) -> mx.array:
        return self.biased((states * self.taps).sum(axis=1))

    def chain(self, state: State, inputs: Inputs, queries: Inputs | None) -> tuple[mx.array | None, State]:
        width, (x,) = len(self.taps), inputs
        whole = mx.concatenate([state[: width - 1][::-1], x]) if width > 1 else x  # (W - 1 + L, C), in order
        last = whole[-width:] if len(whole) >= width else mx.concatenate([state[::-1], x])[-width:]
        if queries is None:
            return None, last[::-1]
        rows = len(x)
        taps = [whole[width - 1 - back : width - 1 - back + rows] * self.taps[back] for back in range(width)]
        return self.biased(mx.stack(taps).sum(axis=0)), last[::-1]

    def biased(self, y: mx.array) -> mx.array:
        return y if self.bias is None else y + self.bias

    def arrays(self) -> list[mx.array]:
        return [self.taps] if self.bias is None else [self.taps, self.bias]


class Delta:
    """S = a (I - b k k^T) S + b k v^T. state (H, N, P); inputs k (L, H, N), v (L, H, P), b and log a (L, H)."""

    def __init__(self, part: DeltaNet) -> None:
        self.shape = (part.value_heads, part.key_dim, part.value_dim)

    def start(self) -> State:
        return mx.zeros(self.shape)

    def advance(self, states: State, inputs: Inputs) -> State:
        key, value, beta, decay = inputs
        states = states * mx.exp(decay)[..., None, None]
        known = (key[..., None, :] @ states)[..., 0, :]  # (n, H, P)
        return states + key[..., None] * ((value - known) * beta[..., None])[..., None, :]

    def read(self, states: State, queries: Inputs, inputs: Inputs) -> mx.array:
        return (queries[0][..., None, :] @ states)[..., 0, :]

    def chain(self, state: State, inputs: Inputs, queries: Inputs | None) -> tuple[mx.array | None, State]:
        """In chunks; source: Yang et al., arXiv 2406.06484, as transformers computes it."""
        seen = []
        for start in range(0, len(inputs[0]), CHUNK):
            part = slice(start, start + CHUNK)
            asked = None if queries is None else queries[0][part]
            y, state = self.chunk(state, tuple(each[part] for each in inputs), asked)
            if y is not None:
                seen.append(y)
        return (mx.concatenate(seen) if seen else None), state

    def chunk(self, state: State, inputs: Inputs, query: mx.array | None) -> tuple[mx.array | None, State]:
        key, value, beta, decay = (each.swapaxes(0, 1) for each in inputs)  # (H, L, ...)
        rows = key.shape[1]
        total = mx.cumsum(decay, axis=1)  # (H, L)
        between = _decays(total)  # (H, L, L)
        own = key * beta[..., None]
        mixing = (own @ key.swapaxes(1, 2)) * between * _mask(rows, -1)
        solved = unit_lower_inverse(mx.eye(rows) + mixing)
        values = solved @ (value * beta[..., None])
        keys = solved @ (own * mx.exp(total)[..., None])
        fresh = values - keys @ state  # (H, L, P): what each row adds beside its key
        left = key * between[:, -1, :, None]  # of each row's key at the last one
        state_after = state * mx.exp(total[:, -1])[:, None, None] + left.swapaxes(1, 2) @ fresh
        if query is None:
            return None, state_after
        asked = query.swapaxes(0, 1)
        within = (asked @ key.swapaxes(1, 2)) * between
        y = (asked * mx.exp(total)[..., None]) @ state + within @ fresh
        return y.swapaxes(0, 1), state_after


class Decaying:
    """S = exp(d) S + x B^T. state (H, P, N); inputs x (L, H, P), B (L, H, N), d (L, H); queries C (L, H, N)."""

    def __init__(self, part: Mamba2) -> None:
        self.shape = (part.heads, part.head_dim, part.state)

    def start(self) -> State:
        return mx.zeros(self.shape)

    def advance(self, states: State, inputs: Inputs) -> State:
        x, b, decay = inputs
        return states * mx.exp(decay)[..., None, None] + x[..., None] * b[..., None, :]

    def read(self, states: State, queries: Inputs, inputs: Inputs) -> mx.array:
        return (states @ queries[0][..., None])[..., 0]

    def chain(self, state: State, inputs: Inputs, queries: Inputs | None) -> tuple[mx.array | None, State]:
        """In chunks; source: state space duality, arXiv 2405.21060."""
        seen = []
        for start in range(0, len(inputs[0]), CHUNK):
            part = slice(start, start + CHUNK)
            x, b, decay = (each[part].swapaxes(0, 1) for each in inputs)  # (H, L, ...)
            total = mx.cumsum(decay, axis=1)
            between = _decays(total)
            if queries is not None:
                c = queries[0][part].swapaxes(0, 1)
                within = (c @ b.swapaxes(1, 2)) * between
                y = within @ x + (c * mx.exp(total)[..., None]) @ state.swapaxes(1, 2)
                seen.append(y.swapaxes(0, 1))
            left = x * between[:, -1, :, None]
            state = state * mx.exp(total[:, -1])[:, None, None] + left.swapaxes(1, 2) @ b
        return (mx.concatenate(seen) if seen else None), state


def _decays(total: mx.array) -> mx.array:
    """(H, L, L): how much of what row j added is left at row i, of summed log decays (H, L); 0 above the diagonal."""
    since = total[..., :, None] - total[..., None, :]
    return mx.exp(mx.where(_mask(total.shape[1], 0) > 0, since, -mx.inf))


def _mask(rows: int, diagonal: int) -> mx.array:
    return mx.array(np.tri(rows, rows, diagonal, dtype=np.float32))


def unit_lower_inverse(x: mx.array) -> mx.array:
    """Of (…, L, L) with ones on the diagonal and nothing above it.

    Block by block: the inverse of [[A, 0], [B, C]] is [[A^-1, 0], [-C^-1 B A^-1, C^-1]], for all pairs of blocks of one
    size together, whose sizes double. As stable as substitution, which goes row by row.
    """
    rows = x.shape[-1]
    inverse = mx.eye(rows)
    size = 1
    at = np.arange(rows)
    while size < rows:
        left = (at // size % 2 == 1)[:, None] & (at[:, None] // size - 1 == at // size)
        inverse = inverse - inverse @ (x * mx.array(left.astype(np.float32))) @ inverse
        size *= 2
    return inverse


class ShortConvLayer:
    """LFM2: x (L, E), normed -> (L, E)."""

    def __init__(self, part: ShortConv, index: int, inward: Linear, outward: Linear, window: Window) -> None:
        self.index, self.inward, self.outward, self.window = index, inward, outward, window

    def recurrences(self) -> dict[tuple[int, int], Recurrence]:
        return {(self.index, CONVOLUTION): self.window}

    def __call__(self, x: mx.array, cache: Cache) -> mx.array:
        before, after, mixed = mx.split(self.inward(x), 3, axis=-1)
        inputs = ((before * mixed).astype(mx.float32),)
        y = cache.recurrent().run((self.index, CONVOLUTION), inputs, ())
        return self.outward(after * y.astype(x.dtype))

    def linears(self) -> list[Linear | Concatenated]:
        return [self.inward, self.outward]

    def arrays(self) -> list[mx.array]:
        return [*self.inward.arrays(), *self.outward.arrays(), *self.window.arrays()]


class DeltaNetLayer:
    """Gated DeltaNet: x (L, E), normed -> (L, E). `inward`: E -> queries, keys, values; z; b; a."""

    def __init__(
        self,
        part: DeltaNet,
        index: int,
        inward: Linear | Concatenated,
        outward: Linear,
        window: Window,
        rates: tuple[mx.array, mx.array],
        norm: tuple[mx.array, float],
    ) -> None:
        """rates: A_log and dt_bias (H,); norm: its weight (P,) and eps."""
        self.part, self.index, self.inward, self.outward, self.window = part, index, inward, outward, window
        self.decay, self.shift = -mx.exp(rates[0].astype(mx.float32)), rates[1].astype(mx.float32)
        self.norm, self.eps = norm
        self.matrix = Delta(part)

    def recurrences(self) -> dict[tuple[int, int], Recurrence]:
        return {(self.index, CONVOLUTION): self.window, (self.index, MATRIX): self.matrix}

    def __call__(self, x: mx.array, cache: Cache) -> mx.array:
        part, rows, states = self.part, len(x), cache.recurrent()
        values = part.value_heads * part.value_dim
        ends = np.cumsum([part.channels, values, part.value_heads]).tolist()
        mixed, gate, beta, step = (
            each.astype(mx.float32) for each in mx.split(self.inward(x), ends, axis=-1)
        )
        y = _silu(states.run((self.index, CONVOLUTION), (mixed,), ()))
        keys = part.key_heads * part.key_dim
        query, key, value = mx.split(y, [keys, 2 * keys], axis=-1)
        share = part.value_heads // part.key_heads
        query, key = (
            mx.repeat(_unit(t.reshape(rows, part.key_heads, -1)), share, axis=1) for t in (query, key)
        )
        value = value.reshape(rows, part.value_heads, -1)
        decay = self.decay * mx.logaddexp(step + self.shift, mx.array(0.0))
        inputs = key, value, mx.sigmoid(beta), decay
        y = states.run((self.index, MATRIX), inputs, (query * part.key_dim**-0.5,))
        y = y * mx.rsqrt(mx.square(y).mean(axis=-1, keepdims=True) + self.eps) * self.norm
        y = y * _silu(gate.reshape(rows, part.value_heads, -1))
        return self.outward(y.reshape(rows, values).astype(x.dtype))

    def linears(self) -> list[Linear | Concatenated]:
        return [self.inward, self.outward]

    def arrays(self) -> list[mx.array]:
        linears = [*self.inward.arrays(), *self.outward.arrays()]
        return [*linears, *self.window.arrays(), self.decay, self.shift, self.norm]


class Mamba2Layer:
    """x (L, E), normed -> (L, E). `inward`: E -> z; x, B, C; dt."""

    def __init__(
        self,
        part: Mamba2,
        index: int,
        inward: Linear,
        outward: Linear,
        window: Window,
        rates: tuple[mx.array, mx.array, mx.array],
        norm: tuple[mx.array | None, float],
    ) -> None:
        """rates: A_log, dt_bias and D (H,)."""
        self.part, self.index, self.inward, self.outward, self.window = part, index, inward, outward, window
        self.decay, self.shift = -mx.exp(rates[0].astype(mx.float32)), rates[1].astype(mx.float32)
        self.skip = rates[2].astype(mx.float32)
        self.norm, self.eps = norm
        wide = part.groups * part.state
        sizes = (part.inner, part.inner, wide, wide, part.heads)
        scale = np.concatenate(
            [np.full(n, s, np.float32) for n, s in zip(sizes, part.scales[1:6], strict=True)]
        )
        self.scale = None if set(part.scales[1:6]) == {1.0} else mx.array(scale)
        self.matrix = Decaying(part)

    def recurrences(self) -> dict[tuple[int, int], Recurrence]:
        return {(self.index, CONVOLUTION): self.window, (self.index, MATRIX): self.matrix}

    def __call__(self, x: mx.array, cache: Cache) -> mx.array:
        part, rows, states = self.part, len(x), cache.recurrent()
        y = self.inward(x if part.scales[0] == 1.0 else x * part.scales[0]).astype(mx.float32)
        y = y if self.scale is None else y * self.scale
        gate, mixed, step = mx.split(y, [part.inner, part.inner + part.channels], axis=-1)
        y = _silu(states.run((self.index, CONVOLUTION), (mixed,), ()))
        wide, share = part.groups * part.state, part.heads // part.groups
        inner, b, c = mx.split(y, [part.inner, part.inner + wide], axis=-1)
        inner = inner.reshape(rows, part.heads, -1)
        b, c = (mx.repeat(t.reshape(rows, part.groups, -1), share, axis=1) for t in (b, c))
        delta = mx.clip(mx.logaddexp(step + self.shift, mx.array(0.0)), *part.time_step_limit)
        inputs = inner * delta[..., None], b, self.decay * delta
        y = states.run((self.index, MATRIX), inputs, (c,)) + inner * self.skip[:, None]
        out = self.outward(self.gated(y.reshape(rows, -1), gate).astype(x.dtype))
        return out if part.scales[6] == 1.0 else out * part.scales[6]

    def gated(self, y: mx.array, gate: mx.array) -> mx.array:
        kind = self.part.norm
        if self.norm is None or kind == "gated":
            y = y * _silu(gate)
        if self.norm is None:
            return y
        parts = y.reshape(len(y), self.part.groups, -1)
        parts = parts * mx.rsqrt(mx.square(parts).mean(axis=-1, keepdims=True) + self.eps)
        y = parts.reshape(y.shape) * self.norm
        return y if kind == "gated" else y * _silu(gate)

    def linears(self) -> list[Linear | Concatenated]:
        return [self.inward, self.outward]

    def arrays(self) -> list[mx.array]:
        linears = [*self.inward.arrays(), *self.outward.arrays()]
        return [*linears, *self.window.arrays(), self.decay, self.shift, self.skip]


RecurrentLayer = ShortConvLayer | DeltaNetLayer | Mamba2Layer


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def _unit(x: mx.array) -> mx.array:
    return x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + 1e-6)
