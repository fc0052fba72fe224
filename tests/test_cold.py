"""Runs whose choice is forced where the model gives it next to nothing: cold, with min-steps or a thinking budget."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import tempo_mlx
from tempo_mlx.decode.combine import COMBINE_RULES, combine, combine_without, edges, shares
from tempo_mlx.model import device
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify
from tests.trees import loaded, prompt

DECODERS: dict[str, dict[str, Any]] = {
    "superposed": {"threshold": 0.0},
    "superposed of one row": {"threshold": 0.0, "combine": "product", "max_parallel_tokens": 3},
    "min-p": {"selection": "min-p", "min_p": 0.01},
    "own": {"select": lambda probabilities, step: [int(probabilities.argmax())]},
    "plain": {"decoder": "plain"},
    "sample": {"decoder": "sample", "beam_width": 2},
    "branches": {"branches": 2},
    "sampled branches": {"branches": 2, "branch_choice": "sample"},
}
STEPS = 8


def best_by_log(run: Run, ids: list[int], excluded: frozenset[int]) -> None:
    """Of a run along one text: where all but excluded tokens have underflowed, the best of them was chosen."""
    text = [step.tokens[0].id for step in run.steps]
    model = loaded("llama", "mlx", True).model
    logits = model.forward([*ids, *text], range(len(ids) + len(text)), None, model.new_cache()).logits
    assert logits is not None
    for place, step in enumerate(run.steps):
        row = logits[len(ids) - 1 + place].copy()
        row[list(excluded)] = -np.inf
        if step.tokens[0].probability == 0.0:
            assert row[step.tokens[0].id] >= row.max() - 1e-3


@pytest.mark.parametrize("temperature", [1e-38, 1e-3, 0.02])
@pytest.mark.parametrize("settings", DECODERS.values(), ids=DECODERS)
def test_the_best_eligible_token_is_chosen_however_improbable(
    settings: dict[str, Any], temperature: float
) -> None:
    model, underflowed = loaded("llama", "mlx", True), 0
    for seed in range(6):
        ids = prompt(seed)
        with warnings.catch_warnings(), np.errstate(divide="raise", invalid="raise"):
            warnings.simplefilter("error", RuntimeWarning)
            run = tempo_mlx.generate(
                model, ids, temperature=temperature, min_steps=STEPS, max_tokens=STEPS, **settings
            )
        assert len(run.steps) == STEPS
        tokens = [token for step in run.steps for token in step.tokens]
        assert not {token.id for token in tokens} & model.tokenizer.eos_ids
        assert all(0.0 < token.weight <= 1.0 for token in tokens if token.weight is not None)
        underflowed += any(step.tokens[0].probability < 1e-38 for step in run.steps)
        if all(len(step.tokens) == 1 for step in run.steps):
            best_by_log(run, ids, model.tokenizer.eos_ids)
        if temperature > 1e-4:  # below, the last bit of a logit decides
            assert verify(run, model).max_difference < 1e-4 / min(temperature, 1.0)
    assert underflowed or temperature > 1e-3


@pytest.mark.parametrize("name", ["superposed", "min-p", "plain"])
def test_a_device_that_chooses_does_so_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the tokens that come back from it is excluded."""
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    test_the_best_eligible_token_is_chosen_however_improbable(DECODERS[name], 1e-3)


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"decoder": "plain"}, {"branches": 2}])
def test_a_thinking_budget_closes_a_cold_run(settings: dict[str, Any]) -> None:
    model = loaded("llama", "mlx")
    run = tempo_mlx.generate(
        model,
        "Why?",
        temperature=0.02,
        max_tokens=24,
        min_steps=24,
        enable_thinking=True,
        thinking_budget=4,
        **settings,
    )
    closing = model.tokenizer.encode("\n</think>\n\n", add_special=False)
    text = [step.tokens[0].id for step in run.steps]
    if model.tokenizer.decode(text[:4]).lstrip().startswith("<think>"):
        assert text[4 : 4 + len(closing)] == closing
    assert all(token.weight > 0 for step in run.steps for token in step.tokens if token.weight is not None)


@pytest.mark.parametrize("rule", COMBINE_RULES)
def test_combining_without_tokens_keeps_the_proportions_of_the_others(rule: str) -> None:
    random = np.random.default_rng(3)
    log_probs = np.log(random.dirichlet(np.ones(9), 3)).astype(np.float32)
    weights = np.array([0.2, 0.3, 0.5])
    whole, left = combine(log_probs, weights, rule), combine_without(log_probs, weights, rule, {2, 5})
    kept = [0, 1, 3, 4, 6, 7, 8]
    assert left[2] == left[5] == 0.0
    np.testing.assert_allclose(left[kept] / left[kept].sum(), whole[kept] / whole[kept].sum(), rtol=1e-5)
    far = log_probs.copy()
    far[:, kept] -= 5000.0
    np.testing.assert_allclose(combine_without(far, weights, rule, {2, 5})[kept], left[kept], rtol=1e-3)


def test_shares_of_what_has_underflowed_are_equal() -> None:
    assert shares([0.2, 0.6]).tolist() == pytest.approx([0.25, 0.75])
    assert shares([0.0]).tolist() == [1.0]
    assert shares([0.0, 0.0]).tolist() == [0.5, 0.5]
    assert shares([]).tolist() == []


def test_a_token_that_no_row_can_say_has_the_rows_weights() -> None:
    log_probs = np.array([[0.0, -np.inf], [-1.0, -np.inf]], np.float32)
    posterior, forward = edges(log_probs, [0.25, 0.75], [1, 0])
    assert posterior[:, 0].tolist() == pytest.approx([0.25, 0.75]) and forward[:, 0].tolist() == [0.0, 0.0]
    assert posterior[:, 1].sum() == pytest.approx(1.0)
