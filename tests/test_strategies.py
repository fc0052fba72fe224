import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.strategies import cluster, coherence, diversity, make_strategy, support_of


def directions(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_clusters_are_directions_not_lengths() -> None:
    points = directions(0, 2, 90, 91, 180, 183) * np.array([[1], [50], [3], [0.1], [7], [1]])
    assert cluster(points, 3).tolist() == [0, 0, 2, 2, 1, 1]


def test_diversity_keeps_the_best_of_each_cluster() -> None:
    points = directions(0, 90, 2, 180, 91, 183)
    assert sorted(diversity(points, 3)) == [2, 4, 5]
    assert "candidate 0" in diversity(points, 3)[2]
    assert sorted(diversity(points, 1)) == [1, 2, 3, 4, 5]
    assert diversity(points, 6) == {}
    assert diversity(points, 20) == {}


def test_candidates_that_cannot_be_told_apart_are_one_cluster() -> None:
    assert sorted(diversity(directions(30, 30, 30), 3)) == [1, 2]
    assert sorted(diversity(np.zeros((3, 4)), 2)) == [1, 2]


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9))
def test_every_point_is_in_the_cluster_of_its_nearest_centre(seed: int, size: int, clusters: int) -> None:
    points = np.random.default_rng(seed).normal(size=(size, 5))
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    labels = cluster(points, clusters)
    assert labels.tolist() == cluster(points, clusters).tolist()
    assert labels[0] == 0
    present = sorted(set(labels.tolist()))
    assert len(present) <= clusters
    centres = np.array([unit[labels == label].sum(axis=0) for label in present])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    similarity = unit @ centres.T
    own = similarity[np.arange(size), [present.index(label) for label in labels.tolist()]]
    np.testing.assert_allclose(own, similarity.max(axis=1), atol=1e-9)


def test_coherence_drops_what_the_context_does_not_support() -> None:
    support = np.array([0.30, 0.50, 0.34, 0.36])
    assert sorted(coherence(support, 0.7)) == [0, 2]
    assert sorted(coherence(support, 0.65)) == [0]
    assert coherence(support, 0.0) == {}
    assert sorted(coherence(support, 1.0)) == [0, 2, 3]
    assert coherence(support, 0.7)[0] == "coherence: support 0.3000 under 0.3500"
    assert coherence(np.zeros(3), 0.7) == {}


def test_support_is_the_attention_on_the_context_without_sinks_and_self() -> None:
    # six prompt slots (four sinks), one earlier set of two members, two candidates
    row = np.array([0.4, 0.1, 0.0, 0.0, 0.05, 0.05, 0.1, 0.1, 0.2, 0.0], np.float32)
    other = np.array([0.1, 0.0, 0.0, 0.0, 0.2, 0.2, 0.2, 0.2, 0.0, 0.1], np.float32)
    swapped = np.stack([np.stack([row, other]), np.stack([other, row])])  # (layers 2, k 2, S 10)
    np.testing.assert_allclose(support_of(swapped[:1], 6), [0.3, 0.8], atol=1e-6)
    np.testing.assert_allclose(support_of(swapped, 6), [0.55, 0.55], atol=1e-6)
    np.testing.assert_allclose(support_of(swapped[:1], 2), [0.3, 0.8], atol=1e-6)
    np.testing.assert_allclose(support_of(swapped[:1, :, [0, 8, 9]], 1), [0.0, 0.0], atol=1e-6)


def test_the_settings_choose_the_strategy() -> None:
    def strategy(**settings):
        return make_strategy(GenerateConfig(**settings))

    assert strategy() is None
    only_clusters = strategy(pruning_strategy="diversity", diversity_clusters=2)
    assert (only_clusters.clusters, only_clusters.coherence) == (2, None)
    only_support = strategy(pruning_strategy="coherence", coherence_threshold=0.4)
    assert only_support.clusters is None
    assert [only_support.coherence(step) for step in (0, 50)] == [0.4, 0.4]
    both = strategy(pruning_strategy="hybrid")
    assert both.clusters == 3
    assert both.coherence(0) == 0.7


@pytest.mark.parametrize(("target", "moves"), [("selection", False), ("pruning", True), ("both", True)])
def test_the_schedule_can_drive_the_coherence_threshold(target: str, moves: bool) -> None:
    config = GenerateConfig(
        pruning_strategy="hybrid", dynamic_target=target, final_threshold=0.9, max_tokens=11
    )
    coherence = make_strategy(config).coherence
    assert coherence(0) == pytest.approx(0.7)
    assert coherence(10) == pytest.approx(0.9 if moves else 0.7)
