"""Suites that time whole runs: tempo, pruning, branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tempo_mlx.api import stream
from tempo_mlx.bench.contenders import Field, MlxLm, Ours, Transformers
from tempo_mlx.bench.processes import run_original
from tempo_mlx.bench.results import Measurement, Result
from tempo_mlx.bench.steps import Effort, tokens, weight_bytes
from tempo_mlx.bench.timing import Timing, interleaved, stopwatch
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.loading import LoadedModel
from tempo_mlx.resolution import resolve

PROMPTS = (
    "Once upon a time in a distant galaxy",
    "Photosynthesis is the process by which",
    "The cat sat on the",
)
TEXTS = 5
WIDE, LONG = 4, 500  # rows and slots at which the cost of pruning is compared with its bound


class Decoding:
    """Runs of one configuration over prompts; counts seconds, logical steps and rows, prompts excluded."""

    def __init__(
        self, loaded: LoadedModel, length: int, prompts: Sequence[str | list[int]] = PROMPTS, **settings: Any
    ) -> None:
        self.loaded, self.prompts = loaded, prompts
        self.config = resolve({"max_tokens": length, "min_steps": length, **settings})
        self.steps = self.rows = 0

    def __call__(self) -> float:
        self.steps = self.rows = 0
        seconds = 0.0
        for prompt in self.prompts:
            decoding = stream(self.loaded, prompt, self.config)
            for step in decoding:
                self.steps += 1
                self.rows += sum(member.slot is not None for member in step.tokens)
            seconds += decoding.timing()["decode_seconds"]
        return seconds

    def timing(self, whole: Timing) -> Timing:
        """Of a logical step."""
        return Timing(tuple(seconds / self.steps for seconds in whole.samples))


def tempo(field: Field, effort: Effort, original: Path | None = None) -> Result:
    """Runs at the defaults, and the original TEMPO if there is a checkout of it."""
    length = 10 if effort.quick else 40
    result = Result(
        "tempo",
        f"Superposed decoding at the defaults: {len(PROMPTS)} prompts, {length} logical steps each, the decode loop "
        "and its records included; times are of one logical step.",
    )
    decodings = {
        each.name: Decoding(_as_loaded(field, each), length)
        for each in field.for_long_runs(transformers=False)
        if isinstance(each, Ours)
    }
    cases: dict[str, Callable[[], float]] = dict(decodings)
    if original is not None:
        cases["original TEMPO"] = partial(run_original, original, field.directory, PROMPTS, length)
    else:
        result.notes.append("The original TEMPO is left out: name a checkout of it with --original.")
    timings = interleaved(cases, effort.rounds(8), warm_up=False)
    ours = decodings[field.ours.name]
    reference = "original TEMPO" if original is not None else field.ours.name
    steps = {name: _per_step(name, timings, decodings, length) for name in cases}
    result.add("one logical step", steps, reference)
    width = ours.rows / ours.steps
    result.notes.append(
        f"tempo-mlx runs all members of a set, {width:.2f} rows a step here; the original runs one row."
    )
    step = steps[field.ours.name].quartile
    result.notes.append(f"That is {1 / step:.1f} logical steps and {width / step:.1f} rows a second.")
    if original is not None:
        base = steps[reference].quartile
        result.goal("one logical step, times the original's", step / base, 1.0)
        result.goal("one row, times the original's", step / width / base, 0.5)
    result.reads(weight_bytes(field.loaded.model), "weights", effort.bandwidth)
    return result


def pruning(field: Field, effort: Effort) -> Result:
    """What retroactive pruning costs, and what it saves."""
    length = 10 if effort.quick else 40
    slots = min(LONG, field.loaded.model.architecture.max_position_embeddings // 2)
    result = Result(
        "pruning",
        "One logical step with nothing removed, and with each signal: at the defaults, where removals make later steps "
        f"cheaper; and of sets of {WIDE} on a prompt of {slots} tokens, under thresholds of 0, so that members are "
        "weighed and none goes. Attention is that of all layers.",
    )
    all_kept = {"attention_threshold": 0.0, "relative_threshold": 0.0, "sigmoid_steepness": 0.0}
    signals: dict[
        str, tuple[dict[str, Any], dict[str, Any]]
    ] = {  # settings; those by which nothing is removed
        "off": ({}, {}),
        "posterior": ({"pruning_signal": "posterior"}, {"posterior_threshold": 0.0}),
        "attention": ({"pruning_signal": "attention"}, all_kept),
    }
    arms: dict[str, Decoding] = {}
    for name, (settings, kept) in signals.items():
        arms[name] = Decoding(field.loaded, length, **settings)
        arms[f"{name}, weighed only"] = Decoding(
            field.loaded,
            length // 2,
            [tokens(field, slots)],
            selection="top-k",
            top_k=WIDE,
            **settings,
            **kept,
        )
    timings = interleaved(arms, effort.rounds(8), warm_up=False)
    steps = {name: arm.timing(timings[name]) for name, arm in arms.items()}
    for name, arm in arms.items():
        reference = "off, weighed only" if name.endswith("only") else "off"
        beside = None if name == reference else ("off", steps[reference])
        case = f"{name} ({arm.rows / arm.steps:.2f} rows a step)"
        result.rows.append(Measurement.of(case, field.ours.name, steps[name], beside))
    for name, bound in (("posterior", 1.03), ("attention", 1.08)):
        ratio = steps[f"{name}, weighed only"].quartile / steps["off, weighed only"].quartile
        result.goal(f"{name}, sets of {WIDE}, {slots} slots, on / off", ratio, bound)
    result.reads(weight_bytes(field.loaded.model), "weights", effort.bandwidth)
    return result


def branches(field: Field, effort: Effort) -> Result:
    """Several texts of one prompt."""
    length = 12 if effort.quick else 48
    result = Result(
        "branches",
        f"{TEXTS} texts of {length} tokens each, continuations of one prompt of 32 tokens, prompt included.",
    )
    ids = tokens(field, 32)

    def ours(**settings: Any) -> Callable[[], float]:
        config = resolve({"max_tokens": length, "min_steps": length, **settings})
        return partial(stopwatch, lambda: list(stream(field.loaded, ids, config)))

    plain = ours(decoder="plain", temperature=0.0)
    cases: dict[str, Callable[[], float]] = {
        f"{TEXTS} branches, one cache": ours(branches=TEXTS, merge_length=0),
        "one greedy text": plain,
        f"{TEXTS} samples, one cache": ours(decoder="sample", beam_width=TEXTS),
    }
    owners = dict.fromkeys(cases, field.ours.name)
    if isinstance(peer := field.named("mlx-lm"), MlxLm):
        name = f"batch of {TEXTS} (mlx-lm)"
        cases[name] = partial(stopwatch, partial(mlx_lm_batch, peer, ids, length, TEXTS))
        owners[name] = "mlx-lm"
    if isinstance(other := field.named("transformers"), Transformers):
        for kind, settings in (
            ("samples", {"do_sample": True, "top_k": 0}),
            ("beams", {"num_beams": TEXTS, "do_sample": False}),
        ):
            name = f"{TEXTS} {kind} (transformers)"
            cases[name] = partial(
                stopwatch,
                partial(transformers_texts, other, ids, length, {"num_return_sequences": TEXTS, **settings}),
            )
            owners[name] = "transformers"
    timings = interleaved(cases, effort.rounds(6), warm_up=False)
    for name, timing in timings.items():
        beside = None if name == "one greedy text" else ("one text", timings["one greedy text"])
        result.rows.append(Measurement.of(name, owners[name], timing, beside))
    return result


def _per_step(name: str, timings: dict[str, Timing], decodings: dict[str, Decoding], length: int) -> Timing:
    if name in decodings:
        return decodings[name].timing(timings[name])
    return Timing(tuple(seconds / (length * len(PROMPTS)) for seconds in timings[name].samples))


def _as_loaded(field: Field, contender: Ours) -> LoadedModel:
    return LoadedModel(contender.model, field.loaded.tokenizer, LoadConfig())


def mlx_lm_batch(peer: MlxLm, ids: list[int], length: int, texts: int) -> None:
    """So many texts of that length, as a batch."""
    from mlx_lm import batch_generate

    tokenizer = SimpleNamespace(eos_token_ids=[], decode=lambda ids: "")
    batch_generate(peer.model, tokenizer, [ids] * texts, max_tokens=length)


def transformers_texts(peer: Transformers, ids: list[int], length: int, settings: dict[str, Any]) -> None:
    """Texts of that length."""
    import torch

    with torch.inference_mode():
        peer.model.generate(
            torch.tensor([ids], device=peer.model.device),
            max_new_tokens=length, min_new_tokens=length, pad_token_id=0, **settings,
        )  # fmt: skip
