"""Attention of a few rows over a lattice: on Metal one fused kernel, elsewhere the same in MLX operations.

`lattice_attention` is the one door. What `layer_bias` hands it decides the path: a `CompactBias` goes to the
kernel, an additive (L, S) array or None to MLX operations. Both mean the same.

The kernel is verified on the CPU, not yet run on Metal: tests/test_kernels.py compiles the text MLX makes for
Metal as C++ and runs it thread by thread. So a Mac compares both paths before first use (kernel_check.py), and does
without the kernel where they differ.

Letters: L new rows, S slots, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.mlx import mx
from tempo_mlx.model import device
from tempo_mlx.model.exponential import exponentials
from tempo_mlx.model.forward import Attention
from tempo_mlx.model.metal import ATTENTION, COMBINE, HEADER, MASS, Kernel
from tempo_mlx.model.visibility import causal_bias, window_bias

NO_BIAS = mx.array([[0.0]])
BLOCK = 64  # rows of a prompt that the portable path takes at a time
MAX_ROWS = 16  # of the kernel; more are matrix products, which Metal's own kernels do better
HEAD_DIMS = (64, 80, 96, 128, 256)  # of the kernel
SPAN = 1024  # slots a threadgroup walks; not tuned on a device
SIMDGROUPS = 8  # of 32 threads, in a threadgroup; not tuned on a device
TILE = 4  # query rows that load a key together
LEAST = 8  # numbers in an array from which on MLX passes it as `device` memory, and as `constant` below: a program each


@dataclass(frozen=True)
class CompactBias:
    """Who of L rows sees which of S slots, without an (L, S) array for the prefix that everybody sees.

    Slots before `first_open` have bias 0. `table` (L, S - first_open), float32, at least one column, is added
    to the scores of the others; -inf is not seen. With a window (0: none), row r sees slot s only where
    row_positions[r] - slot_positions[s] < window. One per forward pass and kind of layer.
    """

    first_open: int
    table: mx.array
    window: int
    row_positions: mx.array  # (L,) int32, padded to LEAST
    slot_positions: mx.array  # (S,) int32, likewise

    @classmethod
    def of(
        cls,
        bias: Float32s | None,
        positions: Ints,
        slot_positions: Ints,
        window: int | None,
    ) -> CompactBias:
        """From the additive bias (L, S), None for plain causal, and positions of rows (L,) and slots (S,)."""
        rows, slots = len(positions), len(slot_positions)
        if bias is None:
            first_open, table = slots - rows, causal_bias(rows, slots)[:, slots - rows :]
        else:
            differing = np.flatnonzero((bias != 0).any(axis=0))
            first_open = int(differing[0]) if len(differing) else slots - 1
            table = bias[:, first_open:]
        if window is not None and positions.max() - slot_positions.min() < window:
            window = None
        wider = min(first_open, max(0, LEAST - table.shape[1]))
        return cls(
            first_open - wider,
            mx.array(np.pad(table, ((0, 0), (wider, 0))).astype(np.float32)),
            window or 0,
            *(mx.array(_at_least(each.astype(np.int32))) for each in (positions, slot_positions)),
        )


def _at_least(numbers: Ints) -> Ints:
    """The same numbers, and zeros behind them that nothing reads, up to LEAST."""
    return np.pad(numbers, (0, max(0, LEAST - len(numbers))))


def layer_bias(
    bias: Float32s | None,
    positions: Ints,
    slot_positions: Ints,
    window: int | None,
    shape: tuple[int, int, int],
    mass: Attention,
    chunk: int | None = None,
    kernel: bool = False,
) -> CompactBias | mx.array | None:
    """The `bias` of `lattice_attention` for layers with this window: the kernel's form where that is to be used.

    bias (L, S) additive, None for plain causal; positions (L,) of the rows and slot_positions (S,): logical;
    shape: (H, K, D), D of keys and of values. chunk: see `window_bias`.
    """
    heads, groups, _ = shape
    if chunk is not None:  # not the kernel's business: an ordinary bias to it
        bias = window_bias(bias, positions, slot_positions, None, chunk)
    if kernel and len(positions) <= MAX_ROWS and mass != "rows":
        return CompactBias.of(bias, positions, slot_positions, window)
    dense = window_bias(bias, positions, slot_positions, window)
    return None if dense is None else mx.array(np.tile(dense, (heads // groups, 1)))


def lattice_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    bias: mx.array | CompactBias | None,
    *,
    scale: float,
    softcap: float | None,
    mass: Attention,
    sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array | None]:
    """Attention of L rows over S slots and, where `mass`, how much of it each slot received.

    queries (H, L, D), keys and values (K, S, D), which may be views of larger buffers. bias: (H/K L, S) float32,
    the same for each head that shares a key head, None for plain causal (row r is slot S - L + r), or a
    `CompactBias`; every row sees a slot. Scores are
    scale * q.k, then softcap * tanh(score / softcap) where given, then plus the bias; the softmax is float32.
    sinks (H,): one more score of each head, that takes a share which no slot receives.
    Returns the output (L, H D) in the queries' dtype, and the mass (S,) float32, mean over heads and rows, or for
    "rows" (L, S), mean over heads, which the kernel does not make (see `layer_bias`).
    """
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
    if isinstance(bias, CompactBias):
        return fused_attention(queries, keys, values, bias, mass=bool(mass), **options)
    return portable_attention(queries, keys, values, bias, mass=mass, **options)


def portable_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    bias: mx.array | None,
    *,
    scale: float,
    softcap: float | None,
    mass: Attention,
    sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array | None]:
    """`lattice_attention` in MLX operations: all rows of the heads that share a key head are one product."""
    heads, rows, dim = queries.shape
    groups, slots, _ = keys.shape
    plain = bias is None and softcap is None and sinks is None and not mass
    if plain and dim == values.shape[-1] and device.on_gpu():
        fused = mx.fast.scaled_dot_product_attention  # for a prompt: no (L, S) scores in memory
        out = fused(queries[None], keys[None], values[None], scale=scale, mask="causal")[0]
        return out.transpose(1, 0, 2).reshape(rows, heads * dim), None
    if bias is None and rows > BLOCK and not mass:  # what comes after a block of rows need not be computed
        outs = []
        for start in range(0, rows, BLOCK):
            stop = min(start + BLOCK, rows)
            seen = slots - rows + stop
            part = queries[:, start:stop], keys[:, :seen], values[:, :seen], None
            outs.append(portable_attention(*part, scale=scale, softcap=softcap, mass=False, sinks=sinks)[0])
        return mx.concatenate(outs), None
    dtype = queries.dtype
    if not device.on_gpu():  # the CPU, whose half-precision products are slow
        queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    scores = _scores(queries.reshape(groups, -1, dim), keys, bias, scale, softcap)  # (K, H/K L, S)
    if bias is None and rows > 1:
        scores[..., slots - rows :] = scores[..., slots - rows :] + _causal(rows, heads // groups)
    weights, total = exponentials(scores, None if sinks is None else _rows_of(sinks, groups, rows))
    out = weights.astype(values.dtype) @ values  # (K, H/K L, D)
    out = out if total is None else out / total
    width = values.shape[-1]
    out = out.reshape(heads, rows, width).transpose(1, 0, 2).reshape(rows, heads * width).astype(dtype)
    if not mass:
        return out, None
    weights = weights if total is None else weights / total
    return out, weights.reshape(heads, rows, slots).mean(axis=0 if mass == "rows" else (0, 1))


def _rows_of(sinks: mx.array, groups: int, rows: int) -> mx.array:
    """(H,) as (K, H/K L, 1)."""
    return mx.repeat(sinks.astype(mx.float32), rows).reshape(groups, -1, 1)


def _scores(
    queries: mx.array, keys: mx.array, bias: mx.array | None, scale: float, softcap: float | None
) -> mx.array:
    """Float32 scores (K, H/K L, S) of folded queries (K, H/K L, D) and keys (K, S, D), whatever those are in: half
    precision would round scores of tens by hundredths, and in float16 they may pass its range."""
    queries, transposed = queries.astype(mx.float32), keys.astype(mx.float32).swapaxes(1, 2)
    if softcap is None:
        return mx.addmm(NO_BIAS if bias is None else bias, queries, transposed, alpha=scale)
    scores = mx.tanh((queries * scale @ transposed) / softcap) * softcap
    return scores if bias is None else scores + bias


@functools.lru_cache(maxsize=4)  # the same for every block of a prompt, layer after layer
def _causal(rows: int, share: int) -> mx.array:
    """(H/K L, L): what rows see of each other."""
    return mx.array(np.tile(causal_bias(rows, rows), (share, 1)))


@dataclass(frozen=True)
class Launch:
    """One run of a kernel: its inputs (arrays or numbers), template arguments, threads, and outputs."""

    kernel: Kernel
    inputs: tuple[mx.array | float, ...]
    template: tuple[tuple[str, Any], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]


def on_metal(launch: Launch, **options: Any) -> list[mx.array]:
    """Queue a launch on the GPU; its outputs. `options` go to the kernel, see `mx.fast.metal_kernel`."""
    outputs: list[mx.array] = _compiled(launch.kernel)(
        inputs=list(launch.inputs),
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=list(launch.output_shapes),
        output_dtypes=list(launch.output_dtypes),
        **options,
    )
    return outputs


@functools.cache
def _compiled(kernel: Kernel) -> Any:
    return mx.fast.metal_kernel(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.source,
        header=HEADER,
        ensure_row_contiguous=False,  # keys and values are views of the cache, not to be copied
    )


def fused_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    bias: CompactBias,
    *,
    scale: float,
    softcap: float | None,
    mass: bool,
    sinks: mx.array | None = None,
    span: int = SPAN,
    run: Callable[[Launch], list[mx.array]] = on_metal,
) -> tuple[mx.array, mx.array | None]:
    """`lattice_attention` as a kernel: one launch up to `span` slots, one more to combine the spans of more.

    The mass takes another, as it needs the final sum of each row. Arrays are contiguous along D. What sinks take is
    taken off at the end: it is one more term of each row's sum. `run` is for tests.
    """
    heads, rows, dim = queries.shape
    groups, slots, _ = keys.shape
    rows_per_key = rows * heads // groups
    # One row's heads alone may need fewer: two programs for a model, and not one for each width.
    tile = TILE if rows > 1 else min(TILE, 1 << (rows_per_key - 1).bit_length())
    parts = -(-slots // span)
    dtype = queries.dtype if parts == 1 else mx.float32
    where = (bias.table, bias.row_positions, bias.slot_positions, bias.first_open, bias.window)
    sizes = {"D": dim, "TEAM": lanes_per_slot(dim), "ROWS": tile, "SIMDGROUPS": SIMDGROUPS}
    attention, logsumexps, scores = run(
        Launch(
            ATTENTION,
            (queries, keys, values, *where, scale, softcap or 0.0, -(-slots // parts), mass),
            (("OUT", dtype), *sizes.items()),
            (32 * SIMDGROUPS * groups, -(-rows_per_key // tile), parts),
            (32 * SIMDGROUPS, 1, 1),
            ((parts, rows, heads * dim), (parts, rows * heads), (rows * heads, slots) if mass else (1, 1)),
            (dtype, mx.float32, mx.float32),
        )
    )
    if parts > 1:
        attention, logsumexps = run(
            Launch(
                COMBINE,
                (attention, logsumexps),
                (("OUT", queries.dtype), ("D", dim)),
                (dim, rows * heads, 1),
                (dim, 1, 1),
                ((rows, heads * dim), (1, rows * heads)),
                (queries.dtype, mx.float32),
            )
        )
    out = attention.reshape(rows, heads * dim)
    if sinks is not None:
        sink = mx.tile(sinks.astype(mx.float32), rows)  # row by row, each with all heads
        share = mx.sigmoid(logsumexps.reshape(-1) - sink)
        out = (out.reshape(-1, dim) * share[:, None]).reshape(rows, heads * dim).astype(queries.dtype)
        logsumexps = mx.logaddexp(logsumexps.reshape(-1), sink)[None]
    if not mass:
        return out, None
    launch = Launch(MASS, (scores, logsumexps), (), (slots, 1, 1), (256, 1, 1), ((slots,),), (mx.float32,))
    return out, run(launch)[0]


def lanes_per_slot(dim: int) -> int:
    """How many of the 32 lanes share a slot: so many that none holds more than 8 of its dimensions."""
    return next(lanes for lanes in (8, 16, 32) if dim % lanes == 0 and dim // lanes <= 8)
