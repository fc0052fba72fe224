"""Branches: every text exact, whatever was merged, finished or dropped from the cache on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tempo_mlx.api import generate, stream
from tempo_mlx.decode.branches import Branches
from tempo_mlx.decode.decoder import Reading
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.decode.score import score_sequences
from tempo_mlx.decode.tree import Choice, Frontier, Node, Tree, most_different
from tempo_mlx.errors import ConfigError
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify
from tempo_mlx.resolution import resolve
from tests.trees import decode, entropy_after, loaded, prompt, removals, teacher

SETTINGS: list[dict[str, Any]] = [
    {},
    {"merge_length": 1},
    {"branch_choice": "sample", "merge_length": 2},
    {"branch_choice": "sample", "temperature": 1.4, "threshold": 0.01},
    {"merge_length": 0, "min_steps": 9},
    {"branch_diversity": 2.0},
    {"branch_diversity": 1.0, "best_of": 9},
]


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("width", range(1, 9))
def test_every_text_has_its_own_exact_log_probability(width: int, backend: str) -> None:
    model = loaded(backend=backend, often=True)
    signals: Counter[str] = Counter()
    for seed, settings in enumerate(SETTINGS):
        ids = prompt(seed)
        run = decode(model, ids, branches=width, max_tokens=16, **{"threshold": 0.02, **settings})
        signals.update(removals(run))
        signals.update(item.why for step in run.steps for item in step.rejected)
        assert 1 <= len(run.paths) <= width
        own = score_sequences(model.model, ids, [path.token_ids for path in run.paths])
        for path, scores in zip(run.paths, own, strict=True):
            allowed = 1e-4 * len(path.token_ids)
            assert path.logprob == pytest.approx(sum(teacher("llama", ids, path.token_ids)), abs=allowed)
            assert path.logprob == pytest.approx(scores.sum(), abs=allowed)
        assert verify(run, model).max_difference < 1e-4
        assert Run.from_json(run.to_json()) == run
    if width >= 4:
        assert signals["merged"] and signals["finished"], signals


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen3", "llama-tied"])
def test_families_with_windows_and_norms_of_their_own(name: str) -> None:
    ids = prompt(1, 9)
    run = decode(loaded(name, often=True), ids, branches=5, max_tokens=18, threshold=0.02)
    for path in run.paths:
        assert path.logprob == pytest.approx(
            sum(teacher(name, ids, path.token_ids)), abs=1e-4 * len(path.token_ids)
        )


@pytest.mark.parametrize("diversity", [0.0, 3.0])  # there is no other branch to differ from
def test_one_branch_is_greedy_decoding(diversity: float) -> None:
    for seed in range(4):
        plain = generate(loaded(often=True), prompt(seed), decoder="plain", temperature=0, max_tokens=20)
        run = generate(
            loaded(often=True), prompt(seed), branches=1, max_tokens=20, branch_diversity=diversity
        )
        assert run.paths[0].token_ids == tuple(step.tokens[0].id for step in plain.steps)
        assert (run.finish_reason, run.final_text) == (plain.finish_reason, plain.final_text)


@pytest.mark.parametrize(
    ("taken", "threshold", "kept"),
    [
        (set(), 0.1, 0),
        ({(7, 0)}, 0.1, 1),  # another text goes on from 7 with 0
        ({(7, 0), (7, 1)}, 0.1, 0),  # and with 1: the penalty falls on both
        ({(7, 0)}, 0.45, 0),  # 1 is under the threshold
        ({(6, 0), (7, 2)}, 0.1, 0),
        ({(7, 0), (3, 7)}, 0.1, 1),
    ],
)
def test_a_branch_avoids_pairs_of_other_texts(
    taken: set[tuple[int, int]], threshold: float, kept: int
) -> None:
    rule = Branches(resolve({"branches": 2, "branch_diversity": 1.0, "threshold": threshold}))
    rule.pairs = taken
    node = Node(-1, 0.0, 0, 0)
    for length, token in enumerate((7, 3, 7), 1):
        node = Node(token, -float(length), length, 0, node)
    log_probs = np.log(np.array([[0.5, 0.4, 0.1]], np.float32))
    frontier = Frontier(log_probs, log_probs, [node], [False], [], lambda node, token: False)
    assert rule.own(frontier) == [kept]
    rule.pairs = {(7, 0), (7, 3)}
    node = Node(0, -4.0, 4, 0, node)  # 7, 3, 7, 0, 7: the text itself went on from 7 with 0
    node = Node(7, -5.0, 5, 0, node)
    assert rule.own(Frontier(log_probs, log_probs, [node], [False], [], frontier.ends)) == [0]


def test_branches_begin_only_where_the_next_token_is_uncertain() -> None:
    sizes = []
    for gate in (0.0, 5.0):
        run = decode(
            loaded(),
            prompt(5),
            branches=6,
            max_tokens=14,
            threshold=0.02,
            branch_entropy=gate,
            merge_length=0,
        )
        begun = [path.token_ids for path in run.paths]
        sizes.append([len({ids[:at] for ids in begun}) for at in range(1, 15)])
        for ids in begun:
            for at in range(len(ids)):
                if len({other[at] for other in begun if other[:at] == ids[:at] and len(other) > at}) > 1:
                    entropy = entropy_after("llama", prompt(5), ids[:at])
                    assert entropy >= gate - 1e-3
    assert sizes[0] != sizes[1]


def test_diversity_makes_texts_share_less() -> None:
    def pairs(strength: float) -> int:
        settings: dict[str, Any] = {"branches": 5, "max_tokens": 20, "threshold": 0.02}
        runs = [decode(loaded(), prompt(seed), branch_diversity=strength, **settings) for seed in range(4)]
        return sum(len({pair for path in run.paths for pair in pairwise(path.token_ids)}) for run in runs)

    assert pairs(3.0) > pairs(0.0)


def text_of(log_prob: float, *tokens: int) -> Reading:
    return Reading(tokens, (log_prob / len(tokens),) * len(tokens), False, 0)


def test_the_most_different_of_probable_texts_are_kept() -> None:
    texts = [
        text_of(-4, 1, 2, 3, 4),
        text_of(-5, 1, 2, 3, 5),
        text_of(-6, 6, 7, 8, 9),
        text_of(-9, 9, 8, 7, 6),
    ]
    assert most_different(texts, 2, 0.0) == texts[:2]
    assert most_different(texts, 2, 0.4) == texts[:2]  # 3 new pairs of 0.4 against 1, and 1 nat
    assert most_different(texts, 2, 0.6) == [texts[0], texts[2]]
    assert most_different(texts, 3, 3.0) == [texts[0], texts[2], texts[3]]
    assert most_different(texts, 9, 3.0) == texts
    long = text_of(-6, *range(20, 32))  # its log-probability is that of twelve tokens
    assert most_different([texts[0], texts[1], long], 2, 0.1) == [texts[0], long]


def test_some_of_more_branches_are_given() -> None:
    settings: dict[str, Any] = {"max_tokens": 14, "threshold": 0.02, "branch_diversity": 1.0}
    all_ = [path.token_ids for path in decode(loaded(), prompt(2), branches=7, **settings).paths]
    some = [path.token_ids for path in decode(loaded(), prompt(2), branches=3, best_of=7, **settings).paths]
    assert len(some) == 3 and some == [text for text in all_ if text in some] != all_[:3]
    with pytest.raises(ConfigError, match="fewer than the 3 branches"):
        resolve({"branches": 3, "best_of": 2})


def test_results_are_distinct_and_ordered_by_mean_log_probability() -> None:
    run = decode(loaded(often=True), prompt(2), branches=6, max_tokens=14, threshold=0.02)
    means = [path.logprob / len(path.token_ids) for path in run.paths]
    assert means == sorted(means, reverse=True)
    assert len({path.token_ids for path in run.paths}) == len(run.paths)
    assert run.final_text == run.paths[0].text


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    settings: dict[str, Any] = {
        "branches": 4, "branch_choice": "sample", "threshold": 0.01, "max_tokens": 12,
    }  # fmt: skip
    first, again, other = (decode(loaded(), prompt(3), **settings, seed=seed).steps for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_the_record_of_a_step() -> None:
    run = decode(loaded(often=True), prompt(0), branches=5, max_tokens=12, threshold=0.02, merge_length=2)
    eos = loaded(often=True).tokenizer.eos_ids
    previous: dict[int, Any] = {}
    log_probs: dict[int | None, float] = {}
    for step in run.steps:
        here = {}
        for token in step.tokens:
            assert (token.slot is None) == (token.id in eos)
            assert len(token.parents) == (1 if previous else 0)
            assert token.branch is not None
            parent = token.parents[0].slot if token.parents else None
            assert parent is None or (token.parents[0].posterior, token.parents[0].forward) == (
                1.0,
                token.probability,
            )
            here[token.slot] = log_probs.get(parent, 0.0) + np.log(token.probability)
            if token.removed_after is not None:
                assert token.removed_after > step.step
        assert len([token for token in step.tokens if token.slot is not None]) <= 5
        sums = [
            log_probs.get(t.parents[0].slot if t.parents else None, 0.0) + np.log(t.probability)
            for t in step.tokens
        ]
        assert sums == sorted(sums, reverse=True)  # best first: the most probable text
        assert len({token.branch for token in step.tokens}) == len(step.tokens)
        assert step.residual_probability == pytest.approx(
            1 - sum(t.probability for t in step.tokens) / max(len(previous), 1)
        )
        previous, log_probs = {t.slot: t for t in step.tokens if t.slot is not None}, here


def test_texts_that_end_alike_are_merged_into_the_more_probable_one() -> None:
    found = 0
    for seed in range(6):
        decoding = stream(loaded(), prompt(seed), branches=8, max_tokens=20, threshold=0.004, merge_length=1)
        for step in decoding:
            nodes = decoding.decoder.nodes  # type: ignore[union-attr]
            assert len({node.token for node in nodes}) == len(nodes)  # no two texts end in the same token
            found += len(step.rejected)
        run = decoding.run()
        for token in (token for step in run.steps for token in step.tokens):
            if token.removed_why is not None and token.removed_why.signal == "merged":
                assert token.removed_why.score <= token.removed_why.threshold
    assert found > 3


def test_branching_stops_at_the_threshold_and_at_the_number_of_places() -> None:
    run = decode(loaded(), prompt(4), branches=8, threshold=0.9, max_tokens=8)
    assert len(run.paths) == 1  # nothing but the best child was ever so probable
    run = decode(loaded(), prompt(4), branches=3, threshold=0.001, max_tokens=8)
    assert [len(step.tokens) for step in run.steps] == [3] * 8
    for step in run.steps:
        assert all(token.probability >= 0.001 for token in step.tokens)


def test_a_run_ends_when_as_many_texts_have_ended_as_were_wanted() -> None:
    run = decode(loaded(often=True), prompt(5), branches=3, threshold=0.01, max_tokens=60)
    eos = loaded(often=True).tokenizer.eos_ids
    assert run.finish_reason == "stop" and len(run.steps) < 60
    assert [path.token_ids[-1] in eos for path in run.paths] == [True] * 3


def test_texts_under_way_are_given_where_a_rule_ends_the_run() -> None:
    class Short:
        threshold, width = None, 2

        def __call__(self, frontier: Frontier) -> Choice:
            best = np.argsort(-frontier.log_probs[-1])[:2].tolist()
            first = not frontier.nodes[0].length
            rows = (
                [(0, token) for token in best] if first else [(row, 7) for row in range(len(frontier.nodes))]
            )
            return Choice([frontier.child(*pair) for pair in rows], done=frontier.nodes[0].length == 2)

    decoder = replace(DECODERS["tree"], start=lambda setup: Tree(setup, Short()))
    run = generate(loaded(), prompt(1), decoder=decoder, max_tokens=9, min_steps=9)
    assert [len(path.token_ids) for path in run.paths] == [3, 3] and run.final_text == run.paths[0].text


def test_a_stop_string_ends_its_own_text_only() -> None:
    model = loaded()
    free = generate(model, prompt(6), branches=3, threshold=0.02, max_tokens=12)
    word = model.tokenizer.decode(free.paths[0].token_ids[4:6], continues=True)
    run = generate(model, prompt(6), branches=3, threshold=0.02, max_tokens=12, stop=[word])
    stopped = [path for path in run.paths if len(path.token_ids) < len(run.steps)]
    assert stopped and all(word not in path.text for path in run.paths)
    for path in stopped:
        assert word in model.tokenizer.decode(path.token_ids, continues=True)
        ids = prompt(6)
        assert path.logprob == pytest.approx(sum(teacher("llama", ids, path.token_ids)), abs=1e-3)


def test_no_text_ends_before_min_steps() -> None:
    model = loaded(often=True)
    run = generate(model, prompt(7), branches=4, threshold=0.01, max_tokens=14, min_steps=10)
    ends = [len(path.token_ids) for path in run.paths if path.token_ids[-1] in model.tokenizer.eos_ids]
    assert ends and min(ends) > 10


def test_a_cancelled_run_keeps_what_it_has() -> None:
    decoding = stream(loaded(), prompt(8), branches=4, threshold=0.02, max_tokens=30)
    for _ in range(5):
        next(decoding)
    decoding.cancel()
    assert list(decoding) == []
    run = decoding.run()
    assert run.finish_reason == "cancelled"
    assert [len(path.token_ids) for path in run.paths] == [5] * 4
