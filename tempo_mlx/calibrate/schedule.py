"""Which exits to keep open: what each saves, weighed against what looking there costs, on samples played through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempo_mlx.calibrate.fit import Outcome, Place
from tempo_mlx.calibrate.samples import Ints
from tempo_mlx.model.exit_cache import AUDITED_EVERY, MOST_WAITING
from tempo_mlx.model.transformer import Transformer

MOST_EXITS = 3
LEAST_GAIN = 0.005  # of the cost of a token, that one more exit must bring
PLAYED = 4000  # samples
MORE = 0.2  # of what the first row takes, each further row of a pass takes; measured on a CPU of two cores


@dataclass(frozen=True)
class Costs:
    """Of one row: a layer, the head, a look at an exit by width; of each further row: more_layer, more_head."""

    layers: int
    layer: float
    head: float
    more_layer: float
    more_head: float
    look: Mapping[int, float]

    @property
    def full(self) -> float:
        return self.layers * self.layer + self.head


def costs_of(model: Transformer, widths: Sequence[int]) -> Costs:
    """By the weights that are read, which is what a pass of few rows takes its time for, on any device."""
    a = model.architecture
    parts = [(block.qkv, block.output, block.gate_up, block.down) for block in model.blocks]
    layer = sum(array.nbytes for block in parts for part in block for array in part.arrays()) / len(parts)
    head = sum(array.nbytes for array in model.head.arrays())
    translator = a.hidden_size**2 * model.dtype.size
    return Costs(
        layers=a.num_hidden_layers,
        layer=layer,
        head=head,
        more_layer=MORE * layer,
        more_head=MORE * head,
        look={width: translator + head * min(1.0, width / a.vocab_size) for width in widths},
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
        least = min(prices.values())
        if least > best - LEAST_GAIN * costs.full:
            break
        near = [place for place in prices if prices[place] <= least + LEAST_GAIN * costs.full]
        place = max(near, key=lambda each: each[1])  # of equals the widest, which misses least
        best = prices[place]
        chosen.append(place)
    return sorted(chosen)


def price(chosen: Sequence[Place], passes: Mapping[Place, Any], texts: Ints, costs: Costs) -> float:
    """What a token costs when rows leave as `passes` says and are caught up exactly (see decode/early_exit.py)."""
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
