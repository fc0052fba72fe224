import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_mlx.decode.combine import COMBINE_RULES, combine, edges, log_probabilities
from tempo_mlx.errors import NumbersError


def random_rows(seed: int, rows: int = 3, vocabulary: int = 11) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.ones(rows))
    return generator.normal(size=(rows, vocabulary)).astype(np.float32) * 5, weights


def softmax(values: np.ndarray) -> np.ndarray:
    exponentials = np.exp(np.asarray(values, np.float64) - np.max(values))
    return exponentials / exponentials.sum()


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0, 2.5]))
def test_log_probabilities_are_a_softmax_at_the_temperature(seed: int, temperature: float) -> None:
    logits, _ = random_rows(seed)
    before = logits.copy()
    result = log_probabilities(logits, temperature)
    assert result.dtype == np.float32
    for row, expected in zip(result, logits, strict=True):
        np.testing.assert_allclose(np.exp(row), softmax(expected / (temperature or 1.0)), atol=2e-6)
    np.testing.assert_array_equal(logits, before)


def test_huge_logits_do_not_overflow() -> None:
    result = log_probabilities(np.array([[1e4, 0.0, -1e4]], np.float32))
    np.testing.assert_allclose(result, [[0.0, -1e4, -2e4]])


@given(st.integers(0, 10**6))
def test_each_rule_is_its_definition(seed: int) -> None:
    logits, weights = random_rows(seed)
    rows = np.array([softmax(row) for row in logits])
    maximum = rows.max(axis=0)
    expected = {
        "mix": sum(weight * row for weight, row in zip(weights, rows, strict=True)),
        "last": rows[-1],
        "mean": (rows[0] + rows[1] + rows[2]) / 3,
        "product": softmax(np.log(rows).mean(axis=0)),
        "max": maximum / maximum.sum(),
    }
    log_probs = log_probabilities(logits)
    assert set(expected) == set(COMBINE_RULES)
    for rule, distribution in expected.items():
        result = combine(log_probs, weights, rule)
        np.testing.assert_allclose(result, distribution, atol=2e-6, err_msg=rule)
        assert result.dtype == np.float32


@pytest.mark.parametrize("rule", COMBINE_RULES)
def test_one_row_is_taken_as_it_is(rule: str) -> None:
    log_probs = log_probabilities(random_rows(1)[0][:1])
    np.testing.assert_array_equal(combine(log_probs, [1.0], rule), np.exp(log_probs[0]))


def test_rows_that_have_nothing_in_common_are_mixed() -> None:
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([[0.75, 0.25, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]], np.float32))
    np.testing.assert_array_equal(combine(log_probs, [0.5, 0.5], "product"), [0.375, 0.125, 0.25, 0.25])


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="median"):
        combine(np.zeros((2, 3), np.float32), [0.5, 0.5], "median")


@given(st.integers(0, 10**6))
def test_edges_are_bayes_rule(seed: int) -> None:
    logits, weights = random_rows(seed)
    tokens = [4, 0, 9]
    rows = np.array([softmax(row) for row in logits])
    posterior, forward = edges(log_probabilities(logits), weights, tokens)
    joint = weights[:, None] * rows[:, tokens]
    np.testing.assert_allclose(forward, rows[:, tokens], rtol=1e-5)
    np.testing.assert_allclose(posterior, joint / joint.sum(axis=0), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(posterior.sum(axis=0), 1.0, atol=1e-14)
    assert posterior.dtype == forward.dtype == np.float64


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_numbers_that_are_not_finite_end_in_a_sentence(odd: float) -> None:
    logits = np.zeros((2, 4), np.float32)
    logits[1, 2] = odd
    with pytest.raises(NumbersError, match=r"float16.*--dtype bfloat16"):
        log_probabilities(logits)
    assert np.isneginf(log_probabilities(np.array([[0.0, -np.inf]], np.float32))[0, 1])


def test_edges_survive_what_underflows_in_float32() -> None:
    log_probs = np.array([[-300.0, 0.0], [-301.0, 0.0]], np.float32)
    posterior, _ = edges(log_probs, [0.5, 0.5], [0])
    np.testing.assert_allclose(posterior[:, 0], softmax(np.array([0.0, -1.0])))


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-39, 1e-30, 1e-6, 100.0])
def test_no_temperature_is_too_small_for_numbers(temperature: float) -> None:
    logits = np.array([[1.0, 3.0, 2.5, -50.0], [7.0, 7.0, -1e30, 0.0]], np.float32)
    result = np.exp(log_probabilities(logits, temperature))
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result.sum(axis=1), 1.0, rtol=1e-6)
    if temperature < 1e-3:
        np.testing.assert_allclose(result, [[0, 1, 0, 0], [0.5, 0.5, 0, 0]], atol=1e-7)
