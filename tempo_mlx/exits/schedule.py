"""Which exits to keep open: a cost model of decoding, simulated on the samples with every choice of exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tempo_mlx.arrays import Bools, Ints
from tempo_mlx.exits.agreement import Outcome, Place, curve, together
from tempo_mlx.exits.cache import AUDITED_EVERY, MOST_DRAFTED, MOST_WAITING
from tempo_mlx.exits.calibration import TARGETS, Exit, Translator
from tempo_mlx.model.transformer import Transformer

MOST_EXITS = 3
LEAST_GAIN = 0.005  # share of a token's cost that one more exit must save
LEAST_DRAFT_GAIN = 0.12  # share that drafting must save: with .09 predicted, a quarter of texts lost 5%
STRICTER = 10  # steps in which margins are raised
PLAYED = 4000  # samples in the simulation
MORE = 0.06  # cost of each further row of a pass, relative to the first; measured on a two-core CPU


@dataclass(frozen=True)
class Costs:
    """Costs of one row: a layer, the head, a look at an exit (by width); of each further row: more_layer, more_head."""

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
    """In bytes of weights read, which bounds the time of a pass of few rows on any device."""
    a = model.architecture
    parts = [linear for block in model.blocks for linear in block.linears()]
    layer = sum(array.nbytes for part in parts for array in part.arrays()) / len(model.blocks)
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


def with_schedule(
    outcomes: Mapping[Place, Outcome],
    fitted: Mapping[int, Translator | None],
    texts: Ints,
    prompts: int,
    costs: Costs,
) -> list[Exit]:
    """The exits, each with the targets for which it pays, to leave at or to draft with. Of a layer where none pays
    only the widest is kept, for the report, without its translator.

    texts (N,): the text of each sample; those of one prompt are equal modulo `prompts`. A later exit sees harder
    choices than it was judged on, as earlier exits take the easy ones; so margins are raised until the exits of a
    target meet it together.
    """
    plain = {place: Exit(*place, curve(outcome, texts % prompts)) for place, outcome in outcomes.items()}
    pays: dict[Place, dict[float, float]] = {place: {} for place in plain}
    drafts: dict[Place, dict[float, float]] = {place: {} for place in plain}
    for target in TARGETS:
        margins = _margins(plain, target)
        if (best := choose_draft(margins, outcomes, texts, costs)) is not None:
            drafts[best][target] = margins[best]
        for step in range(STRICTER):
            margins = _margins(plain, target + (1 - target) * step / STRICTER)
            places = choose(margins, outcomes, texts, costs)
            if together(places, margins, outcomes, texts % prompts) >= target:
                for place in places:
                    pays[place][target] = margins[place]
                break
    paying = {layer for layer, width in plain if pays[layer, width] or drafts[layer, width]}
    result = []
    for place, item in plain.items():
        if pays[place] or drafts[place]:
            weight, offset = fitted[item.layer] or (None, None)
            result.append(replace(item, pays=pays[place], drafts=drafts[place], weight=weight, offset=offset))
        elif item.layer not in paying and place == max(other for other in plain if other[0] == item.layer):
            result.append(item)
    return result


def _margins(exits: Mapping[Place, Exit], target: float) -> dict[Place, float]:
    """The margins of the exits that can promise it."""
    found = {place: item.margin(target) for place, item in exits.items()}
    return {place: margin for place, margin in found.items() if margin is not None}


def choose(
    margins: Mapping[Place, float], outcomes: Mapping[Place, Outcome], texts: Ints, costs: Costs
) -> list[Place]:
    """The exits to keep open, at most one per layer, added greedily while each makes a token cheaper."""
    passes = {place: outcomes[place].margins[:PLAYED] >= least for place, least in margins.items()}
    chosen: list[Place] = []
    best = costs.full
    while len(chosen) < MOST_EXITS:
        layers = {layer for layer, _ in chosen}
        prices = {
            place: price(sorted([*chosen, place]), passes, texts[:PLAYED], costs)
            for place in passes
            if place[0] not in layers
        }
        if not prices:
            break
        least = min(prices.values())
        if least > best - LEAST_GAIN * costs.full:
            break
        near = [place for place in prices if prices[place] <= least + LEAST_GAIN * costs.full]
        place = max(near, key=lambda each: each[1])  # among equals the widest, which misses the fewest tokens
        best = prices[place]
        chosen.append(place)
    return sorted(chosen)


def price(chosen: Sequence[Place], passes: Mapping[Place, Bools], texts: Ints, costs: Costs) -> float:
    """The cost of a token when rows leave as `passes` says and are caught up exactly (see exits/early_exit.py)."""
    last = costs.layers - 1
    total = 0.0
    waiting: list[int] = []  # levels of rows that left, in falling order

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


def choose_draft(
    margins: Mapping[Place, float], outcomes: Mapping[Place, Outcome], texts: Ints, costs: Costs
) -> Place | None:
    """The exit that makes lossless decoding cheapest; None where drafting does not pay."""
    prices = {
        place: drafting_price(
            place, outcomes[place].margins >= least, outcomes[place].right, texts[:PLAYED], costs
        )
        for place, least in margins.items()
    }
    best = min(prices, key=lambda place: prices[place], default=None)
    return best if best is not None and prices[best] < (1 - LEAST_DRAFT_GAIN) * costs.full else None


def drafting_price(place: Place, sure: Bools, right: Bools, texts: Ints, costs: Costs) -> float:
    """The cost of a token when the exit drafts while it is `sure` and all rows are then checked together (see
    exits/self_speculation.py). The samples do not say what would follow a wrong draft, so drafting ends there.
    """
    layer, width = place
    row = costs.layer * (layer + 1)
    total, at = 0.0, 0
    while at < len(texts):
        rows, given = 1, 1
        total += row + costs.look[width]
        while rows < MOST_DRAFTED and at + given < len(texts) and texts[at + given] == texts[at]:
            drafted = at + given - 1
            if not sure[drafted]:
                break
            rows += 1
            total += row
            if not right[drafted]:
                break
            given += 1
            total += costs.look[width] if rows < MOST_DRAFTED else 0
        above = costs.layer * (costs.layers - layer - 1) + costs.head
        more = costs.more_layer * (costs.layers - layer - 1) + costs.more_head
        total += above + (rows - 1) * more
        at += given
    return total / len(texts)
