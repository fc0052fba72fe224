"""What the library of packed_products.cpp computes, against what MLX makes of the same weights unpacked."""

from __future__ import annotations

from itertools import product

import numpy as np

from tempo_mlx.mlx import mx
from tempo_mlx.packed_products import counted, trust

MANY = 65  # rows that are left to the BLAS (MOST_PACKED of few_rows.c, and one)
TOLERANCE = 1e-5  # of the sum of the products' absolute values


def trusted(path: str) -> bool:
    """Let the library describe products if it is right; MLX's own function goes on with them if it is not."""
    trust(path, True)
    right = _agrees(path)
    trust(path, right)
    return right


def _agrees(path: str) -> bool:
    """Whether MLX takes the library, and it computes what MLX computes with the same weights unpacked: every number of
    rows, ends of every length, every layout."""
    count = counted(path)
    before, tried = count(), 0
    random = np.random.default_rng(0)
    for (outs, groups), bits, group in product(((5, 3), (37, 8)), (4, 8), (32, 64, 128)):
        every, w = (random.standard_normal((n, groups * group), np.float32) for n in (MANY, outs))
        parts = mx.quantize(mx.array(w), group, bits, stream=mx.cpu)
        weights = mx.dequantize(*parts, group, bits, stream=mx.cpu)
        mx.eval(parts, weights)
        for rows in (*range(1, 10), MANY):
            x = mx.array(every[:rows])
            x = x if outs == 5 else mx.contiguous(x.T, stream=mx.cpu).T  # columns that lie apart
            y = mx.quantized_matmul(x, *parts, True, group, bits, stream=mx.cpu)
            error = mx.abs(y - mx.matmul(x, weights.T, stream=mx.cpu), stream=mx.cpu)
            bound = TOLERANCE * mx.matmul(
                mx.abs(x, stream=mx.cpu), mx.abs(weights, stream=mx.cpu).T, stream=mx.cpu
            )
            tried += 1
            if not mx.all(mx.less_equal(error, bound, stream=mx.cpu), stream=mx.cpu).item():
                return False
    return bool(count() - before == tried)
