"""Early exit where the model is spread over ranks: an `EarlyExit` on each, and one for the decoder to ask.

Every rank decides for itself where rows leave, from logits that MLX's collectives make identical on all of them; so
all take the same path through the layers. Self-speculation depends on measured times, which differ between ranks, and
is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import ConfigError
from tempo_mlx.exits.early_exit import EarlyExit
from tempo_mlx.exits.plan import make_plan
from tempo_mlx.ranks.model import DistributedCache, DistributedModel, ModelShard
from tempo_mlx.ranks.processes import Local


class DistributedExits(DistributedModel):
    """What `EarlyExit` is for one process. One for each run."""

    def __init__(self, model: DistributedModel, config: GenerateConfig, context: Sequence[int]) -> None:
        """Raises ConfigError, ModelError, before any rank has an exit."""
        if config.lossless:
            raise ConfigError("lossless has no effect on a model over several ranks; leave it out.")
        super().__init__(model.leader, model.architecture, model.info)
        self.leader.run_here(_check, model.number, config)
        self.leader.tell(_open, self.number, model.number, config, list(context))

    def cache_around(self, cache: DistributedCache) -> DistributedCache:
        return self.give(DistributedCache(self.leader, cache.positions), "model.cache_around", cache)

    def inside(self, cache: DistributedCache) -> DistributedCache:
        return self.give(DistributedCache(self.leader, cache.positions), "model.inside", cache)

    def finished(self, cache: DistributedCache) -> bool:
        return bool(self.call("model.finished", cache))

    def finish(self, cache: DistributedCache) -> None:
        self.call("model.finish", cache)

    def timing(self) -> Mapping[str, float]:
        """As rank 0 took it."""
        times: Mapping[str, float] = self.call("model.timing")
        return times

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = self.call("model.report")
        return found


def _check(local: Local, model: int, config: GenerateConfig) -> None:
    make_plan(local.objects[model].model, config)


def _open(local: Local, number: int, model: int, config: GenerateConfig, context: list[int]) -> None:
    shard: ModelShard = local.objects[model]
    local.objects[number] = replace(shard, model=EarlyExit(*make_plan(shard.model, config), context))
