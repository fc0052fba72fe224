"""What is compared: the ways to get several texts, each with what the settings say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TEXTS = 8
MOST_PASSES = 320  # of an enumeration of 8 rows a pass: twice a program's length


@dataclass(frozen=True)
class Arm:
    """said: what the page calls it. only: tasks that it is for; all where empty. tried: on tuning problems only."""

    name: str
    said: str
    settings: dict[str, Any]
    only: tuple[str, ...] = ()
    tried: bool = False


def sampled(**settings: Any) -> dict[str, Any]:
    return {"decoder": "sample", "beam_width": TEXTS, "threshold": 0.0, **settings}


def branches(**settings: Any) -> dict[str, Any]:
    return {"decoder": "tree", "branches": TEXTS, **settings}


def leaves(rows: int = 8, **settings: Any) -> dict[str, Any]:
    return {
        "decoder": "enumerate",
        "leaves": TEXTS,
        "threshold": 0.05,
        "max_passes": MOST_PASSES * (8 // rows),
        "rows": rows,
        **settings,
    }


ARMS = (
    Arm("greedy", "greedy", {"decoder": "plain", "temperature": 0.0}),
    Arm("nucleus", "nucleus sampling, T 0.8, p 0.95", sampled(temperature=0.8, top_p=0.95)),
    Arm("min-p", "min-p sampling, T 1, 0.1", sampled(temperature=1.0, min_p=0.1)),
    Arm(
        "arithmetic",
        "arithmetic sampling, T 0.8, p 0.95",
        sampled(temperature=0.8, top_p=0.95, sampling="arithmetic"),
    ),
    Arm(
        "without-repeats",
        "samples without repeats, T 0.8, p 0.95",
        sampled(temperature=0.8, top_p=0.95, sampling="stochastic-beam"),
    ),
    Arm("diverse-beam", "diverse beam search", {"decoder": "diverse-beam", "beam_width": TEXTS}),
    Arm("branches-3", "branches, merge length 3 (the default)", branches()),
    Arm("branches-10", "branches, merge length 10", branches(merge_length=10)),
    Arm("branches-0", "branches, never merged", branches(merge_length=0), ("humaneval",)),
    Arm("branches-diverse", "branches, best of 16, diversity 1", branches(best_of=16, branch_diversity=1.0)),
    Arm(
        "branches-gate",
        "branches where the entropy is 1 nat, merge length 10",
        branches(merge_length=10, branch_entropy=1.0),
    ),
    Arm(
        "branches-gate-half",
        "branches, entropy 0.5",
        branches(merge_length=10, branch_entropy=0.5),
        tried=True,
    ),
    Arm("enumerate-gate", "enumeration, entropy 0.5", leaves(branch_entropy=0.5), tried=True),
    Arm("enumerate-10", "enumeration, threshold 0.1", leaves(threshold=0.1), tried=True),
    Arm("enumerate", "enumeration, 8 rows", leaves(rows=8)),
    Arm("enumerate-doubt", "enumeration, closest calls first", leaves(leaf_order="doubt")),
    Arm("enumerate-sure", "enumeration, unsure texts given up", leaves(rows=8, warmup=2)),
    Arm("enumerate-1", "enumeration, 1 row", leaves(rows=1), ("humaneval",)),
    Arm(
        "wide",
        "enumeration, threshold 0.001, 95%",
        leaves(threshold=0.001, coverage=0.95, leaves=16),
        ("questions",),
    ),
)


def arms_for(task: str, tuning: bool) -> list[Arm]:
    return [arm for arm in ARMS if task in (arm.only or (task,)) and (tuning or not arm.tried)]
