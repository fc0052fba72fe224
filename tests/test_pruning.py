import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.pruning import (
    LOCAL_SETS,
    AttentionHistory,
    PruneContext,
    Pruned,
    PruneRule,
    SetView,
    at_random,
    by_attention,
    by_posterior,
    by_probability,
    open_sets,
    prune_rule,
    settle,
    without_sinks,
)
from tempo_mlx.decode.step import Member, Removal
from tempo_mlx.lattice import Lattice


def view(
    posterior=(0.5, 0.5), *, weights=None, attention=None, step=0, first_slot=10, probabilities=None
) -> SetView:
    size = len(posterior)
    weights = np.asarray(weights if weights is not None else np.full(size, 1 / size))
    return SetView(
        step,
        np.arange(first_slot, first_slot + size),
        np.arange(100, 100 + size),
        np.asarray(probabilities if probabilities is not None else weights),
        weights,
        np.asarray(posterior),
        None if attention is None else np.asarray(attention, np.float32),
    )


def removed(rule: PruneRule, *views: SetView, threshold: float = 0.1) -> list[int]:
    return [entry.slot for entry in rule(PruneContext(20, threshold, views))]


def flat(*members: float, layers: int = 2, sets: int = 1) -> np.ndarray:
    """The same attention from every set and layer: (sets, layers, members)."""
    return np.broadcast_to(np.array(members, np.float32), (sets, layers, len(members)))


# Which sets are open, and what a rule gets to see


def random_lattice(seed: int, steps: int, prompt: int = 3, removals: bool = True):
    """A lattice with random edges, and its members by slot; some members removed on the way."""
    random = np.random.default_rng(seed)
    lattice, members = Lattice(prompt), {}
    for _ in range(steps):
        earlier = [slot for slot in lattice.slots.tolist() if slot not in lattice.newest]
        if removals and earlier and random.random() < 0.3:
            gone = int(random.choice(earlier))
            lattice.remove([gone])
            del members[gone]
        width = int(random.integers(1, 4))
        before = len(lattice.newest)
        posterior = random.dirichlet(np.ones(before), size=width).T if before else None
        weights = random.dirichlet(np.ones(width))
        for slot, weight in zip(lattice.append(weights, posterior).tolist(), weights.tolist(), strict=True):
            members[slot] = Member(1000 + slot, weight / 2, slot, weight)
    return lattice, members


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_open_sets_are_the_wide_ones_of_the_window(seed: int, steps: int, window: int) -> None:
    lattice, members = random_lattice(seed, steps)
    newest = steps - 1
    posterior = dict(zip(lattice.slots.tolist(), lattice.posterior().tolist(), strict=True))
    found = {shown.step: shown for shown in open_sets(lattice, members, window)}
    assert list(found) == sorted(found)
    for step in range(steps):
        alive = [s for s, t in zip(lattice.slots.tolist(), lattice.sets.tolist(), strict=True) if t == step]
        if len(alive) < 2 or step >= newest or step < newest - window:
            assert step not in found
            continue
        shown = found[step]
        assert shown.slots.tolist() == alive
        assert shown.tokens.tolist() == [1000 + slot for slot in alive]
        assert shown.weights.tolist() == [members[slot].weight for slot in alive]
        assert shown.probabilities.tolist() == [members[slot].probability for slot in alive]
        assert shown.posterior.tolist() == [posterior[slot] for slot in alive]
        assert shown.posterior.sum() == pytest.approx(1.0)
        assert shown.attention is None


@pytest.mark.parametrize("window", [1, 3, 20])
def test_the_history_returns_what_each_later_set_gave_each_alive_member(window: int) -> None:
    random = np.random.default_rng(window)
    prompt, layers = 5, 3
    lattice, history, given_mass = Lattice(prompt), AttentionHistory(window), {}
    members, before = {}, 0
    for step in range(10):
        width = 1 + step % 3
        posterior = np.full((before, width), 1 / before) if before else None
        for slot in lattice.append(np.full(width, 1 / width), posterior).tolist():
            members[slot] = Member(slot, 0.5, slot, 0.5)
        before = width
        mass = random.dirichlet(np.ones(lattice.size), size=layers).astype(np.float32)
        history = history.record(lattice, mass)
        clean = without_sinks(mass, prompt)
        for column, slot in enumerate(lattice.slots.tolist()):
            given_mass[step, slot] = clean[:, prompt + column]
        for shown in open_sets(lattice, members, window, history):
            expected = [
                [given_mass[later, slot] for slot in shown.slots.tolist()]
                for later in range(shown.step + 1, step + 1)
            ]
            np.testing.assert_array_equal(shown.attention, np.array(expected).transpose(0, 2, 1))
        if step in (4, 7):
            gone = int(lattice.slots[lattice.sets == step - 2][0])
            lattice.remove([gone])
            del members[gone]
    assert len(history.records) == min(window, 10)


def test_sinks_are_taken_out_and_the_rest_scaled_up() -> None:
    mass = np.array([[0.5, 0.1, 0.1, 0.1, 0.05, 0.15], [0.0, 0.0, 0.0, 0.0, 0.5, 0.5]], np.float32)
    np.testing.assert_allclose(
        without_sinks(mass, 5), [[0, 0, 0, 0, 0.25, 0.75], [0, 0, 0, 0, 0.5, 0.5]], atol=1e-6
    )
    np.testing.assert_allclose(without_sinks(mass, 1)[0], [0, 0.2, 0.2, 0.2, 0.1, 0.3], atol=1e-6)
    assert np.isfinite(without_sinks(np.array([[1.0, 0, 0, 0, 0]], np.float32), 4)).all()


# Posterior, probability, random


def test_the_posterior_rule_removes_the_member_no_reading_uses() -> None:
    """Set 0: A and B, equally likely. Both rows of set 1 came from B, so A is the member to go."""
    lattice = Lattice(1)
    members = {}
    for slot in lattice.append([0.5, 0.5], None).tolist():
        members[slot] = Member(slot, 0.5, slot, 0.5)
    for slot in lattice.append([0.3, 0.7], np.array([[0.05, 0.02], [0.95, 0.98]])).tolist():
        members[slot] = Member(slot, 0.4, slot, 0.5)
    context = PruneContext(1, 0.1, open_sets(lattice, members, 8))
    assert len(context.sets) == 1
    (entry,) = by_posterior()(context)
    assert entry.slot == 1
    assert entry.why.score == pytest.approx(0.3 * 0.05 + 0.7 * 0.02)
    assert (entry.why.signal, entry.why.threshold, entry.why.unattended) == ("posterior", 0.1, False)
    assert by_probability()(context) == []


def test_thresholds_are_absolute_or_relative_to_the_largest() -> None:
    shown = view((0.05, 0.15, 0.80), weights=(0.3, 0.3, 0.4))
    assert removed(by_posterior(), shown) == [10]
    assert removed(by_posterior(), shown, threshold=0.2) == [10, 11]
    assert removed(by_posterior(relative=True), shown, threshold=0.1) == [10]
    assert removed(by_posterior(relative=True), shown, threshold=0.2) == [10, 11]
    assert removed(by_posterior(relative=True), shown, threshold=0.06) == []
    assert removed(by_posterior(), shown, threshold=0.06) == [10]
    assert removed(by_posterior(), shown, threshold=0.05) == []  # at the threshold is not under it


def test_the_probability_rule_looks_at_weights_among_the_living() -> None:
    shown = view((0.05, 0.95), weights=(0.30, 0.06))
    assert removed(by_probability(), shown, threshold=0.17) == [11]
    assert removed(by_probability(), shown, threshold=0.16) == []
    assert removed(by_probability(relative=True), shown, threshold=0.21) == [11]


def test_the_random_rule_removes_the_share_it_is_told_and_stays_with_it() -> None:
    views = [view(np.full(8, 1 / 8), step=i, first_slot=8 * i) for i in range(250)]
    gone = removed(at_random(1), *views, threshold=0.3)
    assert len(gone) / 2000 == pytest.approx(0.3, abs=0.05)
    assert removed(at_random(1), *views, threshold=0.3) == gone
    assert set(removed(at_random(1), *views, threshold=0.2)) < set(gone)
    assert removed(at_random(2), *views, threshold=0.3) != gone
    assert removed(at_random(1), *views, threshold=0.0) == []
    assert (
        len(removed(at_random(1, relative=True), *views, threshold=1.0)) == 1750
    )  # all but the largest draw


# Attention


def test_the_attention_rule_removes_what_nobody_reads() -> None:
    shown = view((0.5, 0.3, 0.2), attention=flat(0.02, 0.2, 0.18))
    for rule in (by_attention(), by_attention(steepness=None), by_attention(multi_scale=False)):
        assert removed(rule, shown, threshold=0.01) == [10]
    (entry,) = by_attention(steepness=None)(PruneContext(20, 0.01, (shown,)))
    assert entry.why.signal == "attention"
    assert entry.why.score == pytest.approx(0.02)
    assert entry.why.threshold == pytest.approx(0.5 * 0.4 / 3)
    (voted,) = by_attention()(PruneContext(20, 0.01, (shown,)))
    assert voted.why.score == pytest.approx(1 / (1 + np.exp(-10 * (0.02 / (0.5 * 0.4 / 3) - 1))), abs=1e-6)
    assert voted.why.threshold == 0.5


@pytest.mark.parametrize("steepness", [None, 10.0])
def test_absolute_and_relative_attention(steepness: float | None) -> None:
    shown = view((0.5, 0.5), attention=flat(0.004, 0.012))
    absolute = by_attention(relative_threshold=0.0, steepness=steepness)
    relative = by_attention(relative_threshold=0.6, steepness=steepness)
    assert removed(absolute, shown, threshold=0.01) == [10]
    assert removed(absolute, shown, threshold=0.003) == []
    assert removed(absolute, shown, threshold=0.02) == [10, 11]
    assert removed(absolute, shown, threshold=0.0) == []
    assert removed(relative, shown, threshold=0.0) == [10]  # under 0.6 x 0.008
    assert removed(relative, shown, threshold=0.003) == [10]
    assert removed(by_attention(relative_threshold=0.4, steepness=steepness), shown, threshold=0.003) == []
    # the larger of both thresholds counts, so the absolute one can take a whole set
    assert removed(relative, shown, threshold=0.02) == [10, 11]
    assert removed(relative, view(attention=flat(0.0, 0.0)), threshold=0.0) == []


def test_only_the_last_layers_count_when_told_so() -> None:
    attention = np.array([[[0.02, 0.3], [0.02, 0.3], [0.2, 0.2]]])  # one set, three layers, two members
    for multi_scale in (True, False):
        settings = {"steepness": None, "multi_scale": multi_scale}
        assert removed(by_attention(**settings, relative_threshold=0.75), view(attention=attention)) == [10]
        last = by_attention(**settings, relative_threshold=0.75, num_layers=1)
        assert removed(last, view(attention=attention), threshold=0.0) == []


def test_multi_scale_weighs_deep_layers_and_near_sets_more() -> None:
    def score(attention, multi_scale):
        rule = by_attention(steepness=None, relative_threshold=0.0, multi_scale=multi_scale)
        return [entry.why.score for entry in rule(PruneContext(20, 1.0, (view(attention=attention),)))]

    layered = np.array([[[0.4, 0.0], [0.0, 0.4]]])  # depth weights 1/3, 2/3
    assert score(layered, False) == pytest.approx([0.2, 0.2])
    assert score(layered, True) == pytest.approx(
        [(0.2 + 0.4 / 3 + 0.2) / 3, (0.2 + 0.8 / 3 + 0.2) / 3], abs=1e-7
    )
    near = np.zeros((LOCAL_SETS + 3, 1, 2))
    near[:LOCAL_SETS, :, 0] = 0.8  # the first is read at once, the second only later
    near[LOCAL_SETS:, :, 1] = 0.8 * LOCAL_SETS / 3
    assert score(near, False) == pytest.approx([0.5, 0.5])
    assert score(near, True) == pytest.approx([(0.5 + 0.5 + 0.8) / 3, (0.5 + 0.5 + 0.0) / 3])


def test_a_steep_sigmoid_counts_sets_and_a_flat_one_averages() -> None:
    # one later set attends a lot, two hardly: the mean is over the threshold, the majority is not
    attention = np.array([[[0.9, 0.5]], [[0.05, 0.5]], [[0.05, 0.5]]])
    settings = {"relative_threshold": 0.0, "multi_scale": False}
    shown = view(attention=attention)
    assert removed(by_attention(**settings, steepness=None), shown, threshold=0.3) == []
    assert removed(by_attention(**settings, steepness=50.0), shown, threshold=0.3) == [10]
    assert removed(by_attention(**settings, steepness=0.1), shown, threshold=0.3) == []


def test_attention_is_asked_for_only_where_it_is_needed() -> None:
    assert by_attention().needs_attention
    assert not by_posterior().needs_attention
    with pytest.raises(ValueError, match="attention"):
        removed(by_attention(), view())


# Removal modes


def entries(*scores: tuple[int, float]) -> list[Pruned]:
    return [Pruned(slot, Removal("mine", score, 0.5)) for slot, score in scores]


@pytest.mark.parametrize(
    ("mode", "gone", "unattended"),
    [
        ("keep_token", [10, 12], []),
        ("keep_unattended", [10, 11, 12], [11]),
        ("remove_position", [10, 11, 12], []),
    ],
)
def test_removal_modes_decide_when_a_whole_set_would_go(
    mode: str, gone: list[int], unattended: list[int]
) -> None:
    context = PruneContext(5, 0.5, (view((0.3, 0.3, 0.4)), view(step=1, first_slot=20)))
    settled = settle(context, entries((21, 0.3), (10, 0.1), (12, 0.2), (11, 0.4)), mode)
    assert [entry.slot for entry in settled] == [*gone, 21]
    assert [entry.slot for entry in settled if entry.why.unattended] == unattended
    partly = settle(context, entries((10, 0.1), (12, 0.2)), mode)
    assert partly == entries((10, 0.1), (12, 0.2))


def test_ties_are_decided_by_probability() -> None:
    context = PruneContext(5, 0.5, (view((0.5, 0.5), probabilities=(0.4, 0.2)),))
    assert [e.slot for e in settle(context, entries((10, 0.1), (11, 0.1)), "keep_token")] == [11]


def test_a_rule_that_names_what_is_not_open_is_refused() -> None:
    context = PruneContext(5, 0.5, (view(),))
    with pytest.raises(ValueError, match="99"):
        settle(context, entries((99, 0.1)), "keep_token")
    with pytest.raises(ValueError, match="removal mode"):
        settle(context, [], "drop")


# Settings


def test_the_settings_choose_the_rule() -> None:
    def gone(threshold: float = 0.1, **given) -> list[int]:
        shown = view((0.05, 0.95), weights=(0.95, 0.05), attention=flat(0.3, 0.1, layers=2))
        return removed(
            prune_rule(GenerateConfig(**{"pruning_signal": "posterior", **given})), shown, threshold=threshold
        )

    assert prune_rule(GenerateConfig()) is None
    assert gone() == [10]
    assert gone(pruning_signal="probability") == [11]
    assert gone(pruning_signal="attention", relative_threshold=0.6) == [11]
    assert gone(pruning_signal="attention", relative_threshold=0.4) == []
    assert gone(0.05, pruning_signal="attention", relative_threshold=0) == []
    assert gone(0.2, pruning_signal="attention", relative_threshold=0) == [11]
    assert gone(0.05, relative_posterior=True) == []
    draws = [gone(0.5, pruning_signal="random", seed=seed) for seed in range(20)]
    assert [10, 11] in draws
    assert [] in draws


def test_a_rule_of_ones_own_is_a_function() -> None:
    def stale(context):
        for shown in context.sets:
            if context.step - shown.step >= 3:
                yield from shown.under(shown.posterior, shown.posterior.max(), "stale")

    views = (view((0.4, 0.6), step=16), view((0.4, 0.6), step=19, first_slot=30))
    context = PruneContext(20, 0.1, views)
    (entry,) = settle(context, PruneRule(stale)(context), "keep_token")
    assert (entry.slot, entry.why.signal, entry.why.score, entry.why.threshold) == (10, "stale", 0.4, 0.6)
