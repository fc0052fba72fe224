"""The baselines on the same tree: beam search as transformers' own, diverse beams, independent samples."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from tempo_mlx.api import generate
from tempo_mlx.decode.beam import DiverseBeam
from tempo_mlx.decode.selection import select
from tempo_mlx.decode.tree import Frontier, Node
from tempo_mlx.report.verify import verify
from tests.trees import decode, loaded, prompt, reference, removals, teacher, torch


def transformers_beam(ids: list[int], eos: frozenset[int], width: int, steps: int, **rest: Any) -> list[Any]:
    """(token ids up to and with the first EOS, score) of each returned sequence, best first."""
    with torch.inference_mode():
        out = reference("llama").generate(
            torch.tensor([ids]), num_beams=width, num_return_sequences=width, max_new_tokens=steps, do_sample=False,
            return_dict_in_generate=True, output_scores=True, eos_token_id=sorted(eos), pad_token_id=0, **rest,
        )  # fmt: skip
    result = []
    for sequence, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        new = sequence[len(ids) :]
        end = next((index + 1 for index, token in enumerate(new) if token in eos), len(new))
        result.append((tuple(new[:end]), score))
    return result


@pytest.mark.parametrize("often", [False, True])
@pytest.mark.parametrize("width", [2, 4, 5])
def test_beam_search_equals_transformers(width: int, often: bool) -> None:
    model = loaded(often=often)
    reasons: Counter[str] = Counter()
    for seed in range(10):
        ids, steps = prompt(seed, 4 + seed), 10 + 7 * seed
        run = decode(model, ids, decoder="beam", beam_width=width, max_tokens=steps)
        expected = transformers_beam(ids, model.tokenizer.eos_ids, width, steps)
        assert [path.token_ids for path in run.paths] == [tokens for tokens, _ in expected]
        scores = [path.logprob / len(path.token_ids) for path in run.paths]
        assert scores == pytest.approx([score for _, score in expected], abs=1e-5)
        reasons[run.finish_reason] += 1
    assert len(reasons) == 2 if often else reasons["length"] >= 8  # both ways to end were met


def test_beam_search_with_a_minimum_length_equals_transformers() -> None:
    model = loaded(often=True)
    for seed in range(3):
        run = decode(model, prompt(seed), decoder="beam", beam_width=3, max_tokens=14, min_steps=6)
        expected = transformers_beam(prompt(seed), model.tokenizer.eos_ids, 3, 14, min_new_tokens=6)
        assert [path.token_ids for path in run.paths] == [tokens for tokens, _ in expected]


def test_rows_that_lose_their_place_are_dropped_and_say_why() -> None:
    run = decode(loaded(), prompt(1), decoder="beam", beam_width=4, max_tokens=16)
    assert Counter(removals(run))["beam"] > 5
    for token in (token for step in run.steps for token in step.tokens):
        if token.removed_why is not None:
            assert token.removed_why.score < token.removed_why.threshold
    assert verify(run, loaded()).max_difference < 1e-4


def test_diverse_beams_take_turns_and_pay_for_tokens_already_taken() -> None:
    model, ids, width, strength = loaded(often=True), prompt(2), 4, 1.5
    run = decode(
        model, ids, decoder="diverse-beam", beam_width=width, diversity_strength=strength, max_tokens=9
    )
    eos = model.tokenizer.eos_ids
    texts: list[list[int]] = [[] for _ in range(width)]
    for _ in range(9):
        taken: Counter[int] = Counter()
        for text in texts:
            if text and text[-1] in eos:
                continue
            with torch.inference_mode():
                logits = reference("llama")(torch.tensor([[*ids, *text]])).logits[0, -1].double()
            scores = torch.log_softmax(logits, -1)
            for token, times in taken.items():
                scores[token] -= strength * times
            token = int(scores.argmax())
            taken[token] += 1
            text.append(token)
    assert {path.token_ids for path in run.paths} == {tuple(text) for text in texts}
    assert verify(run, model).max_difference < 1e-4


def test_diverse_beams_without_a_penalty_are_all_greedy() -> None:
    run = decode(
        loaded(), prompt(3), decoder="diverse-beam", beam_width=3, diversity_strength=0.0, max_tokens=8
    )
    greedy = generate(loaded(), prompt(3), decoder="plain", temperature=0, max_tokens=8)
    assert {path.token_ids for path in run.paths} == {tuple(step.tokens[0].id for step in greedy.steps)}


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_samples_are_exact_and_each_has_its_own_seed(backend: str) -> None:
    settings: dict[str, Any] = {
        "decoder": "sample", "selection": "top-p", "top_p": 0.8, "temperature": 0.7, "max_tokens": 14,
    }  # fmt: skip
    model, ids = loaded(backend=backend, often=True), prompt(4)
    five = decode(model, ids, beam_width=5, **settings)
    three = decode(model, ids, beam_width=3, **settings)
    assert {path.token_ids for path in three.paths} < {path.token_ids for path in five.paths}
    assert five.steps != decode(model, ids, beam_width=5, seed=43, **settings).steps
    assert five.steps == decode(model, ids, beam_width=5, **settings).steps
    for path in five.paths:
        assert path.logprob == pytest.approx(
            sum(teacher("llama", ids, path.token_ids)), abs=1e-4 * len(path.token_ids)
        )
    assert verify(five, model).max_difference < 1e-4


@pytest.mark.parametrize(
    "rule", [{"selection": "top-p", "top_p": 0.5}, {"selection": "min-p", "min_p": 0.5}, {"threshold": 0.03}]
)
def test_samples_come_from_the_selected_tokens_by_their_probability(rule: dict[str, Any]) -> None:
    ids = prompt(5)
    run = generate(loaded(), ids, decoder="sample", beam_width=256, max_tokens=1, **rule)
    logits = (
        loaded().model.forward(ids, range(len(ids)), None, loaded().model.new_cache(), logits="last").logits
    )
    assert logits is not None
    p = np.exp(logits[0].astype(np.float64) - logits.max())
    p /= p.sum()
    allowed = select(p, rule=rule.get("selection", "threshold"), value=[*rule.values()][-1], max_width=320)
    counts = Counter(token.id for token in run.steps[0].tokens)
    assert set(counts) <= set(allowed.tolist()) and len(allowed) > 2
    expected = p[allowed] / p[allowed].sum() * 256
    observed = np.array([counts[token] for token in allowed.tolist()])
    assert float(((observed - expected) ** 2 / expected).sum()) < 3 * len(allowed) + 10  # chi-squared


def test_samples_at_temperature_zero_are_greedy() -> None:
    run = generate(loaded(), prompt(6), decoder="sample", beam_width=3, temperature=0, max_tokens=6)
    greedy = generate(loaded(), prompt(6), decoder="plain", temperature=0, max_tokens=6)
    assert {path.token_ids for path in run.paths} == {tuple(step.tokens[0].id for step in greedy.steps)}


def test_a_token_costs_the_more_the_more_groups_took_it() -> None:
    log_probs = np.array([[-0.3, -1.8, -9.0]], np.float32)
    root = Node(-1, 0.0, 0, 0)
    frontier = Frontier(log_probs, log_probs, [root], [False], [], lambda node, token: False)
    chosen = DiverseBeam(4, 1.0)(frontier).children
    assert [child.token for child in chosen] == [0, 0, 1, 0]  # 0 costs 1 and then 2: more than 1 is behind
