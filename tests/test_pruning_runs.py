"""Every knob of the schedule, pruning and retroactive groups changes a run of a tiny model, as predicted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.decoder import Setup
from tempo_mlx.decode.functions import Functions, Prune
from tempo_mlx.decode.pruning import PruneContext, Pruned, PruneRule, prune_rule
from tempo_mlx.decode.rules import make_rules
from tempo_mlx.decode.schedules import bezier, relu
from tempo_mlx.decode.step import Member, Step
from tempo_mlx.decode.tempo import Tempo
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.resolution import resolve
from tempo_mlx.weights import open_checkpoint

VOCABULARY, WIDTH, LAYERS, HEADS, GROUPS, STEPS = 48, 32, 3, 4, 2, 24
PROMPT = (3, 14, 15, 9, 2, 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random Llama whose distributions are uneven enough for wide and narrow sets."""
    random = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("twin")

    def matrix(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (random.normal(size=shape) * scale / math.sqrt(shape[-1])).astype(np.float32)

    kv = WIDTH * GROUPS // HEADS
    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, WIDTH, scale=6.0),
        "lm_head.weight": matrix(VOCABULARY, WIDTH, scale=2.2),
        "model.norm.weight": np.ones(WIDTH, np.float32),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for part, shape in {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (kv, WIDTH),
            "self_attn.v_proj": (kv, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (64, WIDTH),
            "mlp.up_proj": (64, WIDTH),
            "mlp.down_proj": (WIDTH, 64),
        }.items():
            weights[f"{name}.{part}.weight"] = matrix(*shape, scale=1.5)
        weights[f"{name}.input_layernorm.weight"] = np.ones(WIDTH, np.float32)
        weights[f"{name}.post_attention_layernorm.weight"] = np.ones(WIDTH, np.float32)
    save_file(weights, path / "model.safetensors")
    config = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return build(open_checkpoint(str(path)), "auto", "float32")


def begin(model: Any, config: GenerateConfig, prune: Prune | None) -> Tempo:
    functions = Functions(prune=prune)
    return Tempo(Setup(model, PROMPT, config), make_rules(config, functions))


class Decoded:
    """One run: its steps, every context its rule saw, and what was removed when."""

    def __init__(self, model: Any, prune: Any = None, **settings: Any) -> None:
        threshold = {} if "selection" in settings else {"threshold": 0.08}
        self.config = resolve({"max_tokens": STEPS, **threshold, **settings})
        self.contexts: list[PruneContext] = []
        rule = prune if prune is not None else prune_rule(self.config)
        tempo = begin(model, self.config, None if rule is None else self.watch(rule))
        self.cache_lengths, self.cache_bytes = [], []
        for _ in range(self.config.max_tokens):
            tempo.advance()
            self.cache_lengths.append(len(tempo.cache))
            self.cache_bytes.append(tempo.cache.nbytes)
            waiting = 0 if tempo.probed is not None else len(tempo.lattice.newest)  # rows not run yet
            assert len(tempo.cache) == tempo.lattice.size - waiting
        tempo.note_evidence()
        self.steps: list[Step] = tempo.steps

    def watch(self, rule: PruneRule) -> PruneRule:
        def decide(context: PruneContext) -> Iterable[Pruned]:
            self.contexts.append(context)
            return rule(context)

        return PruneRule(decide, rule.needs_attention)

    @property
    def members(self) -> list[tuple[int, Member]]:
        return [(step.step, member) for step in self.steps for member in step.tokens]

    @property
    def removals(self) -> dict[int, set[int]]:
        """Slots by the step after which they were removed."""
        found: dict[int, set[int]] = {}
        for _, member in self.members:
            if member.removed_after is not None:
                found.setdefault(member.removed_after, set()).add(member.slot)
        return found

    @property
    def count(self) -> int:
        return sum(map(len, self.removals.values()))

    @property
    def widths(self) -> list[int]:
        return [len(step.tokens) for step in self.steps]

    def scores(self) -> set[tuple[str, float]]:
        return {(m.removed_why.signal, m.removed_why.threshold) for _, m in self.members if m.removed_why}


def first_difference(one: Decoded, other: Decoded) -> tuple[set[int], set[int]]:
    """What both removed at the first step at which they differ; up to there the runs are the same."""
    for step in range(STEPS):
        pair = one.removals.get(step, set()), other.removals.get(step, set())
        if pair[0] != pair[1]:
            return pair
    raise AssertionError("both runs removed the same members")


def removes_less(one: Decoded, other: Decoded) -> bool:
    less, more = first_difference(one, other)
    return less < more


POSTERIOR = {"pruning_signal": "posterior", "posterior_threshold": 0.2}
ATTENTION = {"attention_threshold": 0.02, "relative_threshold": 0.8}


# Schedules


def expected_thresholds(curve: Any, start: float, final: float) -> list[float]:
    return [start + (final - start) * curve(step / (STEPS - 1)) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("settings", "curve", "final"),
    [
        ({}, lambda t: bezier(t, 0.2, 0.8), 1.0),
        ({"final_threshold": 0.4}, lambda t: bezier(t, 0.2, 0.8), 0.4),
        ({"bezier_p1": 0.9}, lambda t: bezier(t, 0.9, 0.8), 1.0),
        ({"bezier_p2": 0.1}, lambda t: bezier(t, 0.2, 0.1), 1.0),
        ({"relu_activation_point": 0.5}, lambda t: relu(t, 0.5), 1.0),
        ({"relu_activation_point": 0.8}, lambda t: relu(t, 0.8), 1.0),
    ],
    ids=["bezier", "final", "p1", "p2", "relu", "activation point"],
)
def test_the_selection_threshold_follows_its_curve(
    model: Any, settings: Any, curve: Any, final: float
) -> None:
    run = Decoded(model, **{"final_threshold": 1.0, **settings})
    expected = expected_thresholds(curve, 0.08, final)
    assert [step.threshold for step in run.steps] == pytest.approx(expected)
    for step, threshold in zip(run.steps, expected, strict=True):
        assert all(member.probability >= threshold * (1 - 1e-6) for member in step.tokens[1:])
    constant = Decoded(model)
    assert sum(run.widths) < sum(constant.widths)
    if final == 1.0:
        assert run.widths[-1] == 1


@pytest.mark.parametrize("target", ["selection", "pruning", "both"])
def test_the_target_says_which_threshold_moves(model: Any, target: str) -> None:
    run = Decoded(model, dynamic_target=target, final_threshold=0.6, **POSTERIOR)
    selection = [step.threshold for step in run.steps]
    pruning = [context.threshold for context in run.contexts]
    curve = expected_thresholds(lambda t: bezier(t, 0.2, 0.8), 0.0, 1.0)[: STEPS - 1]
    moves_selection, moves_pruning = target in ("selection", "both"), target in ("pruning", "both")
    assert selection[:-1] == pytest.approx([0.08 + (0.52 * c if moves_selection else 0.0) for c in curve])
    assert pruning == pytest.approx([0.2 + (0.4 * c if moves_pruning else 0.0) for c in curve])
    still = Decoded(model, **POSTERIOR)
    assert (run.widths != still.widths) or (run.removals != still.removals)
    if target == "pruning":
        assert removes_less(still, run)
        assert len({threshold for _, threshold in run.scores()}) > 1


def test_the_schedule_moves_the_coherence_threshold_too(model: Any) -> None:
    settings = {"pruning_strategy": "coherence", "coherence_threshold": 0.5}
    still = Decoded(model, **settings)
    moving = Decoded(
        model, **settings, final_threshold=1.0, dynamic_target="pruning", relu_activation_point=0.5
    )
    half = STEPS // 2
    assert [s.rejected for s in still.steps[:half]] == [s.rejected for s in moving.steps[:half]]
    assert sum(len(s.rejected) for s in moving.steps) > sum(len(s.rejected) for s in still.steps)
    assert moving.widths[-1] == 1  # at 1, the best supported candidate alone


# Before append


def test_coherence_drops_candidates_by_its_threshold(model: Any) -> None:
    def rejected(threshold: float) -> list[int]:
        run = Decoded(model, pruning_strategy="coherence", coherence_threshold=threshold)
        assert all(entry.why.startswith("coherence") for step in run.steps for entry in step.rejected)
        return [len(step.rejected) for step in run.steps]

    assert sum(rejected(0.0)) == 0
    assert 0 < sum(rejected(0.8)) < sum(rejected(1.0))
    everything = Decoded(model, pruning_strategy="coherence", coherence_threshold=1.0)
    assert set(everything.widths) == {1}


def test_diversity_keeps_one_candidate_a_cluster(model: Any) -> None:
    free = Decoded(model)
    for clusters in (1, 2):
        run = Decoded(model, pruning_strategy="diversity", diversity_clusters=clusters)
        assert max(run.widths) == clusters < max(free.widths)
        for step in run.steps:
            assert all(entry.probability <= step.tokens[0].probability for entry in step.rejected)
            assert all(entry.why.startswith("diversity") for entry in step.rejected)
    # the best is never dropped, and up to the first difference the candidates are those of the free run
    assert run.steps[0].tokens[0].id == free.steps[0].tokens[0].id
    first = {m.id for m in run.steps[0].tokens} | {r.id for r in run.steps[0].rejected}
    assert first == {m.id for m in free.steps[0].tokens}


def test_hybrid_does_both(model: Any) -> None:
    run = Decoded(model, pruning_strategy="hybrid", diversity_clusters=3, coherence_threshold=0.8)
    reasons = {entry.why.split(":")[0] for step in run.steps for entry in step.rejected}
    assert reasons == {"diversity", "coherence"}
    assert max(run.widths) <= 3


# Retroactive pruning


def test_pruning_shrinks_the_cache_and_every_removal_says_why(model: Any) -> None:
    free, pruned = Decoded(model), Decoded(model, **POSTERIOR)
    assert free.count == 0
    assert pruned.count > 5
    assert pruned.cache_lengths[-1] < free.cache_lengths[-1]
    assert len({slot for slots in pruned.removals.values() for slot in slots}) == pruned.count
    for step, member in pruned.members:
        if member.removed_why is not None:
            assert member.removed_why.signal == "posterior"
            assert member.removed_why.score == member.posterior < member.removed_why.threshold == 0.2
            assert step < member.removed_after <= step + 8
            assert not member.removed_why.unattended


def test_cache_memory_shrinks_with_what_is_removed(model: Any) -> None:
    """Long enough that the blocks the cache is allocated in show it."""
    wide = {"max_tokens": 100, "selection": "top-k", "top_k": 4}
    kept = Decoded(model, **wide)
    pruned = Decoded(model, **wide, pruning_signal="posterior", posterior_threshold=0.3)
    assert kept.cache_lengths[-1] > 256 > pruned.cache_lengths[-1]
    assert pruned.cache_bytes[-1] < kept.cache_bytes[-1]


@pytest.mark.parametrize("signal", ["posterior", "probability", "random"])
def test_a_higher_threshold_removes_more(model: Any, signal: str) -> None:
    settings = {"pruning_signal": signal}
    low = Decoded(model, **settings, posterior_threshold=0.15)
    high = Decoded(model, **settings, posterior_threshold=0.3)
    assert removes_less(low, high)
    assert low.scores() == {(signal, 0.15)}
    assert high.scores() == {(signal, 0.3)}


@pytest.mark.parametrize("signal", ["posterior", "probability", "random"])
def test_a_relative_threshold_counts_in_units_of_the_largest_score(model: Any, signal: str) -> None:
    settings = {"pruning_signal": signal, "posterior_threshold": 0.4}
    absolute = Decoded(model, **settings)
    relative = Decoded(model, **settings, relative_posterior=True)
    assert removes_less(relative, absolute)
    assert all(threshold < 0.4 for _, threshold in relative.scores())


def test_the_signals_are_not_the_same(model: Any) -> None:
    runs = [
        Decoded(model, pruning_signal=signal, **settings)
        for signal, settings in {
            "posterior": {"posterior_threshold": 0.2},
            "probability": {"posterior_threshold": 0.2},
            "random": {"posterior_threshold": 0.2},
            "attention": {},
        }.items()
    ]
    assert len({json.dumps(sorted((k, sorted(v)) for k, v in run.removals.items())) for run in runs}) == 4


def test_random_removal_follows_the_seed(model: Any) -> None:
    settings = {"pruning_signal": "random", "posterior_threshold": 0.3}
    one, again, other = (Decoded(model, **settings, seed=seed) for seed in (1, 1, 2))
    assert one.removals == again.removals != other.removals


def test_posteriors_are_the_shares_of_all_readings(model: Any) -> None:
    """Against forward-backward over the recorded edges, by hand, in a run without removals."""
    run = Decoded(model, prune=PruneRule(lambda context: []))
    context = run.contexts[8]
    weights = np.array([m.weight for m in slot_order(run.steps[context.step])])
    for step in range(context.step - 1, max(-1, context.step - 9), -1):
        rows = slot_order(run.steps[step + 1])
        posterior = np.array([[edge.posterior for edge in row.parents] for row in rows])
        weights = weights @ posterior  # (members of `step`,): in slot order, as parents are
        shown = [view for view in context.sets if view.step == step]
        if shown:
            np.testing.assert_allclose(shown[0].posterior, weights, atol=1e-12)
    assert len(context.sets) > 3


def slot_order(step: Step) -> list[Member]:
    return sorted((m for m in step.tokens if m.slot is not None), key=lambda m: m.slot)


@pytest.mark.parametrize("settings", [POSTERIOR, ATTENTION], ids=["posterior", "attention"])
def test_the_window_limits_how_far_back_is_looked(model: Any, settings: Any) -> None:
    def ages(run: Decoded) -> list[int]:
        return [m.removed_after - step for step, m in run.members if m.removed_after is not None]

    near, far = Decoded(model, **settings, pruning_window=1), Decoded(model, **settings, pruning_window=20)
    assert set(ages(near)) == {1}
    assert max(ages(far)) > 1
    assert all(len(c.sets) <= 1 and all(v.step == c.step - 1 for v in c.sets) for c in near.contexts)


# Attention


def slow_decision(
    context: PruneContext,
    *,
    layers: int = LAYERS,
    multi_scale: bool = True,
    relative: float = 0.8,
    steepness: float | None = 10.0,
) -> dict[int, float]:
    """Slots the attention rule must remove, with their scores: the definition, in plain loops."""
    found = {}
    depth = [0.5 + 0.5 * number / max(layers - 1, 1) for number in range(layers)]
    for view in context.sets:
        size = len(view.slots)
        used = view.attention[:, LAYERS - layers :].astype(float).tolist()
        plain = [[mean(layer[m] for layer in at) for m in range(size)] for at in used]
        deep = [
            [sum(d * layer[m] for d, layer in zip(depth, at, strict=True)) / sum(depth) for m in range(size)]
            for at in used
        ]
        views = [plain, deep, plain[:5]] if multi_scale else [plain]
        if steepness is None:
            scores = [mean(mean(at[m] for at in v) for v in views) for m in range(size)]
            threshold = max(context.threshold, relative * mean(scores))
        else:
            votes = []
            for v in views:
                bounds = [max(context.threshold, relative * mean(at)) for at in v]
                votes.append(
                    [
                        mean(
                            1 / (1 + math.exp(-steepness * (at[m] / b - 1)))
                            for at, b in zip(v, bounds, strict=True)
                        )
                        for m in range(size)
                    ]
                )
            scores = [mean(vote[m] for vote in votes) for m in range(size)]
            threshold = 0.5
        gone = {int(view.slots[m]): scores[m] for m in range(size) if scores[m] < threshold}
        if len(gone) == size:
            gone.pop(max(gone, key=lambda slot: (gone[slot], slot)))
        found.update(gone)
    return found


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


ATTENTION_KNOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {"relative": 0.8}),
    "threshold": ({"attention_threshold": 0.1}, {}),
    "relative threshold": ({"relative_threshold": 0.9}, {"relative": 0.9}),
    "absolute only": ({"relative_threshold": 0}, {"relative": 0.0}),
    "last layer": ({"num_layers_to_use": 1}, {"layers": 1}),
    "last two layers": ({"num_layers_to_use": 2}, {"layers": 2}),
    "single scale": ({"multi_scale_attention": False}, {"multi_scale": False}),
    "hard": ({"sigmoid_steepness": 0}, {"steepness": None}),
    "flat sigmoid": ({"sigmoid_steepness": 0.5}, {"steepness": 0.5}),
}


@pytest.mark.parametrize("name", ATTENTION_KNOBS)
def test_every_attention_knob_acts_as_defined(model: Any, name: str) -> None:
    """Each step of each run removes just what the definition says, and the knob changes what that is."""
    settings, definition = ATTENTION_KNOBS[name]
    merged = {name: value for name, value in {**ATTENTION, **settings}.items() if value is not None}
    run = Decoded(model, **merged)
    assert run.count > 3
    scores = {m.slot: m.removed_why.score for _, m in run.members if m.removed_why}
    for context in run.contexts:
        expected = slow_decision(context, **definition)
        assert run.removals.get(context.step, set()) == set(expected)
        assert all(scores[slot] == pytest.approx(score, abs=1e-5) for slot, score in expected.items())
    if name != "base":
        first_difference(Decoded(model, **ATTENTION), run)


def test_more_attention_is_asked_for_by_higher_thresholds(model: Any) -> None:
    def run(absolute: float = 0.02, **relative: Any) -> Decoded:
        return Decoded(model, sigmoid_steepness=0, attention_threshold=absolute, **relative)

    usual = run(relative_threshold=0.8)
    assert removes_less(usual, run(0.1, relative_threshold=0.8))
    assert removes_less(run(relative_threshold=0.3), usual)
    assert removes_less(run(relative_threshold=0), usual)


def test_attention_in_the_record_is_the_mean_over_layers(model: Any) -> None:
    run = Decoded(model, **ATTENTION)
    shares = [m.attention for _, m in run.members if m.attention is not None]
    assert len(shares) > 10
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert all(m.attention is None for _, m in Decoded(model, **POSTERIOR).members)


# Removal modes


def test_removal_modes(model: Any) -> None:
    """A random threshold of 0.7 empties sets; each mode does with them what it is named for."""
    settings = {"pruning_signal": "random", "posterior_threshold": 0.7}
    runs = {
        mode: Decoded(model, **settings, complete_removal_mode=mode)
        for mode in ("keep_token", "keep_unattended", "remove_position")
    }
    alive = {
        mode: [sum(m.removed_after is None for m in step.tokens) for step in run.steps]
        for mode, run in runs.items()
    }
    unattended = {
        mode: [
            sum(m.removed_why is not None and m.removed_why.unattended for m in step.tokens)
            for step in run.steps
        ]
        for mode, run in runs.items()
    }
    assert min(alive["keep_token"]) == 1
    assert sum(unattended["keep_token"]) == 0
    assert min(alive["keep_unattended"]) == 0
    assert all(
        a > 0 or u == 1 for a, u in zip(alive["keep_unattended"], unattended["keep_unattended"], strict=True)
    )
    assert min(alive["remove_position"]) == 0
    assert sum(unattended["remove_position"]) == 0
    for mode in ("keep_unattended", "remove_position"):
        assert removes_less(runs["keep_token"], runs[mode])
        assert runs[mode].cache_lengths[-1] < runs["keep_token"].cache_lengths[-1]
    for run in runs.values():  # a whole set removed leaves a gap, and shifts nothing
        assert [step.position for step in run.steps] == list(range(len(PROMPT), len(PROMPT) + STEPS))


# A rule of one's own


def test_a_bare_function_prunes(model: Any) -> None:
    def older_than_two(context: PruneContext) -> Iterable[Pruned]:
        for view in context.sets:
            if context.step - view.step == 2:
                yield from view.under(view.posterior, view.posterior.max(), "stale")

    config = resolve({"max_tokens": STEPS, "threshold": 0.08})
    tempo = begin(model, config, older_than_two)
    for _ in range(STEPS):
        tempo.advance()
    wide = 0
    for step in tempo.steps[: STEPS - 3]:
        alive = [m for m in step.tokens if m.removed_after is None]
        assert len(alive) == 1
        gone = [m for m in step.tokens if m.removed_after is not None]
        wide += bool(gone)
        assert all((m.removed_after, m.removed_why.signal) == (step.step + 2, "stale") for m in gone)
    assert wide > 3


def test_no_rule_asks_for_no_attention(model: Any) -> None:
    asked: list[object] = []

    class Watching:
        architecture, info, new_cache, embeddings = (
            model.architecture,
            model.info,
            model.new_cache,
            model.embeddings,
        )

        def forward(self, *arguments: Any, attention: object = False, **rest: Any) -> Any:
            asked.append(attention)
            return model.forward(*arguments, attention=attention, **rest)

    for settings, expected in (({}, {False}), (POSTERIOR, {False}), (ATTENTION, {False, True})):
        asked.clear()
        Decoded(Watching(), **settings)
        assert set(asked) == expected
