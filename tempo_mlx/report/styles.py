"""How text looks on a terminal: what is dim and what is coloured.

The colours are the terminal's own, so that they suit a light and a dark background. Alternatives have one hue, the
paler the smaller their share; without colours brackets and slashes say the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.text import Text

from tempo_mlx.decode.paths import is_usable
from tempo_mlx.report.phrases import Phrase
from tempo_mlx.report.safe import isolated, printable
from tempo_mlx.report.text import Piece

SHADES = ((0.6, "green"), (0.3, "cyan"), (0.15, "yellow"), (0.05, "magenta"), (0.0, "red"))  # least, colour
SHARES = ((0.25, "cyan"), (0.0, "dim cyan"))
REMOVED_STYLE = "strike dim"
MARK_STYLE = "dim"
LEGEND = "[best/other]: what else was probable, in whole words; the paler, the less."
LISTED = "Shares are of these texts together; coloured is what the first has not."


class Bit(NamedTuple):
    """Text with a style. alone: it stands among others, and its direction must not carry them along.

    fork: the phrase with alternatives that this is a part of.
    """

    text: str
    style: str = ""
    alone: bool = False
    fork: Phrase | None = None


def drawn(bits: Iterable[Bit]) -> Text:
    """For a terminal."""
    result = Text()
    for bit in bits:
        result.append(isolated(bit.text) if bit.alone else printable(bit.text), bit.style)
    return result


def raw(bits: Iterable[Bit]) -> str:
    """For a pipe or a file: character for character."""
    return "".join(bit.text for bit in bits)


def styled(stretch: Iterable[Piece]) -> list[Bit]:
    """Members of a set with alternatives are coloured, a lone token is plain."""
    result: list[Bit] = []
    marked = False
    for piece in stretch:
        if piece.token is None:
            marked = piece.text.endswith(("[", "/"))
            result.append(Bit(piece.text, MARK_STYLE))
        elif not is_usable(piece.token):
            result.append(Bit(piece.text, REMOVED_STYLE, True))
        elif piece.label:
            result.append(Bit(piece.text, MARK_STYLE))
        elif marked:
            result.append(Bit(piece.text, shade(piece.token.probability, SHADES), True))
        else:
            result.append(Bit(piece.text))
    return result


def styled_phrases(found: Iterable[Phrase], shares: bool = False) -> list[Bit]:
    """`a [soft/very soft] light`. shares: with a number after each."""
    result: list[Bit] = []
    for phrase in found:
        if not phrase.alternatives:
            result.append(Bit(phrase.text))
            continue
        choices = [(phrase.text, phrase.share or 0.0, "")]
        choices += [(a.text, a.share, shade(a.share, SHARES)) for a in phrase.alternatives]
        for index, (text, share, style) in enumerate(choices):
            result.append(Bit("/" if index else "[", MARK_STYLE, fork=phrase))
            result.append(Bit(one_line(text) if index else text, style, True, phrase))
            if shares:
                result.append(Bit(f" {share:.2f}", MARK_STYLE, fork=phrase))
        result.append(Bit("]", MARK_STYLE, fork=phrase))
    return result


def one_line(text: str) -> str:
    """An alternative within a line of the best text: its own line breaks are marked."""
    return re.sub(r"[ \t]*\n\s*", " \u21b5 ", text).replace("\t", "\\t")


def shade(value: float, shades: Sequence[tuple[float, str]]) -> str:
    """The colour of a share; of what is under all of them, as in a file that lies, the last one."""
    return next((colour for least, colour in shades if value >= least), shades[-1][1])
