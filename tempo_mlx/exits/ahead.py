"""Running ahead: what may follow, from the text itself, and whether trying it pays."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

import numpy as np

SHORTEST = 2  # tokens that must read alike
LONGEST = 7  # tokens that are guessed at most, and compared
SEARCHED = 64  # places that are compared, the latest ones

LOOKUP, EXIT = "lookup", "exit"  # who runs ahead
LEARNING = 3  # steps of one row that run in full first, to know what they take
RELEARNING = 24  # steps after which one runs in full again
REMEMBERED = 7  # full steps, of which the median counts
PAUSE = 64  # steps that nobody runs ahead who has lost a full step's time


class Lookup:
    """The tokens of a text, and where each pair of neighbours stood (prompt lookup decoding, A. Saxena 2023).

    As many tokens are guessed as read alike, since long matches go on more often than short ones.
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
        """The tokens that followed the longest ending that was there before, of equals the latest one; may be empty."""
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
        """How many tokens before `place` are those before the end."""
        tokens = self._tokens
        count = SHORTEST
        while count < min(LONGEST, place) and tokens[place - 1 - count] == tokens[-1 - count]:
            count += 1
        return count


class Payoff:
    """Whether running ahead is worth it: what it took, against what the steps it gave would have taken in full."""

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
        """A pass took so long; it gave one step, whatever else it gives."""
        if source is None:
            self._full.append(seconds)
            self._full_at = self._steps
        else:
            self._won[source] += self.full - seconds

    def yielded(self, source: str | None) -> None:
        """A row that was run ahead was asked for: one more full step that need not be run."""
        self._won[source] += self.full
