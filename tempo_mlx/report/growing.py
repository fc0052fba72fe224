"""The phrases of a run that grows: what has settled, for good, and the rest as the best reading has it now.

A cut (report/phrases.py) that no removal can reach any more divides the lattice: what comes before it never changes.
So each stretch between two cuts is read once, when the second has settled, and a step costs no more in a long run.
"""

from __future__ import annotations

from collections.abc import Sequence

from tempo_mlx.decode.paths import Chosen, is_read, layers_of, usable
from tempo_mlx.decode.settled import SettledReading
from tempo_mlx.decode.step import Member, Step
from tempo_mlx.report.build import texted
from tempo_mlx.report.phrases import (
    SHOW_ABOVE,
    Phrase,
    TextSet,
    begins_word,
    phrases_along,
    phrases_of,
    within,
)
from tempo_mlx.report.stops import cut_at_stop
from tempo_mlx.report.text import REPLACEMENT, JointText, Tokenizer, texts_along


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
    ) -> None:
        self._tokenizer = tokenizer
        self._show_above = show_above
        self._window = window
        self._stop = stop
        self._hold = max(map(len, stop), default=1) - 1
        self._start = 0  # the step that the open ones begin with: a cut, or the first
        self._open: list[Step] = []
        self._best: list[Chosen[Member]] = []  # of the open sets, as far as the best path has settled
        self._reading: SettledReading[Member] = SettledReading(window)
        self._held: list[Phrase] = []

    def add(self, step: Step) -> list[Phrase]:
        """What `step` settles."""
        self._open.append(step)
        self._best += self._reading.add(step)
        if self._window is None:
            return []
        # The set before the newest was the last, whose members may end the text, and no longer is.
        index = len(self._open) - 1 - (self._window + 1 if self._window else 1)
        if index <= 0 or not self._is_cut(index):
            return []
        found = self._phrases(index)
        del self._open[:index], self._best[:index]
        self._start += index
        return self._release(found)

    def tail(self) -> str:
        """What follows what has been given out, as the best reading has it now."""
        chosen = [*self._best, *self._reading.tail]
        ids = [one.member.id for one in chosen if is_read(one.member)]
        held = "".join(phrase.text for phrase in self._held)
        return cut_at_stop(held + "".join(texts_along(ids, self._tokenizer)), self._stop)

    def finish(self) -> list[Phrase]:
        """The rest, when no step follows."""
        found = [*self._held, *(self._phrases(None) if self._open else [])]
        text = "".join(phrase.text for phrase in found)
        self._open, self._best, self._held = [], [], []
        return within(found, 0, len(cut_at_stop(text, self._stop)))

    def _is_cut(self, index: int) -> bool:
        """As phrases.is_cut, of an open set whose member has no text yet. Were it a cut, the best path has settled."""
        (first, *others) = usable(self._open[index], last=False)
        if others or not is_read(first):
            return False
        text = self._tokenizer.token_text(first.id)
        if REPLACEMENT in text:  # part of a character, which counts where it is whole
            joint = JointText(self._tokenizer)
            for chosen in self._best[: index + 1]:
                text = joint.add(chosen.member.id)[1] if is_read(chosen.member) else ""
        return begins_word(text)

    def _phrases(self, cut: int | None) -> list[Phrase]:
        """Of the open sets up to the next cut; of all, and the text ends with them."""
        steps = (
            self._open if cut is None else self._open[: cut + 2]
        )  # the set after it says that it is not the last
        records: Sequence[TextSet] = texted(
            [step.record(self._tokenizer) for step in steps], self._tokenizer
        )[0]
        layers = layers_of(records)
        if cut is None:
            return phrases_along(layers, self._start, self._show_above)
        return phrases_of(layers[: cut + 1], self._start, False, self._show_above)

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
