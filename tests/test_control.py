"""Every control against mlx-lm's or transformers' own, in runs that verify; and forged files that it catches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tempo_mlx.api import generate, score
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode import control as controls
from tempo_mlx.decode.control import Control
from tempo_mlx.errors import ConfigError, TempoError
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import compare, decode_settings, tolerance_for, verify
from tests.trees import loaded, prompt

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
lm = pytest.importorskip("mlx_lm.sample_utils")

V = 320


def rows(seed: int, count: int = 1, spread: float = 3.0) -> Any:
    """Logits (count, V)."""
    return np.random.default_rng(seed).normal(0, spread, (count, V)).astype(np.float32)


def control(prompt_ids: Sequence[int] = (5,), **settings: Any) -> Control:
    return Control(GenerateConfig(**{"decoder": "plain", **settings}), prompt_ids)


# -- one row


@pytest.mark.parametrize("seed", range(5))
def test_bias_and_penalties_are_mlx_lms_in_its_order(seed: int) -> None:
    from tempo_mlx.mlx import mx

    given = {
        "repetition_penalty": 1.3, "repetition_context_size": 7, "presence_penalty": 0.4,
        "presence_context_size": 5, "frequency_penalty": 0.3, "frequency_context_size": 6,
    }  # fmt: skip
    bias = {3: 2.5, 17: -4.0}
    ids = np.random.default_rng(seed).integers(0, 12, 15)
    logits = rows(seed)
    expected = mx.array(logits)
    for processor in lm.make_logits_processors(bias, **given):
        expected = processor(mx.array(ids), expected)
    expected = expected - mx.logsumexp(expected, axis=-1, keepdims=True)
    found = control(ids[:9].tolist(), **given, logit_bias=[f"{k}={v}" for k, v in bias.items()])(
        logits, [ids[9:].tolist()]
    )
    assert np.abs(found.log_probs - np.array(expected)).max() < 1e-5
    assert np.abs(rows(seed) - logits).max() == 0  # what it was given is left alone


WARPERS: Mapping[str, tuple[float, Callable[[float], Any]]] = {
    "top_p": (0.7, lambda value: transformers.TopPLogitsWarper(value)),
    "top_k": (6, lambda value: transformers.TopKLogitsWarper(value)),
    "min_p": (0.1, lambda value: transformers.MinPLogitsWarper(value)),
    "typical_p": (0.6, lambda value: transformers.TypicalLogitsWarper(value)),
    "eta_cutoff": (0.02, lambda value: transformers.EtaLogitsWarper(value)),
}  # fmt: skip


def warped(logits: Any, temperature: float, names: Sequence[str]) -> Any:
    scores = torch.tensor(logits) / temperature
    for name in names:
        value, make = WARPERS[name]
        scores = make(value)(None, scores)
    return scores.softmax(-1).numpy()


@pytest.mark.parametrize("name", WARPERS)
def test_a_truncation_is_transformers(name: str) -> None:
    for seed in range(20):
        logits = rows(seed, 2, spread=1.0 + seed % 4)
        found = control(temperature=1.5, **{name: WARPERS[name][0]})(logits)
        assert np.abs(np.exp(found.tempered) - warped(logits, 1.5, [name])).max() < 1e-5
        kept = np.isfinite(found.tempered)
        assert (np.isfinite(found.log_probs) == kept).all() and 0 < kept.sum() < kept.size
        plain = control(temperature=1.5)(logits)
        assert (
            np.abs(found.log_probs[kept] - plain.log_probs[kept]).max() < 1e-6
        )  # texts are as probable as before


def test_truncations_follow_one_another_in_the_order_that_is_written() -> None:
    order = ["top_p", "top_k", "min_p", "typical_p", "eta_cutoff"]
    settings = {name: WARPERS[name][0] for name in order}
    elsewhere = 0
    for seed in range(20):
        logits = rows(seed, spread=1.5)
        found = np.exp(control(temperature=1.5, **settings)(logits).tempered)
        assert np.abs(found - warped(logits, 1.5, order)).max() < 1e-5
        elsewhere += np.abs(found - warped(logits, 1.5, order[::-1])).max() > 1e-3
    assert elsewhere > 5


def test_temperature_comes_after_penalties_and_before_truncation() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    found = np.exp(control([0], presence_penalty=1.0, temperature=2.0, top_p=0.6)(logits, [[]]).tempered)[0]
    mass = np.array([0.5 / np.e, 0.3, 0.15, 0.05]) ** 0.5
    mass /= mass.sum()  # 0.27 0.34 0.24 0.14
    assert found[2:].max() == 0 and np.abs(found[:2] - mass[:2] / mass[:2].sum()).max() < 1e-6


def test_a_text_that_may_not_end_yet_keeps_a_token_under_any_truncation() -> None:
    logits = rows(0)
    best = int(logits.argmax())
    config = GenerateConfig(decoder="plain", top_k=1, min_steps=2)
    found = Control(config, [5], [best])(logits, [[7]])
    assert found.tempered[0].argmax() == np.argsort(logits[0])[-2]
    assert Control(config, [5], [best])(logits, [[7, 7]]).tempered[0].argmax() == best


# -- runs

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "bias": {"logit_bias": {3: 4.0, 9: 3.0}},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.5, "presence_context_size": 6},
    "frequency": {"frequency_penalty": 1.2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_text_is_mlx_lms(name: str) -> None:
    """Step by step on the twin's own logits, through mlx-lm's processors."""
    from tempo_mlx.mlx import mx

    model, processors = loaded(), lm.make_logits_processors(**SETTINGS[name])
    for seed in range(20):
        ids = prompt(seed)
        run = generate(model, ids, decoder="plain", temperature=0.0, max_tokens=8, **SETTINGS[name])
        cache, tokens = model.model.new_cache(), list(ids)
        new = ids
        for step in run.steps:
            out = model.model.forward(
                new, range(len(tokens) - len(new), len(tokens)), None, cache, logits="last"
            )
            logits = mx.array(out.logits)
            for processor in processors:
                logits = processor(mx.array(tokens), logits)
            probabilities = np.array(mx.softmax(logits, axis=-1))[0]
            assert step.tokens[0].id == int(probabilities.argmax())
            assert abs(step.tokens[0].probability - probabilities.max()) < 1e-5
            new = [step.tokens[0].id]
            tokens += new


MANY = {"logit_bias": {3: 2.0, 40: -5.0}, "repetition_penalty": 1.3, "frequency_penalty": 0.2}
CUT = {"top_p": 0.3, "top_k": 20, "min_p": 0.02}
RUNS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"decoder": "plain", "temperature": 0.9, **MANY, **CUT, "typical_p": 0.9, "eta_cutoff": 1e-3},
    "greedy": {"decoder": "plain", "temperature": 0.0, **MANY},
    "tree": {"branches": 3, "threshold": 0.02, "min_steps": 4, **MANY, **CUT},
    "drawn": {"branches": 3, "branch_choice": "sample", "threshold": 0.0, **MANY, **CUT},
    "sample": {"decoder": "sample", "beam_width": 2, "temperature": 1.3, **MANY, **CUT},
    "beam": {"decoder": "beam", "beam_width": 3, **MANY, "top_k": 4},
    "diverse-beam": {"decoder": "diverse-beam", "beam_width": 3, **MANY},
    "mcts": {"decoder": "mcts", "mcts_simulations": 6, "mcts_depth": 2, "threshold": 0.02, **MANY, "min_p": 0.05},
    "superposed": {"threshold": 0.05, "logit_bias": MANY["logit_bias"], "typical_p": 0.9, "paths": 2},
    "nucleus": {"top_p": 0.5, "top_k": 12, "logit_bias": MANY["logit_bias"]},
}  # fmt: skip


def made(name: str, **more: Any) -> Run:
    run = generate(loaded(often=True), prompt(3), max_tokens=8, **RUNS[name], **more)
    return Run.from_json(run.to_json())


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_controls_verifies_and_decodes_again(name: str) -> None:
    run, model = made(name), loaded(often=True)
    result = verify(run, model)
    assert result.ok, result.findings
    again = generate(model, run.prompt, decode_settings(run))
    assert compare(run, again, tolerance_for(model.model, run, decode_settings(run)), model.tokenizer).ok


FORGED: Sequence[tuple[str, Mapping[str, Any]]] = [
    ("greedy", {"logit_bias": []}),
    ("greedy", {"logit_bias": ["3=2.5", "40=-5.0"]}),
    ("greedy", {"repetition_penalty": 1.0}),
    ("greedy", {"repetition_penalty": 1.4}),
    ("greedy", {"frequency_penalty": 0.0}),
    ("greedy", {"presence_penalty": 0.5}),
    ("greedy", {"repetition_context_size": 2}),
    ("plain", {"top_p": None}),
    ("plain", {"top_p": 0.25}),
    ("plain", {"top_k": 3}),
    ("drawn", {"top_p": None}),
    ("drawn", {"repetition_penalty": 1.0}),
    ("sample", {"logit_bias": []}),
    ("sample", {"top_k": 2}),
    ("tree", {"repetition_penalty": 1.0}),
    ("tree", {"top_k": 1}),
    ("beam", {"logit_bias": []}),
    ("beam", {"frequency_penalty": 1.0}),
    ("diverse-beam", {"repetition_penalty": 1.0}),
    ("mcts", {"frequency_penalty": 0.0}),
    ("mcts", {"min_p": None}),
    ("superposed", {"logit_bias": []}),
    ("superposed", {"typical_p": None}),
]


@pytest.mark.parametrize(("name", "changes"), FORGED)
def test_a_file_with_a_control_removed_or_changed_is_caught(name: str, changes: Mapping[str, Any]) -> None:
    value = json.loads(made(name).to_json())
    value["config"].update(changes)
    with suppress(TempoError):
        assert not verify(Run.from_json(json.dumps(value)), loaded(often=True)).ok


def test_what_reads_one_text_is_refused_for_a_parallel_set() -> None:
    for setting in ({"repetition_penalty": 1.1}, {"choices": ("a", "b")}):
        with pytest.raises(ConfigError, match="superposed decoder; leave it out, or choose --decoder plain"):
            generate(loaded(), prompt(0), decoder="superposed", **setting)
    with pytest.raises(ConfigError, match="logit_bias names token 99999"):
        generate(loaded(), prompt(0), logit_bias={99999: 1})


# -- functions of the caller's own


def doubled(tokens: Any, logits: Any) -> Any:
    """What was said last is said again."""
    logits[:, tokens[-1]] += 2.0
    return logits


def test_a_processor_is_named_in_the_file_and_asked_for() -> None:
    model = loaded(often=True)
    run = generate(
        model, prompt(1), decoder="plain", temperature=0.0, max_tokens=6, logits_processors=[doubled]
    )
    assert run.custom is not None and run.custom["logits_processors"].name == "doubled"
    assert run.custom["logits_processors"].sha256 is not None
    assert verify(run, model, logits_processors=[doubled]).ok
    with pytest.raises(ConfigError, match="doubled"):
        verify(run, model)
    with pytest.raises(ConfigError, match="doubled"):
        verify(run, model, logits_processors=[lambda tokens, logits: logits])
    with pytest.raises(ConfigError, match="must return as many logits"):
        generate(model, prompt(1), decoder="plain", logits_processors=[lambda tokens, logits: logits[0, :3]])
    with pytest.raises(ConfigError, match="superposed"):
        generate(model, prompt(1), logits_processors=[doubled])


@pytest.mark.parametrize("decoder", ["plain", "beam", "tree", "enumerate"])
def test_functions_that_leave_only_the_end_too_early(decoder: str) -> None:
    model = loaded()

    def ends(tokens: Any, logits: Any) -> Any:
        gone = np.full_like(logits, -np.inf)
        gone[..., list(model.tokenizer.eos_ids)] = 0.0
        return gone

    own: dict[str, Any] = {"decoder": decoder, "max_tokens": 4, "logits_processors": [ends]}
    assert generate(model, "Hello", **own).finish_reason == "stop"
    with pytest.raises(ConfigError, match="leave min_steps out"):
        generate(model, "Hello", min_steps=2, **own)


def test_an_mlx_lm_processor_can_be_given_as_it_is() -> None:
    model, settings = loaded(), {"decoder": "plain", "temperature": 0.0, "max_tokens": 6}
    own = generate(model, prompt(2), **settings, presence_penalty=1.5)
    theirs = generate(model, prompt(2), **settings, logits_processors=[lm.make_presence_penalty(1.5)])
    assert own.final_text == theirs.final_text


def test_a_plain_run_names_no_threshold_and_an_older_file_that_does_verifies() -> None:
    model = loaded()
    run = generate(model, prompt(4), decoder="plain", max_tokens=4)
    older = replace(run, steps=tuple(replace(step, threshold=0.1) for step in run.steps))
    assert {step.threshold for step in run.steps} == {None}
    assert verify(run, model).ok and verify(older, model).ok


def test_a_bias_given_twice_counts_twice() -> None:
    model, rest = loaded(), {"decoder": "plain", "temperature": 0, "max_tokens": 3}
    twice = generate(model, prompt(4), logit_bias=("7=3", "9=-1", "7=1.5"), **rest)
    once = generate(model, prompt(4), logit_bias=("7=4.5", "9=-1"), **rest)
    assert twice.steps == once.steps


def test_scores_are_of_the_controlled_distributions() -> None:
    model = loaded()
    run = generate(model, prompt(4), branches=3, threshold=0.02, max_tokens=6, **MANY, top_k=20)
    texts = [path.token_ids for path in run.paths]
    found = score(model, prompt(4), texts, **MANY, top_k=20)
    assert [s.log_prob for s in found] == pytest.approx([path.logprob for path in run.paths], abs=1e-4)
    assert score(model, prompt(4), texts)[0].log_prob != pytest.approx(found[0].log_prob, abs=1e-3)


def test_the_command_line_scores_under_controls(capsys: pytest.CaptureFixture[str]) -> None:
    from tempo_mlx.cli.main import main
    from tests.twins import twin

    flags = ["--repetition-penalty", "1.5", "--logit-bias", "3=2"]
    assert main(["score", "--model", str(twin("llama")), "--json", "Once upon", " a time", *flags]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    (found,) = score(loaded(), "Once upon", [" a time"], repetition_penalty=1.5, logit_bias={3: 2})
    assert said["log_probs"] == pytest.approx(found.log_probs, abs=1e-5)
    assert said["log_prob"] != pytest.approx(score(loaded(), "Once upon", [" a time"])[0].log_prob, abs=1e-3)


def test_the_order_is_the_one_the_module_says() -> None:
    """Every neighbour pair matters to the outcome: exchanged, some run is another."""
    assert list(controls.PENALTIES) == ["repetition", "presence", "frequency"]
    assert list(controls.TRUNCATIONS) == ["top_p", "top_k", "min_p", "typical_p", "eta_cutoff"]
