"""Running rows ahead of need: guesses at the next tokens, and whether acting on them pays off."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

import numpy as np

SHORTEST = 2  # tokens that must match
LONGEST = 7  # most tokens compared, and guessed
SEARCHED = 64  # most recent places that are compared

LOOKUP, EXIT = "lookup", "exit"  # who runs ahead
LEARNING = 3  # first one-row steps, run in full to measure their time
RELEARNING = 24  # steps after which one is measured in full again
REMEMBERED = 7  # full steps whose median is used
PAUSE = 64  # steps for which a source stops running ahead once it has lost a full step's time


class Lookup:
    """The tokens of a text, and where each pair of neighbours stood (prompt lookup decoding, A. Saxena 2023).

    It guesses as many tokens as matched: long matches continue more often than short ones.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], list[int]] = {}  # a pair of neighbours: the places after it
        self.add(tokens)

    def add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._tokens.append(int(token))
            if len(self._tokens) >= SHORTEST:
                self._after.setdefault(self._ending, []).append(len(self._tokens))

    def guess(self) -> list[int]:
        """The tokens after the longest earlier match of the text's ending (the latest of equals); may be empty."""
        best = at = 0
        for place in self._after.get(self._ending, [])[-2 : -2 - SEARCHED : -1]:
            alike = self._alike(place)
            if alike > best:
                best, at = alike, place
            if best == LONGEST:
                break
        return self._tokens[at : at + best]

    @property
    def _ending(self) -> tuple[int, ...]:
        return tuple(self._tokens[-SHORTEST:])

    def _alike(self, place: int) -> int:
        """How many tokens before `place` match those at the end."""
        tokens = self._tokens
        count = SHORTEST
        while count < min(LONGEST, place) and tokens[place - 1 - count] == tokens[-1 - count]:
            count += 1
        return count


class Payoff:
    """Whether running ahead pays off: its cost against that of the full steps it saved."""

    def __init__(self) -> None:
        self._full: deque[float] = deque(maxlen=REMEMBERED)
        self._steps = self._full_at = 0
        self._won: defaultdict[str | None, float] = defaultdict(float)  # seconds, by who ran ahead
        self._paused_until: defaultdict[str, int] = defaultdict(int)

    def step(self) -> None:
        """A step of one row begins."""
        self._steps += 1

    def allows(self, source: str) -> bool:
        """Whether `source` may run ahead in this step."""
        known = len(self._full) >= LEARNING and self._steps - self._full_at < RELEARNING
        if known and self._won[source] < -self.full:
            self._won[source] = 0
            self._paused_until[source] = self._steps + PAUSE
        return known and self._steps >= self._paused_until[source]

    @property
    def full(self) -> float:
        """Seconds of a full step."""
        return float(np.median(self._full)) if self._full else 0.0

    def took(self, seconds: float, source: str | None) -> None:
        """Note the time of a pass that yielded one step for certain."""
        if source is None:
            self._full.append(seconds)
            self._full_at = self._steps
        else:
            self._won[source] += self.full - seconds

    def yielded(self, source: str | None) -> None:
        """A row run ahead was asked for, which saves a full step."""
        self._won[source] += self.full
