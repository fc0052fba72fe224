"""What the settings make of a row's logits before anything is chosen from them, and in which order.

    logits -> logit bias -> repetition, presence, frequency penalty -> functions of the caller's own
           -> mask of the grammar -> temperature -> top-p -> top-k -> min-p -> typical -> eta

The first line, mlx-lm's, changes how probable texts are. Bools and truncation only take tokens away: they leave gaps in
`log_probs`, at temperature 1, by which a text is as probable as without them; what is chosen from, `tempered`, sums to
1 again. Every truncation sees what the one before it left. All of it is a function of a row's logits and of the tokens
before it, so that `verify` can repeat it.

Shapes: k rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tempo_mlx.arrays import Bools, Float32s, Ints
from tempo_mlx.config import SELECTIONS, USES, GenerateConfig
from tempo_mlx.decode.combine import log_probabilities
from tempo_mlx.decode.constraint import Constraint
from tempo_mlx.errors import ConfigError
from tempo_mlx.settings import shown

Texts = Sequence[Sequence[int]]  # of each row the tokens after the prompt, its own included
Processor = Callable[[Ints, Float32s], Float32s]  # token ids so far (n,), logits (1, V) -> logits
Observer = Callable[[Float32s], None]  # log-probabilities (k, V), as `tempered`


@dataclass(frozen=True)
class Controlled:
    """tempered (k, V): what is chosen from. logits (k, V): after the first line, of which `log_probs` are made; None
    where those are `tempered`. gone (k, V): what must not come next, -inf in both; None where all may. masked (k,): the
    probability at temperature 1 that the grammar took away; None without one.
    """

    tempered: Float32s
    logits: Float32s | None = None
    gone: Bools | None = None
    masked: tuple[float, ...] | None = None

    @cached_property
    def log_probs(self) -> Float32s:
        """(k, V): at temperature 1."""
        return self.tempered if self.logits is None else without(log_probabilities(self.logits), self.gone)


class Control:
    """The settings of one run, and the prompt that its texts follow."""

    def __init__(
        self,
        config: GenerateConfig,
        prompt_ids: Sequence[int],
        eos_ids: Iterable[int] = (),
        constraint: Constraint | None = None,
        processors: Sequence[Processor] = (),
        observer: Observer | None = None,
    ) -> None:
        self.temperature = config.temperature
        self.prompt_ids, self.eos_ids = list(prompt_ids), list(eos_ids)
        self.bias = bias_of(config)
        self.penalties = [
            (penalty, getattr(config, f"{name}_penalty"), getattr(config, f"{name}_context_size"))
            for name, (penalty, off) in PENALTIES.items()
            if getattr(config, f"{name}_penalty") != off
        ]
        self.processors, self.constraint, self.observer = tuple(processors), constraint, observer
        self.truncations = truncations_of(config)
        self.fewest = config.min_steps
        self.min_steps = config.min_steps if self.truncations else 0

    @property
    def reads_texts(self) -> bool:
        """Whether the tokens before a row decide anything; where not, nobody need know them."""
        return bool(self.penalties or self.processors or self.min_steps) or self.constraint is not None

    @property
    def needs_all(self) -> bool:
        """Whether it makes anything but the temperature's of logits, or somebody looks on: the best of them, chosen
        before, are not enough."""
        changes = self.bias is not None or self.penalties or self.processors or self.truncations
        return bool(changes) or self.constraint is not None or self.observer is not None

    def ahead(self, texts: Texts) -> None:
        """What the rows' texts will be; what follows from them alone is begun while the model runs."""
        if self.constraint is not None:
            self.constraint.ahead(texts)

    def __call__(self, logits: Float32s, texts: Texts = ()) -> Controlled:
        """Raises ModelError for logits that are not finite, DeadEndError, ConfigError where a function gives none."""
        logits = self.adjusted(logits, texts)
        gone, masked = None, None
        if self.constraint is not None:
            allowed = self.constraint.allowed(texts)
            tempered, masked = self.constrained(logits, allowed)
            gone = ~allowed
        if any(
            len(text) < self.min_steps for text in texts
        ):  # a truncation must leave more than what may not come
            gone = np.zeros(logits.shape, np.bool_)
            for row, text in zip(gone, texts, strict=True):
                row[self.eos_ids] = len(text) < self.min_steps
        if masked is None:
            tempered = log_probabilities(without(logits, gone), self.temperature)
        if self.truncations:
            self.truncate(tempered)
            gone = np.isneginf(tempered)
        if self.observer is not None:
            self.observer(tempered)
        same = gone is None and self.temperature in (0.0, 1.0)
        return Controlled(tempered, None if same else logits, gone, masked)

    def constrained(self, logits: Float32s, allowed: Bools) -> tuple[Float32s, tuple[float, ...]]:
        """`tempered` and `masked` under a grammar, which mostly allows so few tokens that all others cost nothing."""
        log_probs = log_probabilities(logits)
        tempered = np.full_like(log_probs, -np.inf)
        masked = []
        for row, mask, result in zip(log_probs, allowed, tempered, strict=True):
            ids = np.flatnonzero(mask)
            masked.append(max(0.0, 1.0 - float(np.exp(row[ids]).sum(dtype=np.float64))))
            result[ids] = log_probabilities(row[None, ids], self.temperature)[0]
        return tempered, tuple(masked)

    def score(self, logits: Float32s, texts: Texts) -> Float32s:
        """The `log_probs` alone, of texts that need not be of the grammar: -inf for all that it does not allow."""
        allowed = None if self.constraint is None else self.constraint.allowed(texts, any_text=True)
        if not self.truncations:
            gone = None if allowed is None else ~allowed
            return without(log_probabilities(self.adjusted(logits, texts)), gone)
        if allowed is None:
            return self(logits, texts).log_probs
        found = np.full(logits.shape, -np.inf, np.float32)
        followed = np.flatnonzero(allowed.any(axis=1))  # what has left the grammar has nothing to truncate
        if len(followed):
            found[followed] = self(logits[followed], [texts[row] for row in followed.tolist()]).log_probs
        return found

    def adjusted(self, logits: Float32s, texts: Texts) -> Float32s:
        """The logits (k, V) after bias, penalties and functions. Raises ConfigError where those leave nothing."""
        if self.bias is None and not self.penalties and not self.processors:
            return logits
        logits = logits.astype(np.float32, copy=True)
        if self.bias is not None:
            ids, values = self.bias
            np.add.at(logits.T, ids, values[:, None])  # a token may be named more than once
        for row, text in zip(logits, texts, strict=True) if self.penalties or self.processors else ():
            tokens = np.array([*self.prompt_ids, *text], np.int64)
            for penalty, strength, window in self.penalties:
                penalty(row, tokens[-window:], np.float32(strength))
            for processor in self.processors:
                row[:] = processed(processor, tokens, row)
            early = bool(self.processors) and len(text) < self.fewest
            if early and np.isneginf(np.delete(row, self.eos_ids)).all():
                raise ConfigError(
                    f"The logits_processors let nothing but the end follow a text of {len(text)} tokens, and min_steps "
                    f"is {self.fewest}; leave min_steps out, or have them allow something else."
                )
        return logits

    def truncate(self, log_probs: Float32s) -> None:
        """Let every row (k, V) be over fewer tokens, scaled to sum to 1 after every truncation."""
        for row in log_probs:
            for truncation, value in self.truncations:
                probabilities = np.exp(row)
                kept = truncation(probabilities, value)
                row[~kept] = -np.inf
                row -= np.log(probabilities[kept].sum(dtype=np.float64), dtype=np.float32)


def without(logits: Float32s, gone: Bools | None) -> Float32s:
    """(k, V), -inf where `gone`."""
    return logits if gone is None else np.where(gone, np.float32(-np.inf), logits)


def bias_of(config: GenerateConfig) -> tuple[Ints, Float32s] | None:
    """Token ids, and what is added to the logit of each."""
    pairs = [entry.split("=") for entry in config.logit_bias]
    if not pairs:
        return None
    return np.array([int(token) for token, _ in pairs]), np.array([value for _, value in pairs], np.float32)


def check_bias(config: GenerateConfig, vocabulary: int) -> None:
    """Raises ConfigError for a token that the model does not have."""
    bias = bias_of(config)
    if bias is not None and (beyond := [int(token) for token in bias[0] if token >= vocabulary]):
        raise ConfigError(
            f"logit_bias names token {beyond[0]}, and the model's ids end at {vocabulary - 1}; name one that it has."
        )


# -- penalties, as mlx-lm has them: each changes the logits (V,) of the tokens (n,) in its window


def repetition(logits: Float32s, tokens: Ints, penalty: np.float32) -> None:
    """Divide positive logits, multiply negative ones (arXiv 1909.05858)."""
    seen = logits[tokens]
    logits[tokens] = np.where(seen < 0, seen * penalty, seen / penalty)


def presence(logits: Float32s, tokens: Ints, penalty: np.float32) -> None:
    """Subtract the penalty once, however often the token is there."""
    logits[tokens] = logits[tokens] - penalty


def frequency(logits: Float32s, tokens: Ints, penalty: np.float32) -> None:
    """Subtract the penalty for each time that the token is there."""
    np.subtract.at(logits, tokens, penalty)


Penalty = Callable[[Float32s, Ints, np.float32], None]
# By the name that the settings begin with, in their order, with the value that does nothing.
PENALTIES: Mapping[str, tuple[Penalty, float]] = {
    "repetition": (repetition, 1.0), "presence": (presence, 0.0), "frequency": (frequency, 0.0),
}  # fmt: skip


def processed(processor: Processor, tokens: Ints, logits: Float32s) -> Float32s:
    """A row's logits (V,) by a function of the caller's own. Raises ConfigError where it returns none."""
    given = processor(tokens, logits[None].copy())
    try:
        with np.errstate(over="ignore"):
            found = np.asarray(given, np.float32)
    except (TypeError, ValueError):  # no numbers
        found = np.empty(0, np.float32)
    if found.size != logits.size or np.isnan(found).any() or not np.isfinite(found.max()):
        raise ConfigError(
            f"The logits processor {shown(processor)} must return as many logits as it was given (1, "
            f"{logits.size}), none of them NaN and not all -inf; it returned {shown(given)}."
        )
    return found.reshape(-1)


# -- truncations: which tokens of a distribution (V,) stay; the best always does


def top_p(probabilities: Float32s, value: float) -> Bools:
    """The fewest best tokens that together have `value` (arXiv 1904.09751); equals of the last stay, too."""
    floor = 1e-5  # nothing below is needed, mostly, and to sort the whole vocabulary takes long
    if probabilities[probabilities >= floor].sum(dtype=np.float64) < value:
        floor = 0.0
    best = np.sort(probabilities[probabilities >= floor])[::-1]
    before = np.cumsum(best, dtype=np.float64) - best
    return at_least(probabilities, best[max(int((before < value).sum()) - 1, 0)])


def top_k(probabilities: Float32s, value: float) -> Bools:
    """The `value` best tokens, and equals of the last."""
    count = min(int(value), len(probabilities))
    return at_least(probabilities, np.partition(probabilities, -count)[-count])


def min_p(probabilities: Float32s, value: float) -> Bools:
    """Tokens with at least this share of the best one's probability (arXiv 2407.01082)."""
    return at_least(probabilities, np.float32(value) * probabilities.max())


def typical_p(probabilities: Float32s, value: float) -> Bools:
    """The tokens whose surprise is nearest to the expected one, the fewest that have `value` (arXiv 2202.00666)."""
    surprise = surprise_of(probabilities)
    distance = np.abs(surprise - entropy_of(probabilities, surprise))
    order = np.argsort(distance, kind="stable")
    needed = int((np.cumsum(probabilities[order], dtype=np.float64) < value).sum())
    return at_least(-distance, -distance[order[min(needed, len(order) - 1)]])


def eta_cutoff(probabilities: Float32s, value: float) -> Bools:
    """Tokens at or above the smaller of `value` and sqrt(value) exp(-entropy), or the best (arXiv 2210.15191)."""
    entropy = entropy_of(probabilities, surprise_of(probabilities))
    eta = min(value, value**0.5 * float(np.exp(-entropy)))
    return at_least(probabilities, min(np.float32(eta), probabilities.max()))


def at_least(numbers: Float32s, bound: np.float32) -> Bools:
    return np.greater_equal(numbers, bound)


def surprise_of(probabilities: Float32s) -> Float32s:
    """(V,): -log p, infinite where p is 0."""
    with np.errstate(divide="ignore"):
        return -np.log(probabilities)


def entropy_of(probabilities: Float32s, surprise: Float32s) -> float:
    seen = probabilities > 0
    return float((probabilities[seen] * surprise[seen]).sum(dtype=np.float64))


Truncation = Callable[[Float32s, float], Bools]
# By the name of the setting, in their order.
TRUNCATIONS: Mapping[str, Truncation] = {
    "top_p": top_p, "top_k": top_k, "min_p": min_p, "typical_p": typical_p, "eta_cutoff": eta_cutoff,
}  # fmt: skip


OFF = {"top_p": 1.0, "typical_p": 1.0, "min_p": 0.0, "eta_cutoff": 0.0}  # everything stays


def truncations_of(config: GenerateConfig) -> list[tuple[Truncation, float]]:
    """Those in force; the one that forms the sets of a decoder is its selection's (selection.py)."""
    selects = SELECTIONS.get(config.selection, ("", 0.0))[0] if "selection" in USES[config.decoder] else ""
    values = {name: getattr(config, name) for name in TRUNCATIONS if name != selects}
    on = {name: value for name, value in values.items() if value is not None and value != OFF.get(name)}
    return [(TRUNCATIONS[name], value) for name, value in on.items()]
