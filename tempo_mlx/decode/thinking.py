"""Deep thinking: reasoning between a model's marks (<think> and </think>, mostly), kept apart from the answer, and
closed when it takes long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tempo_mlx.weights.reasoning import THINK, Reasoning

# For models whose chat template has no switch: Cogito's own words, then what they mean.
SYSTEM_LINE = (
    "Enable deep thinking subroutine.\n"
    f"Think first, between {THINK.open} and {THINK.close}; then write only the answer."
)


class Tokenizer(Protocol):
    @property
    def reasoning(self) -> Reasoning: ...
    def encode(self, text: str, add_special: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str: ...


def is_open(prompt: str, marks: Reasoning = THINK) -> bool:
    """Whether a chat prompt ends inside a block of reasoning, as some templates leave it."""
    return prompt.rstrip().endswith(marks.open.rstrip())


def system_message(system: str | None) -> str:
    """A system message that asks for reasoning."""
    return SYSTEM_LINE if system is None else f"{SYSTEM_LINE}\n\n{system}"


class Splitter:
    """Splits text that arrives in pieces into reasoning and answer. A text that opens no block is all answer.

    A tag is never shown, nor the blanks around it.
    """

    def __init__(self, opened: bool, marks: Reasoning = THINK) -> None:
        self._marks = marks
        self._held = ""  # may be part of a tag, or blanks before one
        self._stage = "reasoning" if opened else "start"
        self._fresh = True  # nothing shown of this stage yet

    @property
    def reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as is known."""
        return self._stage == "reasoning"

    def add(self, text: str) -> tuple[str, str]:
        """What has become certain: (reasoning, answer)."""
        self._held += text
        reasoning = ""
        if self._stage == "start":
            start = self._held.lstrip()
            first, plain = self._marks.open, self._marks.answer
            if first.startswith(start) or (plain.startswith(start) and plain != start):
                return "", ""
            if start.startswith(first):
                self._stage, self._held = "reasoning", start[len(first) :]
            else:
                self._stage, self._fresh = "answer", False
                self._held = start[len(plain) :] if plain and start.startswith(plain) else self._held
        if self._stage == "reasoning":
            before, tag, after = self._held.partition(self._marks.close)
            if tag:
                reasoning = self._shown(before).rstrip()
                self._stage, self._held, self._fresh = "answer", after, True
            else:
                return self._shown(self._release(before)), ""
        held, self._held = self._held, ""
        return reasoning, self._shown(held)

    def finish(self) -> tuple[str, str]:
        """The rest, when no text follows."""
        held, self._held = self._held, ""
        return (self._shown(held).rstrip(), "") if self._stage == "reasoning" else ("", self._shown(held))

    def _release(self, text: str) -> str:
        """All but an end that may turn out to be blanks before the closing tag, or its beginning."""
        close = self._marks.close
        partial = max((n for n in range(len(close)) if text.endswith(close[:n])), default=0)
        kept = text[: len(text) - partial].rstrip()
        self._held = text[len(kept) :]
        return kept

    def _shown(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        return text


def split(text: str, opened: bool, marks: Reasoning = THINK) -> tuple[str | None, str]:
    """(reasoning, answer) of a whole text; None where there is no reasoning. opened: see `is_open`."""
    splitter = Splitter(opened, marks)
    (first, answer), (rest, last) = splitter.add(text), splitter.finish()
    reasoning = first + rest
    return reasoning or None, answer + last


class Budget:
    """Says which token must come next so that reasoning closes after `steps` tokens (a decoder's `guide`)."""

    def __init__(self, tokenizer: Tokenizer, steps: int, opened: bool) -> None:
        self.tokenizer = tokenizer
        self.steps = steps
        self.opened = opened
        self.closing = tokenizer.encode(tokenizer.reasoning.closing, add_special=False)

    def __call__(self, token_ids: Sequence[int]) -> int | None:
        """The forced token after these, None where the model may choose."""
        place = len(token_ids) - self.steps
        if not 0 <= place < len(self.closing):
            return None
        splitter = Splitter(self.opened, self.tokenizer.reasoning)
        splitter.add(self.tokenizer.decode(token_ids[: self.steps], continues=True))
        return self.closing[place] if splitter.reasoning else None
