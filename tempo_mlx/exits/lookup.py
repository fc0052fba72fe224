"""Guesses at what follows, from the text itself: what followed when it last read as it does now."""

from __future__ import annotations

from collections.abc import Iterable

SHORTEST = 2  # tokens that must read alike
LONGEST = 7  # tokens that are guessed at most, and compared
SEARCHED = 64  # places that are compared, the latest ones


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
