"""What superposition costs: how far a lattice's rows are from what the model says of each path alone.

Paths are drawn along the edges of a lattice. After each of its tokens, the exact distribution (one tree pass, every
row sees its own ancestors) is held against that of the lattice's row of the same member, which sees a mixture of
pasts: KL(exact || superposed) in nats, mean over paths. `mixture`: the same of the distributions averaged over the
paths, where what belongs to single paths cancels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import tempo_mlx
from benchmarks.quality.prompts import Prompt
from benchmarks.studies import append_record, read_records
from tempo_mlx.api import Stream
from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.decode.combine import log_probabilities
from tempo_mlx.decode.paths import layers_of, sample_paths, token_ids
from tempo_mlx.decode.prefill import never, prefill
from tempo_mlx.decode.score import depths, make_trie
from tempo_mlx.decode.tempo import Tempo
from tempo_mlx.lattice import ATTEND_RULES, ancestor_bias, ancestor_parents

CASES = [*((rule, 8) for rule in ATTEND_RULES), ("lineage", 2), ("lineage", 4), ("all", 2), ("all", 4)]
THRESHOLD = 0.03  # low enough for the widths to count
PATHS = 6


def run_divergence(
    loaded: tempo_mlx.LoadedModel, prompts: Sequence[Prompt], tokens: int, path: Path
) -> Iterator[dict[str, Any]]:
    """Append a line to `path` for every prompt, rule and width that has none there, yielding it."""
    done = {(line["prompt"], line["attend"], line["cap"]) for line in read_records(path)}
    for prompt in prompts:
        for attend, cap in CASES:
            if (prompt.id, attend, cap) in done:
                continue
            result = measure(loaded, prompt.text, attend, cap, tokens)
            line = {"prompt": prompt.id, "attend": attend, "cap": cap, **result}
            append_record(path, line)
            yield line


def measure(
    loaded: tempo_mlx.LoadedModel, prompt: str, attend: str, cap: int, tokens: int, paths: int = PATHS
) -> dict[str, Any]:
    """KL after each of the first tokens - 1 steps: `row`, `mixture`; `width`: mean of the sets."""
    decoding = tempo_mlx.stream(
        loaded, prompt, attend=attend, max_parallel_tokens=cap, threshold=THRESHOLD, max_tokens=tokens,
        min_steps=tokens,
    )  # fmt: skip
    rows = rows_of(decoding)
    layers = layers_of(decoding.steps)
    drawn = sample_paths(layers, paths, 0)
    exact = exact_rows(
        loaded.model, decoding.prompt.token_ids, [token_ids(layers, path) for path in drawn]
    )  # (paths, tokens - 1, V)
    result: dict[str, Any] = {"row": [], "mixture": []}
    for t, superposed in enumerate(rows):
        log_p, log_q = exact[:, t], superposed[[path.choice[t] for path in drawn]]
        result["row"].append(round(float(np.mean(divergence(log_p, log_q))), 4))
        means = [np.logaddexp.reduce(each, axis=0) - np.log(paths) for each in (log_p, log_q)]
        result["mixture"].append(round(float(divergence(*means)), 4))
    return {**result, "width": round(float(np.mean([len(layer.members) for layer in layers])), 3)}


def rows_of(decoding: Stream) -> list[Float32s]:
    """Decode a lattice to its end: the rows (k, V) of each set but the last, the best member's first."""
    # Somebody looks on: else a GPU chooses the best tokens itself, and rows are of those.
    decoding.task = replace(decoding.task, observer=lambda log_probs: None)
    rows: list[Float32s] = []
    for step in decoding:
        decoder = decoding.decoder
        assert isinstance(decoder, Tempo)
        if step.step:
            rows.append(decoder.log_probs[::-1])  # from slot order
    return rows


def divergence(log_p: Float32s, log_q: Float32s) -> Any:
    """KL(p || q) along the last axis."""
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1, dtype=np.float64)


def exact_rows(model: Any, prompt_ids: Sequence[int], texts: Sequence[Sequence[int]]) -> Float32s:
    """Log-probabilities after each token but the last of texts of one length: (texts, length - 1, V)."""
    log_probs, row_of = run_trie(model, prompt_ids, texts)
    return log_probs[np.stack(row_of)[:, 1:]]


def run_trie(
    model: Any, prompt_ids: Sequence[int], texts: Sequence[Sequence[int]]
) -> tuple[Float32s, list[Ints]]:
    """Log-probabilities (n, V) of all rows that texts need, and of each text the row that each token is read from."""
    cache = model.new_cache()
    shared = len(prompt_ids) - 1
    if shared:
        prefill(model, prompt_ids[:-1], cache, never)
    tokens, parents, row_of = make_trie(prompt_ids[-1], texts)
    bias = np.zeros((len(tokens), shared + len(tokens)), np.float32)
    bias[:, shared:] = ancestor_bias(parents, len(tokens))
    continued = ancestor_parents(parents, len(tokens), shared)
    out = model.forward(tokens, shared + depths(parents), bias, cache, parents=continued)
    return log_probabilities(out.logits), row_of
