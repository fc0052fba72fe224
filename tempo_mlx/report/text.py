"""The inline text: `The capital of France is [Paris/known/located] ...`.

What a set shows is decided here for every output: members still alive, best first; where a whole set was removed,
the member kept for the text (`keep_unattended`), or nothing. A set with one such member reads as plain text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from tempo_mlx.decode.step import Removal

REPLACEMENT = "\ufffd"  # stands for bytes that are no whole character


class Shown(Protocol):
    """The part of a member that decides whether it is shown (decode.step.Member, report.run.RunToken)."""

    @property
    def id(self) -> int: ...
    @property
    def slot(self) -> int | None: ...
    @property
    def removed_after(self) -> int | None: ...
    @property
    def removed_why(self) -> Removal | None: ...


class Detokenizer(Protocol):
    def add(self, token_id: int) -> str: ...
    def finish(self) -> str: ...


class Tokenizer(Protocol):
    def token_text(self, token_id: int) -> str: ...
    def detokenizer(self) -> Detokenizer: ...


Token = TypeVar("Token", bound=Shown)


def is_shown(token: Shown) -> bool:
    """Alive, or removed but kept as its set's token in the text."""
    unattended = token.removed_why is not None and token.removed_why.unattended
    return token.removed_after is None or unattended


def shown(tokens: Iterable[Token]) -> list[Token]:
    return [token for token in tokens if is_shown(token)]


def texts_along(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token of a sequence; joined, they are the text of the sequence.

    A token that holds only part of a character has no text of its own: the character goes to the token that
    completes it. Bytes that never become a character read as U+FFFD.
    """
    texts = [tokenizer.token_text(token) for token in ids]
    start = 0
    while start < len(texts):
        end = start
        while end < len(texts) and REPLACEMENT in texts[end]:
            end += 1
        if end - start > 1:
            joint = tokenizer.detokenizer()
            texts[start:end] = [joint.add(token) for token in ids[start:end]]
            texts[end - 1] += joint.finish()
        start = max(end, start + 1)
    return texts


def alternatives(texts: Sequence[str]) -> tuple[str, list[str]]:
    """Texts of one set -> the whitespace they all begin with, and what follows it, made visible where it is blank.

    So `[ was/ is]` reads ` [was/is]`, and a line break among alternatives cannot break the line.
    """
    lead = texts[0][: len(texts[0]) - len(texts[0].lstrip())]
    for text in texts[1:]:
        while not text.startswith(lead):
            lead = lead[:-1]
    if "\n" in lead:
        lead = ""
    return lead, [visible_whitespace(text[len(lead) :]) for text in texts]


def visible_whitespace(text: str) -> str:
    for character, name in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, name)
    return text


def inline_set(tokens: Sequence[Shown], texts: Sequence[str]) -> str:
    """One set as text: `tokens` are those shown, best first. A lone end-of-text token prints nothing."""
    if not tokens:
        return ""
    if len(tokens) == 1:
        return "" if tokens[0].slot is None else texts[0]
    lead, rest = alternatives(texts)
    return f"{lead}[{'/'.join(rest)}]"
