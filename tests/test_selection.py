import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_mlx.decode.selection import SELECTION_RULES, draw, select

DISTRIBUTION = np.array([0.05, 0.30, 0.25, 0.30, 0.10], np.float32)


def slow_select(probabilities, rule, value, max_width, excluded):
    """Sort everything, then walk down the list."""
    order = sorted(set(range(len(probabilities))) - set(excluded), key=lambda i: (-probabilities[i], i))
    kept, total = order[:1], float(probabilities[order[0]])
    for token in order[1:]:
        p = probabilities[token]
        passes = {
            "threshold": p >= np.float32(value),
            "min-p": p >= np.float32(value * float(probabilities[order[0]])),
            "top-p": total < value,
            "top-k": len(kept) < value,
        }[rule]
        if not passes or p <= 0 or len(kept) >= max_width:
            break
        kept.append(token)
        total += float(p)
    return kept


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("threshold", 0.1, [1, 3, 2, 4]),  # a float32 0.1 passes a threshold of 0.1
        ("threshold", 0.28, [1, 3]),
        ("threshold", 1.0, [1]),
        ("threshold", 0.0, [1, 3, 2, 4, 0]),
        ("min-p", 0.5, [1, 3, 2]),
        ("min-p", 1.0, [1, 3]),
        ("top-p", 0.5, [1, 3]),
        ("top-p", 0.62, [1, 3, 2]),  # two hold 0.60
        ("top-p", 0.7, [1, 3, 2]),
        ("top-p", 0.0, [1]),
        ("top-k", 3, [1, 3, 2]),
        ("top-k", 1, [1]),
    ],
)
def test_known_answers(rule: str, value: float, expected: list[int]) -> None:
    assert select(DISTRIBUTION, rule=rule, value=value).tolist() == expected


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_every_rule_is_capped(rule: str) -> None:
    value = 8 if rule == "top-k" else 1.0 if rule == "top-p" else 0.01
    assert select(DISTRIBUTION, rule=rule, value=value, max_width=2).tolist() == [1, 3]
    assert select(DISTRIBUTION, rule=rule, value=value, max_width=1).tolist() == [1]


def test_excluded_ids_give_way_and_the_input_stays() -> None:
    before = DISTRIBUTION.copy()
    assert select(DISTRIBUTION, value=0.9, excluded={1, 3}).tolist() == [2]
    assert select(DISTRIBUTION, value=0.1, excluded={1, 3}).tolist() == [2, 4]
    assert select(DISTRIBUTION, value=0.0, excluded={1, 3}).tolist() == [2, 4, 0]
    np.testing.assert_array_equal(DISTRIBUTION, before)


def test_certainty_leaves_one_token() -> None:
    assert select(np.array([0, 1, 0], np.float32), value=1.0).tolist() == [1]
    assert select(np.array([0, 1, 0], np.float32), value=0.0).tolist() == [1]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="typical"):
        select(DISTRIBUTION, rule="typical")


@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([2, 40, 3000]),
    sharpness=st.sampled_from([0.0, 1.0, 4.0]),
    rule=st.sampled_from(SELECTION_RULES),
    value=st.floats(0.0, 1.0),
    max_width=st.integers(1, 9),
    excluded=st.sets(st.integers(0, 1), max_size=1),
)
def test_equals_the_slow_reference(seed, size, sharpness, rule, value, max_width, excluded) -> None:
    # rounding the logits makes ties, sharpness 0 makes everything one tie
    logits = np.round(np.random.default_rng(seed).normal(size=size) * sharpness, 1)
    probabilities = np.exp(logits).astype(np.float32)
    probabilities /= probabilities.sum()
    value = 1 + int(value * 9) if rule == "top-k" else value
    result = select(probabilities, rule=rule, value=value, max_width=max_width, excluded=excluded)
    assert result.tolist() == slow_select(probabilities, rule, value, max_width, excluded)


def test_a_draw_never_takes_what_has_no_mass() -> None:
    mass = np.array([0.0, 0.5, 0.0, 1.5, 0.0])
    assert [draw(mass, place) for place in (0.0, 0.2, 0.25, 0.9, np.nextafter(1.0, 0.0))] == [1, 1, 3, 3, 3]
