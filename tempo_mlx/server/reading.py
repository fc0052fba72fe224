"""The text of the most probable reading, as far as it can no longer change: what a token stream may send."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tempo_mlx.decode.step import Member, Step
from tempo_mlx.report.text import JointText, Tokenizer, is_shown

ROOT = None


@dataclass(frozen=True)
class Chosen:
    """One token of a reading; `logprob` was read from the row of slot `parent` (None: the prompt's last)."""

    member: Member
    parent: int | None
    logprob: float

    @property
    def shown(self) -> bool:
        """Whether the token's text is part of the final text."""
        return self.member.slot is not None and is_shown(self.member)


Path = list[Chosen]


class SettledReading:
    """Follows a superposed or plain run, and gives out the best path's tokens once no later step can change them.

    A set is settled when every path that is still open goes through one member of it, and when it lies more than
    `window` sets back, out of reach of retroactive pruning.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.anchor: int | None = ROOT  # slot of the last settled member
        self.open: list[Step] = []

    def add(self, step: Step) -> Path:
        """The tokens that `step` settles, hidden ones included."""
        self.open.append(step)
        paths = self._paths()
        count = 0
        while count < len(self.open) - self.window and len({id(path[count].member) for path in paths}) == 1:
            count += 1
        settled = paths[0][:count] if count else []
        if settled:
            self.anchor = settled[-1].member.slot
            del self.open[:count]
        return settled

    def _paths(self) -> list[Path]:
        """The best path to each member of the newest set, from the anchor on."""
        scores: dict[int | None, tuple[float, Path]] = {self.anchor: (0.0, [])}
        ended: list[Path] = []
        for index, step in enumerate(self.open):
            reached: dict[int | None, tuple[float, Path]] = {}
            for member in readable(step, newest=index + 1 == len(self.open)):
                options = [(scores[slot][0] + p, p, slot) for slot, p in forward(member) if slot in scores]
                if options:
                    score, logprob, parent = max(options, key=lambda option: option[0])
                    path = [*scores[parent][1], Chosen(member, parent, logprob)]
                    if member.slot is None:
                        ended.append(path)
                    else:
                        reached[member.slot] = (score, path)
            scores = reached
        return [path for _, path in scores.values()] + ended


def readable(step: Step, newest: bool) -> list[Member]:
    """Members a path may use; a set that shows none takes part with all (report/run.py, best_path)."""
    members = [member for member in step.tokens if is_shown(member)] or step.tokens
    return [member for member in members if newest or member.slot is not None]


def forward(member: Member) -> Sequence[tuple[int | None, float]]:
    """(slot of a parent, log P(member | parent)); the first set's parent is the prompt."""
    if not member.parents:
        return [(ROOT, _log(member.probability))]
    return [(edge.slot, _log(edge.forward)) for edge in member.parents]


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0.0 else -math.inf


class TextStream:
    """Tokens to text, holding back what may still become part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._joint = JointText(tokenizer)
        self._shown = False  # the token before the next one
        self._hold = max((len(text) for text in stop), default=1) - 1
        self._stop = stop
        self._text = ""
        self.sent = ""

    def add(self, tokens: Sequence[Chosen]) -> str:
        """What can be sent after these tokens."""
        for chosen in tokens:
            rest, text = self._joint.add(chosen.member.id)
            self._text += (rest if self._shown else "") + (text if chosen.shown else "")
            self._shown = chosen.shown
        end = min(
            (at for at in map(self._text.find, self._stop) if at >= 0), default=len(self._text) - self._hold
        )
        new = self._text[len(self.sent) : max(end, len(self.sent))]
        self.sent += new
        return new
