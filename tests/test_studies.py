"""What the benchmarks share: intervals that cover what they say, and records that are made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import bootstrap, describe, read_records, runtime, studied


@pytest.mark.slow
@pytest.mark.parametrize(
    ("samples", "skewed", "least", "most"), [(8, False, 0.91, 0.98), (8, True, 0.87, 0.95)]
)
def test_intervals_cover_the_truth(samples: int, skewed: bool, least: float, most: float) -> None:
    """Plain percentiles would cover .89 and .83."""
    random, rounds = np.random.default_rng(1), 400
    truth, hits = (np.exp(0.245) if skewed else 0.0), 0
    for seed in range(rounds):
        values = random.lognormal(0.0, 0.7, samples) if skewed else random.normal(size=samples)
        value, low, high = bootstrap(lambda index, v=values: v[index].mean(), samples, 400, seed)
        assert value == pytest.approx(values.mean()) and low <= value <= high
        hits += low <= truth <= high
    assert least <= hits / rounds <= most


def test_of_several_figures_each_has_its_own() -> None:
    values = np.random.default_rng(0).normal([[0.0, 5.0]], [[1.0, 2.0]], (40, 2))
    both = bootstrap(lambda index: values[index].mean(axis=0), 40)
    for column in (0, 1):
        alone = bootstrap(lambda index, c=column: values[index, c].mean(), 40)
        assert [part[column] for part in both] == pytest.approx(alone)
    mean, low, high = both
    spread = 1.99 * values.std(axis=0, ddof=1) / 40**0.5  # as Student's t has it
    np.testing.assert_allclose(low, mean - spread, atol=0.15)
    np.testing.assert_allclose(high, mean + spread, atol=0.15)


def test_draws_without_a_figure_do_not_count() -> None:
    """As a ratio has none where what it is divided by was not drawn."""
    counts = np.array([0.0, 0.0, 1.0, 1.0, 2.0])

    def ratio(index: np.ndarray) -> float:
        total = counts[index].sum()
        return float(2.0 if total else np.nan)

    assert bootstrap(ratio, 5) == (2.0, 2.0, 2.0)
    assert np.isnan(bootstrap(lambda index: np.nan, 5)[1])
    assert bootstrap(lambda index: 3.0, 1) == (3.0, 3.0, 3.0)


def test_a_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, made = tmp_path / "folder" / "study.jsonl", []

    def make(key: str) -> dict[str, str]:
        if key == "c":
            raise KeyboardInterrupt
        made.append(key)
        return {"found": key.upper()}

    with pytest.raises(KeyboardInterrupt):
        studied(path, "abc", make)
    with path.open("a") as file:
        file.write('{"key": "c", "fou')  # cut off
    assert [record["found"] for record in studied(path, "bad", make)] == ["B", "A", "D"]
    assert [record["key"] for record in read_records(path)] == made == ["a", "b", "d"]
    assert runtime([{"cpu_seconds": 100.0}, {"cpu_seconds": 85.0}]) == "3 core-minutes"


def test_results_of_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    describe(tmp_path / "new", {"prompts": 4, "tokens": 24, "numpy": "1"})
    describe(tmp_path / "new", {"prompts": 60, "tokens": 24, "numpy": "2"})
    kept = (tmp_path / "new" / "about.json").read_text()
    with pytest.raises(SystemExit, match=r"has results with tokens 24, not 32; give another --out"):
        describe(tmp_path / "new", {"prompts": 60, "tokens": 32, "numpy": "2"})
    assert (tmp_path / "new" / "about.json").read_text() == kept and '"prompts": 60' in kept
