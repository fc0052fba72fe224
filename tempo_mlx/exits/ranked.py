"""Early exit where the model is spread over ranks: an `EarlyExit` on each, and one for the decoder to ask.

Every rank decides for itself where rows leave, from logits that MLX's collectives have made the same on all, bit for
bit; so all take the same way through the layers. Self-speculation goes by the time that passes take, which no two
ranks agree on, and is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import ConfigError
from tempo_mlx.exits.early_exit import EarlyExit
from tempo_mlx.exits.plan import make_plan
from tempo_mlx.ranks.model import ParallelModel, Part, RankedCache
from tempo_mlx.ranks.processes import Local


class RankedExits(ParallelModel):
    """What `EarlyExit` is for one process. One for each run."""

    def __init__(self, model: ParallelModel, config: GenerateConfig, context: Sequence[int]) -> None:
        """Raises ConfigError, ModelError, before any rank has an exit."""
        if config.lossless:
            raise ConfigError("lossless has no effect on a model over several ranks; leave it out.")
        super().__init__(model.leader, model.leader.number(), model.architecture, model.info)
        self.leader.run_here(_check, model.number, config)
        self.leader.tell(_open, self.number, model.number, config, list(context))
        weakref.finalize(self, self.leader.forget, self.number).atexit = False

    def cache_around(self, cache: RankedCache) -> RankedCache:
        around = RankedCache(self.leader, cache.positions)
        self.leader.tell(_cache_around, self.number, cache.number, around.number)
        return around

    def inside(self, cache: RankedCache) -> RankedCache:
        inner = RankedCache(self.leader, cache.positions)
        self.leader.run(_inside, self.number, cache.number, inner.number)
        return inner

    def finished(self, cache: RankedCache) -> bool:
        return bool(self.leader.run(_finished, self.number, cache.number))

    def finish(self, cache: RankedCache) -> None:
        self.leader.run(_finish, self.number, cache.number)

    def timing(self) -> Mapping[str, float]:
        """As rank 0 took it."""
        times: Mapping[str, float] = self.leader.run_here(_timing, self.number)
        return times

    def report(self) -> dict[str, Any]:
        said: dict[str, Any] = self.leader.run_here(_report, self.number)
        return said


def _check(local: Local, model: int, config: GenerateConfig) -> None:
    make_plan(local.objects[model].transformer, config)


def _open(local: Local, number: int, model: int, config: GenerateConfig, context: list[int]) -> None:
    part: Part = local.objects[model]
    local.objects[number] = Part(EarlyExit(*make_plan(part.transformer, config), context), part.share)


def _exits(local: Local, number: int) -> EarlyExit:
    exits: EarlyExit = local.objects[number].transformer
    return exits


def _cache_around(local: Local, number: int, cache: int, around: int) -> None:
    local.objects[around] = _exits(local, number).cache_around(local.objects[cache])


def _inside(local: Local, number: int, cache: int, inner: int) -> None:
    local.objects[inner] = _exits(local, number).inside(local.objects[cache])


def _finished(local: Local, number: int, cache: int) -> bool:
    return _exits(local, number).finished(local.objects[cache])


def _finish(local: Local, number: int, cache: int) -> None:
    _exits(local, number).finish(local.objects[cache])


def _timing(local: Local, number: int) -> Mapping[str, float]:
    return _exits(local, number).timing()


def _report(local: Local, number: int) -> dict[str, Any]:
    return _exits(local, number).report()
