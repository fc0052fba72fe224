"""The texts of a run that are each an exact reading: branches, beams, samples, paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tempo_mlx.report.records import RunPath


@dataclass(frozen=True)
class ListedText:
    """One of several texts. share: of the probability of all that are listed.

    log_prob, tokens: of its most probable spelling.
    """

    text: str
    share: float
    log_prob: float
    tokens: int


def listed(paths: Sequence[RunPath]) -> list[ListedText]:
    """The texts, each once, the most probable first."""
    together: dict[str, list[RunPath]] = {}
    for path in paths:
        together.setdefault(path.text, []).append(path)
    logs = np.array([np.logaddexp.reduce([path.logprob for path in same]) for same in together.values()])
    shares = np.exp(logs - logs.max(initial=-np.inf))
    shares /= shares.sum()
    best = [max(same, key=lambda path: path.logprob) for same in together.values()]
    found = [
        ListedText(path.text, float(share), path.logprob, len(path.token_ids))
        for path, share in zip(best, shares, strict=True)
    ]
    return sorted(found, key=lambda text: -text.share)
