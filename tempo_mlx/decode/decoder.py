"""What every decoder is: how it is begun, what it keeps, and what the rest of the package may ask of it.

A decoder is a subclass of `Decoder` that knows how to make one step, and a `DecoderSpec` that says what it is; the
table of them is in registry.py. docs/extend.md shows a whole one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tempo_mlx.arrays import Float32s
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.constraint import Constraint
from tempo_mlx.decode.control import Control, Observer, check_bias
from tempo_mlx.decode.functions import Functions
from tempo_mlx.decode.prefill import Interrupt, check_prompt, never, prefill
from tempo_mlx.decode.step import Step
from tempo_mlx.model.forward import Chooser, Model


@dataclass(frozen=True)
class Setup:
    """What a decoder is begun with; one that has no use for a part of it leaves it.

    cache: may hold a prefix of the prompt. interrupted: asked between chunks of the prompt, and in long steps.
    reads(token_ids): what an ended text says; texts that say the same are one to who counts them.
    guide(token_ids): the one token that must follow a text, or None. stops(newest_first): whether a text ends with its
    last token, although the model did not end it; its tokens last to first. constraint: what texts may be. observer: is
    shown what every row's token is chosen from. chooser: the same model, where it can choose on its device.
    """

    model: Model
    prompt_ids: Sequence[int]
    config: GenerateConfig
    eos_ids: Iterable[int] = ()
    cache: Any | None = None
    interrupted: Interrupt = never
    guide: Callable[[Sequence[int]], int | None] | None = None
    stops: Callable[[Iterable[int]], bool] | None = None
    functions: Functions = field(default_factory=Functions)
    constraint: Constraint | None = None
    observer: Observer | None = None
    reads: Callable[[Sequence[int]], Hashable] = tuple
    chooser: Chooser | None = None

    def control(self) -> Control:
        """What the settings make of logits."""
        processors = self.functions.logits_processors or ()
        return Control(self.config, self.prompt_ids, self.eos_ids, self.constraint, processors, self.observer)


@dataclass(frozen=True)
class Reading:
    """One text: its tokens and their log-probabilities. `finished`: the model ended it."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finished: bool
    branch: int

    @property
    def log_prob(self) -> float:
        return sum(self.log_probs)


class Decoder(ABC):
    """One decoding under way: `advance` makes a step, `steps` are those so far."""

    def __init__(self, setup: Setup) -> None:
        """Raises PromptError, and ConfigError for a setting that the model's vocabulary makes nothing of."""
        check_prompt(setup.model, setup.prompt_ids)
        self.model, self.config = setup.model, setup.config
        self.eos_ids = frozenset(setup.eos_ids)
        self.prompt_length = len(setup.prompt_ids)
        self.guide, self.stops, self.interrupted = setup.guide, setup.stops, setup.interrupted
        check_bias(self.config, self.model.architecture.vocab_size)
        self.control = setup.control()
        self.cache = self.model.new_cache() if setup.cache is None else setup.cache
        self.steps: list[Step] = []
        self.clock = time.perf_counter()

    def run_prompt(self, setup: Setup) -> Float32s:
        """The logits (1, V) after the prompt. Raises Interrupted."""
        logits = prefill(self.model, setup.prompt_ids, self.cache, self.interrupted)
        self.clock = time.perf_counter()
        return logits

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether nothing can follow."""

    @property
    def length(self) -> int:
        """Of texts that get a token each step; 0 where texts see to their length themselves."""
        return len(self.steps)

    @property
    def full(self) -> bool:
        """Whether the settings allow no further step."""
        return self.length >= self.config.max_tokens

    @property
    def slots(self) -> int:
        """How many slots the cache holds, but for rows that are run ahead."""
        return len(self.cache)

    @property
    def slots_next(self) -> int:
        """How many it holds when the newest rows are run."""
        return self.slots + sum(token.slot is not None for token in self.steps[-1].tokens)

    def recorded(self) -> Sequence[Step]:
        """The steps as the run file has them."""
        return self.steps

    @abstractmethod
    def advance(self) -> Step:
        """Make one step, and `record` it."""

    def readings(self) -> list[Reading]:
        """The texts so far with their exact log-probabilities, best first; [] where paths are read off a lattice."""
        return []

    def note_evidence(self) -> None:  # noqa: B027 (most decoders learn nothing later)
        """Write into `steps` what later rows have shown of earlier ones, where they show anything."""

    def statistics(self, token_text: Callable[[int], str]) -> dict[str, Any] | None:
        """For the run file's `tree`: what was searched, if anything was."""
        return None

    def record(self, step: Step) -> Step:
        """Keep a step that is complete, with the time it took."""
        now = time.perf_counter()
        step.seconds, self.clock = now - self.clock, now
        self.steps.append(step)
        return step

    def excluded(self, length: int) -> Collection[int]:
        """Tokens that must not follow a text of so many tokens: those that end it, before `min_steps`."""
        return self.eos_ids if length < self.config.min_steps else ()


@dataclass(frozen=True)
class DecoderSpec:
    """What a decoder is, and what can follow from it. The settings it uses say so themselves (config.py).

    lattice: its run is one text of sets, read along their edges; otherwise texts that each stand for themselves.
    editable: one can go back in its run and decide otherwise (sessions). log_probs: it runs rows in slot order, so that
    a token's rivals are known (completions). texts: the setting that says how many texts it gives. functions: those of
    the caller's own it can be given (see `Functions`). masses: how probable all
    other texts are is known too.
    """

    name: str
    start: Callable[[Setup], Decoder]
    lattice: bool = False
    editable: bool = False
    log_probs: bool = False
    texts: str | None = None
    masses: bool = False
    functions: tuple[str, ...] = ()
