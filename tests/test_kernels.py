"""The attention kernel against MLX operations, and those against numpy, over random lattices."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tempo_mlx.mlx import mx
from tempo_mlx.model import kernels
from tempo_mlx.model.exponential import exponentials, gated_silu
from tempo_mlx.model.kernels import (
    CompactBias,
    Launch,
    fused_attention,
    lattice_attention,
    portable_attention,
)
from tempo_mlx.model.metal import ATTENTION, COMBINE, MASS
from tests.metal import (
    DTYPES,
    MASS_TOLERANCE,
    ON_METAL,
    RUN,
    TOLERANCE,
    Case,
    KernelError,
    as_float,
    check,
    difference,
    folded,
    fused,
    numpy_attention,
    on_cpu,
    portable,
    runs_kernels,
)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", kernels.HEAD_DIMS)
def test_kernel_agrees_at_every_head_dim_and_dtype(dim: int, dtype: str) -> None:
    check(Case(dtype, dim, seed=dim))


@runs_kernels
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 16])
@pytest.mark.parametrize(("groups", "heads_per_key"), [(3, 1), (1, 2), (2, 3), (1, 8)])
def test_kernel_agrees_at_every_number_of_rows_and_heads(rows: int, groups: int, heads_per_key: int) -> None:
    check(Case(groups=groups, heads_per_key=heads_per_key, rows=rows, slots=31 + rows, prompt=9, seed=rows))


@runs_kernels
@pytest.mark.parametrize("seed", range(12))
def test_kernel_agrees_on_random_lattices(seed: int) -> None:
    """Ragged sizes, spans, windows, softcaps and strides, all at once."""
    random = np.random.default_rng(seed)
    rows = int(random.integers(1, 17))
    prompt = int(random.integers(0, 60))
    check(
        Case(
            rows=rows,
            prompt=prompt,
            slots=prompt + rows + int(random.integers(0, 90)),
            groups=int(random.integers(1, 3)),
            heads_per_key=int(random.integers(1, 5)),
            softcap=float(random.uniform(0.5, 5)) if random.random() < 0.5 else None,
            window=int(random.integers(1, 40)) if random.random() < 0.5 else None,
            span=int(random.integers(20, 80)),
            stride=int(random.integers(1, 3)),
            seed=seed,
        )
    )


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_combines_spans_that_some_rows_do_not_see(dtype: str) -> None:
    check(Case(dtype, 128, rows=3, slots=150, prompt=100, window=17, span=32, seed=5))


@runs_kernels
@pytest.mark.parametrize("span", [kernels.SPAN, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_take_their_share_from_every_slot(dtype: str, span: int) -> None:
    """Beside the kernel, in one span and in several; and by definition, as one more score that holds nothing."""
    case = Case(dtype, rows=3, slots=50, span=span, window=30, seed=7)
    heads, _, dim = case.arrays[0].shape
    sinks = mx.array(np.linspace(-1, 4, heads, dtype=np.float32))
    found = fused_attention(*case.arrays, case.compact, **case.settings, span=span, run=RUN, sinks=sinks)
    queries, keys, values = (x.astype(mx.float32) for x in case.arrays)
    wanted = portable_attention(queries, keys, values, folded(case), **case.settings, sinks=sinks)
    error, mass_error = difference(found, wanted)
    assert error <= TOLERANCE[dtype] and mass_error <= MASS_TOLERANCE
    q, k, v = (np.array(x) for x in (queries, keys, values))
    scores = np.einsum("hld,hsd->hls", q, np.repeat(k, case.heads_per_key, 0)) * case.settings["scale"]
    scores = np.concatenate(
        [scores + case.visible, np.tile(np.array(sinks)[:, None, None], (1, 3, 1))], axis=2
    )
    shares = np.exp(scores - scores.max(axis=2, keepdims=True))
    shares = (shares / shares.sum(axis=2, keepdims=True))[..., :-1]
    out = np.einsum("hls,hsd->lhd", shares, np.repeat(v, case.heads_per_key, 0)).reshape(3, heads * dim)
    np.testing.assert_allclose(np.array(wanted[0]), out, atol=1e-5)
    np.testing.assert_allclose(np.array(wanted[1]), shares.mean(axis=(0, 1)), atol=1e-6)


@runs_kernels
def test_kernel_sees_one_slot_only() -> None:
    case = Case(rows=1, slots=1, prompt=0)
    check(case)
    assert float(fused(case)[1][0]) == pytest.approx(1)


@runs_kernels
def test_kernel_gives_nothing_to_slots_nobody_sees() -> None:
    case = Case(rows=4, slots=60, prompt=10, seed=3)
    unseen = np.isneginf(case.bias).all(axis=0)
    assert unseen.sum() > 5
    mass = as_float(fused(case)[1])
    assert (mass[unseen] == 0).all()
    assert mass.sum() == pytest.approx(1, abs=1e-5)


def test_compact_bias_means_the_same_as_the_whole() -> None:
    case = Case(rows=5, prompt=20, slots=60, seed=4)
    everything = np.zeros((5, 60), np.float32)
    causal = np.where(np.arange(60) <= np.arange(55, 60)[:, None], np.float32(0), np.float32(-np.inf))
    for bias, whole, first_open in (
        (case.bias, case.bias, 20),
        (everything, everything, 52),  # a table of at least 8 columns, see kernels.LEAST
        (None, causal, 52),
    ):
        compact = CompactBias.of(bias, case.positions[-5:], case.positions, None)
        assert compact.first_open == first_open
        assert np.array_equal(np.pad(as_float(compact.table), ((0, 0), (first_open, 0))), whole)


def test_a_window_that_reaches_every_slot_is_none() -> None:
    positions = np.arange(10, dtype=np.int64)
    assert CompactBias.of(None, positions[-2:], positions, 10).window == 0
    assert CompactBias.of(None, positions[-2:], positions, 9).window == 9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("slots", [70, 900])  # small and large softmax
def test_portable_path_is_attention_by_definition(dtype: str, softcap: float | None, slots: int) -> None:
    case = Case(dtype, rows=7, slots=slots, prompt=40, softcap=softcap, window=33, stride=2, seed=6)
    out, mass = lattice_attention(*case.arrays, folded(case), **case.settings)
    assert out.dtype == DTYPES[dtype]
    error, mass_error = difference((out, mass), numpy_attention(case))
    assert error <= TOLERANCE[dtype]
    assert mass_error <= MASS_TOLERANCE


@pytest.mark.parametrize("rows", [1, 2, kernels.BLOCK, kernels.BLOCK + 1, 300])
@pytest.mark.parametrize("mass", [False, True])
def test_no_bias_is_plain_causal(rows: int, mass: bool) -> None:
    """Also for a prompt, of which blocks of rows are computed apart."""
    case = Case(rows=rows, slots=rows + 17, prompt=17)
    case.__dict__["bias"] = np.where(
        np.arange(case.slots) <= np.arange(17, case.slots)[:, None], np.float32(0), np.float32(-np.inf)
    )
    out, received = lattice_attention(*case.arrays, None, **{**case.settings, "mass": mass})
    expected, expected_mass = numpy_attention(case)
    assert np.abs(as_float(out) - expected).max() < TOLERANCE["float32"]
    assert (received is not None) == mass
    if mass:
        assert np.abs(as_float(received) - expected_mass).max() < MASS_TOLERANCE


def test_softmax_and_silu_are_exact_and_hide_what_is_not_seen() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(scale=9, size=(400, 900)).astype(np.float32)
    scores[random.random(scores.shape) < 0.4] = -np.inf
    expected = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    weights, total = exponentials(mx.array(scores))
    found = as_float(weights if total is None else weights / total)
    assert np.abs(found - expected).max() < 2e-6
    assert (found[np.isinf(scores)] == 0).all()
    x = np.linspace(-100, 80, 10_001, dtype=np.float32)
    wanted = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(
        as_float(gated_silu(mx.array(x), mx.array(3.0))), 3 * wanted, rtol=1e-5, atol=1e-30
    )


def test_half_precision_costs_no_more_than_its_rounding() -> None:
    """The base of a power would be rounded too, and its fault raised to that power."""
    x = mx.array([-30.0, -10.0, -5.0, 2.0]).astype(mx.bfloat16)
    wanted = np.asarray([a / (1 + np.exp(-a)) for a in (-30.0, -10.0, -5.0, 2.0)])
    np.testing.assert_allclose(as_float(gated_silu(x, mx.ones_like(x))), wanted, rtol=1e-2)


MUTATIONS = {
    "first open slot": (ATTENTION, "slot >= first_open", "slot > first_open"),
    "table row": (ATTENTION, "table[row[i] *", "table[row[0] *"),
    "window": (ATTENTION, ">= window", "> window"),
    "last slot": (ATTENTION, "base + team < end;", "base + team <= end;"),
    "head of a row": (ATTENTION, "r % heads_per_key", "r / rows"),
    "slot stride": (ATTENTION, "slot * keys_strides[1]", "slot * D"),
    "value stride": (ATTENTION, "key_head * values_strides[0]", "key_head * slots * D"),
    "query stride": (ATTENTION, "queries_strides[1]", "D"),
    "scale": (ATTENTION, "= scale * static_cast", "= static_cast"),
    "softcap": (ATTENTION, "if (softcap > 0)", "if (softcap > 9)"),
    "reduction over a team": (ATTENTION, "other = TEAM / 2", "other = TEAM / 4"),
    "running maximum": (ATTENTION, "top[i] = new_top;", ""),
    "rescaled output": (ATTENTION, "output[i][d] * keep +", "output[i][d] +"),
    "rescaled total": (ATTENTION, "total[i] * keep + weight", "total[i] + weight"),
    "merge of teams": (ATTENTION, "team_total += simd_shuffle_xor(team_total, other)", "team_total += 0"),
    "merge of simdgroups": (ATTENTION, "totals[s] * metal::exp(tops[s] - whole_top)", "totals[s]"),
    "barrier before the merge": (ATTENTION, "threadgroup_barrier(mem_flags::mem_threadgroup);\n        float",
                                 "float"),
    "barrier after the merge": (ATTENTION, "threadgroup_barrier(mem_flags::mem_threadgroup);  //", "//"),
    "lanes that leave": (ATTENTION, "if (simd_any(seen))", "if (seen)"),
    "ragged tile": (ATTENTION, "metal::min(tile * ROWS + i, rows * heads_per_key - 1)",
                    "metal::min(tile * ROWS + i, rows * heads_per_key - 2)"),
    "span": (ATTENTION, "part * span", "part * (span - 1)"),
    "weight of a span": (COMBINE, "weight = metal::exp(logsumexps[at] - top)", "weight = 1"),
    "sum over spans": (COMBINE, "top + metal::log(whole)", "top"),
    "mean over heads": (MASS, "sum / heads_and_rows", "sum"),
    "normalised mass": (MASS, "- logsumexp[r]", ""),
}  # fmt: skip
MUTATION_CASES = (
    Case(rows=3, slots=70, prompt=30, softcap=2.0, window=29, span=24, stride=2, seed=1),
    Case(rows=5, slots=40, prompt=1, heads_per_key=1, seed=2),
)


@runs_kernels
def test_mutation_cases_are_green_as_they_stand() -> None:
    for case in MUTATION_CASES:
        check(case)


@runs_kernels
@pytest.mark.skipif(ON_METAL, reason="a mutated kernel may hang a GPU")
@pytest.mark.parametrize("what", MUTATIONS)
def test_a_mutation_of_the_kernel_is_noticed(what: str) -> None:
    kernel, old, new = MUTATIONS[what]
    assert old in kernel.source
    mutated = dataclasses.replace(kernel, source=kernel.source.replace(old, new))

    def run(launch: Launch) -> list[Any]:
        return on_cpu(dataclasses.replace(launch, kernel=mutated) if launch.kernel == kernel else launch)

    def is_red(case: Case) -> bool:
        try:
            error, mass_error = difference(fused(case, run), portable(case))
        except KernelError:
            return True
        return error > TOLERANCE[case.dtype] or mass_error > MASS_TOLERANCE

    assert any(is_red(case) for case in MUTATION_CASES)
