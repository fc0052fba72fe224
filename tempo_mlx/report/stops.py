"""Stop strings (`--stop`): where a text ends, and whether one that grows has come to its end.

A text that grows is searched once: each time only as far back as a string may reach that its new tokens complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from tempo_mlx.decode.paths import Chosen, Token, is_read
from tempo_mlx.decode.settled import SettledReading
from tempo_mlx.decode.step import Member, Step
from tempo_mlx.report.text import REPLACEMENT, InlineStream, JointText, Label, Piece, Tokenizer, texts_along


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def stop_in(text: str, stop: Sequence[str]) -> str | None:
    """The stop string that ends `text`: the first in it."""
    found = [(at, each) for each in stop if (at := text.find(each)) >= 0]
    return min(found)[1] if found else None


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

    @property
    def held(self) -> str:
        """What is held back: said should no more follow."""
        return "" if self._ended else self._held

    def finish(self) -> str:
        """The rest, when nothing follows."""
        rest = cut_at_stop(self.held + self._joint.finish(), self._stop)
        self._ended = True
        return rest


class StoppedInline(InlineStream):
    """Inline text that ends where the best path comes to a stop string; a set waits until that is known of it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        window: int | None,
        removed: bool = False,
        label: Label | None = None,
    ) -> None:
        super().__init__(tokenizer, window=window, removed=removed, label=label)
        self._stop = stop
        self._hold = max(map(len, stop), default=1) - 1
        self._reading: SettledReading[Member] = SettledReading(window)
        self._along = JointText(tokenizer)
        self._own: list[str] = []  # what the best path reads of the first of the open sets
        self._ended = False

    def add(self, step: Step) -> list[Piece]:
        if self._ended:
            return []
        self._open.append(step)
        return self._release(self._reading.add(step), self._hold)

    def finish(self) -> list[Piece]:
        return self._release([] if self._ended else self._reading.tail, 0) + super().finish()

    def _release(self, path: Sequence[Chosen[Member]], hold: int) -> list[Piece]:
        for chosen in path:
            own = "".join(self._along.add(chosen.member.id)) if is_read(chosen.member) else ""
            self._own.append(own)
        text = "".join(self._own)
        cut = cut_at_stop(text, self._stop)
        left = len(cut) if cut != text else len(text) - hold
        result: list[Piece] = []
        while self._own and len(self._own[0]) <= left:
            left -= len(self._own.pop(0))
            result += self._pieces(self._open.pop(0), self._joint)
        if cut != text:
            result.append(Piece(self._own[0][:left]))
            self._ended, self._own, self._open = True, [], []
        return result


def inline_stream(tokenizer: Tokenizer, stop: Sequence[str], **how: Any) -> InlineStream:
    """See InlineStream; with stop strings it ends before the first of them."""
    return StoppedInline(tokenizer, stop, **how) if stop else InlineStream(tokenizer, **how)
