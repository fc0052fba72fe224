"""Which exits to keep open: what each saves, weighed against what looking there costs, on samples played through."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.calibrate.fit import Outcome
from tempo_mlx.calibrate.samples import Ints
from tempo_mlx.model._mlx import mx
from tempo_mlx.model.exit_cache import AUDITED_EVERY, MOST_WAITING
from tempo_mlx.model.transformer import Transformer

MOST_EXITS = 3
LEAST_GAIN = 0.005  # of the time of a token, that one more exit must bring
PLAYED = 4000  # samples
ROUNDS = 15
Place = tuple[int, int]  # layer and width of an exit

CONTEXT = 64  # slots below the rows, when costs are measured


@dataclass(frozen=True)
class Costs:
    """Seconds of one row: a layer, the head, a look at an exit by width; of each further row: more_layer, more_head."""

    layers: int
    layer: float
    head: float
    more_layer: float
    more_head: float
    look: Mapping[int, float]

    @property
    def full(self) -> float:
        return self.layers * self.layer + self.head


def measure_costs(model: Transformer, shortlist: NDArray[np.int32], widths: Sequence[int]) -> Costs:
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
    }
    for width in widths:
        part = model.head.choose(mx.array(shortlist[:width]))
        cases[f"look {width}"] = lambda part=part: model.logits(states[1] @ square, part)  # type: ignore[misc]
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
        more_layer=max(0.0, seconds["layers of 4"] - seconds["layers"]) / 3 / layers,
        more_head=max(0.0, seconds["head of 4"] - seconds["head"]) / 3,
        look={width: seconds[f"look {width}"] for width in widths},
    )


def choose(
    thresholds: Mapping[Place, float | None], outcomes: Mapping[Place, Outcome], texts: Ints, costs: Costs
) -> list[Place]:
    """The exits to keep open, at most one a layer, added one by one as long as each makes a token cheaper."""
    usable = {place: least for place, least in thresholds.items() if least is not None}
    passes = {place: outcomes[place].margins[:PLAYED] >= least for place, least in usable.items()}
    chosen: list[Place] = []
    best = costs.full
    while len(chosen) < MOST_EXITS:
        layers = {layer for layer, _ in chosen}
        prices = {
            place: price(sorted([*chosen, place]), passes, texts[:PLAYED], costs)
            for place in usable
            if place[0] not in layers
        }
        if not prices:
            break
        place = min(prices, key=lambda each: prices[each])
        if prices[place] > best - LEAST_GAIN * costs.full:
            break
        best = prices[place]
        chosen.append(place)
    return sorted(chosen)


def price(chosen: Sequence[Place], passes: Mapping[Place, Any], texts: Ints, costs: Costs) -> float:
    """Seconds a token, when rows leave as `passes` says and are caught up exactly (see decode/early_exit.py)."""
    last = costs.layers - 1
    total = 0.0
    waiting: list[int] = []  # levels of rows that left, none below the one after it

    def run(first: int, stop: int) -> float:
        behind = sum(stop - max(first, level) for level in waiting if level < stop)
        waiting[:] = [max(level, stop) for level in waiting]
        return costs.layer * (stop - first) + costs.more_layer * behind

    for sample in range(len(texts)):
        depth, left = 0, None
        full = len(waiting) >= MOST_WAITING
        for place in chosen:
            layer, width = place
            if full and layer != last:
                continue
            total += run(depth, layer + 1) + costs.look[width]
            depth = layer + 1
            if passes[place][sample]:
                left = layer
                break
        if left is None:
            total += run(depth, costs.layers) + costs.head
        else:
            total += costs.more_head / AUDITED_EVERY
            if left < last:
                waiting.append(left + 1)
        ends = sample + 1 == len(texts) or texts[sample + 1] != texts[sample]
        if ends and waiting:
            total += run(min(waiting), costs.layers)
        waiting[:] = [level for level in waiting if level < costs.layers and not ends]
    return total / len(texts)
