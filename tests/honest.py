"""Honest runs of every decoder on a tiny model that ends texts often: what verify must find exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from tempo_mlx.api import generate
from tempo_mlx.decode.decoder import DecoderSpec
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.report.run import Run
from tests.trees import loaded, prompt

TEMPERATURES = (0.02, 0.1, 0.3, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 0.0)
REMOVALS: Mapping[str, Any] = {"pruning_signal": "posterior", "posterior_threshold": 0.2}
WIDE: Mapping[str, Any] = {"threshold": 0.01, "max_parallel_tokens": 4}

# Ten kinds of run of each decoder, one at each temperature.
KINDS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "superposed": (
        {**WIDE, **REMOVALS},
        {**WIDE, "min_steps": 5, "pruning_strategy": "diversity"},
        {**WIDE, "attention_threshold": 0.02, "sigmoid_steepness": 0.0, "attend": "all", "combine": "last"},
        {**WIDE, "paths": 3, **REMOVALS, "relative_posterior": True},
        {"selection": "top-p", "top_p": 0.6, "pruning_signal": "random", "posterior_threshold": 0.3, "attend": "best"},
        {"selection": "min-p", "attention_threshold": 0.02, "attend": "weighted", "stop": ("a",)},
        {**WIDE, "final_threshold": 0.2, "dynamic_target": "both", **REMOVALS, "combine": "product"},
        {"selection": "top-k", "top_k": 3, "combine": "max", "pruning_strategy": "coherence"},
        {**WIDE, **REMOVALS, "complete_removal_mode": "keep_unattended", "pruning_window": 2, "custom_rope": False},
        {**WIDE, "pruning_strategy": "hybrid", "combine": "mean"},
    ),
    "plain": (
        {}, {"min_steps": 6}, {"stop": ("a", "e")}, {"seed": 1}, {"seed": 2}, {"seed": 3}, {"seed": 4},
        {"min_steps": 8}, {"seed": 5}, {},
    ),
    "tree": (
        {"branches": 3}, {"branches": 4, "min_steps": 5}, {"branches": 3, "stop": ("a", "e")},
        {"branches": 5, "merge_length": 1, "threshold": 0.01},
        {"branches": 3, "branch_choice": "sample", "threshold": 0.02}, {"branches": 3, "branch_diversity": 0.5},
        {"branches": 2, "best_of": 5, "threshold": 0.02}, {"branches": 4, "threshold": 0.02}, {"branches": 1},
        {"branches": 4, "threshold": 0.05},
    ),
    "enumerate": (
        {"leaves": 4}, {"leaves": 3, "min_steps": 5}, {"leaves": 5, "stop": ("a", "e")}, {"leaves": 6, "rows": 1},
        {"leaves": 4, "selection": "top-p", "top_p": 0.7}, {"leaves": 4, "selection": "top-k", "top_k": 3},
        {"leaves": 9, "coverage": 0.02, "threshold": 0.01}, {"leaves": 9, "max_passes": 7, "threshold": 0.02},
        {"leaves": 4, "branch_entropy": 2.0, "threshold": 0.02}, {"leaves": 8, "merge_length": 1, "threshold": 0.01},
        {"leaves": 8, "warmup": 2, "confidence_window": 2, "threshold": 0.02},
        {"leaves": 7, "leaf_order": "doubt", "threshold": 0.02, "merge_length": 2},
    ),
    "mcts": (
        {"min_steps": 6}, {"mcts_simulations": 12}, {"min_steps": 6, "threshold": 0.02}, {"min_steps": 8},
        {"mcts_depth": 1}, {"selection": "top-p"}, {"stop": ("a", "e")}, {"mcts_c_puct": 3.0},
        {"max_parallel_tokens": 3, "threshold": 0.001}, {},
    ),
    "beam": (
        {}, {"beam_width": 3}, {"beam_width": 2}, {"min_steps": 6}, {"stop": ("a", "e")}, {"beam_width": 1},
        {"min_steps": 10}, {"beam_width": 4}, {"max_tokens": 3}, {"beam_width": 6},
    ),
    "diverse-beam": (
        {}, {"diversity_strength": 0.0}, {"beam_width": 2}, {"min_steps": 6}, {"stop": ("a", "e")}, {"beam_width": 1},
        {"diversity_strength": 3.0}, {"beam_width": 4}, {"max_tokens": 3}, {"beam_width": 6},
    ),
    "sample": (
        {"beam_width": 2}, {"beam_width": 3, "min_steps": 6}, {"stop": ("a", "e")},
        {"selection": "top-p", "top_p": 0.7}, {"selection": "top-k", "top_k": 3}, {"selection": "min-p"}, {"seed": 1},
        {"beam_width": 6}, {"threshold": 0.001}, {},
    ),
}  # fmt: skip


def settings_of(decoder: str, kind: int) -> dict[str, Any]:
    settings = {"decoder": decoder, "max_tokens": 10, **KINDS[decoder][kind]}
    if decoder == "mcts":
        settings = {"mcts_simulations": 6, "mcts_depth": 2, "threshold": 0.02, **settings}
        if "selection" in settings:
            del settings["threshold"]
    if decoder not in ("beam", "diverse-beam", "enumerate"):
        settings["temperature"] = TEMPERATURES[kind]
    return settings


@cache
def honest(decoder: str, kind: int, backend: str = "mlx") -> Run:
    run = generate(loaded(backend=backend, often=True), prompt(kind), **settings_of(decoder, kind))
    return Run.from_json(run.to_json())


def every() -> Iterator[tuple[str, int]]:
    for decoder in KINDS:
        yield from ((decoder, kind) for kind in range(len(TEMPERATURES)))


def specs() -> Mapping[str, DecoderSpec]:
    return DECODERS
