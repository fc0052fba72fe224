"""Suites that time single passes: decode, rows, context, prefill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tempo_mlx import blas
from tempo_mlx.bench.contenders import Contender, Field
from tempo_mlx.bench.results import MLX_LM, Measurement, Result
from tempo_mlx.bench.timing import Timing, interleaved, ratio, stopwatch
from tempo_mlx.mlx import mx
from tempo_mlx.model.linear import Concatenated, QuantizedLinear
from tempo_mlx.model.transformer import Transformer

PROMPT = 128  # slots below the rows, unless stated otherwise
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
SHORT = 2000  # slots up to which transformers takes part: it takes minutes to fill more
LENGTHS = (512, 2000, 8000, 16000)
PROMPTS = (128, 512, 2048)
TRIED = (
    "Outside the products are hundreds of small operations, on one core, beside products on all. What made them fewer "
    "or cheaper is in: exponentials by `power`, which MLX computes faster here than `exp`; rotation as one small "
    "product; scores, scale and bias in one; division after the weighted sum; each layer begun while the next is "
    "described. Slower or hardly faster when timed alone: halves of gate and up that are contiguous, "
    "`mx.fast.rms_norm`, `sigmoid` and `softmax` as MLX has them; SiLU and its product fused by `mx.compile`, which "
    "wants a C++ compiler at run time."
)


@dataclass(frozen=True)
class Effort:
    """How much to measure. bandwidth: bytes per second; gflops: of a large float32 product."""

    quick: bool
    bandwidth: float
    gflops: float

    def rounds(self, many: int) -> int:
        return max(2, many // 4) if self.quick else many

    def processes(self, many: int) -> int:
        """Rounds if each run is a process."""
        return 1 if self.quick else many


def decode(field: Field, effort: Effort) -> Result:
    """One row on a short prompt: the step of ordinary decoding."""
    result = Result("decode", f"One row on top of {PROMPT} slots: the step of ordinary decoding.")
    model = field.loaded.model
    alone = {"products": partial(stopwatch, Products(model, 1))} if isinstance(model, Transformer) else {}
    timings = one_row(field, tokens(field, PROMPT), effort.rounds(12), alone)
    products = timings.pop("products", None)
    result.add("1 row", timings)
    _floor(result, field, effort)
    whole = timings[field.ours.name].quartile * 1e3
    if products is not None and result.floor is not None and whole > 1.5 * result.floor:
        inside = products.quartile * 1e3
        speed = weight_bytes(model) / inside / 1e6
        result.notes.append(
            f"Above the floor: the matrix products alone take {inside:.1f} ms, since {blas.ensure().name} reads the "
            f"weights of one row at {speed:.1f} GB/s; the operations between them take the other "
            f"{whole - inside:.1f} ms. The other suites' steps are made of the same two parts."
        )
    result.goal("one row, times mlx-lm's step", ratio(timings, field.ours.name, MLX_LM), 0.95)
    result.goal(
        "one row, times the floor", timings[field.ours.name].quartile * 1e3 / (result.floor or 1), 1.5
    )
    return result


def rows(field: Field, effort: Effort) -> Result:
    """The cost of k rows relative to one, the share of matrix products, and what attention mass adds."""
    result = Result(
        "rows",
        f"A pass of k rows on top of {PROMPT} slots. Ours are the members of one set on one cache; the others' are a "
        "batch of k sequences, which is how they would hold k alternatives. `products alone`: the same matrix "
        "products without anything between them.",
    )
    ours, ids = field.ours, tokens(field, PROMPT)
    state = ours.start(ids)[0]
    widths = (1, 2, 4, 8) if effort.quick else WIDTHS
    cases: dict[str, Callable[[], float]] = {}
    for width in widths:
        few = tokens(field, width)
        cases[f"{width}"] = partial(stopwatch, partial(ours.rows, state, few))
        if width in (1, 8):
            with_mass = partial(ours.rows, state, few, attention=True)
            cases[f"{width} with attention mass"] = partial(stopwatch, with_mass)
        if isinstance(ours.model, Transformer):
            cases[f"{width} products alone"] = partial(stopwatch, Products(ours.model, width))
    timings = interleaved(cases, effort.rounds(12), repeats=2)
    one = ("1 row", timings["1"])
    for width in widths:
        plural = "row" if width == 1 else "rows"
        result.rows.append(Measurement.of(f"{width} {plural}", ours.name, timings[f"{width}"], one))
        for kind in ("with attention mass", "products alone"):
            if (timing := timings.get(f"{width} {kind}")) is not None:
                beside = (f"{width} {plural}", timings[f"{width}"])
                result.rows.append(Measurement.of(f"{width} {plural}, {kind}", ours.name, timing, beside))
    for other in field.contenders[1:]:
        batches: dict[str, Callable[[], float]] = {}
        for width in (1, 2, 4, 8):
            batch = other.start(ids, copies=width)[0]
            name = "1 row" if width == 1 else f"{width} rows"
            batches[name] = partial(stopwatch, partial(other.rows, batch, tokens(field, width)))
        several = interleaved(batches, effort.rounds(6), repeats=2)
        for name, timing in several.items():
            result.rows.append(Measurement.of(name, other.name, timing, ("1 row", several["1 row"])))
    _floor(result, field, effort)
    for width, bound in ((2, 1.2), (4, 1.5), (8, 1.8)):
        result.goal(
            f"k = {width}, times one row", timings[f"{width}"].quartile / timings["1"].quartile, bound
        )
    for width in (1, 8):
        whole = timings[f"{width}"].quartile
        if f"{width} products alone" in timings:
            outside = 1 - timings[f"{width} products alone"].quartile / whole
            result.goal(f"k = {width}, share outside the products", outside, 0.25)
            if outside > 0.25 and TRIED not in result.notes and mx.default_device().type == mx.cpu:
                result.notes.append(TRIED)
        result.goal(
            f"k = {width}, attention mass on / off",
            timings[f"{width} with attention mass"].quartile / whole,
            1.08,
        )
    return result


def context(field: Field, effort: Effort) -> Result:
    """One row on prompts of growing length."""
    lengths = _lengths(field, LENGTHS[:2] if effort.quick else LENGTHS)
    result = Result("context", f"One row on top of so many slots; beyond {SHORT} without transformers.")
    ratios: list[float | None] = []
    for length in lengths:
        several = field.for_long_runs(transformers=length <= SHORT)
        timings = one_row(field, tokens(field, length), effort.rounds(10), contenders=several)
        result.add(f"{length} slots", timings)
        ratios.append(ratio(timings, field.ours.name, MLX_LM))
    _floor(result, field, effort, slots=lengths[-1])
    for length, times in zip(lengths[1:], ratios[1:], strict=True):
        if times is not None and ratios[0] is not None:
            what = f"ratio to mlx-lm at {length} slots, over that at {lengths[0]}"
            result.goal(what, times / ratios[0], 1.05)
    return result


def prefill(field: Field, effort: Effort) -> Result:
    """From token ids to the first distribution."""
    lengths = _lengths(field, PROMPTS[:2] if effort.quick else PROMPTS)
    result = Result(
        "prefill",
        "Running a prompt: from token ids to the first logits. Without transformers: on prompts its threads lose so "
        "much time to those of the others, in one process, that its figures would say nothing about it.",
    )
    for length in lengths:
        ids = tokens(field, length)
        cases: dict[str, Callable[[], float]] = {
            each.name: partial(stopwatch, partial(each.start, ids))
            for each in field.for_long_runs(transformers=False)
        }
        timings = interleaved(cases, effort.rounds(8), warm_up=length <= 512)
        result.add(f"{length} tokens", timings)
        if length == 512:
            result.goal("512 tokens, times mlx-lm's", ratio(timings, field.ours.name, MLX_LM), 1.0)
    work = 2 * lengths[0] * (weight_bytes(field.loaded.model) / _width(field))
    result.floor = max(work / effort.gflops / 1e6, 1e3 * weight_bytes(field.loaded.model) / effort.bandwidth)
    result.floor_is = (
        f"{lengths[0]} tokens: the products' additions and multiplications at {effort.gflops:.0f} GFLOP/s"
    )
    return result


class Products:
    """Every matrix product of a pass of k rows, and nothing else."""

    def __init__(self, model: Transformer, rows: int) -> None:
        self.linears = linears(model)
        a = model.architecture
        widths = {a.hidden_size, a.intermediate_size, a.num_attention_heads * a.head_dim}
        self.inputs = {width: mx.random.normal((rows, width)).astype(model.dtype) for width in widths}
        mx.eval(list(self.inputs.values()))
        self.of = [self.inputs[_inputs(linear)] for linear in self.linears]

    def __call__(self) -> None:
        mx.eval([linear(x) for linear, x in zip(self.linears, self.of, strict=True)])


def linears(model: Transformer) -> list[Any]:
    return [*(linear for block in model.blocks for linear in block.linears()), model.head]


def _inputs(linear: Any) -> int:
    first = linear.parts[0] if isinstance(linear, Concatenated) else linear
    if isinstance(first, QuantizedLinear):
        return int(first.scales.shape[1] * first.layout.group_size)
    return int(first.weight.shape[1])


def weight_bytes(model: Any) -> int:
    """Bytes of weights that one step reads; a separate embedding is read one row at a time and not counted."""
    return sum(int(array.nbytes) for linear in linears(model) for array in linear.arrays())


def tokens(field: Field, count: int) -> list[int]:
    """Ordinary token ids, the same every time."""
    vocabulary = field.loaded.model.architecture.vocab_size
    return [
        int(i) for i in np.random.default_rng(7).integers(vocabulary // 50, vocabulary * 9 // 10, size=count)
    ]


def _lengths(field: Field, wanted: Sequence[int]) -> list[int]:
    """The lengths that fit the model's context."""
    limit = field.loaded.model.architecture.max_position_embeddings
    return [length for length in wanted if length < limit] or [limit // 2]


def one_row(
    field: Field,
    ids: Sequence[int],
    rounds: int,
    others: Mapping[str, Callable[[], float]] = {},
    contenders: Sequence[Contender] | None = None,
) -> dict[str, Timing]:
    """Time one row after these ids for these contenders (None: all), interleaved with other cases."""
    cases = dict(others)
    for each in field.contenders if contenders is None else contenders:
        cases[each.name] = partial(stopwatch, partial(each.rows, each.start(ids)[0], tokens(field, 1)))
    return interleaved(cases, rounds, repeats=3)


def _floor(result: Result, field: Field, effort: Effort, slots: int = PROMPT) -> None:
    model = field.loaded.model
    a = model.architecture
    cache = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * slots * _width(field)
    result.reads(weight_bytes(model) + cache, f"weights and {slots} slots", effort.bandwidth)


def _width(field: Field) -> int:
    return 4 if field.loaded.model.info["dtype"] == "float32" else 2
