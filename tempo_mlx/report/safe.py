"""Text from elsewhere, such as a model's, that shall not drive the terminal it is written to. Imports nothing heavy."""

from __future__ import annotations

import unicodedata

# Control characters, which could drive the terminal, as visible symbols; line breaks and tabs stay. So the marks that
# change the direction of all that follows them.
_CONTROLS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
    0x7F: 0x2421,
}
_ISOLATE, _END_ISOLATE = "\u2068", "\u2069"


def printable(text: str) -> str:
    """Text that cannot drive the terminal."""
    return text.translate(_CONTROLS)


def isolated(text: str) -> str:
    """Printable text that leaves the order of what stands around it alone, should it run from right to left."""
    text = printable(text)
    if text.isascii() or not any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text):
        return text
    return f"{_ISOLATE}{text}{_END_ISOLATE}"
