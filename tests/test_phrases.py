"""The phrase view: best path, and the words that other readings have instead."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from tempo_mlx.decode.step import Edge, Removal
from tempo_mlx.report import phrases as module
from tempo_mlx.report.phrases import Phrase, phrases


@dataclass(frozen=True)
class Word:
    id: int
    text: str
    probability: float
    slot: int | None
    parents: tuple[Edge, ...] = ()
    removed_after: int | None = None
    removed_why: Removal | None = None
    branch: int | None = None


@dataclass(frozen=True)
class Set:
    tokens: list[Word] = field(default_factory=list)


def lattice(*sets: dict[str, dict[str, float] | float]) -> list[Set]:
    """Sets of texts; the first gives each text its probability, the others P(j|i) by the text of the parent."""
    steps: list[Set] = []
    slots = itertools.count()
    before: dict[str, int] = {}
    for members in sets:
        words, here = [], {}
        for text, given in members.items():
            slot = next(slots)
            here[text] = slot
            edges: tuple[Edge, ...] = ()
            if isinstance(given, float):
                best = given
            else:
                best = max(given.values())
                edges = tuple(Edge(before[parent], 0.0, each) for parent, each in given.items())
            words.append(Word(slot, text, best, slot, edges))
        before = here
        steps.append(Set(words))
    return steps


def shown(found: Sequence[Phrase]) -> str:
    return "".join(
        f"[{'/'.join([phrase.text, *(a.text for a in phrase.alternatives)])}]"
        if phrase.alternatives
        else phrase.text
        for phrase in found
    )


def enumerate_paths(steps: Sequence[Set]) -> list[tuple[float, list[Word]]]:
    """Every path with its weight, by following the edges; independent of decode/paths.py."""
    paths = [(word.probability, [word]) for word in steps[0].tokens]
    for step in steps[1:]:
        paths = [
            (weight * edge.forward, [*path, word])
            for weight, path in paths
            for word in step.tokens
            for edge in word.parents
            if edge.slot == path[-1].slot
        ]
    total = sum(weight for weight, _ in paths)
    return [(weight / total, path) for weight, path in paths]


def test_one_doubtful_word() -> None:
    steps = lattice({" The": 1.0}, {" sky": {" The": 0.7}, " sea": {" The": 0.3}},
                    {" is": {" sky": 0.9, " sea": 0.9}})  # fmt: skip
    found = phrases(steps)
    assert shown(found) == " The [sky/sea] is"
    fork = found[1]
    assert fork.share == pytest.approx(0.7)
    assert fork.alternatives[0].share == pytest.approx(0.3)
    assert (fork.start, fork.end) == (1, 2)
    assert fork.alternatives[0].slots == (2,)


def test_a_reading_that_is_a_token_longer_differs_in_that_word_alone() -> None:
    """Member by member this reads [soft/very] [light/soft] [fell/light]."""
    steps = lattice(
        {" A": 1.0},
        {" soft": {" A": 0.6}, " very": {" A": 0.4}},
        {" light": {" soft": 0.9, " very": 0.0}, " soft": {" soft": 0.0, " very": 0.9}},
        {" fell": {" light": 0.9, " soft": 0.0}, " light": {" light": 0.0, " soft": 0.9}},
        {" on": {" fell": 0.9, " light": 0.0}, " fell": {" fell": 0.0, " light": 0.9}},
    )
    assert shown(phrases(steps)) == " A [soft/very soft] light fell on"


def test_words_that_change_together_are_one_fork() -> None:
    steps = lattice(
        {" known": 1.0},
        {" only": {" known": 0.6}, " as": {" known": 0.4}},
        {" as": {" only": 0.9, " as": 0.0}, " the": {" only": 0.0, " as": 0.9}},
        {" Echo": {" as": 0.9, " the": 0.9}},
    )
    assert shown(phrases(steps)) == " known [only as/as the] Echo"


def test_words_that_change_each_for_itself_are_two_forks() -> None:
    steps = lattice(
        {" a": 1.0},
        {" big": {" a": 0.6}, " old": {" a": 0.4}},
        {" dog": {" big": 0.5, " old": 0.5}, " cat": {" big": 0.4, " old": 0.4}},
        {" ran": {" dog": 0.9, " cat": 0.9}},
    )
    assert shown(phrases(steps)) == " a [big/old] [dog/cat] ran"


def test_a_word_left_out_is_shown_with_its_neighbour() -> None:
    steps = lattice(
        {" a": 1.0},
        {" very": {" a": 0.6}, " old": {" a": 0.4}},
        {" old": {" very": 0.9, " old": 0.0}, " dog": {" very": 0.0, " old": 0.9}},
        {" dog": {" old": 0.9, " dog": 0.0}, " ran": {" old": 0.0, " dog": 0.9}},
        {" ran": {" dog": 0.9, " ran": 0.0}, " off": {" dog": 0.0, " ran": 0.9}},
    )
    assert shown(phrases(steps)) == " a [very old/old] dog ran"


def test_what_a_reading_says_last_before_all_agree_again_belongs_to_it() -> None:
    steps = lattice(
        {" a": 1.0},
        {" very": {" a": 0.6}, " big": {" a": 0.4}},
        {" big": {" very": 0.9, " big": 0.0}, " soft": {" very": 0.0, " big": 0.9}},
        {" soft": {" big": 0.9, " soft": 0.0}, " warm": {" big": 0.0, " soft": 0.9}},
        {" light": {" soft": 0.9, " warm": 0.9}},
    )
    assert shown(phrases(steps)) == " a [very big soft/big soft warm] light"


def test_words_in_place_of_a_full_stop_are_shown_with_the_word_before() -> None:
    steps = lattice(
        {" a": 1.0},
        {" dog": {" a": 0.9}},
        {".": {" dog": 0.6}, " and": {" dog": 0.4}},
        {" He": {".": 0.9, " and": 0.0}, " cat": {".": 0.0, " and": 0.9}},
        {" ran": {" He": 0.9, " cat": 0.9}},
    )
    assert shown(phrases(steps)) == " a [dog. He/dog and cat] ran"


def test_parts_of_characters_are_no_alternative() -> None:
    steps = lattice(
        {" a": 1.0}, {" dog": {" a": 0.6}, " \ufffd": {" a": 0.4}}, {" ran": {" dog": 0.9, " \ufffd": 0.9}}
    )
    assert shown(phrases(steps)) == " a dog ran"


def test_words_are_whole() -> None:
    steps = lattice(
        {" an": 1.0},
        {" E": {" an": 0.6}, " L": {" an": 0.4}},
        {"cho": {" E": 0.9, " L": 0.9}},
        {" fell": {"cho": 0.9}},
    )
    assert shown(phrases(steps)) == " an [Echo/Lcho] fell"


def test_white_space_and_punctuation_alone_are_no_alternative() -> None:
    steps = lattice(
        {" end": 1.0},
        {".": {" end": 0.4}, ",": {" end": 0.3}, "\n": {" end": 0.3}},
        {" The": {".": 0.9, ",": 0.0, "\n": 0.0}, " the": {".": 0.0, ",": 0.9, "\n": 0.9}},
        {" dog": {" The": 0.9, " the": 0.9}},
    )
    assert shown(phrases(steps)) == " end. The dog"


def test_operators_are_an_alternative() -> None:
    steps = lattice({"x": 1.0}, {" +": {"x": 0.6}, " -": {"x": 0.4}}, {" y": {" +": 0.9, " -": 0.9}})
    assert shown(phrases(steps)) == "x [+/-] y"


def test_characters_are_units_where_words_have_no_spaces() -> None:
    steps = lattice({"天": 1.0}, {"空": {"天": 0.6}, "气": {"天": 0.4}}, {"很": {"空": 0.9, "气": 0.9}})
    assert shown(phrases(steps)) == "天[空/气]很"


def test_a_word_that_a_token_has_twice_differs_where_it_differs() -> None:
    steps = lattice(
        {" a": 1.0}, {" 谢谢": {" a": 0.6}, " 谢了": {" a": 0.4}}, {" b": {" 谢谢": 0.9, " 谢了": 0.9}}
    )
    assert shown(phrases(steps)) == " a 谢[谢/了] b"


def test_small_shares_are_not_shown() -> None:
    steps = lattice(
        {" a": 1.0}, {" dog": {" a": 0.96}, " cat": {" a": 0.04}}, {" ran": {" dog": 0.9, " cat": 0.9}}
    )
    assert shown(phrases(steps)) == " a dog ran"
    assert shown(phrases(steps, show_above=0.03)) == " a [dog/cat] ran"


def test_what_only_stops_sooner_is_no_alternative() -> None:
    steps = lattice(
        {" a": 1.0},
        {" soft": {" a": 0.6}, " very": {" a": 0.4}},
        {" light": {" soft": 0.9, " very": 0.0}, " soft": {" soft": 0.0, " very": 0.9}},
    )
    assert shown(phrases(steps)) == " a [soft/very soft] light"


def test_what_follows_decides_what_was_likelier() -> None:
    """Shares are of whole readings: an edge after the fork counts, also where a cut follows."""
    steps = lattice(
        {" a": 1.0}, {" dog": {" a": 0.6}, " cat": {" a": 0.4}}, {" ran": {" dog": 0.1, " cat": 0.9}}
    )
    fork = phrases(steps)[1]
    assert (fork.text, fork.alternatives[0].text) == ("cat", "dog")
    assert fork.share == pytest.approx(0.36 / 0.42)


def test_removed_members_say_nothing() -> None:
    steps = lattice(
        {" a": 1.0}, {" dog": {" a": 0.6}, " cat": {" a": 0.4}}, {" ran": {" dog": 0.9, " cat": 0.9}}
    )
    why = Removal("posterior", 0.01, 0.1)
    cat = steps[1].tokens[1]
    gone = Word(cat.id, cat.text, cat.probability, cat.slot, cat.parents, 2, why)
    assert shown(phrases([steps[0], Set([steps[1].tokens[0], gone]), steps[2]])) == " a dog ran"


def random_lattice(seed: int, length: int, width: int) -> list[Set]:
    """A word of its own for every member, so that readings are aligned position by position."""
    random = np.random.default_rng(seed)
    sets: list[dict[str, dict[str, float] | float]] = []
    for t in range(length):
        count = int(random.integers(1, width + 1))
        names = [f" w{t}{'abcdefgh'[i]}" for i in range(count)]
        if not sets:
            sets.append(
                {name: float(p) for name, p in zip(names, random.dirichlet(np.ones(count)), strict=True)}
            )
            continue
        rows = {parent: random.dirichlet(np.full(count + 1, 0.4)) for parent in sets[-1]}
        sets.append(
            {name: {parent: float(row[i]) for parent, row in rows.items()} for i, name in enumerate(names)}
        )
    return lattice(*sets)


@pytest.mark.parametrize("seed", range(40))
def test_shares_are_those_of_all_paths(seed: int) -> None:
    """Against enumeration: who says what at the steps of a fork, and that no probable word is missing."""
    steps = random_lattice(seed, length=5, width=3)
    paths = enumerate_paths(steps)
    found = phrases(steps)
    best = max(paths, key=lambda path: path[0])[1]
    assert "".join(phrase.text for phrase in found) == "".join(word.text for word in best)
    said: set[tuple[int, str]] = set()
    for phrase in (phrase for phrase in found if phrase.alternatives):
        shares: dict[str, float] = defaultdict(float)
        for weight, path in paths:
            shares["".join(word.text for word in path[phrase.start : phrase.end]).strip()] += weight
        assert phrase.share == pytest.approx(shares[phrase.text], abs=1e-9)
        for alternative in phrase.alternatives:
            assert alternative.share == pytest.approx(shares[alternative.text], abs=1e-9)
            assert alternative.share >= module.SHOW_ABOVE
            said |= {(phrase.start + i, word) for i, word in enumerate(alternative.text.split())}
        expected = {
            text for text, share in shares.items() if share >= module.SHOW_ABOVE and text != phrase.text
        }
        assert {a.text for a in phrase.alternatives} == expected
    for t in range(len(steps)):
        marginal: dict[str, float] = defaultdict(float)
        for weight, path in paths:
            marginal[path[t].text.strip()] += weight
        within = [phrase for phrase in found if phrase.alternatives and phrase.start <= t < phrase.end]
        for text, share in marginal.items():
            if share >= module.SHOW_ABOVE and text != best[t].text.strip() and not within:
                raise AssertionError(f"{text} has a share of {share} and is in no fork")


def test_many_paths_are_drawn_and_few_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn shares are near the exact ones, and the same for the same seed."""
    steps = random_lattice(7, length=7, width=3)
    exact = phrases(steps, show_above=0.1)
    monkeypatch.setattr(module, "FEW", 1)
    drawn = phrases(steps, show_above=0.1)
    assert drawn == phrases(steps, show_above=0.1)
    assert drawn != exact
    assert [phrase.text for phrase in drawn] == [phrase.text for phrase in exact]
    for one, other in zip(drawn, exact, strict=True):
        if one.share is not None and other.share is not None:
            assert abs(one.share - other.share) < 0.08


def test_blanks_and_nothing_else() -> None:
    steps = lattice({"\n": 0.6, " dog": 0.4}, {" \n": {"\n": 0.9, " dog": 0.9}})
    assert shown(phrases(steps)) == "\n \n"


def test_no_steps_no_phrases() -> None:
    assert phrases([]) == []


def test_a_long_run_without_a_cut_is_read_in_time() -> None:
    """500 sets of up to 8 take a quarter of a second of processor time; the bound allows for a slow machine."""
    steps = random_lattice(3, length=500, width=8)
    start = time.process_time()
    assert len(phrases(steps)) > 100
    assert time.process_time() - start < 2.0
