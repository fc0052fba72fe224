"""Control tokens that a user's text spells, kept apart from those that the chat template writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode keeps them free for inner use


class Quoting:
    """`messages`: the conversation with a mark in the place of every token that a message spells.

    What the model wrote itself stays as it is: templates look for its reasoning.
    """

    def __init__(self, tokens: Iterable[str], messages: Sequence[Mapping[str, Any]]) -> None:
        ordered = sorted((token for token in tokens if token), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        used = json.dumps(list(messages), ensure_ascii=False, default=str)
        self._open, self._close = [mark for mark in _NONCHARACTERS if mark not in used][:2] or ("", "")
        self._marks = re.compile(f"{self._open}([0-9]+){self._close}")
        self._found: list[str] = []
        self.messages = [
            dict(each) if each.get("role") == "assistant" or not self._open else self._quoted(each)
            for each in messages
        ]

    def text(self, rendered: str) -> str:
        """What the template made of the conversation, with the tokens in their places again."""
        return (
            self._marks.sub(lambda match: self._found[int(match[1])], rendered) if self._found else rendered
        )

    def encode(
        self,
        rendered: str,
        ordinary: Callable[[str], list[int]],
        literal: Callable[[str, bool], list[int]],
    ) -> list[int]:
        """The token ids. ordinary: encodes text in which tokens are meant; literal: a stretch between two tokens in
        which none is, and whether it is the first."""
        if not self._found:
            return ordinary(rendered)
        ids: list[int] = []
        start = 0  # of what is ordinary and not encoded yet
        for begin, stop in self._stretches(rendered):
            if self._marks.search(rendered, begin, stop):
                ids += ordinary(rendered[start:begin]) if begin > start else []
                ids += literal(self.text(rendered[begin:stop]), begin == 0)
                start = stop
        return ids + (ordinary(rendered[start:]) if start < len(rendered) else [])

    def _stretches(self, rendered: str) -> Iterable[tuple[int, int]]:
        """Where text stands between the tokens that the template wrote."""
        start = 0
        for match in self._tokens.finditer(rendered):
            yield start, match.start()
            start = match.end()
        yield start, len(rendered)

    def _quoted(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._tokens.sub(self._mark, value)
        if isinstance(value, Mapping):
            return {key: each if key == "role" else self._quoted(each) for key, each in value.items()}
        return [self._quoted(each) for each in value] if isinstance(value, (list, tuple)) else value

    def _mark(self, match: re.Match[str]) -> str:
        self._found.append(match[0])
        return f"{self._open}{len(self._found) - 1}{self._close}"
