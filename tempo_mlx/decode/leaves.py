"""The order in which the texts of a model are enumerated (arXiv 2604.20500). No model: what follows a text is told.

A *path* leaves the tree known so far with one token and follows the most probable one from there on, until its text
ends: a *leaf*. It weighs what prefix and token are worth, the probability of all texts that begin so (order `mass`); or
what its text gave up by not taking the best token each time, the product of P(token) / P(best) (order `doubt`, as
limited discrepancy search counts: Harvey and Ginsberg 1995), which opens close calls late in a text as soon as early
ones. Paths are taken by falling weight, the first from the prompt. What leaves a path weighs no more than the path
does, so this order is one of all paths there are, whenever each is followed: following several at once changes when a
leaf is known, and never which.

Every probability is at temperature 1. Of all texts, `found` have ended; the others begin with a token that is kept and
not taken (`open`), with one that is not kept (`truncated`), as a text does that came to repeat another (`merged`), or
as one of which the model was less sure over a stretch of tokens than it was of the first few (`unsure`;
DeepConf, arXiv 2508.15260, with the tokens' own log-probabilities for their confidence).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np

from tempo_mlx.arrays import Floats, Ints
from tempo_mlx.decode.tree import Node

SMALLEST = math.ulp(0.0)  # of a text that was found: a long one's is no float, and yet it is there
NOTHING: Ints = np.empty(0, np.int64)
Key = tuple[
    float, int, int, int
]  # of a path: falling weight; of equals the shorter, the lower token, the older


@dataclass(eq=False)
class Place(Node):
    """A token of a text, or the prompt. Once known, `kept` (n,) are the tokens that may follow, the best first, with
    the log-probabilities (n,) that they have here; `gone`: the probability that another does.

    probability: of its token, there. doubt: log of what its text weighs by that order. row: its place among the rows in
    the cache. number: of the places so far.
    """

    number: int = -1
    probability: float = 1.0
    doubt: float = 0.0
    row: int | None = None
    kept: Ints = field(default_factory=lambda: NOTHING)
    log_probs: Floats = field(default_factory=lambda: np.empty(0))
    gone: float = 0.0


def line(place: Node | None) -> Iterator[Place]:
    """The place, the one before it, and so on; the prompt is the last."""
    while place is not None:
        assert isinstance(place, Place)
        yield place
        place = place.parent


@dataclass(eq=False)
class Path:
    """Its own places begin at the `begins`th token of its text and end at `tip`. ended: as a leaf, since its last
    tokens repeat another text's, or since they are less sure than the first texts'."""

    key: Key
    begins: int
    tip: Place
    ended: Literal["", "leaf", "merged", "unsure"] = ""

    def places(self) -> list[Place]:
        return [place for place in line(self.tip) if place.length >= self.begins][::-1]


@dataclass(frozen=True)
class Masses:
    """Probabilities that sum to 1."""

    found: float
    open: float
    truncated: float
    merged: float
    unsure: float


class Agenda:
    """Paths that wait, that are followed, and those that are settled: in order, with nothing before them to come.

    leaves: so many are wanted; coverage: so much probability; None: all there is. merge_length: a path ends where so
    many of its own last tokens are in a row in a text before it; 0: never. warmup: so many leaves say how sure a path
    must be over each `window` of tokens; 0: it need not. by_doubt: paths weigh so, not by mass. ends: whether a place
    is the last of its text; reads: what a text says, which leaves that are wanted say each once.
    """

    def __init__(
        self,
        leaves: int | None,
        coverage: float | None,
        merge_length: int,
        ends: Callable[[Place], bool],
        reads: Callable[[Place], Hashable],
        warmup: int = 0,
        window: int = 1,
        by_doubt: bool = False,
    ) -> None:
        self.coverage, self.merge_length, self.ends, self.reads = coverage, merge_length, ends, reads
        self.said: set[Hashable] = set()
        self.window, self.least = window, -math.inf  # confidence that a path needs
        self.first: list[float] = []  # least confidences of the first leaves
        self.warmup, self.by_doubt = warmup, by_doubt
        self.root = Place(-1, 0.0, 0, 0)
        self.followed = [Path((0.0, 0, -1, 0), 1, self.root)]
        self.waiting: list[
            tuple[Key, Place, int]
        ] = []  # heap: of each place the best of `kept` not taken yet
        self.settled: list[Path] = []
        self.fresh: list[Place] = []  # places since somebody looked
        self.room = (
            math.inf if leaves is None else leaves
        )  # how many paths may still become leaves that are wanted
        self.found = 0.0
        self.done = False
        self.count = 0
        self.endings: dict[tuple[int, ...], list[Place]] = {}  # last tokens in settled texts

    @property
    def eligible(self) -> float:
        """How many paths may become leaves that are wanted, if as many as so far merge or say nothing new."""
        return self.room * len(self.settled) / len(self.said) if self.said else self.room

    def learn(self, path: Path, kept: Ints, log_probs: Floats, gone: float) -> None:
        """What may follow the tip of a path; it goes on with the best of it."""
        place = path.tip
        place.kept, place.log_probs, place.gone = kept, log_probs, gone
        self.wait(place, 1)
        path.tip = self.grow(place, 0)
        self.close(path)

    def grow(self, place: Place, index: int) -> Place:
        log_prob = float(place.log_probs[index])
        child = Place(int(place.kept[index]), place.log_prob + log_prob, place.length + 1, 0, place)
        child.number, child.probability = self.count, math.exp(log_prob)
        child.doubt = place.doubt + log_prob - float(place.log_probs[0])
        self.count += 1
        self.fresh.append(child)
        return child

    def wait(self, place: Place, index: int) -> None:
        if index < len(place.kept):
            before = place.doubt - float(place.log_probs[0]) if self.by_doubt else place.log_prob
            weight = before + float(place.log_probs[index])
            key = (-weight, place.length, int(place.kept[index]), place.number)
            heapq.heappush(self.waiting, (key, place, index))

    def begin(self) -> None:
        """Take the best that waits."""
        key, place, index = heapq.heappop(self.waiting)
        self.wait(place, index + 1)
        path = Path(key, place.length + 1, self.grow(place, index))
        self.followed.append(path)
        self.close(path)

    def close(self, path: Path) -> None:
        """Say whether a path has ended."""
        if self.ends(path.tip):
            path.ended = "leaf"
        else:
            path.ended = self.fault(path.tip, path)

    def next(self, rows: int) -> list[Path]:
        """At most `rows` paths to go on with: the heaviest of those that may become leaves that are wanted."""
        while not self.done:
            ranked = sorted(self.followed, key=lambda path: path.key)
            running = [path for path in ranked[: int(min(self.eligible, len(ranked)))] if not path.ended][
                :rows
            ]
            if not self.waiting:
                return running
            best = self.waiting[0][0]
            before = sum(path.key < best for path in ranked)
            if before >= self.eligible or sum(path.key < best for path in running) >= rows:
                return running
            self.begin()
        return []

    def settle(self) -> None:
        """Settle paths as long as the heaviest has ended."""
        while not self.done:
            if self.waiting and all(self.waiting[0][0] < path.key for path in self.followed):
                self.begin()
            if not self.followed:
                self.done = True
                return
            best = min(self.followed, key=lambda path: path.key)
            self.cut(best)
            if not best.ended:
                return
            self.followed.remove(best)
            self.settled.append(best)
            self.remember(best)
            if best.ended == "leaf":
                if len(self.first) < self.warmup:
                    self.first.append(min(map(self.confidence, line(best.tip))))
                    if len(self.first) == self.warmup and min(self.first) < math.inf:
                        self.least = min(self.first)
                self.found += math.exp(best.tip.log_prob)
                text = self.reads(best.tip)
                self.room -= text not in self.said
                self.said.add(text)
            self.done = self.room <= 0 or (self.coverage is not None and self.found >= self.coverage)

    # -- texts that come to repeat another

    def remember(self, path: Path) -> None:
        for place in path.places() if self.merge_length else ():
            if place.length >= self.merge_length:
                self.endings.setdefault(tuple(place.token_ids(self.merge_length)), []).append(place)

    def repeats(self, place: Place, path: Path) -> bool:
        """Whether the last tokens of a path, all its own, are in a row in a settled text, and not in its own past."""
        if not self.merge_length or place.length - path.begins + 1 < self.merge_length:
            return False
        others = self.endings.get(tuple(place.token_ids(self.merge_length)), ())
        if not others:
            return False
        own = {each.number for each in line(place)}
        return any(other.number not in own for other in others)

    # -- texts of which the model is not sure

    def confidence(self, place: Place) -> float:
        """Mean log-probability of the last `window` tokens of a text; infinite for a shorter one."""
        start = next(islice(line(place), self.window, None), None)
        return math.inf if start is None else (place.log_prob - start.log_prob) / self.window

    def fault(self, place: Place, path: Path) -> Literal["", "merged", "unsure"]:
        """Why a path that has not ended its text goes no further than this place, if so."""
        if self.repeats(place, path):
            return "merged"
        return "unsure" if self.least > -math.inf and self.confidence(place) < self.least else ""

    def cut(self, path: Path) -> None:
        """End a path, all before it being settled, at its first place with a fault; nothing leaves it from there on.

        What ends its text is no such place: how probable that text is, is known.
        """
        if not self.merge_length and self.least == -math.inf:
            return
        places = path.places()
        going = places[:-1] if path.ended == "leaf" else places
        first = next((at for at, place in enumerate(going) if self.fault(place, path)), None)
        if first is None:
            return
        void = {place.number for place in places[first:]}
        path.tip, path.ended = places[first], self.fault(places[first], path)
        self.followed = [each for each in self.followed if each is path or not _through(each.tip, void)]
        self.waiting = [item for item in self.waiting if not _through(item[1], void)]
        heapq.heapify(self.waiting)

    # -- what there is

    def pending(self, most: int) -> Iterator[Place]:
        """What paths go on from, heaviest first, of at most so many that may become wanted leaves."""
        most = int(min(most, self.eligible))
        ranked = [(path.key, path.tip) for path in self.followed if not path.ended]
        ranked += [
            (key, place) for key, place, _ in heapq.nsmallest(most, self.waiting, key=lambda item: item[0])
        ]
        for _, place in sorted(ranked, key=lambda item: item[0])[:most]:
            yield place

    def outcome(self) -> list[Path]:
        """The settled paths. Before the end also the leaves that may have others before them; the text under way, where
        there is none."""
        if self.done:
            return self.settled
        ended = [path for path in self.followed if path.ended == "leaf"]
        paths = [*self.settled, *sorted(ended, key=lambda path: path.key)]
        if any(path.ended == "leaf" for path in paths):
            return paths
        under_way = [path for path in self.followed if path.tip.length]
        return [*paths, *sorted(under_way, key=lambda path: path.key)[:1]]


def masses(paths: Iterable[Path]) -> Masses:
    """What a set of paths says of all texts."""
    paths = list(paths)
    ends = {path.tip.number for path in paths}
    places = {place.number: place for path in paths for place in line(path.tip)}
    taken = {
        (place.parent.number, place.token) for place in places.values() if isinstance(place.parent, Place)
    }
    sums = {"found": 0.0, "open": 0.0, "truncated": 0.0, "merged": 0.0, "unsure": 0.0}
    for path in paths:
        mass = math.exp(path.tip.log_prob) or (SMALLEST if path.ended == "leaf" else 0.0)
        sums[{"leaf": "found", "": "open"}.get(path.ended, path.ended)] += mass
    for place in places.values():
        if place.number in ends:
            continue
        here = math.exp(place.log_prob)
        sums["truncated"] += here * place.gone
        for token, log_prob in zip(place.kept.tolist(), place.log_probs.tolist(), strict=True):
            if (place.number, token) not in taken:
                sums["open"] += math.exp(place.log_prob + log_prob)
    return Masses(**sums)


def _through(place: Place, void: set[int]) -> bool:
    return any(each.number in void for each in line(place))
