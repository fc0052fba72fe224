"""Samples that share no luck, and samples without repeats: what they are of, against all texts there are."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest

from tempo_mlx.api import generate
from tempo_mlx.decode.decoder import Setup
from tempo_mlx.decode.sampling import Arithmetic, StochasticBeam, conditioned, samples, weights_of
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify
from tempo_mlx.resolution import resolve
from tests.small import PROMPT, Ids, after, small
from tests.trees import loaded, prompt

LONG = 3  # tokens: of 8, so that there are some 400 texts
COUNT = 6
RUNS = 2000
WAYS: dict[str, dict[str, Any]] = {
    "plain": {}, "cold": {"temperature": 0.7}, "nucleus": {"temperature": 1.3, "top_p": 0.8},
}  # fmt: skip


@cache
def truth(way: str) -> dict[Ids, float]:
    """The probability of every text, tempered and truncated by hand."""
    settings = WAYS[way]
    known: dict[Ids, np.ndarray] = {}
    for text, log_probs in after(8).items():
        mass = np.exp(np.array(log_probs) / settings.get("temperature", 1.0))
        mass /= mass.sum()
        if "top_p" in settings:
            order = np.argsort(-mass)
            kept = order[: int((np.cumsum(mass[order]) < settings["top_p"]).sum()) + 1]
            cut = np.zeros(8)
            cut[kept] = mass[kept]
            mass = cut / cut.sum()
        known[text] = mass
    found: dict[Ids, float] = {}

    def go(text: Ids, mass: float) -> None:
        if len(text) == LONG or (text and text[-1] == 7):
            found[text] = mass
            return
        for token in np.flatnonzero(known[text]).tolist():
            go((*text, token), mass * float(known[text][token]))

    go((), 1.0)
    return found


@cache
def drawn(kind: str, way: str) -> tuple[list[list[Ids]], list[list[float]]]:
    """The texts of many runs, each with another seed, and their weights."""
    texts, weights = [], []
    settings = {
        "decoder": "sample",
        "sampling": kind,
        "beam_width": COUNT,
        "threshold": 0.0,
        "max_tokens": LONG,
    }
    for seed in range(RUNS if (kind, way) == ("stochastic-beam", "nucleus") else RUNS // 3):
        config = resolve({**settings, **WAYS[way], "seed": seed})
        tree = samples(Setup(small(8).model, PROMPT, config, eos_ids=(7,)))
        for _ in range(LONG):
            tree.advance()
            if tree.finished:
                break
        texts.append([reading.token_ids for reading in tree.readings()])
        said = tree.statistics(str) or {}
        weights.append(said.get("weights", [1.0 / COUNT] * COUNT))
    return texts, weights


@pytest.mark.parametrize("way", WAYS)
def test_every_arithmetic_sample_is_an_ordinary_one(way: str) -> None:
    """Chi-square of text number i over the runs, for the first and another, in bins of at least 5."""
    expected = truth(way)
    texts, _ = drawn("arithmetic", way)
    for number in (0, COUNT - 1):
        counts = Counter(run[number] for run in texts)
        assert set(counts) <= set(expected)
        common = [text for text, mass in expected.items() if mass * len(texts) >= 5.0]
        rest = len(texts) - sum(counts[text] for text in common)
        pairs = [(counts[text], expected[text] * len(texts)) for text in common]
        pairs.append((rest, len(texts) - sum(pair[1] for pair in pairs)))
        chi = sum((seen - due) ** 2 / due for seen, due in pairs if due > 0.0)
        freedom = len(pairs) - 1
        assert chi < freedom + 4.0 * math.sqrt(2.0 * freedom), (chi, freedom)


def test_arithmetic_samples_are_spread() -> None:
    """Of the first token each is drawn as often as its probability says, but for less than one."""
    first = np.exp(np.array(after(8)[()]))
    texts, _ = drawn("arithmetic", "plain")
    for run in texts[:200]:
        counts = Counter(text[0] for text in run)
        for token, mass in enumerate(first):
            assert abs(counts[token] - COUNT * mass) < 1.0 + 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_samples_without_repeats_estimate_without_bias(way: str) -> None:
    """The mean of the estimates of the texts that begin with each token, within three standard errors."""
    expected = truth(way)
    texts, weights = drawn("stochastic-beam", way)
    assert all(len(set(run)) == len(run) == min(COUNT, len(expected)) for run in texts)
    for token in range(8):
        true = sum(mass for text, mass in expected.items() if text[0] == token)
        found = np.array([
            sum(w for text, w in zip(run, each, strict=True) if text[0] == token)
            for run, each in zip(texts, weights, strict=True)
        ])  # fmt: skip
        error = found.std(ddof=1) / math.sqrt(len(found))
        assert abs(found.mean() - true) <= 3.0 * error + 1e-5, (token, found.mean(), true, error)


def test_the_first_without_repeats_is_an_ordinary_sample() -> None:
    """The text of the greatest noise has its probability; any text is drawn more often, and more often the likelier."""
    expected = truth("plain")
    texts, _ = drawn("stochastic-beam", "plain")
    counts = Counter(text for run in texts for text in run)
    best = sorted(expected, key=lambda text: -expected[text])[:5]
    for text in best:
        share = counts[text] / len(texts)
        assert expected[text] < share <= 1.0
    assert counts[best[0]] > counts[best[4]]


def test_noise_given_its_greatest() -> None:
    noisy = np.array([0.3, -1.0, 2.0, 1.9999999])
    found = conditioned(noisy, -0.5)
    assert found.max() == found[2] == -0.5 and (np.argsort(found) == np.argsort(noisy)).all()
    assert weights_of([math.log(0.3)], -math.inf) == pytest.approx([0.3])
    assert weights_of([math.log(0.3)], 2.0)[0] == pytest.approx(0.3 / (1 - math.exp(-0.3 / math.exp(2.0))))


def test_of_one_row_too_the_first_that_is_left_out_bounds_the_weights() -> None:
    totals = []
    for seed in range(400):
        settings = {"decoder": "sample", "sampling": "stochastic-beam", "beam_width": 2, "max_tokens": 1}
        config = resolve({**settings, "threshold": 0.0, "seed": seed})
        tree = samples(Setup(small(8).model, PROMPT, config, eos_ids=(7,)))
        tree.advance()
        totals.append(sum((tree.statistics(str) or {})["weights"]))
    assert abs(np.mean(totals) - 1.0) < 3.0 * np.std(totals) / math.sqrt(len(totals))


def test_noise_is_kept_of_what_may_go_on_and_not_of_the_whole_vocabulary() -> None:
    config = resolve(
        {
            "decoder": "sample",
            "sampling": "stochastic-beam",
            "beam_width": 2,
            "threshold": 0.0,
            "max_tokens": 8,
        }
    )
    tree = samples(Setup(loaded().model, prompt(1), config))
    for _ in range(8):
        tree.advance()
    assert isinstance(tree.rule, StochasticBeam) and len(tree.rule.noisy) <= 1 + 8 * 2 * 3


@pytest.mark.parametrize("kind", ["arithmetic", "stochastic-beam"])
def test_texts_are_exact_share_rows_and_can_be_verified(kind: str) -> None:
    settings: dict[str, Any] = {
        "decoder": "sample",
        "beam_width": 6,
        "threshold": 0.0,
        "max_tokens": 12,
        "top_p": 0.9,
    }
    for seed in range(3):
        run = generate(loaded(often=True), prompt(seed), sampling=kind, seed=seed, **settings)
        single = generate(loaded(often=True), prompt(seed), sampling="independent", seed=seed, **settings)
        assert len(run.paths) == 6
        assert len(run.steps[0].tokens) <= len(single.steps[0].tokens)
        found = verify(run, loaded(often=True))
        assert found.ok, found.findings
        assert Run.from_json(run.to_json()) == run
    assert (run.tree is None) == (kind == "arithmetic")


@pytest.mark.parametrize("what", ["weight", "bound", "left out", "given twice", "another text"])
def test_verify_finds_a_forgery(what: str) -> None:
    kind = "arithmetic" if what == "given twice" else "stochastic-beam"
    settings: dict[str, Any] = {"decoder": "sample", "beam_width": 5, "threshold": 0.0, "max_tokens": 10}
    run = generate(loaded(often=True), prompt(1), sampling=kind, **settings)
    value = json.loads(run.to_json())
    if what == "weight":
        value["tree"]["weights"][0] *= 1.2
    elif what == "bound":
        value["tree"]["bound"] += 0.1
    elif what == "left out":
        value["tree"]["weights"].pop()
        value["paths"].pop()
    elif what == "given twice":
        value["paths"].append(value["paths"][0])
    else:
        value["paths"][1] = value["paths"][0]
    assert not verify(Run.from_json(json.dumps(value)), loaded(often=True)).ok


def test_rules_know_nothing_of_texts_that_are_not_theirs() -> None:
    config = resolve({"decoder": "sample", "sampling": "arithmetic"})
    setup = Setup(small(8).model, PROMPT, config, eos_ids=(7,))
    from tempo_mlx.decode.tree import Node

    stranger = Node(3, -1.0, 1, 0, Node(-1, 0.0, 0, 0))
    assert Arithmetic(setup).of(stranger) == [] and StochasticBeam(setup).of(stranger) == (-1.0, -math.inf)
