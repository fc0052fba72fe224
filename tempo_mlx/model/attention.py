"""Attention of a few rows over one cache, in MLX ops."""

from __future__ import annotations

from typing import Any, Literal

from tempo_mlx.model._mlx import mx
from tempo_mlx.model.visibility import causal_bias


def attend(
    queries: Any,
    keys: Any,
    values: Any,
    bias: Any | None,
    *,
    scale: float,
    softcap: float | None,
    mass: bool | Literal["rows"],
) -> tuple[Any, Any | None]:
    """queries (H, L, D), keys and values (K, S, D), bias (L, S) additive or None for plain causal.

    Returns the output (L, H D) and, where `mass`, the attention each slot received: (S,), mean over heads and rows,
    or (L, S) for "rows".
    """
    heads, rows, dim = queries.shape
    groups, slots, _ = keys.shape
    if bias is None and rows > 1:
        bias = mx.array(causal_bias(rows, slots)).astype(queries.dtype)
    folded = (queries * scale).reshape(groups, heads // groups * rows, dim)
    scores = folded @ keys.swapaxes(1, 2)  # (K, H/K L, S)
    if softcap is not None:
        scores = mx.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores.reshape(heads, rows, slots) + bias
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(groups, -1, slots)
    out = (weights @ values).reshape(heads, rows, dim).transpose(1, 0, 2).reshape(rows, heads * dim)
    if not mass:
        return out, None
    by_row = weights.reshape(heads, rows, slots).astype(mx.float32).mean(axis=0)
    return out, by_row if mass == "rows" else by_row.mean(axis=0)
