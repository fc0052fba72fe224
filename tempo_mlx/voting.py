"""Choosing among texts: by what most of them say, by how sure the model was, or by a program that tests them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from tempo_mlx.arrays import Floats
from tempo_mlx.errors import ConfigError
from tempo_mlx.report.answers import By
from tempo_mlx.report.run import Run
from tempo_mlx.sandbox import Limits, run

Vote = Literal["majority", "mass", "mean", "window"]
VOTES: tuple[Vote, ...] = get_args(Vote)
WINDOW = 32  # tokens over which confidence is the mean


def vote_of(name: str) -> Vote:
    """Raises ConfigError."""
    for known in VOTES:
        if name == known:
            return known
    raise ConfigError(f"vote is {name!r}; choose {', '.join(VOTES)}.")


def choose(found: Run, vote: Vote, by: By) -> int:
    """The place in the run's `paths` of the text that is chosen, of equals the first. Raises ConfigError.

    majority: the answer that most texts give; mass: the one whose texts are most probable together, each counted once
    (both give its most probable text); mean: the text of the best mean log-probability a token; window: the text whose
    least sure stretch is the surest (the lowest group confidence of DeepConf, arXiv 2508.15260, by the tokens' own
    log-probabilities).
    """
    if not found.paths:
        raise ConfigError("The run has no texts to choose from; ask for some, as with --leaves 8.")
    if vote == "mean":
        return best([path.logprob / max(len(path.token_ids), 1) for path in found.paths])
    if vote == "window":
        return best([lowest_group(each) for each in token_log_probs(found)])
    logs = [path.logprob for path in found.paths]
    votes: dict[str, float] = {}
    seen: set[tuple[int, ...]] = set()
    for path, log in zip(found.paths, logs, strict=True):
        answer = by(path.text)
        if answer is None or (vote == "mass" and path.token_ids in seen):
            continue
        seen.add(path.token_ids)
        if vote == "mass":  # of long texts no float holds the mass itself
            votes[answer] = float(np.logaddexp(votes.get(answer, -math.inf), log))
        else:
            votes[answer] = votes.get(answer, 0.0) + 1.0
    if not votes:
        return 0
    winner = max(votes, key=lambda answer: votes[answer])
    return best([
        log if by(path.text) == winner else -math.inf for path, log in zip(found.paths, logs, strict=True)
    ])  # fmt: skip


def best(scores: Sequence[float]) -> int:
    return int(np.argmax(np.asarray(scores, np.float64)))


def lowest_group(log_probs: Floats, window: int = WINDOW) -> float:
    """The least mean of so many neighbours in a row; of a shorter text the mean."""
    if len(log_probs) <= window:
        return float(log_probs.mean()) if len(log_probs) else 0.0
    sums = np.cumsum(np.insert(log_probs, 0, 0.0))
    return float((sums[window:] - sums[:-window]).min() / window)


def token_log_probs(found: Run) -> list[Floats]:
    """Of each text the log-probabilities of its tokens, as the steps of a tree have them: at the run's temperature."""
    places: dict[tuple[int, ...], float] = {}
    texts: dict[int | None, tuple[int, ...]] = {None: ()}
    for step in found.steps:
        for token in step.tokens:
            text = (*texts[token.parents[0].slot if token.parents else None], token.id)
            places[text] = math.log(max(token.probability, 1e-300))
            if token.slot is not None:
                texts[token.slot] = text
    return [
        np.array([places.get(path.token_ids[:end], -math.inf) for end in range(1, len(path.token_ids) + 1)])
        for path in found.paths
    ]


def verified(found: Run, test: str | Callable[[str], bool], limits: Limits | None = None) -> int | None:
    """The first text that passes a test, None if none does. test: a function of a text, or a command that gets the text
    on standard input and ends with 0; it runs in a sandbox (sandbox.py). Raises ConfigError.
    """
    passes = program(test, limits) if isinstance(test, str) else test
    return next((at for at, path in enumerate(found.paths) if passes(path.text)), None)


def program(command: str, limits: Limits | None = None) -> Callable[[str], bool]:
    """A command as a test of texts. Files that it names are looked for where we are. Raises ConfigError."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{command!r} is no command: {error}; mend its quotes.") from error
    if not words:
        raise ConfigError("--verify-with names no command; give one, such as 'python check.py'.")
    return lambda text: run(words, text, Path.cwd(), limits).ok
