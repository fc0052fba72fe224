"""What of a growing run is shown, in bits with a style: phrases, the best text alone, or the sets as brackets.

A view is given the steps as they come. What it gives back of them is settled and never changes; `pending` is the rest
as it is now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tempo_mlx.decode.paths import Chosen, is_read
from tempo_mlx.decode.settled import SettledReading
from tempo_mlx.decode.step import Member, Step
from tempo_mlx.report.growing import GrowingPhrases
from tempo_mlx.report.phrases import SHOW_ABOVE, Phrase
from tempo_mlx.report.stops import TextStream, cut_at_stop, inline_stream
from tempo_mlx.report.styles import LEGEND, Bit, styled, styled_phrases
from tempo_mlx.report.text import Label, Tokenizer, texts_along

ViewName = Literal["phrases", "text", "sets"]


class View(Protocol):
    """A way to show a run that grows."""

    @property
    def legend(self) -> str:
        """What a reader must know of what was shown; empty where it speaks for itself."""
        ...

    def add(self, step: Step) -> list[Bit]: ...
    def pending(self) -> list[Bit]: ...
    def finish(self) -> list[Bit]: ...


@dataclass(frozen=True)
class Look:
    """How runs are shown. window: see SettledReading; removed: with members struck through that were removed."""

    view: ViewName
    show_above: float = SHOW_ABOVE
    shares: bool = False
    label: Label | None = None
    removed: bool = False

    def view_of(self, tokenizer: Tokenizer, window: int | None, stop: Sequence[str] = ()) -> View:
        if self.view == "sets":
            return SetsView(self, tokenizer, window, stop)
        if self.view == "phrases":
            return PhraseView(self, tokenizer, window, stop)
        return TextView(tokenizer, window, stop)


class PhraseView:
    """Settled phrases, and dim what may still change, as plain text of the best reading."""

    def __init__(self, look: Look, tokenizer: Tokenizer, window: int | None, stop: Sequence[str]) -> None:
        self._look = look
        self._growing = GrowingPhrases(tokenizer, window, look.show_above, stop)
        self.legend = ""

    def add(self, step: Step) -> list[Bit]:
        return self._shown(self._growing.add(step))

    def pending(self) -> list[Bit]:
        return [Bit(self._growing.tail(), "dim")]

    def finish(self) -> list[Bit]:
        return self._shown(self._growing.finish())

    def _shown(self, found: Sequence[Phrase]) -> list[Bit]:
        if any(phrase.alternatives for phrase in found):
            self.legend = LEGEND
        return styled_phrases(found, self._look.shares)


class TextView:
    """The best reading alone, character for character."""

    legend = ""

    def __init__(self, tokenizer: Tokenizer, window: int | None, stop: Sequence[str]) -> None:
        self._reading: SettledReading[Member] = SettledReading(window)
        self._text = TextStream(tokenizer, stop)
        self._tokenizer, self._stop = tokenizer, stop

    def add(self, step: Step) -> list[Bit]:
        return [Bit(self._text.add(_ids(self._reading.add(step))))]

    def pending(self) -> list[Bit]:
        tail = self._text.held + "".join(texts_along(_ids(self._reading.tail), self._tokenizer))
        return [Bit(cut_at_stop(tail, self._stop), "dim")]

    def finish(self) -> list[Bit]:
        return [Bit(self._text.add(_ids(self._reading.tail)) + self._text.finish())]


class SetsView:
    """Every set as `[A/B]`, as the original has it."""

    legend = ""

    def __init__(self, look: Look, tokenizer: Tokenizer, window: int | None, stop: Sequence[str]) -> None:
        how = {"window": window, "removed": look.removed, "label": look.label}
        self._stream = inline_stream(tokenizer, stop, **how)

    def add(self, step: Step) -> list[Bit]:
        return styled(self._stream.add(step))

    def pending(self) -> list[Bit]:
        return styled(self._stream.pending())

    def finish(self) -> list[Bit]:
        return styled(self._stream.finish())


def _ids(path: Sequence[Chosen[Member]]) -> list[int]:
    return [chosen.member.id for chosen in path if is_read(chosen.member)]
