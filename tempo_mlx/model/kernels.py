"""Attention of a few rows over a lattice: on Metal one fused kernel, elsewhere the same in MLX operations.

`lattice_attention` is the one door. What `layer_bias` hands it decides the path: a `CompactBias` goes to the
kernel, an additive (L, S) array or None to MLX operations. Both mean the same.

The kernel is verified on the CPU, not yet run on Metal: tests/test_kernels.py compiles the text MLX makes for
Metal as C++ and runs it thread by thread. So a Mac compares both paths once, before first use, and does
without the kernel where they differ; `kernel_self_check` has the message.

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
    row_positions: mx.array  # (L,) int32
    slot_positions: mx.array  # (S,) int32

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
        return cls(
            first_open,
            mx.array(np.ascontiguousarray(table, np.float32)),
            window or 0,
            mx.array(positions.astype(np.int32)),
            mx.array(slot_positions.astype(np.int32)),
        )


def layer_bias(
    bias: Float32s | None,
    positions: Ints,
    slot_positions: Ints,
    window: int | None,
    shape: tuple[int, int, int],
    mass: Attention,
    chunk: int | None = None,
) -> CompactBias | mx.array | None:
    """The `bias` of `lattice_attention` for layers with this window: the kernel's form where it can be used.

    bias (L, S) additive, None for plain causal; positions (L,) of the rows and slot_positions (S,): logical;
    shape: (H, K, D), D of keys and of values. chunk: see `window_bias`.
    """
    heads, groups, head_dim = shape
    if chunk is not None:  # not the kernel's business: an ordinary bias to it
        bias = window_bias(bias, positions, slot_positions, None, chunk)
    if len(positions) <= MAX_ROWS and head_dim in HEAD_DIMS and mass != "rows" and use_kernel():
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
    """Float32 scores (K, H/K L, S) of folded queries (K, H/K L, D) and keys (K, S, D); in float32 one operation."""
    transposed = keys.swapaxes(1, 2)
    if softcap is None and queries.dtype == mx.float32:
        return mx.addmm(NO_BIAS if bias is None else bias, queries, transposed, alpha=scale)
    scores = (queries * scale @ transposed).astype(mx.float32)
    if softcap is not None:
        scores = mx.tanh(scores / softcap) * softcap
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
    tile = min(4, 1 << (rows_per_key - 1).bit_length())  # query rows that load a key together
    parts = -(-slots // span)
    dtype = queries.dtype if parts == 1 else mx.float32
    threads = 32 * SIMDGROUPS
    where = (bias.table, bias.row_positions, bias.slot_positions, bias.first_open, bias.window)
    sizes = {"D": dim, "TEAM": lanes_per_slot(dim), "ROWS": tile, "SIMDGROUPS": SIMDGROUPS}
    attention, logsumexps, scores = run(
        Launch(
            ATTENTION,
            (queries, keys, values, *where, scale, softcap or 0.0, -(-slots // parts), mass),
            (("OUT", dtype), *sizes.items()),
            (threads * groups, -(-rows_per_key // tile), parts),
            (threads, 1, 1),
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


@dataclass(frozen=True)
class SelfCheck:
    """Kernel against MLX operations on this device.

    ok: None where there is no Metal. max_error: the largest absolute difference in output or attention mass.
    """

    ok: bool | None
    max_error: float
    message: str


def use_kernel() -> bool:
    """Whether MLX computes on Metal here and the kernel was right when it was checked, on first use."""
    return device.on_gpu() and kernel_self_check().ok is True


MASS_TOLERANCE = 1e-5
SELF_CHECKS = (  # head dim, dtype, what rounding the output to it may cost
    (64, mx.float32, 1e-4),
    (128, mx.float16, 4e-3),
    (128, mx.bfloat16, 3e-2),
    (256, mx.bfloat16, 3e-2),
)


@functools.cache
def kernel_self_check() -> SelfCheck:
    """Whether kernel and MLX operations agree on this machine's GPU; compared once in a process."""
    if not mx.metal.is_available():
        return SelfCheck(None, 0.0, "The attention kernel is for Metal, which this machine does not have.")
    return compare_paths()


def compare_paths(run: Callable[[Launch], list[mx.array]] = on_metal) -> SelfCheck:
    """Kernel, launched by `run`, against MLX operations, on random lattices of every dtype."""
    worst = 0.0
    for seed, (dim, dtype, tolerance) in enumerate(SELF_CHECKS):
        try:
            error, mass_error = _differences(seed, dim, dtype, run)
        except (RuntimeError, ValueError) as problem:  # MLX raises them where Metal cannot compile or launch
            message = f"The attention kernel does not run here, so MLX operations are used: {problem}"
            return SelfCheck(False, float("nan"), message)
        worst = max(worst, error, mass_error)
        if not (error <= tolerance and mass_error <= MASS_TOLERANCE):
            message = (
                f"The attention kernel is off by {error:.1e} (attention mass by {mass_error:.1e}) at head "
                f"dim {dim} in {dtype}, so MLX operations are used; please report it."
            )
            return SelfCheck(False, worst, message)
    return SelfCheck(True, worst, f"The attention kernel agrees with MLX operations within {worst:.1e}.")


def _differences(
    seed: int, dim: int, dtype: mx.Dtype, run: Callable[[Launch], list[mx.array]]
) -> tuple[float, float]:
    """Largest differences of output and mass on one random lattice with two spans, a window and a softcap."""
    generator = np.random.default_rng(seed)
    groups, heads, rows, slots, window = 2, 6, 5, 1500 + seed, 1200
    hidden = generator.random((rows, slots)) < 0.3
    bias = np.where(hidden, -np.inf, -generator.exponential(size=(rows, slots))).astype(np.float32)
    bias[:, : slots // 2] = 0
    bias[:, slots - rows :] = np.where(np.eye(rows), 0, -np.inf)  # each row sees itself, not its siblings
    positions = np.arange(slots)
    within = positions[-rows:, None] - positions < window
    queries, keys, values = (
        mx.array(generator.standard_normal((n, length, dim)).astype(np.float32)).astype(dtype)
        for n, length in ((heads, rows), (groups, slots), (groups, slots))
    )
    compact = CompactBias.of(bias, positions[-rows:], positions, window)
    settings: dict[str, Any] = {"scale": dim**-0.5, "softcap": 30.0, "mass": True}
    found = fused_attention(queries, keys, values, compact, **settings, run=run)
    with mx.stream(mx.cpu):  # clear of the GPU's reduced-precision products
        queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
        dense = mx.array(np.tile(np.where(within, bias, np.float32(-np.inf)), (heads // groups, 1)))
        expected = portable_attention(queries, keys, values, dense, **settings)
        found_out, expected_out = (np.array(out.astype(mx.float32)) for out in (found[0], expected[0]))
        found_mass, expected_mass = np.array(found[1]), np.array(expected[1])
    error = float(np.max(np.abs(found_out - expected_out)))
    return error, float(np.max(np.abs(found_mass - expected_mass)))
