"""Several forward passes made as one: products are of all their rows, attention of each is in its own cache.

A row's numbers come of itself and of its cache alone, so each pass gives what it gives by itself, but for the last
digits of products, which a library may add up otherwise for another number of rows. A product of few rows takes about
as long as its weights take to be read: so passes made together take little longer than one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tempo_mlx.mlx import mx
from tempo_mlx.model.attention import Share
from tempo_mlx.model.failures import told_failures
from tempo_mlx.model.forward import Ask, Forward
from tempo_mlx.model.rope import rotations
from tempo_mlx.model.transformer import Transformer


@told_failures()
def together(model: Transformer, asks: Sequence[Ask]) -> list[Forward]:
    """What `forward` gives for each, every one of another cache, to which its rows are appended.

    Raises DeviceError, and then no cache has a row more.
    """
    stops = np.cumsum([len(ask.positions) for ask in asks]).tolist()
    for ask in asks:
        ask.cache.reserve(ask.positions)
    turns = zip(
        *(rotations(model.architecture.ropes, ask.positions, ask.cache.positions) for ask in asks),
        strict=True,
    )
    shares = [
        Share(stop, ask.cache, model.biases(ask.positions, ask.bias, ask.cache))
        for stop, ask in zip(stops, asks, strict=True)
    ]
    rows = model.rows_of(
        np.concatenate([ask.positions for ask in asks]),
        [
            (np.concatenate([cos for cos, _ in turn]), np.concatenate([sin for _, sin in turn]))
            for turn in turns
        ],
        {},
        shares=tuple(shares),
    )
    tokens = np.concatenate([np.asarray(ask.tokens, np.int64) for ask in asks])
    out = model.logits(model.through(tokens, rows, asks[0].cache)[0])
    mx.eval(out, *(array for ask in asks for array in ask.cache.arrays()))
    for ask in asks:
        ask.cache.commit()
    logits = np.array(out, copy=False)
    return [Forward(rows) for rows in np.split(logits, stops[:-1])]
