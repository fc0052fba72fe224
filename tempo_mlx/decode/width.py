"""`max_parallel_tokens auto`: the widest set that this device runs for little more than a single row.

What k rows cost beside one depends on device, number format and library far more than on anything one could know
beforehand: from hardly more (bfloat16 on a GPU) to six times as much for eight (4-bit on some). So it is measured,
once for each model on each device, and kept in the user's cache directory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata

import numpy as np

from tempo_mlx._version import __version__
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.padding import with_padding
from tempo_mlx.kept import keep, kept
from tempo_mlx.model import device
from tempo_mlx.model.forward import Model
from tempo_mlx.settings import settings_of

KEPT = "row-costs.json"
ROWS = range(1, 17)  # every one: products on a GPU may take 6 rows for less than 5
AFFORDABLE = 2.0  # times a single row
CONTEXT = 64  # slots below the rows
ROUNDS = 9

log = logging.getLogger(__name__)


def with_measured_width(config: GenerateConfig, model: Model, *, pads: bool = False) -> GenerateConfig:
    """`config` with a number for `max_parallel_tokens auto`, where its decoder uses it. pads: see padding.py."""
    decoders = settings_of(GenerateConfig)["max_parallel_tokens"].row.decoders or ()
    if config.max_parallel_tokens != "auto" or config.decoder not in decoders:
        return config
    return replace(config, max_parallel_tokens=affordable(row_costs(model), pads=pads))


def affordable(costs: Mapping[int, float], *, pads: bool = False) -> int:
    """The most rows that cost at most AFFORDABLE times one row; between measured numbers the cost is a line."""
    costs = with_padding(costs) if pads else costs
    rows = np.arange(1, max(costs) + 1)
    known = sorted(costs)
    between = np.interp(rows, known, [costs[k] for k in known])
    too_dear = np.flatnonzero(between > AFFORDABLE * costs[1])
    return int(rows[too_dear[0] - 1] if len(too_dear) else rows[-1])


def row_costs(model: Model, *, again: bool = False) -> dict[int, float]:
    """Seconds of a pass of k rows, by k; measured (`again`, or where no measurement is kept) and kept."""
    if not again and (costs := kept_costs(model)):
        return costs
    if not again:
        log.warning("Measuring once what rows cost on this device; it takes some seconds.")
    costs = measure(model)
    keep(KEPT, _key(model), costs)
    return costs


def kept_costs(model: Model) -> dict[int, float]:
    """What is kept of a measurement of every width; nothing where that is not what was written."""
    try:
        costs = {int(rows): float(cost) for rows, cost in kept(KEPT).get(_key(model), {}).items()}
    except (TypeError, ValueError, AttributeError):
        return {}
    return costs if sorted(costs) == list(ROWS) else {}


def measure(model: Model) -> dict[int, float]:
    """Seconds of a pass of k rows, by k: the lower quartile of interleaved passes over a short context."""
    vocabulary = model.architecture.vocab_size
    cache = model.new_cache()
    tokens = np.random.default_rng(0).integers(vocabulary, size=CONTEXT)
    model.forward(tokens, np.arange(CONTEXT), None, cache, logits="none")
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(ROUNDS + 1):
        for rows, taken in seconds.items():
            bias = np.zeros((rows, CONTEXT + rows), np.float32)
            bias[:, CONTEXT:] = np.where(np.eye(rows, dtype=bool), 0, -np.inf)
            start = time.perf_counter()
            model.forward(tokens[:rows], np.full(rows, CONTEXT), bias, cache)
            taken.append(time.perf_counter() - start)
            cache.truncate(CONTEXT)
    return {
        rows: float(np.quantile(taken[1:], 0.25)) for rows, taken in seconds.items()
    }  # the first warms up


def _key(model: Model) -> str:
    info = model.info
    parts = [info.get("sha256") or info.get("revision") or info.get("id")]
    parts += [info.get(name) for name in ("dtype", "quantization", "kv_bits", "backend", "device")]
    parts += [
        device.name(),
        __version__,
        *(metadata.version(name) for name in ("mlx", "torch") if name == info.get("backend")),
    ]
    return " ".join(map(str, parts))
