"""Stop strings: found when they are complete, wherever token boundaries lie, at a cost that does not grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_mlx.decode.settled import SettledReading
from tempo_mlx.decode.step import Member, Step
from tempo_mlx.report.stops import Stops, StopWatch, TextStream, cut_at_stop, inline_stream
from tempo_mlx.report.text import texts_along
from tests.readings import TOKENIZER, lattice
from tests.runs import WORDS, ByteTokenizer, make_run, members, sky_steps, step

ids = st.lists(st.integers(0, len(TOKENIZER.pieces) - 1), max_size=12)
strings = st.lists(st.text("wasix \n\t€", min_size=1, max_size=4), max_size=2)


def text_of(tokens: Sequence[int]) -> str:
    return "".join(texts_along(tokens, TOKENIZER))


@given(ids, strings, st.data())
@settings(deadline=None)
def test_a_string_is_found_with_the_token_that_completes_it(
    tokens: list[int], stop: list[str], data: st.DataObject
) -> None:
    if whole := text_of(tokens):
        start = data.draw(st.integers(0, len(whole) - 1))
        stop = [*stop, whole[start : start + data.draw(st.integers(1, 6))]]
    stops = Stops(TOKENIZER, stop)
    for length in range(1, len(tokens) + 1):
        text = text_of(tokens[:length])
        found = cut_at_stop(text, stop) != text
        assert stops(reversed(tokens[:length]), new=length) == found
        if "\ufffd" not in text:  # the bytes of half a character are read anew with each further token
            assert stops(reversed(tokens[:length])) == found
        if found:
            return


@given(ids, strings)
@settings(deadline=None)
def test_what_a_stream_has_said_is_the_text_up_to_a_string(tokens: list[int], stop: list[str]) -> None:
    stream, said = TextStream(TOKENIZER, stop), ""
    for place, token in enumerate(tokens):
        said += stream.add([token])
        text = cut_at_stop(text_of(tokens[: place + 1]), stop)
        assert text.startswith(said) or "\ufffd" in text
    if "\ufffd" not in text_of(tokens):
        whole = text_of(tokens)
        cut = cut_at_stop(whole, stop)
        held = max(map(len, stop), default=1) - 1
        assert said == (cut if cut != whole else whole[: max(len(whole) - held, 0)])


@given(st.integers(0, 10**6), strings)
@settings(deadline=None)
def test_a_lattice_ends_where_its_best_path_holds_a_string(seed: int, stop: list[str]) -> None:
    random = np.random.default_rng(seed)
    steps = lattice(lambda options: options[int(random.integers(len(options)))])
    watch = StopWatch(Stops(TOKENIZER, stop), None)
    for length in range(1, len(steps) + 1):
        seen = [
            Step(
                s.step, s.position, s.threshold, s.residual_probability, [alive(t, length) for t in s.tokens]
            )
            for s in steps[:length]
        ]
        text = make_run(seen, TOKENIZER).final_text
        assert StopWatch(Stops(TOKENIZER, stop), None)(seen) == (cut_at_stop(text, stop) != text)
    text = make_run(steps, TOKENIZER).final_text
    assert watch(steps) == watch(steps) == (cut_at_stop(text, stop) != text)


def alive(token: Member, length: int) -> Member:
    """A member as it was after so many steps."""
    member = Member(token.id, token.probability, token.slot, token.weight, token.parents)
    if token.removed_after is not None and token.removed_after < length:
        member.removed_after, member.removed_why = token.removed_after, token.removed_why
    return member


def test_the_cost_of_a_step_does_not_grow_with_the_run() -> None:
    class Counting(ByteTokenizer):
        asked = 0

        def token_text(self, token_id: int) -> str:
            self.asked += 1
            return super().token_text(token_id)

    tokenizer = Counting(WORDS.pieces)
    watch = StopWatch(Stops(tokenizer, ["\n\n", "never said"]), window=2)
    steps: list[Step] = []
    costs = []
    for index in range(400):
        before = [] if index == 0 else [3 + 2 * index - 2, 3 + 2 * index - 1]
        steps.append(
            step(index, members({1: 0.5, 2: 0.4}, 3 + 2 * index, before, t1=[0.1, 0.6], t2=[0.3, 0.2]))
        )
        tokenizer.asked = 0
        assert not watch(steps)
        costs.append(tokenizer.asked)
    assert max(costs[200:]) <= max(costs[20:40]) < 40


def test_a_character_of_many_tokens_can_be_a_stop_string() -> None:
    pieces = ByteTokenizer([b"a", *(bytes([byte]) for byte in "😀".encode())])
    assert Stops(pieces, ["😀"])([4, 3, 2, 1, 0])
    assert Stops(pieces, ["a😀"])([4, 3, 2, 1, 0])
    assert not Stops(pieces, ["😀"])([3, 2, 1, 0])


def test_a_reading_that_turns_out_otherwise_is_searched_from_where_it_does() -> None:
    """Two texts side by side; the less probable one, which held the string at its start, wins when they meet."""
    watch = StopWatch(Stops(WORDS, ["is"]), window=0)
    steps = [step(0, members({1: 0.5, 2: 0.4}, 3))]
    for index in range(1, 9):
        before = [1 + 2 * index, 2 + 2 * index]
        steps.append(
            step(index, members({3: 0.5, 4: 0.4}, 3 + 2 * index, before, t3=[0.01, 0.9], t4=[0.9, 0.01]))
        )
        assert not watch(steps)
    steps.append(step(9, members({5: 0.9}, 21, [19, 20], t5=[0.9, 0.01])))
    assert watch(steps)


def test_a_stop_string_is_looked_for_no_further_back_than_it_reaches() -> None:
    taken = []

    def newest_first() -> Iterator[int]:
        for number in count():
            taken.append(number)
            yield 1  # " was"

    assert not Stops(WORDS, ["is was"])(newest_first())
    assert len(taken) < 5


def test_the_window_of_a_reading_bounds_what_is_looked_at_again() -> None:
    class Counted(Step):
        looked = 0

        @property
        def tokens(self) -> list[Member]:
            type(self).looked += 1
            return self.__dict__["kept"]

        @tokens.setter
        def tokens(self, value: list[Member]) -> None:
            self.__dict__["kept"] = value

    reading: SettledReading[Member] = SettledReading(window=3)
    costs = []
    for index in range(60):
        before = [] if index == 0 else [3 + 2 * index - 2, 3 + 2 * index - 1]
        made = step(index, members({1: 0.5, 2: 0.4}, 3 + 2 * index, before, t1=[0.9, 0.01], t2=[0.01, 0.9]))
        Counted.looked = 0  # two texts side by side that never meet: nothing settles
        assert reading.add(Counted(made.step, made.position, None, 0.0, made.tokens)) == []
        costs.append(Counted.looked)
    assert set(costs[10:]) == {6}
    assert len(reading.tail) == 60


@pytest.mark.parametrize(
    ("stop", "final", "text"),
    [
        ([" to"], " is blue", " [was/is][ blue/ish]"),
        (["oda"], " is blue t", " [was/is][ blue/ish] t"),
        (["lue"], " is b", " [was/is] b"),
        ([" is"], "", ""),
        (["."], " is blue today", " [was/is][ blue/ish] today"),
        ([" was", "nothing"], " is blue today.", " [was/is][ blue/ish] today[./<eos>]"),
    ],
)
def test_every_text_of_a_run_ends_before_a_stop_string(stop: list[str], final: str, text: str) -> None:
    run = make_run(sky_steps(), config={"stop": stop, "attend": "lineage"})
    assert (run.final_text, run.text) == (final, text)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ([" to"], " [was/is][ blue/ish]"),
        (["oda"], " [was/is][ blue/ish] t"),
        ([" is"], ""),
        (["."], " [was/is][ blue/ish] today"),
        ([" was", "nothing"], " [was/is][ blue/ish] today[./<eos>]"),
    ],
)
def test_what_is_printed_while_it_grows_ends_there_too(stop: list[str], text: str) -> None:
    stream = inline_stream(WORDS, stop, window=2)
    said = ["".join(piece.text for piece in stream.add(each)) for each in sky_steps()]
    said.append("".join(piece.text for piece in stream.finish()))
    assert "".join(said) == text
    assert stream.pending() == []


def test_letters_of_a_string_are_looked_for_one_by_one() -> None:
    letters = ByteTokenizer([bytes([byte]) for byte in b"abcd"])
    assert Stops(letters, ["abcd"])([3, 2, 1, 0, 0])
    assert not Stops(letters, ["abcd"])([3, 2, 0, 1, 0])
