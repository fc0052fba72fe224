"""Run an arm on prompts and keep of every run what the figures are made of, a JSON line a prompt."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import tempo_mlx
from benchmarks.pruning_ablation import remove_share
from benchmarks.quality.arms import TEXTS, Arm
from benchmarks.quality.prompts import Prompt
from benchmarks.side_by_side import side_by_side
from benchmarks.studies import Record, append_record, read_records
from tempo_mlx.decode.paths import Layer, best_paths, is_usable, layers_of, sample_paths, token_ids
from tempo_mlx.decode.score import score_sequences
from tempo_mlx.decode.step import Step
from tempo_mlx.decode.tree import most_different
from tempo_mlx.model.forward import Forward
from tempo_mlx.report.run import Run
from tempo_mlx.weights import Tokenizer

QUARTERS = 4  # of a text's length: where along it the log-probability was lost
THINNED = 0.6  # share of the removable members that the thinned readings remove
KEPT = ("texts", "first", "best")  # readings whose tokens are kept


@dataclass(frozen=True)
class Plan:
    """How runs are made: of exactly `tokens` steps, or at most so many where the model `ends` its texts. seed: another
    than 0 draws other texts. together: so many prompts at once, which are not timed.
    """

    tokens: int
    ends: bool = False
    seed: int = 0
    together: int = 1


def file_of(folder: Path, arm: Arm, seed: int | str = 0) -> Path:
    return folder / (f"{arm.name}.seed-{seed}.jsonl" if seed else f"{arm.name}.jsonl")


class Counting:
    """A model that counts its passes by their rows, those of the prompt left out."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.architecture, self.info = model.architecture, model.info
        self.new_cache, self.embeddings = model.new_cache, model.embeddings
        self.passes: Counter[int] = Counter()

    def forward(self, tokens: Any, positions: Any, bias: Any, cache: Any, **options: Any) -> Forward:
        out: Forward = self.model.forward(tokens, positions, bias, cache, **options)
        if bias is not None:  # the prompt's chunks are plain causal
            self.passes[len(tokens)] += 1
        return out


def run_arm(
    loaded: tempo_mlx.LoadedModel, arm: Arm, prompts: Sequence[Prompt], plan: Plan, path: Path
) -> Iterator[Record]:
    """Append a line to `path` for every prompt that has none there, yielding it."""
    done = {record["prompt"] for record in read_records(path)}
    missing = [prompt for prompt in prompts[: arm.prompts] if prompt.id not in done]
    works = [partial(measure, loaded, arm, prompt, plan) for prompt in missing]
    if plan.together == 1:
        records = (work(loaded.model) for work in works)
    else:
        records = (
            {**record, "seconds": None, "cpu_seconds": None}
            for record in side_by_side(loaded.model, works, plan.together)
        )
    for record in records:
        append_record(path, record)
        yield record


def measure(loaded: tempo_mlx.LoadedModel, arm: Arm, prompt: Prompt, plan: Plan, among: Any) -> Record:
    """One run, its readings, and what the model thinks of each. among: the model, or that as it is among other runs."""
    model = Counting(among)
    seed = 1000 * int(prompt.id[-2:]) + sum(map(ord, prompt.kind))  # other draws for every prompt
    seed += 100_000 * plan.seed
    settings = {**arm.settings, "max_tokens": plan.tokens, "seed": seed}
    if not plan.ends:
        settings["min_steps"] = plan.tokens
    wall, cpu = time.perf_counter(), time.process_time()
    decoding = tempo_mlx.stream(tempo_mlx.LoadedModel(model, loaded.tokenizer), prompt.text, **settings)
    for _ in decoding:
        pass
    texts = decoding.readings()  # with their exact log-probabilities
    texts = texts[:TEXTS] if arm.worth is None else most_different(texts, TEXTS, arm.worth)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    readings: dict[str, list[tuple[Sequence[int], Any]]] = {}
    if texts:
        pairs = [(text.token_ids, text.log_probs) for text in texts]
        readings = {name: pairs[:1] if name == "first" else pairs for name in arm.readings}
    else:  # a lattice or plain text: score what is read off it
        run = decoding.run()
        ids = [read(run, name, seed) for name in arm.readings]
        for name, text, log_probs in zip(
            arm.readings, ids, score_sequences(loaded.model, run.prompt.token_ids, ids), strict=True
        ):
            readings[name] = [(text, log_probs)]
    return {
        "prompt": prompt.id,
        "seed": seed,
        "tokens": len(decoding.steps),
        "readings": {
            name: [kept(name, ids, each, loaded.tokenizer) for ids, each in pairs]
            for name, pairs in readings.items()
        },
        "passes": dict(sorted(model.passes.items())),
        "width": round(float(np.mean([alive(step) for step in decoding.steps])), 3),
        "seconds": round(wall, 3),
        "cpu_seconds": round(cpu, 3),
    }


def kept(reading: str, ids: Sequence[int], log_probs: Any, tokenizer: Tokenizer) -> Record:
    """What is kept of a text."""
    nats = quarters(log_probs)
    if reading not in KEPT:
        return {"tokens": len(ids), "nats": nats}
    return {"ids": ids, "text": tokenizer.decode(ids, continues=True), "nats": nats}


def words_of(text: Record, tokenizer: Callable[[], Tokenizer]) -> str:
    """What a kept text reads. tokenizer: that of its model, which texts need that were kept as ids alone."""
    words: str = text["text"] if "text" in text else tokenizer().decode(text["ids"], continues=True)
    return words


def length_of(text: Record, record: Record) -> int:
    """In tokens; a line that does not say it is of a run whose texts all have as many as it had steps."""
    length: int = len(text["ids"]) if "ids" in text else text.get("tokens", record["tokens"])
    return length


def quarters(log_probs: Any) -> list[float]:
    """The negative log-probability of each quarter of a text's tokens."""
    return [round(-float(part.sum()), 3) for part in np.array_split(np.asarray(log_probs), QUARTERS)]


def in_quarters(length: int) -> list[int]:
    """How many of a text's tokens are in each of its quarters."""
    return [len(part) for part in np.array_split(np.arange(length), QUARTERS)]


def alive(step: Step) -> int:
    """How many members of a set are left at the end."""
    return sum(is_usable(token) for token in step.tokens)


# What is read off a run


def read(run: Run, reading: str, seed: int) -> list[int]:
    """The text of a reading, as token ids."""
    if reading == "texts":  # of plain decoding
        return [step.tokens[0].id for step in run.steps]
    layers = layers_of(run.steps)
    if reading == "best":
        return token_ids(layers, best_paths(layers)[0])
    if reading == "drawn":
        return token_ids(layers, sample_paths(layers, 1, seed)[0])
    if reading == "random":
        return at_random(layers, [range(len(layer.members)) for layer in layers], seed)
    signal = reading.removeprefix("thinned: ")
    scores = {
        t: np.array([getattr(member, SCORES[signal]) for member in layer.members])
        for t, layer in enumerate(layers)
        if len(layer.members) > 1 and layer.members[0].posterior is not None
    }
    return at_random(layers, remove_share(layers, scores, THINNED), seed)


SCORES = {"posterior": "posterior", "probability": "weight"}


def at_random(layers: Sequence[Layer[Any]], kept: Sequence[Sequence[int]], seed: int) -> list[int]:
    """A text of a member of each layer, drawn uniformly from those kept."""
    random = np.random.default_rng([seed, 7])
    return [
        layer.members[random.choice(list(here))].id
        for layer, here in zip(layers, kept, strict=True)
        if layer.printed
    ]
