"""Phrases while a run grows: the same as of the whole run, nothing taken back, and cheap."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_mlx.arrays import Ints
from tempo_mlx.decode.paths import best_paths, layers_of, sample_paths
from tempo_mlx.decode.step import Edge, Member, Removal, Step
from tempo_mlx.report import growing as growing_module
from tempo_mlx.report.growing import GrowingPhrases
from tempo_mlx.report.phrases import (
    DRAWN,
    SHOW_ABOVE,
    Aligned,
    Phrase,
    Stretch,
    groups,
    phrases_in,
    phrases_of,
)
from tempo_mlx.report.text import texts_along
from tempo_mlx.report.verify.texts import SaysAtOnce
from tests.runs import ByteTokenizer, make_run

PIECES = [
    b"<eos>",
    *(f" w{i}".encode() for i in range(30)),
    b"ing",
    b"s",
    b"\n",
    b".",
    b" \xe2",
    b"\x82",
    b"\xac",
    "我".encode()[:2],
    " 我".encode()[:3],
    "我".encode()[2:],
    "我我".encode()[2:4],
    "我我".encode()[4:],
]
TOKENIZER = ByteTokenizer(PIECES)
EVERY = np.arange(1, len(PIECES))
PARTS = np.array([1, 2, *(index for index, piece in enumerate(PIECES) if max(piece) > 127)])


def random_steps(
    seed: int, length: int, width: int, single: float = 0.3, ends: bool = True, among: Ints = EVERY
) -> list[Step]:
    """Sets of random tokens; `single`: how many have one member. ends: the last may end the text."""
    random = np.random.default_rng(seed)
    slots, steps, before = itertools.count(3), [], []
    for index in range(length):
        count = 1 if random.random() < single else int(random.integers(2, width + 1))
        ids = [int(i) for i in random.choice(among, count, replace=False)]
        if ends and random.random() < 0.1:
            ids.append(0)
        rows = {slot: random.dirichlet(np.full(len(ids) + 1, 0.5)) for slot in before}
        first = random.dirichlet(np.full(len(ids) + 1, 2.0))
        members = []
        for place, token in enumerate(ids):
            edges = tuple(Edge(slot, 1.0 / len(before), float(row[place])) for slot, row in rows.items())
            slot = None if token == 0 else next(slots)
            weight = None if slot is None else 1.0 / count
            members.append(Member(token, float(first[place]), slot, weight, edges))
        before = [member.slot for member in members if member.slot is not None]
        steps.append(Step(index, 3 + index, 0.1, 0.1, tuple(members)))
    return steps


def text_of(found: Sequence[Phrase]) -> str:
    return "".join(phrase.text for phrase in found)


@given(
    st.integers(0, 10**6), st.sampled_from([(), ("\n",), (" w1 w2", "s."), ("w3",)]), st.sampled_from([0, 3])
)
@settings(deadline=None, max_examples=60)
def test_what_grows_is_what_the_run_comes_to(seed: int, stop: tuple[str, ...], window: int) -> None:
    steps = random_steps(seed, length=25, width=3)
    run = make_run(steps, TOKENIZER, config={"stop": list(stop)})
    growing = GrowingPhrases(TOKENIZER, window, stop=stop)
    found: list[Phrase] = []
    for step in steps:
        found += growing.add(step)
        assert text_of(found) + growing.tail() is not None
    found += growing.finish()
    whole = phrases_in(run.steps, run.final_text)
    assert text_of(found) == text_of(whole) == run.final_text
    assert [p for p in found if p.alternatives] == [p for p in whole if p.alternatives]


@pytest.mark.parametrize("seed", range(80))
def test_characters_of_several_tokens_are_whole_and_nothing_is_said_that_no_path_spells(seed: int) -> None:
    steps = random_steps(seed, length=6, width=3, single=0.5, ends=False, among=PARTS)
    run = make_run(steps, TOKENIZER)
    growing = GrowingPhrases(TOKENIZER, 0)
    found = [*itertools.chain.from_iterable(map(growing.add, steps)), *growing.finish()]
    assert text_of(found) == text_of(run.phrases) == run.final_text
    assert [p for p in found if p.alternatives] == [p for p in run.phrases if p.alternatives]
    paths = itertools.product(*([token.id for token in step.tokens] for step in steps))
    spelled = {b"".join(PIECES[token] for token in path).decode("utf-8", "replace") for path in paths}
    assert run.final_text in spelled
    for other in (other for phrase in found for other in phrase.alternatives):
        said = other.text + other.follows.partition("\ufffd")[0]
        assert any(said in text for text in spelled)


def test_a_token_says_nothing_before_its_last_character_is_whole() -> None:
    ids = [PIECES.index(piece) for piece in (b" w1", " 我".encode()[:3], "我".encode()[2:], b"s")]
    assert texts_along(ids, TOKENIZER) == [" w1", "", " 我", "s"]
    assert texts_along(ids, SaysAtOnce(TOKENIZER)) == [" w1", " ", "我", "s"]  # older files are read so


@pytest.mark.slow
@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_what_has_settled_is_said_of_every_longer_run(seed: int) -> None:
    """Also with removals in reach of the window: a set's members may go until it is out of it."""
    window = 2
    random = np.random.default_rng(seed)
    steps = random_steps(seed, length=20, width=3, ends=False)
    growing, said = GrowingPhrases(TOKENIZER, window), ""
    for index, step in enumerate(steps):
        for earlier in steps[max(index - 1 - window, 0) : max(index - 1, 0)]:
            alive = [t for t in earlier.tokens if t.removed_after is None]
            if len(alive) > 1 and random.random() < 0.3:
                alive[-1].removed_after, alive[-1].removed_why = index - 1, Removal("posterior", 0.0, 0.1)
        said += text_of(growing.add(step))
        assert make_run(steps[: index + 1], TOKENIZER).final_text == said + growing.tail()
    assert make_run(steps, TOKENIZER).final_text == said + text_of(growing.finish())


def test_what_can_still_be_removed_has_not_settled() -> None:
    steps = random_steps(5, length=12, width=3, single=1.0, ends=False)
    now, later = GrowingPhrases(TOKENIZER, 0), GrowingPhrases(TOKENIZER, 4)
    never = GrowingPhrases(TOKENIZER, None)
    for step in steps:
        assert never.add(step) == []
    first = next(i for i, step in enumerate(steps) if now.add(step))
    assert next(i for i, step in enumerate(steps) if later.add(step)) > first


def operations(work: Callable[[], object]) -> int:
    """How many functions it calls, Python's own included."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def ticking(pieces: int) -> Callable[[], float]:
    """A clock by which so many pieces of work fit into an update."""
    ticks = itertools.count(0.0, growing_module.UPDATE_SECONDS / pieces)
    return lambda: next(ticks)


@pytest.mark.parametrize("single", [0.03, 0.0])
def test_no_update_waits_for_a_long_stretch_to_be_read(single: float) -> None:
    """500 steps of 8, with a set of one now and then. Reading a stretch of 100 sets takes half a million calls; an
    update goes on with it until its time is over, and is late by no more than the piece it is at.
    """
    steps = random_steps(1, length=500, width=8, single=single, ends=False)
    GrowingPhrases(TOKENIZER, 8).add(steps[0])  # what is imported at its first use
    growing, found, costs = GrowingPhrases(TOKENIZER, 8, clock=ticking(1)), [], []
    for step in steps:
        costs.append(operations(lambda step=step: found.extend(growing.add(step))))
    assert max(costs) < 2_500
    assert operations(growing.tail) < 10 * len(steps)
    found += growing.finish()
    assert text_of(found) == make_run(steps, TOKENIZER).final_text


def test_a_stretch_is_read_in_small_pieces() -> None:
    """Whatever it is about: drawing readings, aligning them, finding the words they differ in, weighing those."""
    length = 100
    layers = layers_of(random_steps(1, length, width=8, single=0.0, ends=False))
    texts = [[TOKENIZER.token_text(member.id) for member in layer.members] for layer in layers]
    stretch, choice = Stretch.of(layers, 0, True, texts), best_paths(layers)[0].choice
    pieces, costs = phrases_of(stretch, choice, SHOW_ABOVE), []
    while pieces.gi_frame is not None:
        costs.append(operations(lambda: next(pieces, None)))
    assert max(costs) < 1_500

    best = stretch.reading(choice)
    drawn = [stretch.reading(path.choice) for path in sample_paths(layers, DRAWN, 0)]
    aligned = [Aligned.of(best, reading, stops=True) for reading in drawn]
    words = groups(best, aligned, np.full(DRAWN, 1 / DRAWN), SHOW_ABOVE)
    assert (
        sum(1 for _ in words) > DRAWN + 50
    )  # numpy does much in few operations: one for a reading, one for a word


def test_phrases_keep_up_with_the_steps() -> None:
    """And an update takes under five milliseconds on average; the bound is generous, in processor time."""
    steps = random_steps(1, length=500, width=8, single=0.1, ends=False)
    growing, found = GrowingPhrases(TOKENIZER, 8, clock=ticking(250)), []
    start = time.process_time()
    for step in steps:
        found += growing.add(step)
        growing.tail()
    assert (time.process_time() - start) / len(steps) < 0.02
    assert len(text_of(found)) > 0.8 * len(make_run(steps, TOKENIZER).final_text)
    assert [p for p in found if p.alternatives]


def test_what_may_become_a_stop_string_is_held_back() -> None:
    tokenizer = ByteTokenizer([b"<eos>", b" a", b" one", b" two", b" three"])
    steps = []
    for index, token in enumerate((1, 2, 3, 4)):
        before = (Edge(2 + index, 1.0, 0.9),) if index else ()
        steps.append(Step(index, 3 + index, 0.1, 0.1, (Member(token, 0.9, 3 + index, 1.0, before),)))
    growing = GrowingPhrases(tokenizer, 0, stop=["one two three"])
    said = [text_of(growing.add(step)) for step in steps]
    assert "".join(said) + text_of(growing.finish()) == " a "
