from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_mlx.decode.step import Removal, Step
from tempo_mlx.report.text import InlineStream, inline_set, make_label, texts_along
from tests.runs import EOS, WORDS, ByteTokenizer, make_run, members, sky_steps, step


def texts_of(*words: str) -> str:
    tokens = members({index + 1: 0.9 / (index + 1) for index in range(len(words))}, 3)
    return inline_set(tokens, words)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((" was", " is"), " [was/is]"),
        (("  was", " is"), " [ was/is]"),
        ((" was", "ing"), "[ was/ing]"),
        (("was",), "was"),
        ((" was",), " was"),
        (("\n\n", " "), "[\\n\\n/ ]"),
        (("\n", "\n\n"), "[\\n/\\n\\n]"),
        (("\n",), "\n"),
        ((" ", "  "), " [/ ]"),
        (("a\tb", "c\r"), "[a\\tb/c\\r]"),
    ],
)
def test_whitespace_of_a_set(words: tuple[str, ...], text: str) -> None:
    assert texts_of(*words) == text


def test_a_lone_end_prints_nothing_and_one_among_others_its_name() -> None:
    assert inline_set(members({EOS: 0.9}, 3), ["<eos>"]) == ""
    assert inline_set(members({EOS: 0.6, 6: 0.3}, 3), ["<eos>", "."]) == "[<eos>/.]"


def test_labels() -> None:
    tokens = members({1: 0.5, 2: 0.25}, 3)
    texts = [" was", " is"]
    assert make_label(False, False) is None
    assert inline_set(tokens, texts, make_label(True, False)) == " [was(1)/is(2)]"
    assert inline_set(tokens, texts, make_label(False, True)) == " [was(0.50)/is(0.25)]"
    assert inline_set(tokens[:1], texts[:1], make_label(True, True)) == " was(1, 0.50)"


def test_characters_split_over_tokens_are_whole() -> None:
    pieces = [bytes([b]) for b in "é€😀".encode()] + [b"a"]
    tokenizer = ByteTokenizer(pieces)
    assert texts_along(range(len(pieces)), tokenizer) == ["", "é", "", "", "€", "", "", "", "😀", "a"]
    assert texts_along([0, 9, 3], tokenizer) == ["\ufffd", "a", "\ufffd"]
    assert texts_along([], tokenizer) == []


@given(st.text(max_size=12), st.data())
def test_texts_along_join_to_the_text(text: str, data: st.DataObject) -> None:
    encoded = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(encoded) - 1, 1)), max_size=8)))
    edges = [0, *(cut for cut in cuts if cut < len(encoded)), len(encoded)]
    pieces = [encoded[a:b] for a, b in itertools.pairwise(edges)]
    assert "".join(texts_along(range(len(pieces)), ByteTokenizer(pieces))) == text


def drain(steps: list[Step], window: int | None) -> list[str]:
    stream = InlineStream(WORDS, window=window)
    parts = ["".join(piece.text for piece in stream.add(s)) for s in steps]
    return [*parts, "".join(piece.text for piece in stream.finish())]


def test_without_pruning_every_set_is_settled_at_once() -> None:
    steps = sky_steps()
    parts = drain(steps, window=0)
    assert parts == [" [was/is]", "[ blue/ish]", " today", "[./<eos>]", ""]
    assert "".join(parts) == make_run(steps).text


def test_a_set_waits_while_a_removal_may_reach_it() -> None:
    steps = [
        step(i, members({1: 0.5, 2: 0.4}, 3 + 2 * i, [] if i == 0 else [1 + 2 * i, 2 + 2 * i]))
        for i in range(5)
    ]
    stream = InlineStream(WORDS, window=2)
    seen = []
    for s in steps:
        if s.step == 3:  # set 2 was run: sets 0 and 1 were weighed
            removed = steps[1].tokens[1]
            removed.removed_after, removed.removed_why = 2, Removal("posterior", 0.0, 0.1)
        seen.append("".join(piece.text for piece in stream.add(s)))
    # At step t rows of set t are still to come, which weigh sets t-2 and later.
    assert seen == ["", "", "", " [was/is] was", ""]
    assert "".join(p.text for p in stream.pending()) == " [was/is] [was/is] [was/is]"
    assert "".join(p.text for p in stream.finish()) == " [was/is] [was/is] [was/is]"
    assert stream.pending() == []


def test_single_members_do_not_wait_but_keep_their_order() -> None:
    steps = sky_steps()
    steps[1].tokens[1].removed_after = steps[1].tokens[1].removed_why = None
    assert drain(steps[2:3], window=8) == [" today", ""]
    assert drain([steps[0], steps[2]], window=8) == ["", "", " [was/is] today"]


def test_a_rule_of_the_users_may_reach_anything() -> None:
    steps = [step(i, members({1: 0.5, 2: 0.4}, 3 + 2 * i)) for i in range(20)]
    assert "".join(drain(steps, window=None)[:-1]) == ""


def test_a_stream_holds_back_half_a_character() -> None:
    halves = [
        step(0, members({9: 0.9}, 3)),
        step(1, members({10: 0.9}, 4, [3])),
        step(2, members({9: 0.9}, 5, [4])),
    ]
    assert drain(halves, window=0) == ["", "€", "", "\ufffd"]
