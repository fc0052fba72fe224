"""Attention over a lattice in the Metal language: the bodies of three kernels.

MLX writes the signatures, from the names used (`mx.fast.metal_kernel`); `kernels.py` launches them, and
tests/test_kernels.py runs the same text on the CPU. Not yet run on Metal.

ATTENTION is an online softmax (Milakov and Gimelshein, arXiv 1805.02867) over spans of the cache, COMBINE
merges the spans (flash decoding, Dao et al., 2023), MASS makes scores into the attention each slot received.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """What `mx.fast.metal_kernel` makes a kernel of; `source` uses the names in `inputs` and `outputs`."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str


HEADER = """
// A score this low stands for -inf: not seen. It is finite, so the difference of two of them is a number.
// Adding q.k does not change it, and once a row sees any slot, exp makes it 0.
constant constexpr float HIDDEN = -1e30f;
"""

ATTENTION = Kernel(
    "lattice_attention",
    (
        "queries",
        "keys",
        "values",
        "table",
        "row_positions",
        "slot_positions",
        "first_open",
        "window",
        "scale",
        "softcap",
        "span",
        "want_mass",
    ),
    ("attention", "logsumexps", "scores"),
    """
    // A threadgroup takes ROWS query rows of one key head over one span of slots. TEAM lanes share a slot,
    // PER dimensions each, so each simdgroup looks at 32 / TEAM slots at a time. At the end they merge.
    constexpr int PER = D / TEAM;
    constexpr int TEAMS = 32 / TEAM;
    const int heads = queries_shape[0];
    const int rows = queries_shape[1];
    const int slots = keys_shape[1];
    const int heads_per_key = heads / keys_shape[0];
    const int key_head = threadgroup_position_in_grid.x;
    const int tile = threadgroup_position_in_grid.y;
    const int part = threadgroup_position_in_grid.z;
    const int begin = part * span;
    const int end = metal::min(begin + span, slots);
    const int simdgroup = simdgroup_index_in_threadgroup;
    const int lane = thread_index_in_simdgroup;
    const int team = lane / TEAM;
    const int first_dim = lane % TEAM * PER;

    // Query rows of a key head are numbered by row, then head. A ragged tile repeats its last one.
    int row[ROWS];
    int head[ROWS];
    float query[ROWS][PER];
    float output[ROWS][PER];
    float top[ROWS];    // largest score so far
    float total[ROWS];  // sum of exp(score - top)
    #pragma clang loop unroll(full)
    for (int i = 0; i < ROWS; i++) {
        const int r = metal::min(tile * ROWS + i, rows * heads_per_key - 1);
        row[i] = r / heads_per_key;
        head[i] = key_head * heads_per_key + r % heads_per_key;
        top[i] = HIDDEN;
        total[i] = 0;
        const int64_t at = head[i] * queries_strides[0] + row[i] * queries_strides[1] + first_dim;
        #pragma clang loop unroll(full)
        for (int d = 0; d < PER; d++) {
            query[i][d] = scale * static_cast<float>(queries[at + d]);
            output[i][d] = 0;
        }
    }

    for (int base = begin + simdgroup * TEAMS; base < end; base += SIMDGROUPS * TEAMS) {
        const bool inside = base + team < end;
        const int slot = metal::min(base + team, end - 1);
        float score[ROWS];
        bool seen = false;
        #pragma clang loop unroll(full)
        for (int i = 0; i < ROWS; i++) {
            float bias = 0;
            if (slot >= first_open) {
                bias = metal::max(table[row[i] * (slots - first_open) + slot - first_open], HIDDEN);
            }
            if (window > 0 && row_positions[row[i]] - slot_positions[slot] >= window) {
                bias = HIDDEN;
            }
            score[i] = inside ? bias : HIDDEN;
            seen = seen || score[i] > HIDDEN;
        }
        if (simd_any(seen)) {
            const int64_t key_at = key_head * keys_strides[0] + slot * keys_strides[1] + first_dim;
            const int64_t value_at = key_head * values_strides[0] + slot * values_strides[1] + first_dim;
            float key[PER];
            float value[PER];
            #pragma clang loop unroll(full)
            for (int d = 0; d < PER; d++) {
                key[d] = static_cast<float>(keys[key_at + d]);
                value[d] = static_cast<float>(values[value_at + d]);
            }
            #pragma clang loop unroll(full)
            for (int i = 0; i < ROWS; i++) {
                float dot = 0;
                #pragma clang loop unroll(full)
                for (int d = 0; d < PER; d++) {
                    dot += query[i][d] * key[d];
                }
                for (ushort other = TEAM / 2; other > 0; other /= 2) {
                    dot += simd_shuffle_xor(dot, other);
                }
                if (softcap > 0) {
                    dot = softcap * metal::precise::tanh(dot / softcap);
                }
                score[i] += dot;
                const float new_top = metal::max(top[i], score[i]);
                const float keep = metal::exp(top[i] - new_top);
                const float weight = metal::exp(score[i] - new_top);
                top[i] = new_top;
                total[i] = total[i] * keep + weight;
                #pragma clang loop unroll(full)
                for (int d = 0; d < PER; d++) {
                    output[i][d] = output[i][d] * keep + weight * value[d];
                }
            }
        }
        if (want_mass && inside && first_dim == 0) {
            #pragma clang loop unroll(full)
            for (int i = 0; i < ROWS; i++) {
                scores[(row[i] * heads + head[i]) * slots + slot] = score[i];
            }
        }
    }

    // Merge the teams of each simdgroup, then the simdgroups, one row at a time.
    threadgroup float tops[SIMDGROUPS];
    threadgroup float totals[SIMDGROUPS];
    threadgroup float outputs[SIMDGROUPS * D];
    #pragma clang loop unroll(full)
    for (int i = 0; i < ROWS; i++) {
        const float team_top = simd_max(top[i]);
        const float keep = metal::exp(top[i] - team_top);
        float team_total = total[i] * keep;
        for (ushort other = TEAM; other < 32; other *= 2) {
            team_total += simd_shuffle_xor(team_total, other);
        }
        #pragma clang loop unroll(full)
        for (int d = 0; d < PER; d++) {
            float team_output = output[i][d] * keep;
            for (ushort other = TEAM; other < 32; other *= 2) {
                team_output += simd_shuffle_xor(team_output, other);
            }
            if (team == 0) {
                outputs[simdgroup * D + first_dim + d] = team_output;
            }
        }
        if (lane == 0) {
            tops[simdgroup] = team_top;
            totals[simdgroup] = team_total;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float whole_top = HIDDEN;
        for (int s = 0; s < SIMDGROUPS; s++) {
            whole_top = metal::max(whole_top, tops[s]);
        }
        float whole = 0;
        for (int s = 0; s < SIMDGROUPS; s++) {
            whole += totals[s] * metal::exp(tops[s] - whole_top);
        }
        const int at = (part * rows + row[i]) * heads + head[i];
        for (int d = simdgroup * 32 + lane; d < D; d += SIMDGROUPS * 32) {
            float sum = 0;
            for (int s = 0; s < SIMDGROUPS; s++) {
                sum += outputs[s * D + d] * metal::exp(tops[s] - whole_top);
            }
            attention[at * D + d] = static_cast<OUT>(whole > 0 ? sum / whole : 0.0f);
        }
        if (simdgroup == 0 && lane == 0) {
            logsumexps[at] = whole > 0 ? whole_top + metal::log(whole) : HIDDEN;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // others still read what the next row overwrites
    }
    """,
)

COMBINE = Kernel(
    "lattice_combine",
    ("parts", "logsumexps"),
    ("attention", "logsumexp"),
    """
    // A thread makes one number of the output: the mean of what the spans found (parts, L, H D), weighted by
    // the sums they saw.
    const int d = thread_position_in_grid.x;
    const int r = thread_position_in_grid.y;
    const int count = logsumexps_shape[0];
    const int heads_and_rows = logsumexps_shape[1];
    float top = HIDDEN;
    for (int part = 0; part < count; part++) {
        top = metal::max(top, logsumexps[part * heads_and_rows + r]);
    }
    float whole = 0;
    float sum = 0;
    for (int part = 0; part < count; part++) {
        const int at = part * heads_and_rows + r;
        const float weight = metal::exp(logsumexps[at] - top);
        whole += weight;
        sum += weight * parts[at * D + d];
    }
    attention[r * D + d] = static_cast<OUT>(sum / whole);
    if (d == 0) {
        logsumexp[r] = top + metal::log(whole);
    }
    """,
)

MASS = Kernel(
    "lattice_mass",
    ("scores", "logsumexp"),
    ("mass",),
    """
    // A thread takes one slot: the mean over heads and rows of exp(score - logsumexp).
    const int slot = thread_position_in_grid.x;
    const int heads_and_rows = scores_shape[0];
    const int slots = scores_shape[1];
    float sum = 0;
    for (int r = 0; r < heads_and_rows; r++) {
        sum += metal::exp(scores[r * slots + slot] - logsumexp[r]);
    }
    mass[slot] = sum / heads_and_rows;
    """,
)
