"""Full decoding compared with early exit, lossy and lossless: speed and agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tempo_mlx.api import generate
from tempo_mlx.config import GenerateConfig, as_dict
from tempo_mlx.decode.score import score_sequences
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.run import Run

FULL = "full"
NGRAM = 4


@dataclass(frozen=True)
class Arm:
    """One way to decode the prompt: its last run, and the decoding seconds of each round."""

    name: str
    run: Run
    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """An arm compared with full decoding.

    speedup: of the best rounds. same: share of steps before the first difference. agreement: of the audited early
    choices; None without any. perplexity: of the text under the whole model. repetition: share of repeated 4-grams.
    layers: mean number of layers run per step before its answer.
    """

    name: str
    text: str
    speedup: float
    tokens_per_second: float
    same: float
    agreement: float | None
    perplexity: float
    repetition: float
    layers: float


def arms_of(config: GenerateConfig) -> dict[str, GenerateConfig]:
    """Full decoding, and the early exit that `config` asks for, once lossy and once lossless."""
    full = replace(
        config, early_exit=False, lossless=False, exit_layers=(), confidence_thresholds=(), raw_confidence=False,
        exit_kv="exact", exit_lookup=True, exit_target_agreement=0.95,
    )  # fmt: skip
    return {
        FULL: full,
        "lossy": replace(config, early_exit=True, lossless=False),
        "lossless": replace(config, early_exit=True, lossless=True, exit_kv="exact"),
    }


def decode_all(
    loaded: LoadedModel, prompt: Any, arms: Mapping[str, GenerateConfig], rounds: int = 1
) -> dict[str, Arm]:
    """Decode with every arm in each round, so that a busy moment hits all arms equally."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    runs = {}
    for _ in range(rounds):
        for name, config in arms.items():
            runs[name] = generate(loaded, prompt, config=config)
            seconds[name].append(float(runs[name].timing["decode_seconds"]))
    return {name: Arm(name, runs[name], tuple(seconds[name])) for name in arms}


def compare(loaded: LoadedModel, arms: Mapping[str, Arm]) -> list[Comparison]:
    """Every arm compared with the full one."""
    full = arms[FULL]
    layers = loaded.model.architecture.num_hidden_layers
    return [
        Comparison(
            name=name,
            text=arm.run.final_text,
            speedup=full.best / arm.best * len(arm.run.steps) / len(full.run.steps),
            tokens_per_second=len(arm.run.steps) / arm.best,
            same=same_beginning(full.run, arm.run) / len(full.run.steps),
            agreement=(arm.run.early_exit or {}).get("agreement"),
            perplexity=perplexity(loaded, arm.run),
            repetition=repetition(ids_of(arm.run)),
            layers=(arm.run.early_exit or {}).get("mean_layers") or layers,
        )
        for name, arm in arms.items()
    ]


def ids_of(run: Run) -> list[int]:
    """The tokens of a run's best text."""
    return list(run.paths[0].token_ids) if run.paths else [token.id for token in run.best_path()]


def same_beginning(one: Run, other: Run) -> int:
    """The number of leading steps with the same sets."""
    sets = [[[token.id for token in step.tokens] for step in run.steps] for run in (one, other)]
    pairs = list(zip(*sets, strict=False))
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))


def perplexity(loaded: LoadedModel, run: Run) -> float:
    log_probs = score_sequences(loaded.model, run.prompt.token_ids, [ids_of(run)])[0]
    return math.exp(-float(log_probs.mean()))


def repetition(ids: Sequence[int], length: int = NGRAM) -> float:
    """The share of n-grams that occurred earlier in the text."""
    grams = [tuple(ids[at : at + length]) for at in range(len(ids) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


HEADINGS = ("", "x full", "tokens/s", "same start", "agreement", "perplexity", "repetition", "layers")


def cells(item: Comparison) -> list[str]:
    agreement = "" if item.agreement is None else f"{item.agreement:.1%}"
    return [
        item.name, f"{item.speedup:.2f}", f"{item.tokens_per_second:.1f}", f"{item.same:.0%}", agreement,
        f"{item.perplexity:.2f}", f"{item.repetition:.0%}", f"{item.layers:.1f}",
    ]  # fmt: skip


def settings_of_arm(config: GenerateConfig) -> dict[str, Any]:
    """What a JSON line says of an arm."""
    names = (
        "early_exit",
        "exit_target_agreement",
        "lossless",
        "exit_kv",
        "exit_lookup",
        "decoder",
        "temperature",
        "max_tokens",
    )
    return {name: value for name, value in as_dict(config).items() if name in names}
