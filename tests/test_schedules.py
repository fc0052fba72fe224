from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.schedules import bezier, make_schedule, moving, relu, scheduled

units = st.floats(0.0, 1.0)


def casteljau(time: float, p1: float, p2: float) -> float:
    """De Casteljau's repeated interpolation between the control values."""
    values = [0.0, p1, p2, 1.0]
    while len(values) > 1:
        values = [a * (1 - time) + b * time for a, b in pairwise(values)]
    return values[0]


@given(units, units, units)
def test_bezier_equals_de_casteljau(time: float, p1: float, p2: float) -> None:
    assert bezier(time, p1, p2) == pytest.approx(casteljau(time, p1, p2), abs=1e-12)


def test_bezier_control_values_shape_the_middle() -> None:
    assert bezier(0.5, 0.2, 0.8) == pytest.approx(0.5)
    assert bezier(0.5, 0.0, 0.0) == pytest.approx(0.125)
    assert bezier(0.5, 1.0, 1.0) == pytest.approx(0.875)
    assert bezier(0.5, 0.6, 0.8) > bezier(0.5, 0.2, 0.8)
    assert bezier(0.5, 0.2, 0.9) > bezier(0.5, 0.2, 0.8)


def test_relu_waits_for_its_activation_point() -> None:
    assert [relu(t, 0.5) for t in (0.0, 0.5, 0.75, 1.0)] == [0.0, 0.0, 0.5, 1.0]
    assert [relu(t, 0.0) for t in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]
    assert relu(1.0, 1.0) == 0.0


@given(start=units, final=units, steps=st.integers(2, 50), point=st.none() | st.floats(0.0, 0.9))
def test_a_schedule_starts_and_ends_where_it_is_told(start, final, steps, point) -> None:
    schedule = make_schedule(start, final=final, max_tokens=steps, activation_point=point)
    values = [schedule(step) for step in range(steps)]
    assert values[0] == pytest.approx(start)
    assert values[-1] == pytest.approx(final)
    assert schedule(steps + 5) == pytest.approx(final)
    differences = np.diff(values) * np.sign(final - start)
    assert (differences >= -1e-12).all()


def test_every_setting_moves_the_curve() -> None:
    base = {"final": 1.0, "max_tokens": 11}
    middle = make_schedule(0.1, **base)(5)
    assert middle == pytest.approx(0.55)
    assert make_schedule(0.1)(5) == 0.1
    assert make_schedule(0.1, **{**base, "final": 0.5})(5) == pytest.approx(0.3)
    assert make_schedule(0.1, **base, p1=0.5)(5) > middle
    assert make_schedule(0.1, **base, p2=0.5)(5) < middle
    assert make_schedule(0.1, **base, activation_point=0.5)(5) == pytest.approx(0.1)
    assert make_schedule(0.1, **base, activation_point=0.0)(5) == pytest.approx(0.55)
    assert make_schedule(0.1, **{**base, "max_tokens": 6})(5) == pytest.approx(1.0)


def test_one_step_stays_at_the_start_and_overshoot_is_held() -> None:
    assert make_schedule(0.1, final=1.0, max_tokens=1)(0) == 0.1
    assert moving(0.1, 1.0, 3, lambda time: 3.0 * time)(1) == 1.0
    assert moving(0.1, 1.0, 3, lambda time: -time)(1) == 0.0


@pytest.mark.parametrize("target", ["selection", "pruning", "both"])
def test_the_settings_say_which_threshold_moves(target: str) -> None:
    config = GenerateConfig(
        dynamic_target=target,
        pruning_signal="posterior",
        final_threshold=0.5,
        max_tokens=5,
    )
    for kind in ("selection", "pruning"):
        end = scheduled(config, 0.2, kind)(4)
        assert end == pytest.approx(0.5 if target in (kind, "both") else 0.2)
    assert scheduled(GenerateConfig(), 0.2, "selection")(99) == 0.2
