"""Early exit: rows leave the model where the choice made there is sure enough, or are run ahead of being asked for.

A model is calibrated once (calibrate.py, from samples.py, fit.py and schedule.py), and what that found is kept
(calibration.py). A run opens its exits (plan.py) and decodes with a model that wraps its own: `EarlyExit`,
`SelfSpeculation` where nothing may change, `DistributedExits` over several ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tempo_mlx.config import GenerateConfig
from tempo_mlx.exits.distributed import DistributedExits
from tempo_mlx.exits.early_exit import EarlyExit
from tempo_mlx.exits.plan import make_plan
from tempo_mlx.exits.self_speculation import SelfSpeculation
from tempo_mlx.model.forward import Model
from tempo_mlx.ranks.model import DistributedModel


class Exits(Model, Protocol):
    """A model for one run whose rows may leave early. Its caches may be behind: see `finish` and `inside`."""

    def cache_around(self, cache: Any) -> Any:
        """A cache of the model itself, as this one takes it. Both are the same slots from now on."""
        ...

    def inside(self, cache: Any) -> Any:
        """The cache of the model itself, complete, for work that the exits have no part in."""
        ...

    def finished(self, cache: Any) -> bool:
        """Whether `finish` has nothing to do."""
        ...

    def finish(self, cache: Any) -> None:
        """Run whatever is behind through every layer, and audit what has not been."""
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
    kind = SelfSpeculation if config.lossless else EarlyExit
    return kind(*make_plan(model, config), context)
