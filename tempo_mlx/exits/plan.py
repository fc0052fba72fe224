"""Where a run may leave the model, and how sure it must be there: from the settings and the model's calibration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.arrays import Bools, Float32s, Ints
from tempo_mlx.config import GRAMMARS, GenerateConfig
from tempo_mlx.errors import ConfigError, ModelError
from tempo_mlx.exits.agreement import at_most
from tempo_mlx.exits.calibration import TARGETS, Calibration, Exit, candidates, find_calibration
from tempo_mlx.mlx import mx
from tempo_mlx.model.forward import Model
from tempo_mlx.model.linear import Linear
from tempo_mlx.model.rope import follows_length
from tempo_mlx.model.settle import settle
from tempo_mlx.model.transformer import Transformer

SURE = 0.05  # significance at which an exit that agrees too rarely for its target is closed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What an exit finds for L rows: logits (L, C) of `tokens` (C,), and its confidence (L,)."""

    logits: Float32s
    tokens: Ints
    confidence: Float32s

    @property
    def choices(self) -> Ints:
        """(L,): the tokens it would choose."""
        chosen: Ints = self.tokens[self.logits.argmax(axis=1)]
        return chosen


class Head:
    """The tokens an exit chooses among, and their share of the model's head: a shortlist and the text's own tokens.

    shortlist: None is all the vocabulary.
    """

    def __init__(self, model: Transformer, shortlist: NDArray[np.int32] | None) -> None:
        self._model = model
        self._listed = np.full(model.architecture.vocab_size, shortlist is None)
        if shortlist is not None:
            self._listed[shortlist] = True
        self._linear: Linear | None = model.head if shortlist is None else None
        self.tokens: Ints = np.flatnonzero(self._listed)

    def widen(self, tokens: Sequence[int] | Ints) -> None:
        """Add tokens of the text."""
        new = np.asarray(tokens, np.int64)
        if not self._listed[new].all():
            self._listed[new] = True
            self._linear = None

    def logits(self, x: mx.array) -> Float32s:
        """x (L, E) -> (L, C)."""
        if self._linear is None:
            self.tokens = np.flatnonzero(self._listed)
            self._linear = self._model.head.choose(mx.array(self.tokens))
            settle(self._linear)
        return np.array(self._model.logits(x, self._linear), copy=False)


class OpenExit:
    """An exit in force: rows may leave after `layer` where confidence is at least `least`.

    target: the agreement promised, None where nothing is (raw confidence). left, audited, agreed: rows.
    translator: see `calibration.Exit`.
    """

    def __init__(
        self,
        layer: int,
        least: float,
        target: float | None,
        head: Head,
        translator: tuple[mx.array, mx.array] | None = None,
    ) -> None:
        self.layer, self.least, self.target = layer, least, target
        self.left = self.audited = self.agreed = 0
        self._head, self._translator = head, translator

    def read(self, x: mx.array) -> Found:
        """Evaluate rows x (L, E), the output of its layer."""
        if self._translator is not None:
            weight, offset = self._translator
            x = x @ weight + offset
        logits = self._head.logits(x)
        if self.target is None:
            spread = np.exp(logits - logits.max(axis=1, keepdims=True))
            return Found(logits, self._head.tokens, 1 / spread.sum(axis=1))
        two = np.partition(logits, -2, axis=1)[:, -2:]
        return Found(logits, self._head.tokens, np.abs(two[:, 1] - two[:, 0]))

    def note(self, agreed: Bools) -> None:
        """Count the result of an audit."""
        self.audited += len(agreed)
        self.agreed += int(agreed.sum())

    @property
    def closed(self) -> bool:
        """Whether the agreement is significantly below the promise (one-sided binomial test)."""
        if self.target is None or self.agreed >= self.target * self.audited:
            return False
        return at_most(self.agreed, self.audited, self.target) < SURE


class ExitPlan:
    """The exits of a run, and what happens to rows that leave: `propagate`d at once, or caught up exactly.

    drafts: the exit that drafts in lossless decoding, if that pays. lookup: whether to guess from repetitions in the
    text.
    """

    def __init__(
        self,
        exits: Sequence[OpenExit],
        heads: Iterable[Head],
        *,
        drafts: OpenExit | None = None,
        propagate: bool = False,
        lookup: bool = True,
    ) -> None:
        self.exits, self.drafts, self.propagate, self.lookup = list(exits), drafts, propagate, lookup
        self._heads = list(heads)

    @property
    def open(self) -> list[OpenExit]:
        return [item for item in self.exits if not item.closed]

    def widen(self, tokens: Sequence[int] | Ints) -> None:
        for head in self._heads:
            head.widen(tokens)


def exits_lack(a: Architecture) -> str | None:
    """What of a model keeps its rows from leaving early, in words; None: nothing. Such rows cannot wait: what a layer
    would make of them later is not known from its input alone."""
    if a.recurrent:
        return "layers that keep states"
    return "an embedding of the token for each layer" if a.per_layer_input else None


def make_plan(model: Model, config: GenerateConfig) -> tuple[Transformer, ExitPlan]:
    """The plan that the settings ask for, and the model as a Transformer.

    Raises ModelError (no calibration, or of another model), ConfigError (layers; not the MLX backend).
    """
    if not isinstance(model, Transformer):
        raise ConfigError("early_exit works on the MLX backend alone; leave it out.")
    a = model.architecture
    if lacking := exits_lack(a):
        if not (config.lossless and config.exit_lookup) or config.exit_layers:
            raise ModelError(
                f"No row may leave a {a.family} model early yet, since it has {lacking}; choose --lossless and no "
                "exit layers, which runs guesses from the text ahead, or leave out --early-exit."
            )
        return model, ExitPlan([], [])
    asked = candidates(a.num_hidden_layers, config.exit_layers)
    if not config.lossless and any(getattr(config, name) for name in GRAMMARS):
        return model, ExitPlan(
            [], [], lookup=config.exit_lookup
        )  # an exit knows few of the tokens that may come
    if any(follows_length(rope, a.max_position_embeddings) for rope in a.ropes):
        raise ModelError(
            "This model's positions depend on the length of the text, so rows cannot be caught up; leave out "
            "--early-exit."
        )
    policy: dict[str, Any] = {"propagate": config.exit_kv == "propagate", "lookup": config.exit_lookup}
    if config.raw_confidence:
        log.warning("Raw confidence is not calibrated: nothing is promised about how often an exit agrees.")
        head = Head(model, None)
        exits = [OpenExit(layer, least, None, head) for layer, least in _with_targets(asked[:-1], config)]
        return model, ExitPlan(exits, [head], drafts=exits[-1], **policy)
    calibration = find_calibration(model.info)
    heads: dict[int, Head] = {}

    def opened(item: Exit, target: float, least: float) -> OpenExit:
        head = heads.setdefault(item.width, Head(model, calibration.shortlist[: item.width]))
        translator = None
        if item.weight is not None and item.offset is not None:
            translator = mx.array(item.weight).astype(model.dtype), mx.array(item.offset).astype(model.dtype)
            settle(translator)
        return OpenExit(item.layer, least, target, head, translator)

    if config.exit_layers:
        exits = [opened(*chosen) for chosen in _named(calibration, config)]
        drafts = exits[-1] if exits else None
    else:
        exits = [opened(*chosen) for chosen in _judged(calibration, config, lambda item: item.pays)]
        drafting = _judged(calibration, config, lambda item: item.drafts)
        drafts = next((opened(*chosen) for chosen in drafting), None)
    return model, ExitPlan(exits, heads.values(), drafts=drafts, **policy)


def _with_targets(layers: Sequence[int], config: GenerateConfig) -> list[tuple[int, float]]:
    """The configured layers, or the given ones, each with its target."""
    layers = config.exit_layers or layers
    targets = config.confidence_thresholds or (config.exit_target_agreement,) * len(layers)
    return sorted(zip(layers, targets, strict=True))


def _judged(
    calibration: Calibration, config: GenerateConfig, margins: Callable[[Exit], Mapping[float, float]]
) -> Iterator[tuple[Exit, float, float]]:
    """The exits that have such margins for the target: exit, agreement to promise, least margin."""
    target = config.exit_target_agreement
    known = min((known for known in TARGETS if known >= target), default=max(TARGETS))
    for item in calibration.exits:
        if known in margins(item) and (least := item.margin(target)) is not None:
            yield item, target, max(margins(item)[known], least)


def _named(calibration: Calibration, config: GenerateConfig) -> Iterator[tuple[Exit, float, float]]:
    """The exits of the configured layers: exit, agreement to promise, least margin."""
    off: list[str] = []
    for layer, wanted in _with_targets((), config):
        there = [item for item in calibration.exits if item.layer == layer]
        if not there:
            known = ", ".join(map(str, sorted({item.layer for item in calibration.exits})))
            raise ConfigError(
                f"Exit layer {layer} was not calibrated (layers {known} were); choose among them, or run `tempo-mlx "
                f"calibrate --layers {','.join(map(str, config.exit_layers))}`."
            )
        usable = [
            (item, least)
            for item in there
            if (item.pays or item.drafts) and (least := item.margin(wanted)) is not None
        ]
        if usable:
            item, least = min(usable, key=lambda pair: pair[0].width)
            yield item, wanted, least
        else:
            off.append(f"{layer} (at {wanted:g})")
    if off:
        log.warning(
            "These exit layers cannot promise their agreement, or never pay, and stay shut: %s.",
            ", ".join(off),
        )
