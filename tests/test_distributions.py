"""What is drawn follows the model's distribution, at every temperature and in every branch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import tempo_mlx
from tests.trees import decode, loaded, prompt

RUNS = 240


def exact(ids: Sequence[int], temperature: float, floor: float = 0.0) -> dict[int, float]:
    """The distribution after `ids`, of the tokens at or above `floor`, by the dense model."""
    model = loaded().model
    logits = model.forward(list(ids), range(len(ids)), None, model.new_cache(), logits="last").logits
    assert logits is not None
    scaled = logits[0].astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    kept = np.flatnonzero(p >= floor)
    return dict(zip(kept.tolist(), (p[kept] / p[kept].sum()).tolist(), strict=True))


def check(counts: Mapping[int, int], expected: Mapping[int, float]) -> None:
    """Pearson's chi-squared; tokens that are expected less than five times count as one."""
    assert set(counts) <= set(expected)
    total = sum(counts.values())
    rare = {token for token, p in expected.items() if p * total < 5}
    cells = [(counts.get(token, 0), p * total) for token, p in expected.items() if token not in rare]
    rest = sum(expected[token] for token in rare) * total
    if rest >= 1:
        cells.append((sum(counts.get(token, 0) for token in rare), rest))
    assert len(cells) > 2, "too few tokens to tell anything"
    freedom = len(cells) - 1
    found = sum((observed - wanted) ** 2 / wanted for observed, wanted in cells)
    assert found < freedom + 4.5 * math.sqrt(2 * freedom), (found, freedom)


def check_each(draws: Sequence[tuple[int, Mapping[int, float]]]) -> None:
    """Draws from a distribution each: their places in it, best token first, are spread evenly over 0..1."""
    random = np.random.default_rng(0)
    counts = Counter[int]()
    for token, expected in draws:
        assert token in expected
        before = sum(p for other, p in expected.items() if (-p, other) < (-expected[token], token))
        counts[int(8 * (before + random.random() * expected[token]))] += 1
    check(counts, dict.fromkeys(range(8), 1 / 8))


@pytest.mark.parametrize("temperature", [0.4, 2.0])
def test_plain_draws_follow_the_tempered_distribution(temperature: float) -> None:
    ids = prompt(5)
    expected = exact(ids, temperature)
    runs = (
        tempo_mlx.generate(loaded(), ids, decoder="plain", temperature=temperature, seed=seed, max_tokens=1)
        for seed in range(RUNS)
    )
    check_each([(run.steps[0].tokens[0].id, expected) for run in runs])


@pytest.mark.parametrize("temperature", [0.4, 1.5])
def test_samples_follow_it_at_every_step_of_every_branch(temperature: float) -> None:
    ids = prompt(5)
    run = tempo_mlx.generate(
        loaded(), ids, decoder="sample", beam_width=256, temperature=temperature, threshold=0.01, max_tokens=2
    )
    assert len(run.paths) == 256
    first = Counter(path.token_ids[0] for path in run.paths)
    check(first, exact(ids, temperature, 0.01))
    after = {token: exact([*ids, token], temperature, 0.01) for token in first}
    check_each([(path.token_ids[1], after[path.token_ids[0]]) for path in run.paths])


@pytest.mark.parametrize("temperature", [0.4, 1.5])
def test_sampled_branches_follow_it_at_every_step_of_every_branch(temperature: float) -> None:
    """Every text keeps one child, drawn from those above the threshold; what is free goes to the best others."""
    ids, floor = prompt(5), 0.01
    begun: Counter[int] = Counter()
    drawn: list[list[tuple[int, int]]] = [
        [],
        [],
    ]  # of each branch: the token before, and the one drawn after it
    for seed in range(RUNS):
        run = decode(
            loaded(), ids, branches=2, branch_choice="sample", threshold=floor, temperature=temperature, seed=seed,
            max_tokens=2, merge_length=0,
        )  # fmt: skip
        first = {token.slot: token.id for token in run.steps[0].tokens}
        branches = {token.slot: token.branch for token in run.steps[0].tokens}
        begun[next(token.id for token in run.steps[0].tokens if token.branch == 0)] += 1
        for token in run.steps[1].tokens:
            (parent,) = (edge.slot for edge in token.parents)
            if token.branch is not None and token.branch == branches[parent]:
                drawn[token.branch].append((first[parent], token.id))
    check(begun, exact(ids, temperature, floor))
    after = {token: exact([*ids, token], temperature, floor) for pairs in drawn for token, _ in pairs}
    for pairs in drawn:
        assert len(pairs) > RUNS / 2
        check_each([(token, after[before]) for before, token in pairs])


def texts(seed: int, width: int) -> set[tuple[int, ...]]:
    run = tempo_mlx.generate(
        loaded(), prompt(4), decoder="sample", beam_width=width, seed=seed, threshold=0.0, max_tokens=12
    )
    return {path.token_ids for path in run.paths}


def test_no_sample_of_one_seed_is_a_sample_of_the_next() -> None:
    """As it would be if number and seed were added."""
    assert not texts(7, 4) & texts(8, 4)
    assert texts(7, 2) < texts(7, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"decoder": "plain", "temperature": 0},
        {"threshold": 0.2},
        {"branches": 1},
        {"decoder": "beam", "beam_width": 1},
    ],
)
def test_a_text_may_end_with_the_step_after_min_steps(settings: dict[str, Any]) -> None:
    """min_steps is how many steps come before; the next may be the end."""
    model, met = loaded(often=True), 0
    for seed in range(12):
        ids = prompt(seed)
        free = tempo_mlx.generate(model, ids, max_tokens=12, **settings)
        if free.finish_reason != "stop":
            continue
        before = len(free.steps) - 1
        met += before > 0
        same = tempo_mlx.generate(model, ids, max_tokens=12, min_steps=before, **settings)
        if all(token.slot is not None for step in free.steps[:-1] for token in step.tokens):
            assert same.steps == free.steps
        longer = tempo_mlx.generate(model, ids, max_tokens=12, min_steps=before + 1, **settings)
        assert len(longer.steps) > len(free.steps) or longer.finish_reason == "length"
        last = longer.steps[before].tokens
        assert not {token.id for token in last} & model.tokenizer.eos_ids
    assert met >= 3
