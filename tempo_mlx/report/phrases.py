"""A lattice as people read it: its best path as ordinary text, and where another reading is probable, its words.

    The creature, known [only as/as the] "Echo," was a being of immense [power/wisdom/beauty] and wisdom.

Sets of neighbouring positions are aligned by position, not by content: a reading that is one token longer shifts all
that follows. So the readings are aligned with the best one by words, which makes shifts vanish, and what they have
instead of a stretch of it is an alternative with their share. In speech recognition this is a confusion network, with
the best path as pivot (Mangu, Brill and Stolcke 2000, arXiv cs/0010012).

Where all readings go through one member, what comes before and what comes after are independent, and are read each on
its own: all paths with their exact weights where those are few, and else paths drawn from the lattice's distribution
(forward filtering, backward sampling), seeded.

Shapes: n readings, W words of the best one.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
from rapidfuzz.distance import Levenshtein

from tempo_mlx.arrays import Floats
from tempo_mlx.decode.paths import Layer, Token, best_paths, drawing, is_read, layers_of
from tempo_mlx.decode.pieces import Pieces, whole

SHOW_ABOVE = 0.05  # alternatives of a smaller share are not shown
FEW = 256  # paths that are all weighed; of more, DRAWN are drawn
DRAWN, DRAWN_AT_LEAST = 400, 128  # of a stretch of up to LONG sets, and of one without end
LONG = 100
FOLLOWS = 60  # characters of what follows an alternative
TOGETHER = 0.7  # forks beside each other that so large a share of their readings has in common are one
REPLACEMENT = "\ufffd"  # stands for bytes that are no whole character

# Writing without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese): a unit is a character there.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+(?:['’_.-][^\W_{UNSPACED}]+)*|\S")
BEGINS = re.compile(rf"\s|[{UNSPACED}]")  # what a token begins with where a word begins
IGNORED = re.compile(r"[\s.,;:!?'\"“”‘’…]+")  # a difference in these alone is no other reading


class TextToken(Token, Protocol):
    """A member of a set with its text."""

    @property
    def text(self) -> str: ...


class TextSet(Protocol):
    """A step: its members, best first."""

    @property
    def tokens(self) -> Sequence[TextToken]: ...


@dataclass(frozen=True)
class Alternative:
    """What some readings have instead; `share` of all readings. slots: those of the most probable such reading.

    follows: how that reading goes on, as far as readings differ, a few words of it.
    """

    text: str
    share: float
    slots: tuple[int | None, ...]
    follows: str = ""


@dataclass(frozen=True)
class Phrase:
    """A stretch of the best reading. start, end: the steps its tokens are of, `end` excluded.

    With alternatives, largest share first, it is a fork, and `share` says how many of the readings say the same.
    """

    text: str
    share: float | None
    alternatives: tuple[Alternative, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Reading:
    """One path's text, in words."""

    texts: tuple[str, ...]  # of each step's token; empty where it is not read
    start: int  # the step it begins with
    slots: tuple[int | None, ...]
    words: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        return "".join(self.texts)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(W,): where in the text each word is."""
        return [match.span() for match in WORD.finditer(self.text)]

    @cached_property
    def ends(self) -> list[int]:
        """For each step, where its token's text ends."""
        return list(accumulate(map(len, self.texts)))

    def steps(self, start: int, end: int) -> tuple[int, int]:
        """The steps whose tokens hold the characters from start to end."""
        return self.start + bisect_right(self.ends, start), self.start + bisect_left(self.ends, end) + 1


@dataclass(frozen=True)
class Stretch:
    """The sets from one cut to the next, which is the last of `layers`: its edges count, and its text does not.

    start: the step it begins with; last: the text stops with it, and all of it counts. texts: of each member.
    """

    layers: Sequence[Layer[Token]]
    start: int
    last: bool
    texts: Sequence[Sequence[str]]

    @classmethod
    def of(
        cls, layers: Sequence[Layer[Token]], start: int, last: bool, texts: Sequence[Sequence[str]]
    ) -> Stretch:
        """texts: what each member says, whether it is read or not."""
        until = len(layers) if last else len(layers) - 1
        read = [
            [
                text if t < until and is_read(member) else ""
                for member, text in zip(layer.members, said, strict=True)
            ]
            for t, (layer, said) in enumerate(zip(layers, texts, strict=True))
        ]
        if start:  # all readings go through the one member it begins with
            layers = [Layer(layers[0].members, np.zeros((1, 1))), *layers[1:]]
        return cls(layers, start, last, read)

    def characters(self, choice: Sequence[int]) -> Iterator[dict[int, int]]:
        """The tokens on this path, by set, that make up characters together: all but the last are without text."""
        parts: dict[int, int] = {}
        for t, (layer, index) in enumerate(zip(self.layers, choice, strict=True)):
            begins = is_read(layer.members[index]) and not self.texts[t][index]
            if parts or begins:
                parts[t] = index
            if self.texts[t][index] and parts:
                yield parts
                parts = {}

    def reading(self, choice: Sequence[int], characters: Sequence[Mapping[int, int]] = ()) -> Reading:
        """characters: of the path along which members have their texts; what tokens say that are in one of those
        which the choice does not take whole is not known.
        """
        texts = [texts[index] for texts, index in zip(self.texts, choice, strict=True)]
        for parts in characters:
            shared = [t for t, index in parts.items() if choice[t] == index]
            for t in shared if len(shared) < len(parts) else ():
                texts[t] = REPLACEMENT
        slots = tuple(layer.members[index].slot for layer, index in zip(self.layers, choice, strict=True))
        return Reading(tuple(texts), self.start, slots, tuple(words_of(texts)))


def words_of(texts: Iterable[str]) -> Iterator[str]:
    """The words of these texts joined. A word begins where a text begins that BEGINS says so of."""
    piece = ""
    for text in texts:
        if piece and BEGINS.match(text):
            yield from words_in(piece)
            piece = text
        else:
            piece += text
    yield from words_in(piece)


@lru_cache(maxsize=1 << 14)
def words_in(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text))


def phrases(steps: Sequence[TextSet], show_above: float = SHOW_ABOVE, seed: int = 0) -> list[Phrase]:
    """The best reading of these sets, cut where others differ from it; joined, the texts are the best path's.

    show_above: the least share of an alternative. Of no steps there are no phrases.
    """
    return phrases_along(layers_of(steps), 0, show_above, seed) if steps else []


def phrases_along(
    layers: Sequence[Layer[TextToken]], start: int, show_above: float, seed: int = 0
) -> list[Phrase]:
    """The phrases from step `start`, which is 0 or a cut, to the end."""
    cuts = [0, *(t for t in range(1, len(layers)) if is_cut(layers[t], layers[t - 1])), len(layers)]
    found: list[Phrase] = []
    for since, until in pairwise(cuts):
        part = layers[since : until + 1]
        texts = [[member.text for member in layer.members] for layer in part]
        stretch = Stretch.of(part, start + since, until == len(layers), texts)
        found += whole(phrases_of(stretch, best_paths(stretch.layers)[0].choice, show_above, seed))
    return merged(found)


def within(found: Sequence[Phrase], start: int, end: int) -> list[Phrase]:
    """What of the phrases lies between two characters of their text. A fork that is cut in two is plain text."""
    kept, at = [], 0
    for phrase in found:
        text = phrase.text[max(start - at, 0) : max(end - at, 0)]
        at += len(phrase.text)
        if text == phrase.text:
            kept.append(phrase)
        elif text:
            kept.append(Phrase(text, None, (), phrase.start, phrase.end))
    return merged(kept)


def phrases_in(
    steps: Sequence[TextSet], final_text: str, show_above: float = SHOW_ABOVE, seed: int = 0
) -> list[Phrase]:
    """The phrases of a run as far as its `final_text` goes: up to a stop string, without reasoning."""
    found = phrases(steps, show_above, seed)
    text = "".join(phrase.text for phrase in found)
    start = 0 if text.startswith(final_text) else max(text.rfind(final_text), 0)
    return within(found, start, start + len(final_text))


def is_cut(layer: Layer[TextToken], before: Layer[TextToken]) -> bool:
    """Whether all readings go through one member, and a word begins there.

    What comes before such a set and what comes after are then independent, and are read each on its own. Not so where
    it completes a character that the set before began.
    """
    (first, *others) = layer.members
    begun = any(is_read(member) and not member.text for member in before.members)
    return not others and is_read(first) and begins_word(first.text) and not begun


def begins_word(text: str) -> bool:
    """Whether a word begins where this token does. Bytes that are no whole character may go with what follows."""
    return BEGINS.match(text) is not None and REPLACEMENT not in text


def phrases_of(
    stretch: Stretch, choice: Sequence[int], show_above: float, seed: int = 0
) -> Pieces[list[Phrase]]:
    """The phrases of one stretch, little at a time. choice: its best path."""
    best = stretch.reading(choice)
    if not best.words or all(len(layer.members) == 1 for layer in stretch.layers):
        return [plain(best, 0, len(best.text))] if best.text else []
    aligned: list[Aligned] = []
    choices, weights = yield from weighed(stretch.layers, seed)
    characters = [*stretch.characters(choice)]
    for other in choices:
        aligned.append(Aligned.of(best, stretch.reading(other, characters), stops=stretch.last))
        yield
    forks: list[tuple[int, Phrase]] = []
    for group in (yield from groups(best, aligned, weights, show_above)):
        fork = yield from fork_of(best, aligned, weights, group, show_above)
        forks += [fork] if fork else []
    return list(joined(best, forks))


def weighed(layers: Sequence[Layer[Token]], seed: int) -> Pieces[tuple[list[tuple[int, ...]], Floats]]:
    """Different paths, and the share of each (n,), summing to 1."""
    count = 1
    for layer in layers:
        count = min(count * len(layer.members), FEW + 1)
    if count <= FEW:
        paths = best_paths(layers, FEW)
        choices, logs = [path.choice for path in paths], np.array([path.score for path in paths])
        weights = np.exp(logs - logs.max())
    else:
        several = max(DRAWN * LONG // max(len(layers), LONG), DRAWN_AT_LEAST)
        drawn = Counter((yield from drawing(layers, several, seed)))
        choices, weights = [*drawn], np.array([*drawn.values()], np.float64)
    yield
    return choices, weights / weights.sum()


@dataclass(frozen=True)
class Aligned:
    """A reading laid against the best one: what it says in place of each of the best one's words.

    begin (W + 1,): the reading's words from begin[k] to begin[k + 1] stand for word k of the best reading; none where
    it leaves the word out, several where it says more. known (W,): false at the end, where one of the two texts just
    stops sooner. differs: the words k for which it says something else, punctuation and capitals aside.
    """

    reading: Reading
    begin: list[int]
    known: list[bool]
    differs: dict[int, Content]

    @classmethod
    def of(cls, best: Reading, other: Reading, stops: bool) -> Aligned:
        """stops: whether the texts end with these readings, which need not have got equally far."""
        begin, known = [-1] * (len(best.words) + 1), [True] * len(best.words)
        changed: list[int] = []
        after_last_match: list[int] = []
        for step in Levenshtein.opcodes(best.words, other.words):
            since, until, there = step.src_start, step.src_end, step.dest_start
            if begin[since] >= 0:  # an insertion before it has said where it begins
                there = begin[since]
            follows = step.tag in ("equal", "replace")
            for k in range(since, max(until, since + 1)):
                begin[k] = step.dest_start + k - since if follows and k > since else there
            if step.tag == "equal":
                after_last_match = []
                continue
            changed += range(since, max(until, since + 1))
            if step.tag == "delete":
                after_last_match += range(since, until)
        for k in after_last_match if stops else ():
            known[k] = False
        if begin[-1] < 0 or not stops:
            begin[-1] = len(other.words)
        aligned = cls(other, begin, known, {})
        for k in (min(k, len(known) - 1) for k in changed):
            if known[k] and (said := aligned.content(k, k + 1)) != content(best.words[k : k + 1]):
                aligned.differs[k] = said
        return aligned

    def content(self, start: int, end: int) -> Content:
        return content(self.reading.words[self.begin[start] : self.begin[end]])

    def alternative(self, start: int, end: int, share: float) -> Alternative:
        """What stands for the best reading's words from start to end."""
        first, last = (self.reading.spans[i] for i in (self.begin[start], self.begin[end] - 1))
        since, until = (step - self.reading.start for step in self.reading.steps(first[0], last[1]))
        text, follows = self.reading.text[first[0] : last[1]], self.reading.text[last[1] :][:FOLLOWS]
        return Alternative(text, share, self.reading.slots[since:until], follows)


Content = tuple[str, ...]


def content(words: Sequence[str]) -> Content:
    """The words as far as they count as another reading."""
    return tuple(kept for word in words if (kept := counted(word)))


@lru_cache(maxsize=1 << 14)
def counted(word: str) -> str:
    return "" if IGNORED.fullmatch(word) else word.casefold()


def groups(
    best: Reading, aligned: Sequence[Aligned], weights: Floats, show_above: float
) -> Pieces[list[tuple[int, int]]]:
    """Stretches of the best reading's words, from start to end, that alternatives are shown for, in order.

    Words beside each other whose alternatives come from the same readings belong together; a word that an alternative
    leaves out is shown with a neighbour, since nothing cannot be shown.
    """
    shares: dict[tuple[int, Content], float] = defaultdict(float)
    who: dict[int, set[int]] = defaultdict(set)  # word -> readings that say something else for it
    for index, reading in enumerate(aligned):
        for k, said in reading.differs.items():
            shares[k, said] += weights[index]
            who[k].add(index)
        yield
    found: list[tuple[int, int]] = []
    before: set[int] = set()  # of the last group's last word
    for k in sorted({k for (k, _), share in shares.items() if share >= show_above}):
        start, end = k, k + 1
        if shares.get((k, ()), 0.0) >= show_above:
            start, end = (k, k + 2) if k + 1 < len(best.words) else (max(k - 1, 0), k + 1)
        if not counted(best.words[k]):  # a mark, where others go on: shown with the word it follows
            start = max(k - 1, 0)
        if found and (
            found[-1][1] > start or (found[-1][1] == start and common(before, who[k], weights) >= TOGETHER)
        ):
            start, end = min(start, found[-1][0]), max(end, found.pop()[1])
        found.append((start, end))
        before = who[k]
        yield
    return found


def common(one: set[int], other: set[int], weights: Floats) -> float:
    """The weight of the readings in both, as a share of those in either."""
    return float(weights[[*(one & other)]].sum() / weights[[*(one | other)]].sum())


def fork_of(
    best: Reading, aligned: Sequence[Aligned], weights: Floats, group: tuple[int, int], show_above: float
) -> Pieces[tuple[int, Phrase] | None]:
    """The alternatives to the best reading's words of a group, and where in its text those are; None where no single
    one is probable enough.
    """
    start, end = group
    own = content(best.words[start:end])
    shares: dict[Content, float] = defaultdict(float)
    likeliest: dict[Content, int] = {}
    for index, reading in enumerate(aligned):
        if not all(reading.known[start:end]):
            continue
        said = reading.content(start, end)
        shares[said] += float(weights[index])
        if said not in likeliest or weights[index] > weights[likeliest[said]]:
            likeliest[said] = index
        yield
    shown = sorted(
        (said for said, share in shares.items() if share >= show_above and said and said != own),
        key=lambda said: -shares[said],
    )
    found = [aligned[likeliest[said]].alternative(start, end, shares[said]) for said in shown]
    found = [alternative for alternative in found if REPLACEMENT not in alternative.text]
    if not found:
        return None
    first, last = best.spans[start][0], best.spans[end - 1][1]
    return first, Phrase(best.text[first:last], shares[own], tuple(found), *best.steps(first, last))


def joined(best: Reading, forks: Sequence[tuple[int, Phrase]]) -> Iterator[Phrase]:
    """The forks, which begin at these characters, with the plain text between them."""
    at = 0
    for place, fork in forks:
        if place > at:
            yield plain(best, at, place)
        yield fork
        at = place + len(fork.text)
    if at < len(best.text):
        yield plain(best, at, len(best.text))


def plain(best: Reading, start: int, end: int) -> Phrase:
    return Phrase(best.text[start:end], None, (), *best.steps(start, end))


def merged(found: Sequence[Phrase]) -> list[Phrase]:
    """With plain texts that follow each other made one."""
    result: list[Phrase] = []
    for phrase in found:
        if result and not result[-1].alternatives and not phrase.alternatives:
            before = result.pop()
            phrase = Phrase(before.text + phrase.text, None, (), before.start, phrase.end)
        result.append(phrase)
    return result
