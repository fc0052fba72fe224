"""The inline text: `The capital of France is [Paris/known/located] ...`.

What a set shows is decided here for every output: members still alive, best first; where a whole set was
removed, the member kept for the text (`keep_unattended`), or nothing. One such member reads as plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tempo_mlx.decode.paths import Token, is_usable
from tempo_mlx.decode.step import Step

REPLACEMENT = "\ufffd"  # stands for bytes that are no whole character


class Detokenizer(Protocol):
    @property
    def open(self) -> bool: ...
    def add(self, token_id: int, /) -> str: ...
    def finish(self) -> str: ...


class Tokenizer(Protocol):
    def token_text(self, token_id: int, /) -> str: ...
    def detokenizer(self, *, continues: bool = False) -> Detokenizer: ...


Label = Callable[[Token], str]


class JointText:
    """Texts of the tokens of a sequence, one by one, so that joined they are the text of the sequence.

    A token that ends inside a character has no text of its own: what it says goes to the token that completes the
    character. So a token begins inside one if, and only if, the text of the one before it is empty. Bytes that never
    become a character read as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._open: Detokenizer | None = None
        self._held = ""

    def add(self, token: int) -> tuple[str, str]:
        """(what is to be said of bytes left over from earlier tokens, the text of this one)."""
        text = self._tokenizer.token_text(token)
        if REPLACEMENT not in text:
            return self.finish(), text
        if self._open is None:
            self._open = self._tokenizer.detokenizer(continues=True)
        text = self._held + self._open.add(token)
        self._held = text if self._open.open else ""
        return "", "" if self._open.open else text

    def finish(self) -> str:
        rest = self._held + self._open.finish() if self._open is not None else ""
        self._open, self._held = None, ""
        return rest


def texts_along(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token of a sequence; joined, they are the text of the sequence (JointText)."""
    joint = JointText(tokenizer)
    texts: list[str] = []
    for token in ids:
        rest, text = joint.add(token)
        if rest:
            texts[-1] += rest
        texts.append(text)
    if texts:
        texts[-1] += joint.finish()
    return texts


@dataclass(frozen=True)
class Piece:
    """A stretch of inline text: a member's text, its label, or (token None) marks and blanks between them."""

    text: str
    token: Token | None = None
    label: bool = False


def pieces(
    tokens: Sequence[Token], texts: Sequence[str], *, removed: bool = False, label: Label | None = None
) -> list[Piece]:
    """One set, best first, as pieces. `removed`: with its removed members; `label`: text after each member.

    Whitespace that all members begin with stands before the bracket, so `[ was/ is]` reads ` [was/is]`;
    other line breaks and tabs among alternatives are written `\\n`, `\\t`. A lone end-of-text token prints
    nothing.
    """
    members = [pair for pair in zip(tokens, texts, strict=True) if removed or is_usable(pair[0])]
    if not members or (len(members) == 1 and members[0][0].slot is None):
        return []
    result: list[Piece] = []
    if len(members) == 1:
        token, text = members[0]
        result.append(Piece(text, token))
        if label is not None:
            result.append(Piece(label(token), token, label=True))
        return result
    lead = common_lead([text for _, text in members])
    result.append(Piece(lead + "["))
    for index, (token, text) in enumerate(members):
        if index:
            result.append(Piece("/"))
        result.append(Piece(visible_whitespace(text[len(lead) :]), token))
        if label is not None:
            result.append(Piece(label(token), token, label=True))
    result.append(Piece("]"))
    return result


def common_lead(texts: Sequence[str]) -> str:
    """The blanks that all texts begin with."""
    blanks = min(len(text) - len(text.lstrip(" ")) for text in texts)
    return " " * blanks


def visible_whitespace(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def inline_set(tokens: Sequence[Token], texts: Sequence[str], label: Label | None = None) -> str:
    """One set as text."""
    return "".join(piece.text for piece in pieces(tokens, texts, label=label))


def make_label(show_token_ids: bool, show_probabilities: bool) -> Label | None:
    """What is written after each member, like `(464, 0.31)`; None for nothing."""
    if not show_token_ids and not show_probabilities:
        return None

    def label(token: Token) -> str:
        parts = [str(token.id)] if show_token_ids else []
        if show_probabilities:
            parts.append(f"{token.probability:.2f}")
        return f"({', '.join(parts)})"

    return label


class InlineStream:
    """Inline text of steps that arrive one by one, in two parts: settled, and still open to removals.

    A removal changes sets that were chosen earlier, so only text that no removal can reach any more may be
    printed for good: sets more than `window` before the newest one, and sets with fewer than two alive
    members, which are never weighed. `window`: how far back retroactive pruning looks; 0 without it; None
    where any set may change until the end (a user's own rule). The steps' members are read again at every
    call, since removals are recorded in them.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, window: int | None, removed: bool = False, label: Label | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._window = window
        self._removed = removed
        self._label = label
        self._joint = JointText(tokenizer)
        self._open: list[Step] = []

    def add(self, step: Step) -> list[Piece]:
        """What has settled by the arrival of `step`."""
        self._open.append(step)
        result: list[Piece] = []
        while self._open and self._is_settled(self._open[0], step.step):
            result += self._pieces(self._open.pop(0), self._joint)
        return result

    def pending(self) -> list[Piece]:
        """The sets that may still change, as they are now."""
        joint = JointText(self._tokenizer)
        return [piece for step in self._open for piece in self._pieces(step, joint)]

    def finish(self) -> list[Piece]:
        """The rest, when no step follows."""
        result = [piece for step in self._open for piece in self._pieces(step, self._joint)]
        self._open = []
        rest = self._joint.finish()
        return [*result, Piece(rest)] if rest else result

    def _is_settled(self, step: Step, newest: int) -> bool:
        if self._window == 0 or sum(t.removed_after is None and t.slot is not None for t in step.tokens) < 2:
            return True
        return self._window is not None and step.step < newest - self._window

    def _pieces(self, step: Step, joint: JointText) -> list[Piece]:
        """The best shown member continues the text before it; the others stand alone."""
        texts = [self._tokenizer.token_text(token.id) for token in step.tokens]
        rest = ""
        first = next((index for index, token in enumerate(step.tokens) if is_usable(token)), None)
        if first is not None:
            rest, texts[first] = joint.add(step.tokens[first].id)
        result = pieces(step.tokens, texts, removed=self._removed, label=self._label)
        return [Piece(rest), *result] if rest else result
