"""What a verification finds: numbers held against others, sentences about what cannot be, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tempo_mlx.arrays import Float32s
from tempo_mlx.config import GenerateConfig
from tempo_mlx.exits.agreement import lower_bound
from tempo_mlx.model.forward import Model
from tempo_mlx.report.run import Run

EXACT = 1e-4  # of a probability at temperature 1 that is computed in float32
# How far a rounding may go, of a number near 1.
ROUNDING = {"float16": 2.0**-12, "bfloat16": 2.0**-9}
# Each layer rounds the residual stream twice, each time another way in a pass of few rows and one of many: measured on
# SmolLM2-135M in bfloat16, a logit is off by 1.1 times the root of that, times how far logits spread.
MARGIN = 2.5
MEASURED = 32  # rows
SPREAD = 4.0  # of the logits over the vocabulary, where a step's own is not known
# By the bits of a quantised KV cache. Where nothing is removed the replay repeats the run to 1e-6; a removed slot that
# is masked instead of dropped can change the last bit of a sum, and with it a rounding: 0.01 and 0.16 were measured.
KV_TOLERANCES = {8: 5e-2, 4: 0.4}
FROM_FILE = 1e-12  # of what follows from numbers of the file alone, by the same operations in float64
SUMMED = 1e-5  # of what was added up in float32
SHOWN = 20  # sentences of one kind that are kept
LEAST_ODDS = math.log(np.finfo(np.float32).tiny)


def noise_of(dtype: str, layers: int, numbers: int, measured: float = 0.0) -> float:
    """How far a logit may be off in half precision, as a part of how far logits spread: the largest of so many numbers,
    if they are off at random, by what layers round or by what was measured. 0 in float32."""
    largest = math.sqrt(2.0 * math.log(max(numbers, 8)))
    return largest * max(MARGIN * ROUNDING.get(dtype, 0.0) * math.sqrt(2.0 * layers), measured)


def measured_noise(model: Model, ids: Sequence[int]) -> float:
    """How far two passes that round otherwise differ, all rows at once and one by one: the deviation of a logit as a
    part of how far logits spread, in the worst row. Mostly it is what layers round; but random weights make up to ten
    times as much of a rounding, and it may choose between experts.
    """
    together = model.forward(ids, range(len(ids)), None, model.new_cache()).logits
    cache, worst = model.new_cache(), 0.0
    for position, token in enumerate(ids):
        sees_all = np.zeros(
            (1, position + 1), np.float32
        )  # and not None, for which there may be another kernel
        alone = model.forward([token], [position], sees_all, cache).logits
        assert together is not None and alone is not None
        worst = max(worst, float((alone[0] - together[position]).std() / together[position].std()))
    return worst


@dataclass(frozen=True)
class Tolerance:
    """How far a probability may lie from the one computed anew: `base`, and more where a cold run magnifies.

    A logit that is off by e moves the log-odds of a token by up to 2 e / T. `base` is what that comes to at even odds
    and T = 1, so 4 base / T is the way the log-odds may go; probabilities near 0 and 1 hardly move with it.
    noise: in half precision (see `noise_of`), where a step whose logits lie far apart is further off than another.
    """

    base: float
    temperature: float
    noise: float = 0.0

    def of(self, distribution: Float32s, token: int) -> float:
        """Of a token's probability in a distribution (V,)."""
        warm = self.temperature == 0.0 or self.temperature >= 1.0
        if warm and not self.noise:
            return self.base
        own = float(distribution[token])
        rest = float(
            distribution[:token].sum(dtype=np.float64) + distribution[token + 1 :].sum(dtype=np.float64)
        )
        odds = _log(own) - _log(rest)
        way = 4.0 * self.base / (1.0 if warm else self.temperature)
        if self.noise:
            way = max(way, self.noise * float(np.log(distribution[distribution > 0.0]).std()))
        moved = odds - math.copysign(way, odds)
        return max(self.base, abs(_sigmoid(moved) - _sigmoid(odds)))

    @property
    def worst(self) -> float:
        """Of any probability."""
        return self.base / self.temperature if 0.0 < self.temperature < 1.0 else self.base


def _log(mass: float) -> float:
    return math.log(mass) if mass > 0.0 else LEAST_ODDS


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700.0 else 0.0


def tolerance_for(model: Model, run: Run, config: GenerateConfig) -> Tolerance:
    """By what computes, how deep the model and how long the run is, how much the model makes of a rounding in its text,
    and how cold it decodes; what a file says of its numbers has no say."""
    numbers = sum(len(step.tokens) for step in run.steps)
    dtype, layers, measured = str(model.info.get("dtype")), model.architecture.num_hidden_layers, 0.0
    if dtype in ROUNDING:
        text = (step.tokens[0].id for step in run.steps)
        measured = measured_noise(model, [*run.prompt.token_ids, *text][:MEASURED])
    noise = noise_of(dtype, layers, numbers, measured)
    bits = model.info.get("kv_bits")
    rounded = 0.0 if bits is None else KV_TOLERANCES[8 if bits == 8 else 4]
    return Tolerance(max(EXACT, noise * SPREAD / 4.0, rounded), config.temperature, noise)


@dataclass(frozen=True)
class Difference:
    """One recorded number beside the one recomputed. `token`: text of the member, None for the step's own.

    tolerance: infinite in a step that left the model early, of which exactness is not promised.
    """

    quantity: str
    step: int
    token: str | None
    recorded: float
    recomputed: float
    tolerance: float

    @property
    def size(self) -> float:
        return abs(self.recorded - self.recomputed)

    @property
    def ok(self) -> bool:
        return self.size <= self.tolerance  # not where either is no number

    @property
    def gravity(self) -> tuple[bool, float, float]:
        """Of two differences the larger is the worse one."""
        return not self.ok, self.size / self.tolerance, self.size

    def __str__(self) -> str:
        where = f"step {self.step}" + ("" if self.token is None else f", token {self.token!r}")
        return (
            f"In {where}, the file says {self.quantity} {self.recorded:.9g}; "
            f"computed {self.recomputed:.9g}, tolerance {self.tolerance:.1e}."
        )


@dataclass(frozen=True)
class Verification:
    """worst: the largest difference of each quantity. findings: what cannot be, a sentence each; none where the run is
    what it says. recomputed, left_open: what was held against model, tokenizer and file, and what nobody could.

    rows: N, of the dense pass. agreement: share of the steps whose recorded best token is the recomputed one.
    early, early_agreement: steps that left the model early, of which agreement is promised and not exactness, and how
    many of those that can be judged agree.
    """

    worst: tuple[Difference, ...]
    findings: tuple[str, ...]
    recomputed: tuple[str, ...]
    left_open: tuple[str, ...]
    tolerance: float
    steps: int
    rows: int
    compared: int
    agreement: float
    early: int = 0

    @property
    def max_difference(self) -> float:
        """Of what is held to exactness."""
        return max((d.size for d in self.worst if math.isfinite(d.tolerance)), default=0.0)

    @property
    def ok(self) -> bool:
        return not self.findings


class Book:
    """Where the checks of one run write down what they find."""

    def __init__(self, tolerance: Tolerance) -> None:
        self.tolerance = tolerance
        self.worst: dict[str, Difference] = {}
        self.beyond: dict[str, int] = {}  # numbers out of tolerance, by quantity
        self.compared = 0
        self.recomputed: dict[str, None] = {}
        self.left_open: dict[str, None] = {}
        self.agreed: list[bool] = []  # of every step
        self.early_agreed: list[bool] = []  # of those that left the model early, where that can be judged
        self._sentences: dict[str, list[str]] = {}

    def number(
        self,
        quantity: str,
        step: int,
        token: str | None,
        recorded: float,
        recomputed: float,
        tolerance: float,
    ) -> None:
        """Hold a number of the file against the one computed."""
        self.compared += 1
        found = Difference(quantity, step, token, float(recorded), float(recomputed), tolerance)
        if not found.ok:
            self.beyond[quantity] = self.beyond.get(quantity, 0) + 1
        before = self.worst.get(quantity)
        if before is None or found.gravity > before.gravity:
            self.worst[quantity] = found

    def same(self, what: str, recorded: object, computed: object) -> bool:
        """Hold something against what it must equal. what: with its place, `step 3's position`."""
        self.compared += 1
        if recorded != computed:
            self.lie(what, f"The file says {_short(recorded)} as {what}; computed {_short(computed)}.")
        return recorded == computed

    def lie(self, kind: str, sentence: str) -> None:
        """What cannot be. kind: of which only some sentences are kept."""
        kept = self._sentences.setdefault(kind, [])
        if len(kept) < SHOWN:
            kept.append(sentence)

    def did(self, *what: str) -> None:
        self.recomputed.update(dict.fromkeys(what))

    def open(self, what: str) -> None:
        self.left_open[what] = None

    @property
    def findings(self) -> tuple[str, ...]:
        numbers = []
        for quantity, count in self.beyond.items():
            more = f" ({count - 1} more like it.)" if count > 1 else ""
            numbers.append(f"{self.worst[quantity]}{more}")
        return (*numbers, *(sentence for kind in self._sentences.values() for sentence in kind))


def holds_target(agreed: list[bool], target: float) -> bool:
    """Whether so many agreements are compatible with a promised share (one-sided Clopper-Pearson)."""
    return 1.0 - lower_bound(len(agreed) - sum(agreed), len(agreed)) >= target if agreed else True


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:78]}...{text[-78:]}"
