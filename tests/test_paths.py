import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_mlx.decode.paths import (
    best_paths,
    candidate_paths,
    choose_distinct,
    edit_distance,
    layers_of,
    members_of,
    path_score,
    readings_at_hand,
    sample_paths,
    token_ids,
)
from tempo_mlx.decode.step import Edge, Member, Removal, Step

UNATTENDED = Removal("attention", 0.0, 0.1, unattended=True)
GONE = Removal("posterior", 0.0, 0.1)


def make_step(index: int, members: list[Member]) -> Step:
    return Step(index, index, 0.1, 0.0, tuple(members))


def random_run(
    seed: int, sets: int = 4, width: int = 3, removals: bool = True, eos: bool = True
) -> list[Step]:
    """Sets of random width with random edges; some members removed, some unattended, some ending the text."""
    random = np.random.default_rng(seed)
    steps, slot, before = [], 0, []
    for index in range(sets):
        members = []
        size = int(random.integers(1, width + 1))
        ends = eos and size > 1 and random.random() < 0.3
        for number in range(size):
            ending = ends and number == size - 1
            parents = tuple(Edge(s, 0.5, float(random.uniform(0.01, 1))) for s in before)
            own = None if ending else slot
            slot += not ending
            member = Member(10 * index + number, float(random.uniform(0.01, 1)), own, None, parents)
            if removals and not ending and index + 1 < sets and random.random() < 0.4:
                member.removed_after = index + 1
                member.removed_why = UNATTENDED if random.random() < 0.2 else GONE
            members.append(member)
        before = [member.slot for member in members if member.slot is not None]
        steps.append(make_step(index, members))
    return steps


def slow_paths(steps: list[Step]) -> list[tuple[float, tuple[int, ...], tuple[int, ...]]]:
    """(probability, members' ids, printed ids) of every path, by trying them all."""
    choices, printed = [], []
    for index, step in enumerate(steps):
        last = index + 1 == len(steps)
        rows = [m for m in step.tokens if last or m.slot is not None]
        seen = [m for m in rows if m.removed_after is None or m.removed_why.unattended]
        choices.append(seen or rows)
        printed.append(bool(seen))
    found = []
    for path in itertools.product(*choices):
        probability = path[0].probability
        for before, after in itertools.pairwise(path):
            probability *= {edge.slot: edge.forward for edge in after.parents}[before.slot]
        ids = tuple(m.id for m in path)
        found.append((probability, ids, tuple(i for i, p in zip(ids, printed, strict=True) if p)))
    return sorted(found, reverse=True)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 40))
@settings(deadline=None)
def test_best_paths_equal_trying_all(seed: int, sets: int, count: int) -> None:
    steps = random_run(seed, sets)
    layers = layers_of(steps)
    expected = slow_paths(steps)[:count]
    found = best_paths(layers, count)
    assert len(found) == len(expected)
    for path, (probability, ids, printed) in zip(found, expected, strict=True):
        assert path.score == pytest.approx(np.log(probability), abs=1e-9)
        assert path.score == pytest.approx(path_score(layers, path.choice), abs=1e-9)
        assert tuple(member.id for member in members_of(layers, path)) == ids
        assert tuple(token_ids(layers, path)) == printed


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_random_paths_have_the_frequencies_of_their_scores(temperature: float) -> None:
    steps = random_run(7, sets=3, removals=False, eos=False)
    layers = layers_of(steps)
    draws = 40_000
    counts = Counter(
        tuple(token_ids(layers, path))
        for path in sample_paths(layers, draws, seed=1, temperature=temperature)
    )
    weights = {ids: probability ** (1 / temperature) for probability, ids, _ in slow_paths(steps)}
    assert len(weights) > 3
    total = sum(weights.values())
    for ids, weight in weights.items():
        share = weight / total
        assert counts[ids] / draws == pytest.approx(share, abs=5 * (share * (1 - share) / draws) ** 0.5)


def test_random_paths_follow_their_seed() -> None:
    layers = layers_of(random_run(3, sets=8, removals=False))
    assert sample_paths(layers, 20, seed=1) == sample_paths(layers, 20, seed=1)
    assert sample_paths(layers, 20, seed=1) != sample_paths(layers, 20, seed=2)


def test_a_path_follows_edges_not_single_probabilities() -> None:
    first = [Member(1, 0.6, 1, 0.6), Member(2, 0.4, 0, 0.4)]
    second = [
        Member(3, 0.6, 3, 0.6, (Edge(0, 0.9, 0.9), Edge(1, 0.1, 0.1))),
        Member(4, 0.4, 2, 0.4, (Edge(0, 0.1, 0.1), Edge(1, 0.9, 0.5))),
    ]
    layers = layers_of([make_step(0, first), make_step(1, second)])
    assert token_ids(layers, best_paths(layers)[0]) == [2, 3]  # 0.36; the two best alone: 0.06


def test_an_ending_member_has_no_successor() -> None:
    first = [Member(1, 0.1, 0, 1.0), Member(2, 0.9, None, None)]
    second = [Member(3, 0.5, 1, 1.0, (Edge(0, 1.0, 0.2),)), Member(9, 0.5, None, None, (Edge(0, 1.0, 0.8),))]
    one = layers_of([make_step(0, first)])
    assert token_ids(one, best_paths(one)[0]) == [2]
    both = layers_of([make_step(0, first), make_step(1, second)])
    assert [token_ids(both, path) for path in best_paths(both, 9)] == [[1, 9], [1, 3]]


def test_a_removed_position_carries_the_path_and_prints_nothing() -> None:
    first = [Member(1, 0.9, 0, 1.0)]
    second = [
        Member(3, 0.5, 2, 0.5, (Edge(0, 1.0, 0.5),), removed_after=3, removed_why=GONE),
        Member(4, 0.5, 1, 0.5, (Edge(0, 1.0, 0.5),), removed_after=3, removed_why=GONE),
        Member(5, 0.1, None, None, (Edge(0, 1.0, 0.1),)),  # ends the text: no reason to print the set
    ]
    third = [
        Member(6, 0.5, 4, 0.5, (Edge(1, 0.5, 0.9), Edge(2, 0.5, 0.1))),
        Member(7, 0.5, 3, 0.5, (Edge(1, 0.5, 0.1), Edge(2, 0.5, 0.1))),
    ]
    layers = layers_of([make_step(i, members) for i, members in enumerate([first, second, third])])
    best = best_paths(layers)[0]
    assert [member.id for member in members_of(layers, best)] == [1, 4, 6]
    assert token_ids(layers, best) == [1, 6]
    assert best.score == pytest.approx(np.log(0.9 * 0.5 * 0.9))


def test_an_unattended_member_is_still_read() -> None:
    first = [
        Member(1, 0.5, 1, 0.5, removed_after=1, removed_why=UNATTENDED),
        Member(2, 0.5, 0, 0.5, removed_after=1, removed_why=GONE),
    ]
    second = [Member(3, 1.0, 2, 1.0, (Edge(0, 0.9, 0.9), Edge(1, 0.1, 0.1)))]
    layers = layers_of([make_step(0, first), make_step(1, second)])
    assert token_ids(layers, best_paths(layers)[0]) == [1, 3]


def test_an_underflowed_edge_does_not_cut_the_only_path() -> None:
    steps = [
        make_step(0, [Member(1, 1.0, 0, 1.0)]),
        make_step(1, [Member(2, 0.2, 1, 1.0, (Edge(0, 1.0, 0.0),))]),
    ]
    layers = layers_of(steps)
    assert token_ids(layers, best_paths(layers)[0]) == [1, 2]
    assert np.isfinite(best_paths(layers)[0].score)


def test_nothing_read_from_nothing() -> None:
    assert best_paths([]) == sample_paths([], 3, seed=0) == candidate_paths([], 3, 0, 0.2) == []


def slow_distance(first: list[int], second: list[int]) -> int:
    if not first or not second:
        return len(first) + len(second)
    return min(
        slow_distance(first[1:], second) + 1,
        slow_distance(first, second[1:]) + 1,
        slow_distance(first[1:], second[1:]) + (first[0] != second[0]),
    )


short = st.lists(st.integers(0, 2), max_size=5)


@given(short, short)
@settings(deadline=None)
def test_edit_distance_equals_its_definition(first: list[int], second: list[int]) -> None:
    assert edit_distance(first, second) == slow_distance(first, second)


def test_distinct_paths_are_taken_by_score_and_kept_apart() -> None:
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 5], [7, 8, 9, 9]]
    scores = [-1.0, -0.5, -2.0, -3.0]
    assert choose_distinct(sequences, scores, 9, 0.0) == [1, 0, 2, 3]
    assert choose_distinct(sequences, scores, 9, 0.5) == [1, 3]
    assert choose_distinct(sequences, scores, 9, 0.25) == [1, 0, 2, 3]
    assert choose_distinct(sequences, scores, 9, 0.3) == [1, 3]
    assert choose_distinct([[1, 2], [3, 4], [1, 2, 4]], [-1.0, -2.0, -1.5], 2, 0.3) == [0, 2]
    assert choose_distinct(sequences, scores, 1, 0.0) == [1]


def test_candidates_are_different_and_begin_with_the_best() -> None:
    @dataclass(frozen=True)
    class FrozenStep:
        tokens: tuple[Member, ...]

    steps = [FrozenStep(tuple(step.tokens)) for step in random_run(5, sets=9, eos=False, removals=False)]
    layers = layers_of(steps)
    found = readings_at_hand(steps, 3, seed=0)
    assert found[0] == token_ids(layers, best_paths(layers)[0])
    assert len(found) == len({tuple(ids) for ids in found}) > 15
    assert found != readings_at_hand(steps, 3, seed=1)
    few = candidate_paths(steps, 3, 0, 0.4)
    assert few[:6] == found[:6] and len(few) <= 15 and len(few) == len({tuple(ids) for ids in few})
    apart = [ids for ids in few if ids == few[0] or ids not in found[:6]]
    assert len(apart) > 2  # and those that come later are far from each other, and from the best
    assert all(
        edit_distance(one, other) >= 0.4 * max(len(one), len(other))
        for one, other in itertools.combinations(apart, 2)
    )
