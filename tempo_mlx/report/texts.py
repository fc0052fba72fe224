"""The texts of a run that are each an exact reading: branches, beams, samples, paths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tempo_mlx.report.records import RunPath


@dataclass(frozen=True)
class ListedText:
    """One of several texts. share: of the probability of all that are listed; log_mass: of it itself.

    log_prob, tokens: of its most probable spelling.
    """

    text: str
    share: float
    log_mass: float
    log_prob: float
    tokens: int


def listed(paths: Sequence[RunPath]) -> list[ListedText]:
    """The texts, each once, the most probable first."""
    together: dict[str, dict[tuple[int, ...], RunPath]] = {}
    for path in paths:
        together.setdefault(as_seen(path.text), {}).setdefault(path.token_ids, path)  # some are drawn twice
    spellings = [list(same.values()) for same in together.values()]
    logs = np.array([np.logaddexp.reduce([path.logprob for path in same]) for same in spellings])
    shares = np.exp(logs - logs.max(initial=-np.inf))
    shares /= shares.sum()
    best = [max(same, key=lambda path: path.logprob) for same in spellings]
    found = [
        ListedText(path.text, float(share), float(log), path.logprob, len(path.token_ids))
        for path, share, log in zip(best, shares, logs, strict=True)
    ]
    return sorted(found, key=lambda text: -text.share)


def as_seen(text: str) -> str:
    """Without the blanks around a text and at the ends of its lines: who reads texts without them reads the same."""
    return re.sub(r"[^\S\n]+(?=\n)", "", text.strip())
