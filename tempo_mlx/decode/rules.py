"""Everything that decides in a superposed run, built from the settings and from functions of the caller's own."""

from __future__ import annotations

from dataclasses import dataclass

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.functions import Functions
from tempo_mlx.decode.pruning import PruneRule, prune_rule
from tempo_mlx.decode.schedules import Schedule, checked_schedule, scheduled
from tempo_mlx.decode.selection import Selector, make_selector
from tempo_mlx.decode.strategies import Strategy, make_strategy
from tempo_mlx.errors import ConfigError


@dataclass(frozen=True)
class Rules:
    """select: the next set, at most `width` tokens; where `sampled`, a token is drawn instead. threshold: what it is
    selected by, for the record, None where that is no threshold. screen: what candidates go before they join, None: all
    stay. prune: what members go later, None: all stay; pruning_threshold: what it is told.
    """

    select: Selector
    width: int
    sampled: bool
    threshold: Schedule | None
    screen: Strategy | None
    prune: PruneRule | None
    pruning_threshold: Schedule


def make_rules(config: GenerateConfig, functions: Functions | None = None, *, single: bool = False) -> Rules:
    """single: one token a step, drawn where the temperature is not 0. Raises ConfigError where a function and a setting
    contradict each other.
    """
    own = functions or Functions()
    if own.schedule is not None and (config.selection != "threshold" or config.final_threshold is not None):
        raise ConfigError(
            "A schedule function moves the threshold itself; leave out final_threshold, and selection rules "
            "that know no threshold."
        )
    threshold = scheduled(config, config.threshold, "selection")
    if own.schedule is not None:
        threshold = checked_schedule(own.schedule)
    by_attention = config.pruning_signal == "attention"
    pruning = config.attention_threshold if by_attention else config.posterior_threshold
    prune = prune_rule(config) if own.prune is None else own.prune
    width = 1 if single or config.temperature == 0 else int(config.max_parallel_tokens)
    return Rules(
        select=make_selector(config, width, threshold, own),
        width=width,
        sampled=single and config.temperature > 0,
        threshold=threshold
        if config.selection == "threshold" and own.select is None and not single
        else None,
        screen=make_strategy(config),
        prune=prune if prune is None or isinstance(prune, PruneRule) else PruneRule(prune),
        pruning_threshold=scheduled(config, pruning, "pruning"),
    )
