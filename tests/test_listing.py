"""Several texts on a terminal, and texts that could do something to it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from tempo_mlx.report.listing import common_front, listing
from tempo_mlx.report.phrases import Alternative, Phrase
from tempo_mlx.report.records import RunPath
from tempo_mlx.report.safe import isolated, printable
from tempo_mlx.report.styles import Bit, drawn, raw, styled_phrases
from tempo_mlx.report.texts import listed


def path(text: str, logprob: float) -> RunPath:
    return RunPath((1, round(-100 * logprob)), text, logprob, True)


def shown(texts: list[RunPath], width: int, prompt: str = "", probabilities: bool = False) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None)
    console.print(listing(listed(texts), prompt, probabilities))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_each_text_is_listed_once_with_its_share() -> None:
    found = listed([path(" a", -2.0), path(" b", -1.0), path("a \n", -1.5), path(" a", -2.0)])
    assert [text.text for text in found] == [" b", "a \n"]
    e = 2.718281828459045
    total = e**-2 + e**-1 + e**-1.5
    assert [text.share for text in found] == pytest.approx([e**-1 / total, (e**-2 + e**-1.5) / total])
    assert found[1].log_prob == -1.5 and found[1].log_mass == pytest.approx(math.log(e**-2 + e**-1.5))


def test_which_texts_read_the_same() -> None:
    """The page's tests read the same cases."""
    for case in json.loads(Path(__file__).with_name("texts.json").read_text()):
        paths = [RunPath((at,), text, logprob, True) for at, (text, logprob) in enumerate(case["paths"])]
        found = {(text.text, text.log_prob) for text in listed(paths)}
        assert found == {(paths[at].text, paths[at].logprob) for at in case["listed"]}, case["name"]


@pytest.mark.parametrize(
    ("texts", "front"),
    [
        ([" tired boy", " tirelessly"], ""),
        ([" a tired boy", " a tirelessly"], " a"),
        ([" Hello, you", " Hello there"], " Hello"),
        ([" the dog's", " the dog"], " the"),
        ([" one two", " one two"], " one two"),
        (["天空", "天气"], "天"),
        ([" a\nb", " a\nc"], " a"),
    ],
)
def test_what_texts_share_is_whole_words(texts: list[str], front: str) -> None:
    assert common_front(texts) == front


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_texts_are_wrapped_at_words_after_what_they_share(width: int) -> None:
    texts = [
        path(" there was a boy who worked tirelessly" + " on and on" * 12 + end, -1.0) for end in (" a", " b")
    ]
    lines = shown(texts, width, "Once upon a time")
    assert lines[0].startswith("Once upon a time there was")
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    front = "Once upon a time there was a boy who worked tirelessly" + " on and on" * 12
    assert words == [*front.split(), "1.", "50%", "a", "2.", "50%", "b"]


def test_numbers_are_shown_where_asked_and_one_text_stands_alone() -> None:
    assert shown([path(" a dog", -1.0)], 40) == [" a dog"]
    assert shown([path(" a", -1.0), path(" b", -9.0)], 60, probabilities=True) == [
        "1. 100% a (-1.00, -0.500 a token)",
        "2.  <1% b (-9.00, -4.500 a token)",
    ]


def test_the_prompt_is_dim_and_what_texts_share_is_not() -> None:
    file = io.StringIO()
    Console(file=file, width=60, force_terminal=True, color_system="standard", _environ={}).print(
        listing(listed([path(" a big dog", -1.0), path(" a red dog", -2.0)]), "Once")
    )
    assert file.getvalue().startswith("\x1b[2mOnce\x1b[0m a\n")


def test_what_differs_from_the_best_is_marked() -> None:
    file = io.StringIO()
    Console(file=file, width=60, force_terminal=True, color_system="standard", _environ={}).print(
        listing(listed([path(" a big dog", -1.0), path(" a red dog", -2.0)]))
    )
    assert "\x1b[36mred\x1b[0m dog" in file.getvalue() and "\x1b[36mbig" not in file.getvalue()


HEBREW = "\u05e9\u05dc\u05d5\u05dd"


def test_text_that_runs_the_other_way_stays_in_its_place() -> None:
    fork = Phrase(HEBREW, 0.6, (Alternative("peace", 0.4, (1,)),), 0, 1)
    bits = styled_phrases([fork])
    assert drawn(bits).plain == f"[\u2068{HEBREW}\u2069/peace]"
    assert raw(bits) == f"[{HEBREW}/peace]"
    assert f"\u2068{HEBREW}\u2069" in " ".join(shown([path(HEBREW, -1.0), path("peace", -2.0)], 40))
    assert isolated("peace") == "peace"


def test_nothing_that_is_shown_drives_the_terminal() -> None:
    assert printable("a\u202eb\u2066c\x1b[2J\x9b") == "a\ufffdb\ufffdc␛[2J\ufffd"
    assert "\x1b" not in drawn([Bit("\x1b[2J"), Bit("\x07", alone=True)]).plain
    assert not any(
        "\x1b" in line for line in shown([path("\x1b[2J a", -1.0), path("b\x07", -2.0)], 40, "\x1b]0;x")
    )


def test_the_best_text_keeps_its_lines_and_alternatives_stay_on_one() -> None:
    fork = Phrase('"""\n    Check', 0.6, (Alternative("if n:\n\n    return\tn", 0.4, (1,)),), 0, 1)
    assert raw(styled_phrases([fork])) == '["""\n    Check/if n: \u21b5 return\\tn]'
