"""The phrases of a run that grows: what has settled, for good, and the rest as the best reading has it now.

A cut (report/phrases.py) that no removal can reach any more divides the lattice: what comes before it never changes.
So each stretch between two cuts is read once, when the second has settled, and a step costs no more in a long run.
A long stretch takes a while to be read, so it is read in the course of the steps that follow: none waits for it.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from tempo_mlx.decode.paths import Chosen, Layer, is_read, layer_after, layers_of, usable
from tempo_mlx.decode.pieces import Pieces
from tempo_mlx.decode.settled import SettledReading
from tempo_mlx.decode.step import Member, Step
from tempo_mlx.decode.thinking import Splitter
from tempo_mlx.report.build import texted
from tempo_mlx.report.phrases import (
    SHOW_ABOVE,
    Phrase,
    Stretch,
    begins_word,
    phrases_along,
    phrases_of,
    within,
)
from tempo_mlx.report.stops import cut_at_stop
from tempo_mlx.report.text import Tokenizer, texts_along

UPDATE_SECONDS = 0.001  # that a step spends on reading what has settled


class GrowingPhrases:
    """Follows a superposed or plain run; joined, what `add` and `finish` give are its phrases (`phrases_in`).

    window: see SettledReading. stop: strings before which the text ends; what may become part of one is held back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        window: int | None,
        show_above: float = SHOW_ABOVE,
        stop: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._tokenizer = tokenizer
        self._show_above = show_above
        self._window = window
        self._stop = stop
        self._hold = max(map(len, stop), default=1) - 1
        self._start = 0  # the step that the open ones begin with: a cut, or the first
        self._open: list[Step] = []
        self._best: list[Chosen[Member]] = []  # of the open sets, as far as the best path has settled
        self._reading: SettledReading[Member] = SettledReading(window)
        # Of the open sets that no removal can reach any more: layers, and what each member says alone.
        self._layers: list[Layer[Member]] = []
        self._texts: list[list[str]] = []
        # Settled stretches: the text of each, and its phrases.
        self._unread: deque[tuple[str, Pieces[list[Phrase]]]] = deque()
        self._held: list[Phrase] = []

    def add(self, step: Step) -> list[Phrase]:
        """What has become certain by `step`."""
        self._open.append(step)
        self._best += self._reading.add(step)
        if self._window is None:
            return []
        # The set before the newest was the last, whose members may end the text, and no longer is.
        index = len(self._open) - 1 - (self._window + 1 if self._window else 1)
        if index >= 0:
            layer = layer_after(self._layers[-1] if index else None, usable(self._open[index], last=False))
            self._layers.append(layer)
            self._texts.append([self._tokenizer.token_text(member.id) for member in layer.members])
        if index > 0 and self._is_cut(index):
            self._close(index)
        return self._release(self._read(self._clock() + UPDATE_SECONDS))

    def catch_up(self) -> list[Phrase]:
        """All that has settled, read at once: where a reader comes late."""
        return self._release(self._read(math.inf))

    def tail(self) -> str:
        """What follows what has been given out, as the best reading has it now."""
        before = [*(phrase.text for phrase in self._held), *(text for text, _ in self._unread)]
        chosen = [*self._best, *self._reading.tail]
        return cut_at_stop("".join([*before, *self._along(chosen)]), self._stop)

    def finish(self) -> list[Phrase]:
        """The rest, when no step follows."""
        found = [*self._held, *self._read(math.inf), *self._last()]
        text = "".join(phrase.text for phrase in found)
        self._open, self._best, self._held = [], [], []
        return within(found, 0, len(cut_at_stop(text, self._stop)))

    def _along(self, path: Sequence[Chosen[Member]]) -> list[str]:
        """The text of each token on a path, of those that are read."""
        return texts_along([one.member.id for one in path if is_read(one.member)], self._tokenizer)

    def _close(self, cut: int) -> None:
        """The open sets up to a cut are a stretch, which waits to be read."""
        texts = self._along(self._best[:cut])
        best, layers, said = self._best[: cut + 1], self._layers[: cut + 1], self._texts[: cut + 1]
        self._unread.append(("".join(texts), self._phrases(best, texts, layers, said, self._start)))
        del self._open[:cut], self._best[:cut], self._layers[:cut], self._texts[:cut]
        self._start += cut

    def _phrases(
        self,
        best: Sequence[Chosen[Member]],
        along: Sequence[str],
        layers: Sequence[Layer[Member]],
        said: Sequence[list[str]],
        start: int,
    ) -> Pieces[list[Phrase]]:
        """The phrases of a stretch. along: the text of each token on the best path; said: of each member, alone."""
        texts, choice = iter(along), []
        for layer, alone, one in zip(layers, said, best, strict=True):
            choice.append(next(i for i, member in enumerate(layer.members) if member is one.member))
            if is_read(one.member) and layer is not layers[-1]:
                alone[choice[-1]] = next(texts)
            yield
        stretch = Stretch.of(layers, start, False, said)
        return (yield from phrases_of(stretch, choice, self._show_above))

    def _read(self, until: float) -> list[Phrase]:
        """The phrases of those stretches that have been read whole by then."""
        found: list[Phrase] = []
        while self._unread:
            _, pieces = self._unread[0]
            try:
                next(pieces)
            except StopIteration as end:
                found += end.value
                self._unread.popleft()
            if self._clock() >= until:
                break
        return found

    def _is_cut(self, index: int) -> bool:
        """As phrases.is_cut, of an open set whose member has no text yet. Were it a cut, the best path has settled."""
        (first, *others) = usable(self._open[index], last=False)
        return not others and is_read(first) and begins_word(self._tokenizer.token_text(first.id))

    def _last(self) -> list[Phrase]:
        """Of the open sets, which the text ends with."""
        if not self._open:
            return []
        records = texted([step.record(self._tokenizer) for step in self._open], self._tokenizer)[0]
        return phrases_along(layers_of(records), self._start, self._show_above)

    def _release(self, found: Sequence[Phrase]) -> list[Phrase]:
        """What of the settled text can become part of a stop string no more; forks stay whole."""
        self._held += found
        text = "".join(phrase.text for phrase in self._held)
        end = min(len(cut_at_stop(text, self._stop)), len(text) - self._hold)
        at = 0
        for phrase in self._held:
            at += len(phrase.text)
            if at > end:
                end = at - len(phrase.text) if phrase.alternatives else end
                break
        given, self._held = within(self._held, 0, end), within(self._held, end, len(text))
        return given


class GrowingAnswer:
    """Takes what has settled apart: the reasoning as text, the answer as phrases."""

    def __init__(self, splitter: Splitter) -> None:
        self._splitter = splitter

    def add(self, settled: Iterable[Phrase]) -> tuple[str, list[Phrase]]:
        """(reasoning, answer), as far as they are certain. A fork with a mark in it is plain text."""
        reasoning, answer = "", list[Phrase]()
        for phrase in settled:
            thought, said = self._splitter.add(phrase.text)
            reasoning += thought
            whole = said.endswith(phrase.text)
            before = said.removesuffix(phrase.text) if whole else said
            answer += [Phrase(before, None, (), phrase.start, phrase.end)] if before else []
            answer += [phrase] if whole else []
        return reasoning, answer

    def rest(self, tail: str) -> tuple[str, str]:
        """The same of what follows and may still change."""
        return copy.copy(self._splitter).add(tail)
