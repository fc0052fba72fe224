"""What one step asks of a GPU: how many operations it dispatches, which a small model's step is made of.

Counted on MLX's own graph of a step that has been described and not been computed, so on any machine.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tempo_mlx.mlx import mx
from tempo_mlx.model.cache import Cache
from tempo_mlx.model.choosing import chosen
from tempo_mlx.model.forward import Attention, Choice
from tempo_mlx.model.transformer import Transformer

# Views: nothing is computed for them. (A slice of what is not contiguous, and a reshape of it, may be copies.)
VIEWS = frozenset(
    [
        "Broadcast",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "ExpandDims",
        "Transpose",
        "Unflatten",
        "Flatten",
        "BroadcastAxes",
    ]
)
NODE = re.compile(r'\[label ?= ?"([A-Za-z]\w*)", shape=rectangle\]')


def operations(arrays: Iterable[mx.array]) -> Counter[str]:
    """How often each operation is dispatched to compute these arrays, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "graph.dot")
        mx.export_to_dot(str(path), *arrays)
        found = Counter(NODE.findall(path.read_text()))
    return Counter({name: count for name, count in found.items() if name not in VIEWS})


def described(
    model: Transformer, cache: Cache, rows: int, attention: Attention = False, *, width: int | None = None
) -> list[mx.array]:
    """What a pass of so many rows, members of one set, gives and writes; not computed. `cache` is to be thrown away.

    width: of the set that is chosen from it on the device; None gives the logits.
    """
    slots = len(cache)
    bias = np.zeros((rows, slots + rows), np.float32)
    bias[:, slots:] = np.where(np.eye(rows, dtype=bool), 0, -np.inf)
    out, mass = model.described(
        np.arange(rows), np.full(rows, slots), bias if rows > 1 else None, cache, attention=attention
    )
    assert out is not None
    given = [out] if width is None else chosen(out, Choice(np.full(rows, 1 / rows), 1.0, width))
    return [*cache.arrays(), *given, *([] if mass is None else [mass])]
