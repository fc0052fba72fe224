"""Functions of the caller's own in place of what the settings name, and how a run's file says so."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from tempo_mlx.arrays import Float32s
from tempo_mlx.decode.pruning import PruneContext, Pruned, PruneRule
from tempo_mlx.decode.schedules import Schedule
from tempo_mlx.errors import ConfigError
from tempo_mlx.settings import shown

if TYPE_CHECKING:
    from tempo_mlx.decode.control import Processor
    from tempo_mlx.decode.decoder import DecoderSpec
    from tempo_mlx.decode.mcts import Value

Prune = PruneRule | Callable[[PruneContext], Iterable[Pruned]]
Select = Callable[[Float32s, int], Iterable[int]]  # probabilities (V,), step -> ids, best first

# The settings that a function stands in for: null in the `config` of its run's file, which would say otherwise.
REPLACED: Mapping[str, tuple[str, ...]] = {
    "prune": ("pruning_signal",),
    "select": ("selection", "threshold", "min_p", "top_p", "top_k"),
    "schedule": ("threshold", "final_threshold"),
}


PROCESSORS = "logits_processors"


@dataclass(frozen=True)
class Functions:
    """Each is None, or takes the place of what the settings say.

    prune(context): what retroactive pruning removes, see decode/pruning.py. select(probabilities (V,), step): ids of
    the next set, best first. schedule(step): the selection threshold. value(rollout): what a text of the tree search
    is worth, see decode/mcts.py. logits_processors: each of (token ids so far (n,), logits (1, V)) gives the logits in
    their place; after bias and penalties, as mlx-lm has them.
    """

    prune: Prune | None = None
    select: Select | None = None
    schedule: Schedule | None = None
    value: Value | None = None
    logits_processors: Sequence[Processor] | None = None

    def given(self) -> dict[str, Callable[..., Any] | Sequence[Callable[..., Any]]]:
        """Those that are not None, by name."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in values if value is not None}

    def check(self, spec: DecoderSpec, others: Iterable[DecoderSpec]) -> None:
        """Raises ConfigError for what is no function, of no use to the decoder, or excluded by another."""
        for name, function in self.given().items():
            several = name == PROCESSORS
            if several and not (isinstance(function, list | tuple) and function):
                raise ConfigError(f"{name} is {shown(function)}; give a list of functions, or leave it out.")
            for each in function if several and isinstance(function, Iterable) else [function]:
                if not callable(each):
                    raise ConfigError(
                        f"{name} is {shown(each)}; give a function (docs/extend.md shows some)."
                    )
            if name not in spec.functions:
                able = " or ".join(other.name for other in others if name in other.functions)
                raise ConfigError(
                    f"A {name} function has no effect with the {spec.name} decoder; leave it out, or choose "
                    f"decoder {able}."
                )
        if self.select is not None and self.schedule is not None:
            raise ConfigError("A select function knows no threshold; leave out the schedule function, or it.")

    def in_force(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` for the run's file, null where a function decided."""
        replaced = {setting for name in self.given() for setting in REPLACED.get(name, ())}
        return {name: None if name in replaced else value for name, value in config.items()}


def described(function: Callable[..., Any] | Sequence[Callable[..., Any]]) -> tuple[str, str | None]:
    """Name and hash of the source, by which a function, or several in their order, can be known again; no hash where
    there is no source.
    """
    if isinstance(function, Sequence):
        names, sums = zip(*map(described, function), strict=True)
        known = None if None in sums else hashlib.sha256("".join(sums).encode()).hexdigest()
        return ", ".join(names), known
    if isinstance(function, PruneRule):
        function = function.decide
    while isinstance(function, partial):
        function = function.func
    source_of = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    name = getattr(source_of, "__qualname__", repr(source_of))
    try:
        source = inspect.getsource(source_of)
    except (OSError, TypeError):
        return name, None
    return name, hashlib.sha256(source.encode()).hexdigest()
