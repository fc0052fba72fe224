"""Early exit: rows leave the model at a layer that is confident enough, or are run before they are asked for.

A model is calibrated once (calibrate.py, with samples.py, fit.py, agreement.py and schedule.py), and the result is kept
(calibration.py). A run opens its exits (plan.py) and decodes with a model that wraps the loaded one: `EarlyExit`,
`SelfSpeculation` where results must not change, `DistributedExits` over several ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tempo_mlx.config import GenerateConfig
from tempo_mlx.exits.distributed import DistributedExits
from tempo_mlx.exits.early_exit import EarlyExit
from tempo_mlx.exits.guessing import Guessing
from tempo_mlx.exits.plan import exits_lack, make_plan
from tempo_mlx.exits.self_speculation import SelfSpeculation
from tempo_mlx.model.forward import Model
from tempo_mlx.ranks.model import DistributedModel


class Exits(Model, Protocol):
    """A model, for one run, whose rows may leave early. Its caches may lag behind: see `finish` and `inside`."""

    def cache_around(self, cache: Any) -> Any:
        """Wrap a cache of the plain model; both hold the same slots from now on."""
        ...

    def inside(self, cache: Any) -> Any:
        """The plain model's cache, completed, for work without exits."""
        ...

    def finished(self, cache: Any) -> bool:
        """Whether `finish` has nothing to do."""
        ...

    def finish(self, cache: Any) -> None:
        """Run all waiting rows through every layer, and finish the audit."""
        ...

    def timing(self) -> Mapping[str, float]:
        """What a run's `timing` says of early exit."""
        ...

    def report(self) -> dict[str, Any]:
        """A run's section `early_exit`."""
        ...


def open_exits(model: Model, config: GenerateConfig, context: Sequence[int]) -> Exits | None:
    """The model with its exits, where the settings want them; context: the tokens of the prompt.

    Raises ConfigError, ModelError: nothing may leave this model, or it is not calibrated.
    """
    if not config.early_exit:
        return None
    if isinstance(model, DistributedModel):
        return DistributedExits(model, config, context)
    transformer, plan = make_plan(model, config)
    if exits_lack(transformer.architecture):
        return Guessing(transformer, plan, context)
    return (SelfSpeculation if config.lossless else EarlyExit)(transformer, plan, context)
