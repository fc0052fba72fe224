"""Which exits to keep open: what each saves, weighed against what looking there costs, on samples played through."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempo_mlx.calibrate.fit import Outcome
from tempo_mlx.calibrate.samples import Ints
from tempo_mlx.model._mlx import mx
from tempo_mlx.model.exit_cache import MOST_WAITING
from tempo_mlx.model.linear import Linear
from tempo_mlx.model.transformer import Transformer

MOST_EXITS = 3
LEAST_GAIN = 0.005  # of the time of a token, that one more exit must bring
PLAYED = 4000  # samples
ROUNDS = 15
CONTEXT = 64  # slots below the rows, when costs are measured


@dataclass(frozen=True)
class Costs:
    """Seconds of one row: a layer, the head, a look at an exit; of each further row: more_layer, more_head."""

    layers: int
    layer: float
    head: float
    look: float
    more_layer: float
    more_head: float

    @property
    def full(self) -> float:
        return self.layers * self.layer + self.head


def measure_costs(model: Transformer, head: Linear) -> Costs:
    """Measured here and now: lower quartiles of interleaved rounds."""
    size, layers = model.architecture.hidden_size, model.architecture.num_hidden_layers
    cache = model.new_cache()
    model.forward([0] * CONTEXT, range(CONTEXT), None, cache, logits="none")
    square = mx.random.normal((size, size)).astype(model.dtype)
    states = {rows: mx.random.normal((rows, size)).astype(model.dtype) for rows in (1, 4)}

    def through(rows: int) -> Any:
        cache.reserve(np.arange(CONTEXT, CONTEXT + rows))
        out, _ = model.run_layers(states[rows], model.rows(cache.positions[CONTEXT:], None, cache), cache)
        cache.truncate(CONTEXT)
        return out

    cases: dict[str, Callable[[], Any]] = {
        "layers": lambda: through(1),
        "layers of 4": lambda: through(4),
        "head": lambda: model.logits(states[1]),
        "head of 4": lambda: model.logits(states[4]),
        "look": lambda: model.logits(states[1] @ square, head),
    }
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, run in cases.items():
            start = time.perf_counter()
            mx.eval(run())
            taken[name].append(time.perf_counter() - start)
    seconds = {name: float(np.quantile(all[1:], 0.25)) for name, all in taken.items()}  # the first warms up
    return Costs(
        layers=layers,
        layer=seconds["layers"] / layers,
        head=seconds["head"],
        look=seconds["look"],
        more_layer=max(0.0, seconds["layers of 4"] - seconds["layers"]) / 3 / layers,
        more_head=max(0.0, seconds["head of 4"] - seconds["head"]) / 3,
    )


def choose(
    thresholds: Mapping[int, float | None], outcomes: Mapping[int, Outcome], texts: Ints, costs: Costs
) -> list[int]:
    """The layers to leave at, added one by one as long as each makes a token cheaper."""
    usable = {layer: least for layer, least in thresholds.items() if least is not None}
    passes = {layer: outcomes[layer].margins[:PLAYED] >= least for layer, least in usable.items()}
    chosen: list[int] = []
    best = costs.full
    while len(chosen) < MOST_EXITS:
        prices = {
            layer: price(sorted([*chosen, layer]), passes, texts[:PLAYED], costs)
            for layer in usable
            if layer not in chosen
        }
        if not prices:
            break
        layer = min(prices, key=lambda each: prices[each])
        if prices[layer] > best - LEAST_GAIN * costs.full:
            break
        best = prices[layer]
        chosen.append(layer)
    return sorted(chosen)


def price(chosen: Sequence[int], passes: Mapping[int, Any], texts: Ints, costs: Costs) -> float:
    """Seconds a token, when rows leave as `passes` says and are caught up exactly (see decode/early_exit.py)."""
    last = costs.layers - 1
    total = 0.0
    waiting: list[int] = []  # levels of rows that left, none below the one after it

    def run(first: int, stop: int) -> float:
        nonlocal waiting
        behind = sum(stop - max(first, level) for level in waiting if level < stop)
        waiting = [level if level > stop else stop for level in waiting]
        return costs.layer * (stop - first) + costs.more_layer * behind

    for sample in range(len(texts)):
        depth, left = 0, None
        full = len(waiting) >= MOST_WAITING
        for layer in chosen:
            if full and layer != last:
                continue
            total += run(depth, layer + 1) + costs.look
            depth = layer + 1
            if passes[layer][sample]:
                left = layer
                break
        if left is None:
            total += run(depth, costs.layers) + costs.head
        elif left == last:
            total += costs.more_head
        else:
            waiting.append(left + 1)
            total += costs.more_head
        ends = sample + 1 == len(texts) or texts[sample + 1] != texts[sample]
        if ends and waiting:
            total += run(min(waiting), costs.layers)
        waiting = [] if ends else [level for level in waiting if level < costs.layers]
    return total / len(texts)
