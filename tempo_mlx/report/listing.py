"""Finished runs on a terminal: a lattice as one text, several texts as a list with their shares.

    Once upon a time, there was a little
    1. 46%  girl named Lily. She loved to play outside
    2. 31%  boy named Tim. He loved to play outside

What the texts begin with alike stands once, before them; the words that a text has and the best one has not are
marked. A share is a text's probability as part of those listed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tempo_mlx.report.phrases import UNSPACED, WORD, phrases_in
from tempo_mlx.report.run import Run
from tempo_mlx.report.safe import isolated, printable
from tempo_mlx.report.styles import MARK_STYLE, Bit, styled, styled_phrases
from tempo_mlx.report.text import pieces
from tempo_mlx.report.texts import ListedText
from tempo_mlx.report.views import Look

MARKED_STYLE = "cyan"
INSIDE = re.compile(rf"[^\W{UNSPACED}]|['’]")  # what words go on with


def run_bits(run: Run, look: Look) -> list[Bit]:
    """A lattice as one text."""
    if look.view == "text":
        return [Bit(run.final_text)]
    if look.view == "phrases":
        return styled_phrases(phrases_in(run.steps, run.final_text, look.show_above), look.shares)
    result: list[Bit] = []
    for step in run.steps:
        texts = [token.text for token in step.tokens]
        result += styled(pieces(step.tokens, texts, removed=look.removed, label=look.label))
    return result


def common_front(texts: Sequence[str]) -> str:
    """What all begin with, in whole words."""
    least, most = min(texts), max(texts)
    length = next((at for at, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
    front = least[:length]
    if INSIDE.search(front[-1:]) and any(INSIDE.match(text[len(front) :]) for text in texts):
        front = re.sub(r"\S*$", "", front)
    return front.rstrip()


def listing(texts: Sequence[ListedText], prompt: str = "", probabilities: bool = False) -> Group:
    """What they have in common, after the prompt, and then each text, wrapped at words."""
    front = common_front([one.text for one in texts]) if len(texts) > 1 else ""
    head = Text().append(printable(prompt), MARK_STYLE).append(printable(front))
    rests = [one.text[len(front) :].strip() for one in texts]
    best = WORD.findall(rests[0])
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for number, (one, rest) in enumerate(zip(texts, rests, strict=True), 1):
        share = f"{one.share:.0%}" if one.share >= 0.005 else "<1%"
        number_of = Text(f"{number}. {share:>4}" if len(texts) > 1 else "", MARK_STYLE)
        text = marked(rest, best)
        if probabilities:
            mean = one.log_prob / max(one.tokens, 1)
            text.append(f" ({one.log_prob:.2f}, {mean:.3f} a token)", MARK_STYLE)
        table.add_row(number_of, text)
    return Group(*([head] if head else []), table)


def marked(text: str, best: Sequence[str]) -> Text:
    """The text, with those of its words marked that the best text has not in their place."""
    result = Text(isolated(text) or "(nothing)", "" if text else MARK_STYLE)
    offset = 1 if result.plain != text and result.plain[:1] == "\u2068" else 0
    spans = [match.span() for match in WORD.finditer(text)]
    words = [text[start:end] for start, end in spans]
    for step in Levenshtein.opcodes(best, words):
        for start, end in spans[step.dest_start : step.dest_end] if step.tag != "equal" else ():
            result.stylize(MARKED_STYLE, start + offset, end + offset)
    return result
