"""A run as a notebook shows it: a lattice as phrases, several texts as a list with their shares."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from tempo_mlx.report.phrases import Phrase
from tempo_mlx.report.texts import ListedText


def run_html(prompt: str, phrases: Iterable[Phrase], texts: Sequence[ListedText]) -> str:
    """The prompt, dim, and what follows it. Text is escaped, and kept from turning the line's direction around."""
    begin = f'<span style="opacity:.6">{escaped(prompt)}</span>'
    listed = "".join(f"<li>{percent(one.share)} {escaped(one.text)}</li>" for one in texts)
    parts = [begin, *map(phrase_html, phrases), f"<ol>{listed}</ol>" if texts else ""]
    return f'<div style="white-space:pre-wrap">{"".join(parts)}</div>'


def phrase_html(phrase: Phrase) -> str:
    """Plain text, or a fork as [best/other], the others shaded by their share, which the tooltip says."""
    if not phrase.alternatives:
        return escaped(phrase.text)
    best = escaped(phrase.text) if phrase.share is None else tipped(phrase.text, phrase.share, "")
    others = [
        tipped(
            one.text,
            one.share,
            f"background:color-mix(in srgb, #4a90d9 {round(15 + 60 * one.share)}%, transparent)",
        )
        for one in phrase.alternatives
    ]
    return f"[{'/'.join([best, *others])}]"


def tipped(text: str, share: float, style: str) -> str:
    return f'<span title="{percent(share)}" style="{style}">{escaped(text)}</span>'


def escaped(text: str) -> str:
    return f"<bdi>{html.escape(text)}</bdi>"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "&lt;1%"
