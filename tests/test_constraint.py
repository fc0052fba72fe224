"""Grammars: every finished text is of the grammar, whoever decodes it; runs verify, forged ones do not."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tempo_mlx.api import generate, score
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.constraint import make_constraint
from tempo_mlx.decode.control import Control
from tempo_mlx.decode.decoder import Setup
from tempo_mlx.decode.forced import RunsForced
from tempo_mlx.decode.tempo import plain
from tempo_mlx.errors import ConfigError, DeadEndError, TempoError
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import compare, decode_settings, tolerance_for, verify
from tempo_mlx.resolution import resolve
from tests.trees import loaded, prompt

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

from benchmarks.schemas import answers, cases, is_valid  # noqa: E402
from tempo_mlx.api import load  # noqa: E402

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"enum": ["x", "yy"]},
        "b": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
DECODERS: dict[str, dict[str, Any]] = {
    "plain": {"decoder": "plain", "temperature": 1.2},
    "greedy": {"decoder": "plain", "temperature": 0.0},
    "tree": {"branches": 3, "threshold": 0.01},
    "sample": {"decoder": "sample", "beam_width": 3, "top_p": 0.9},
    "beam": {"decoder": "beam", "beam_width": 3},
    "diverse-beam": {"decoder": "diverse-beam", "beam_width": 2},
    "mcts": {"decoder": "mcts", "mcts_simulations": 4, "mcts_depth": 2, "threshold": 0.02},
}


class Counting:
    """A model that says how many passes it made."""

    def __init__(self, model: Any) -> None:
        self.model, self.passes = model, 0
        self.architecture, self.info = model.architecture, model.info
        self.new_cache, self.embeddings = model.new_cache, model.embeddings

    def forward(self, *arguments: Any, **more: Any) -> Any:
        self.passes += 1
        return self.model.forward(*arguments, **more)


def made(name: str, **grammar: Any) -> Run:
    settings: dict[str, Any] = grammar or {"json_schema": SCHEMA}
    run = generate(loaded(), prompt(5), max_tokens=60, **DECODERS[name], **settings)
    return Run.from_json(run.to_json())


def finished(run: Run) -> list[str]:
    if run.is_lattice:
        return [run.final_text] if run.finish_reason == "stop" else []
    ends = loaded().tokenizer.eos_ids
    return [path.text for path in run.paths if path.token_ids[-1] in ends]


@pytest.mark.parametrize("name", DECODERS)
def test_finished_texts_are_of_the_schema_and_the_run_verifies(name: str) -> None:
    run, model = made(name), loaded()
    texts = finished(run)
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    result = verify(run, model)
    assert result.ok, result.findings
    assert all(step.masked is not None for step in run.steps)
    again = generate(model, run.prompt, decode_settings(run))
    assert compare(run, again, tolerance_for(model.model, run, decode_settings(run)), model.tokenizer).ok


@pytest.mark.parametrize("name", ["plain", "tree", "beam", "mcts"])
def test_a_file_whose_grammar_was_removed_or_changed_is_caught(name: str) -> None:
    run = made(name)
    for change in (
        {"json_schema": None},
        {"json_schema": '{"type": "object"}'},
        {"json_schema": '{"type": "array"}'},
    ):
        value = json.loads(run.to_json())
        value["config"].update(change)
        with suppress(TempoError):
            assert not verify(Run.from_json(json.dumps(value)), loaded()).ok
    value = json.loads(run.to_json())
    value["steps"][1]["masked"][0] = value["steps"][1]["masked"][0] / 2
    assert not verify(Run.from_json(json.dumps(value)), loaded()).ok


@pytest.mark.parametrize("name", ["plain", "tree", "sample"])
def test_other_grammars(name: str) -> None:
    for text in finished(made(name, regex="(ab|c){2,4}[0-9]")):
        assert re.fullmatch("(ab|c){2,4}[0-9]", text)
    words = ("yes", "no", 'or "so", é')
    found = finished(made(name, choices=words))
    assert found and set(found) <= set(words)
    for text in finished(made(name, grammar='start: "<" item+ ">"\nitem: "a" | "(" item ")"')):
        assert re.fullmatch(r"<[a()]+>", text) and text.count("(") == text.count(")")


def test_the_order_of_all_that_changes_a_distribution() -> None:
    """Bias, penalties, functions, mask, temperature, truncation: each in its place, computed here one by one.

    The penalty divides what the bias made positive; the function sees both, and what the mask takes away; top-k counts
    what the mask left, at the temperature.
    """
    model, size = loaded(), loaded().model.architecture.vocab_size
    given: dict[str, Any] = {
        "logit_bias": {7: 5.0},
        "repetition_penalty": 2.0,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    config = resolve({"decoder": "plain", "choices": ("ab", "ac", "xyz"), **given})
    constraint = make_constraint(config, model.tokenizer)
    seen = []

    def function(tokens: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append((tokens.tolist(), logits.copy()))
        return logits * np.float32(1.5)

    logits = np.random.default_rng(3).normal(size=(1, size)).astype(np.float32)
    control = Control(config, [3, 7], model.tokenizer.eos_ids, constraint, [function])
    found = control(logits, [[]])

    wanted = logits[0].copy()
    wanted[7] += 5.0
    wanted[[3, 7]] = np.where(wanted[[3, 7]] < 0, wanted[[3, 7]] * 2, wanted[[3, 7]] / 2)
    assert seen[0][0] == [3, 7]
    np.testing.assert_array_equal(seen[0][1][0], wanted)
    wanted = wanted * np.float32(1.5)
    constraint = make_constraint(config, model.tokenizer)
    assert constraint is not None
    allowed = constraint.allowed([[]])[0]
    assert 1 < allowed.sum() < 10 < size
    full = np.exp(wanted - wanted.max()) / np.exp(wanted - wanted.max()).sum()
    assert found.masked == pytest.approx((1 - full[allowed].sum(),), abs=1e-6)
    cold = np.where(allowed, np.exp((wanted - wanted[allowed].max()) / 0.5), 0.0)
    cold /= cold.sum()
    best = np.sort(cold)[::-1]
    cold[cold < best[int((np.cumsum(best) - best < 0.9).sum()) - 1]] = 0.0
    assert 0 < (cold > 0).sum() < allowed.sum()
    warm = np.sort(np.where(allowed, full, 0.0) / full[allowed].sum())[::-1]
    assert (cold > 0).sum() < (np.cumsum(warm) - warm < 0.9).sum()  # what top-p would have kept before
    np.testing.assert_allclose(np.exp(found.tempered[0]), cold / cold.sum(), atol=1e-6)
    np.testing.assert_allclose(np.exp(found.log_probs[0]), np.where(cold > 0, full, 0.0), atol=1e-6)


def test_choices_are_scored_exactly_and_what_is_no_choice_is_impossible() -> None:
    model, words = loaded(), ("yes", "no")
    run = generate(model, prompt(1), branches=8, threshold=0.0, merge_length=0, choices=words)
    texts = {path.text: path for path in run.paths}
    assert set(texts) == set(words)  # some of them spelled in several ways
    found = score(model, prompt(1), [path.token_ids for path in run.paths], choices=words)
    assert [s.log_prob for s in found] == pytest.approx([p.logprob for p in run.paths], abs=1e-4)
    for truncation in ({}, {"top_p": 0.9}):
        found = score(model, prompt(1), ["maybe", "no"], choices=words, **truncation)
        assert found[0].log_prob == -np.inf < found[1].log_prob


def test_mass_is_the_texts_and_what_the_grammar_took_away() -> None:
    """Every text of a grammar that has two, and what each step took away: nothing is lost, nothing counted twice."""
    model = loaded()
    run = generate(
        model, prompt(1), branches=4, threshold=0.0, merge_length=0, choices=("a", "b"), max_tokens=5
    )
    mass = sum(np.exp(path.logprob) for path in run.paths)
    first, second = run.steps
    assert first.masked is not None and second.masked is not None
    by_slot = dict(
        zip(sorted(t.slot for t in first.tokens if t.slot is not None), second.masked, strict=True)
    )
    kept = 1.0 - first.masked[0]
    lost = sum(kept * t.probability * by_slot[t.slot] for t in first.tokens if t.slot is not None)
    assert mass + first.masked[0] + lost == pytest.approx(1.0, abs=1e-5)


def test_forced_tokens_cost_no_pass_of_their_own() -> None:
    """And make no other run of it: the same tokens and numbers as row by row."""
    model, settings = loaded(), {"decoder": "plain", "json_schema": SCHEMA, "max_tokens": 40}
    counting = Counting(model.model)
    for temperature in (0.0, 1.0):
        counting.passes = 0
        run = generate(replace(model, model=counting), prompt(5), temperature=temperature, **settings)
        assert run.finish_reason == "stop" and counting.passes < len(run.steps) - 3
        decoder = plain(Setup(model.model, prompt(5), config := decode_settings(run), model.tokenizer.eos_ids,
                              constraint=make_constraint(config, model.tokenizer)))  # fmt: skip
        for step in run.steps:
            alone = decoder.advance()
            assert [t.id for t in alone.tokens] == [t.id for t in step.tokens]
            assert alone.tokens[0].probability == pytest.approx(step.tokens[0].probability, abs=1e-5)
            assert alone.masked == pytest.approx(step.masked, abs=1e-5)
        assert verify(run, model).ok


def test_a_text_that_goes_another_way_than_foretold_forgets_the_rows_ahead() -> None:
    model = loaded().model
    constraint = make_constraint(GenerateConfig(decoder="plain", regex="abcdef"), loaded().tokenizer)
    assert constraint is not None
    ids = prompt(6)
    around, cache = RunsForced(model, constraint, len(ids), 99), model.new_cache()
    around.forward(ids, range(len(ids)), None, cache, logits="last")
    a, other = (loaded().tokenizer.encode(text, add_special=False)[0] for text in "ax")
    constraint.ahead([[a]])
    around.forward([a], [len(ids)], None, cache)
    assert len(cache) == len(ids) + 6 and len(around.known) == 5
    constraint.forced = []
    found = around.forward([other], [len(ids) + 1], None, cache).logits
    alone = model.forward([*ids, a, other], range(len(ids) + 2), None, model.new_cache()).logits
    assert found is not None and alone is not None
    assert len(cache) == len(ids) + 2 and np.abs(found[0] - alone[-1]).max() < 1e-4


def test_a_text_ends_where_the_grammar_may_and_nowhere_else() -> None:
    tokenizer = loaded().tokenizer
    constraint = make_constraint(GenerateConfig(decoder="plain", regex="ab?"), tokenizer)
    assert constraint is not None
    a, b = (tokenizer.encode(text, add_special=False)[0] for text in "ab")
    ends = sorted(tokenizer.eos_ids)
    constraint.ahead([[]])
    assert np.flatnonzero(constraint.allowed([[]])[0]).tolist() == [a]
    after, last = constraint.allowed([[a], [a, b]])
    assert after[b] and after[ends].all() and after.sum() == 1 + len(ends)
    assert np.flatnonzero(last).tolist() == ends
    with pytest.raises(DeadEndError, match="nothing follow token 1"):
        constraint.allowed([[b]])
    assert not constraint.allowed([[b]], any_text=True).any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"regex": "("}, "regex is no grammar"),
        ({"json_schema": "{"}, "json_schema is no grammar"),
        ({"json_schema": {"type": "nothing"}}, "json_schema is no grammar"),
        ({"grammar": "begin: 'a'"}, "grammar is no grammar"),
        ({"regex": "a", "stop": "b"}, "stop contradicts regex"),
    ],
)
def test_what_is_no_grammar_is_one_sentence(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        generate(loaded(), prompt(0), **settings)
    assert str(caught.value).count("\n") == 0


@pytest.mark.slow
def test_some_of_the_schemas_of_the_benchmark_on_the_real_model() -> None:
    """All 60, two models: python -m benchmarks.schemas."""
    model = load()
    for case in cases()[8::13]:
        for arm in ({"decoder": "plain", "temperature": 0.0}, {"branches": 3, "threshold": 0.02}):
            texts = [text for text in answers(model, case, 96, arm) if text is not None]
            assert texts and all(is_valid(text, case["schema"]) for text in texts), case["ask"]
