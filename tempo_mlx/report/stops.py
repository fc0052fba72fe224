"""Stop strings (`--stop`): where a text ends, and whether one that grows has come to its end.

A text that grows is searched once: each time only as far back as a string may reach that its new tokens complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from tempo_mlx.decode.paths import Token, is_read
from tempo_mlx.decode.settled import SettledReading
from tempo_mlx.decode.step import Step
from tempo_mlx.report.text import REPLACEMENT, JointText, Tokenizer, texts_along


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


class Stops:
    """The stop strings of a run, and which texts hold one."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self.strings = strings
        self._reach = max(map(len, strings), default=1) - 1

    def __call__(self, newest_first: Iterable[int], new: int = 1) -> bool:
        """Whether one of a text's `new` last tokens completes a string; the tokens come last to first."""
        ids: list[int] = []
        before = 0  # characters of earlier tokens
        for token in newest_first:
            ids.append(token)
            text = self._tokenizer.token_text(token)
            if len(ids) > new and REPLACEMENT not in text:  # no character is cut in two here
                before += len(text)
                if before >= self._reach:
                    break
        text = "".join(texts_along(ids[::-1], self._tokenizer))
        return cut_at_stop(text, self.strings) != text


class StopWatch:
    """Whether the most probable reading of a growing lattice holds a stop string."""

    def __init__(self, stops: Stops, window: int | None) -> None:
        """window: see SettledReading."""
        self._stops = stops
        self._reading: SettledReading[Token] = SettledReading(window)
        self._settled: list[int] = []
        self._seen = 0
        self._found = False

    def __call__(self, steps: Sequence[Step]) -> bool:
        """steps: all so far; only those that are new are looked at."""
        if not self._stops.strings:
            return False
        before = len(self._settled)
        for step in steps[self._seen :]:
            self._settled += [
                chosen.member.id for chosen in self._reading.add(step) if is_read(chosen.member)
            ]
        if len(steps) > self._seen:
            self._seen = len(steps)
            tail = [chosen.member.id for chosen in self._reading.tail if is_read(chosen.member)]
            new = len(self._settled) - before + len(tail)
            self._found = self._stops(chain(reversed(tail), reversed(self._settled)), new)
        return self._found


class TextStream:
    """Tokens to text, holding back what may still become part of a stop string; nothing follows one."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._joint = JointText(tokenizer)
        self._stop = stop
        self._hold = max(map(len, stop), default=1) - 1
        self._held = ""
        self._ended = False

    def add(self, token_ids: Iterable[int]) -> str:
        """What can be said after these tokens."""
        if self._ended:
            return ""
        self._held += "".join(chain.from_iterable(map(self._joint.add, token_ids)))
        text = cut_at_stop(self._held, self._stop)
        self._ended = text != self._held
        end = len(text) if self._ended else max(len(text) - self._hold, 0)
        self._held = self._held[end:]
        return text[:end]
