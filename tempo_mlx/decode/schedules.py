"""How a threshold moves over the steps of a run."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Literal

from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import ConfigError
from tempo_mlx.settings import shown

Schedule = Callable[[int], float]  # step (0-based) -> threshold


def bezier(time: float, p1: float, p2: float) -> float:
    """The cubic Bezier curve with control values 0, p1, p2, 1 at parameter `time` in 0..1."""
    rest = 1.0 - time
    return 3.0 * rest * rest * time * p1 + 3.0 * rest * time * time * p2 + time**3


def relu(time: float, activation_point: float) -> float:
    """0 up to the activation point, then a straight ramp that reaches 1 at time 1."""
    if time <= activation_point:
        return 0.0
    return (time - activation_point) / (1.0 - activation_point)


def constant(value: float) -> Schedule:
    """The same threshold at every step."""
    return lambda step: value


def checked_schedule(schedule: Schedule) -> Schedule:
    """A schedule of the caller's own, which raises ConfigError where it returns no threshold."""

    def threshold(step: int) -> float:
        value = schedule(step)
        if not isinstance(value, Real) or not 0.0 <= value <= 1.0:
            raise ConfigError(
                f"The schedule function returned {shown(value)} at step {step}; it must return a number from 0 to 1."
            )
        return float(value)

    return threshold


def moving(start: float, final: float, max_tokens: int, curve: Callable[[float], float]) -> Schedule:
    """From `start` at step 0 to `final` at the last step, along `curve` (time 0..1 -> share of the way).

    Time is step / (max_tokens - 1), held at 1 afterwards; a run of one step stays at `start`. The result is
    kept within 0..1, since control values outside that range can overshoot.
    """

    def threshold(step: int) -> float:
        time = min(step / (max_tokens - 1), 1.0) if max_tokens > 1 else 0.0
        share = curve(time)
        return min(1.0, max(0.0, start * (1.0 - share) + final * share))

    return threshold


def make_schedule(
    start: float,
    *,
    final: float | None = None,
    max_tokens: int = 1,
    p1: float = 0.2,
    p2: float = 0.8,
    activation_point: float | None = None,
) -> Schedule:
    """The schedule the settings ask for: constant, a Bezier curve, or, with an activation point, a ReLU ramp."""
    if final is None:
        return constant(start)
    if activation_point is not None:
        return moving(start, final, max_tokens, lambda time: relu(time, activation_point))
    return moving(start, final, max_tokens, lambda time: bezier(time, p1, p2))


def scheduled(config: GenerateConfig, start: float, target: Literal["selection", "pruning"]) -> Schedule:
    """The schedule of a threshold that begins at `start`, by what the settings say about its kind."""
    return make_schedule(
        start,
        final=config.final_threshold if config.dynamic_target in (target, "both") else None,
        max_tokens=config.max_tokens,
        p1=config.bezier_p1,
        p2=config.bezier_p2,
        activation_point=config.relu_activation_point,
    )
