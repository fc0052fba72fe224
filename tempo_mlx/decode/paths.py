"""Reading token sequences off a lattice: the best ones, random ones, different ones.

Members of neighbouring sets are not independent, so a text is always read along edges: a path takes one
member of each set, and its score is log p_0(first) + sum of log P(j|i). Which members it may take is said by
`usable`, and nowhere else in Python; server/web/src/lib/lattice.ts says the same for the page, and
tests/readings.json holds both to it. Scores are what the lattice says; rows of a lattice see mixtures, so the
model's own log-probability of a path may differ.

Shapes: T layers, m members of a layer, n paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from tempo_mlx.arrays import Floats, Ints
from tempo_mlx.decode.pieces import Pieces, whole
from tempo_mlx.decode.step import Edge, Removal


class Token(Protocol):
    """What a member of a set must tell: decode.step.Member and report's RunToken do."""

    @property
    def id(self) -> int: ...
    @property
    def probability(self) -> float: ...
    @property
    def slot(self) -> int | None: ...
    @property
    def parents(self) -> tuple[Edge, ...]: ...
    @property
    def removed_after(self) -> int | None: ...
    @property
    def removed_why(self) -> Removal | None: ...
    @property
    def branch(self) -> int | None: ...


T = TypeVar("T", bound=Token)
T_co = TypeVar("T_co", bound=Token, covariant=True)


class TokenSet(Protocol[T_co]):
    """A step: its members, best first."""

    @property
    def tokens(self) -> Sequence[T_co]: ...


@dataclass(frozen=True)
class Layer(Generic[T_co]):
    """One set as paths see it. edges (m of the previous layer, m): log P(j|i); of the first, (1, m): log
    p_0(j).
    """

    members: tuple[T_co, ...]
    edges: Floats

    @property
    def printed(self) -> bool:
        """Whether its member is part of the text: the set was not removed as a whole."""
        return any(map(is_usable, self.members))


@dataclass(frozen=True)
class Path:
    """One member of each layer, by index, and the sum of its edges."""

    choice: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Chosen(Generic[T]):
    """One token of a path; `logprob` was read from the row of slot `parent` (None: the prompt's last)."""

    member: T
    parent: int | None
    logprob: float


def is_usable(token: Token) -> bool:
    """Alive, or removed from sight only."""
    return token.removed_after is None or (token.removed_why is not None and token.removed_why.unattended)


def is_read(token: Token) -> bool:
    """Whether a path that takes this member has its text: a token that ends the text has none to read."""
    return token.slot is not None and is_usable(token)


def usable(step: TokenSet[T], last: bool) -> tuple[T, ...]:
    """The members of a set that a path may take, best first; `last`: the path may end here.

    A member that ends the text has no successor, so it can only be the last of a path. Of the others those take
    part that are alive or unattended; of a set without any all do, though they print nothing.
    """
    candidates = tuple(token for token in step.tokens if last or token.slot is not None)
    return tuple(filter(is_usable, candidates)) or candidates


def layers_of(steps: Sequence[TokenSet[T]]) -> list[Layer[T]]:
    """The layers of the sets of a run, or of its first ones."""
    layers: list[Layer[T]] = []
    for index, step in enumerate(steps):
        layers.append(layer_after(layers[-1] if layers else None, usable(step, index + 1 == len(steps))))
    return layers


def layer_after(before: Layer[T] | None, members: Sequence[T]) -> Layer[T]:
    """These members as the layer that follows another, or as the first."""
    if before is None:
        edges = np.array([[token.probability for token in members]])
    else:
        forward: list[dict[int | None, float]] = [
            {edge.slot: edge.forward for edge in token.parents} for token in members
        ]
        edges = np.array([[edge.get(token.slot, 0.0) for edge in forward] for token in before.members])
    # A probability that underflowed must not cut the only path there is.
    return Layer(tuple(members), np.log(np.maximum(edges, np.finfo(np.float64).tiny)))


def best_paths(layers: Sequence[Layer[T]], count: int = 1) -> list[Path]:
    """The `count` paths of the highest score, best first (k-best Viterbi); fewer where there are no more.

    Ties go to the earlier member, which is the more probable one.
    """
    if not layers:
        return []
    scores = layers[0].edges.T  # (m, n): the best paths that end in each member, best first
    pointers: list[Ints] = []  # (m, n) each: member of the previous layer x n + its rank
    for layer in layers[1:]:
        # (m before, n, m) -> (m, m before x n), in order of the earlier member
        reached = (scores[:, :, None] + layer.edges[:, None, :]).reshape(-1, layer.edges.shape[1]).T
        order = np.argsort(-reached, axis=1, kind="stable")[:, :count]
        pointers.append(np.stack(np.divmod(order, scores.shape[1])))
        scores = np.take_along_axis(reached, order, axis=1)
    flat = np.argsort(-scores, axis=None, kind="stable")[:count]
    member, rank = np.divmod(flat, scores.shape[1])  # (n,)
    choices = [member]
    for pointer in reversed(pointers):
        member, rank = pointer[:, member, rank]
        choices.append(member)
    return [
        Path(tuple(choice), float(score))
        for choice, score in zip(np.stack(choices[::-1], axis=1).tolist(), scores.ravel()[flat], strict=True)
    ]


def sample_paths(
    layers: Sequence[Layer[T]], count: int, seed: int | Sequence[int], temperature: float = 1.0
) -> list[Path]:
    """Draw `count` paths with probability proportional to exp(score / temperature), repetitions included.

    Forward filtering, backward sampling: exact over all paths, whose number is exponential in T.
    """
    choices = whole(drawing(layers, count, seed, temperature))
    return [Path(choice, path_score(layers, choice)) for choice in choices]


def drawing(
    layers: Sequence[Layer[T]], count: int, seed: int | Sequence[int], temperature: float = 1.0
) -> Pieces[list[tuple[int, ...]]]:
    """The choices of `sample_paths`, a layer at a time."""
    if not layers:
        return []
    random = np.random.default_rng(seed)
    filtered = [layers[0].edges[0] / temperature]  # (m,): log of the summed weight of the paths ending there
    for layer in layers[1:]:
        filtered.append(np.logaddexp.reduce(filtered[-1][:, None] + layer.edges / temperature, axis=0))
        yield
    choices = [_draw(np.broadcast_to(filtered[-1][:, None], (len(filtered[-1]), count)), random)]
    for index in range(len(layers) - 2, -1, -1):
        onward = layers[index + 1].edges[:, choices[-1]] / temperature  # (m, n)
        choices.append(_draw(filtered[index][:, None] + onward, random))
        yield
    return [tuple(choice) for choice in np.stack(choices[::-1], axis=1).tolist()]


def path_score(layers: Sequence[Layer[T]], choice: Sequence[int]) -> float:
    """The sum of the edges of one path."""
    before = (0, *choice)
    return float(sum(layer.edges[before[t], choice[t]] for t, layer in enumerate(layers)))


def members_of(layers: Sequence[Layer[T]], path: Path) -> list[T]:
    """The members a path takes, one a layer."""
    return [layer.members[index] for layer, index in zip(layers, path.choice, strict=True)]


def chosen_of(layers: Sequence[Layer[T]], choice: Sequence[int]) -> list[Chosen[T]]:
    """The members a path takes, each with where its probability was read."""
    before, parent, found = 0, None, []
    for layer, index in zip(layers, choice, strict=True):
        found.append(Chosen(layer.members[index], parent, float(layer.edges[before, index])))
        before, parent = index, layer.members[index].slot
    return found


def trace(steps: Sequence[TokenSet[T]], ids: Sequence[int]) -> list[Chosen[T]]:
    """The most probable path that spells `ids`; [] where there is none. Sets that print nothing are passed through.

    Of a tree the texts may end at any step; branches can hold the same token, and edges tell them apart.
    """
    layers: list[Layer[T]] = []
    spelled = 0
    for index, step in enumerate(steps):
        if spelled == len(ids):
            break
        branching = any(token.branch is not None for token in step.tokens)
        members = usable(step, branching or index + 1 == len(steps))
        if any(map(is_usable, members)):
            members = tuple(token for token in members if token.id == ids[spelled])
            spelled += 1
        if not members:
            return []
        layers.append(layer_after(layers[-1] if layers else None, members))
    return chosen_of(layers, best_paths(layers)[0].choice) if spelled == len(ids) and layers else []


def token_ids(layers: Sequence[Layer[T]], path: Path) -> list[int]:
    """The tokens a path prints: those of layers that print nothing are left out."""
    return [
        member.id for layer, member in zip(layers, members_of(layers, path), strict=True) if layer.printed
    ]


def readings_at_hand(steps: Sequence[TokenSet[T]], count: int, seed: int) -> list[list[int]]:
    """Different readings, the best path first: k-best paths, then random ones, 16 for each of the `count` wanted."""
    layers = layers_of(steps)
    paths = best_paths(layers, 4 * count) + sample_paths(layers, 12 * count, seed)
    return [list(ids) for ids in dict.fromkeys(tuple(token_ids(layers, path)) for path in paths) if ids]


def candidate_paths(steps: Sequence[TokenSet[T]], count: int, seed: int, distance: float) -> list[list[int]]:
    """Those of the readings that are worth an exact score: the best two for each of the `count` wanted, and three that
    are far enough from each other (`distance`, see choose_distinct), in the order they come.
    """
    found = readings_at_hand(steps, count, seed)
    far = choose_distinct(found, range(0, -len(found), -1), 3 * count, distance)
    return [found[i] for i in dict.fromkeys((*range(min(2 * count, len(found))), *far))]


def choose_distinct(
    sequences: Sequence[Sequence[int]], scores: Sequence[float], count: int, distance: float
) -> list[int]:
    """Indices of up to `count` sequences, by descending score, each far enough from all chosen before it.

    `distance`: the least edit distance between two of them, as a share of the longer one's length.
    """
    chosen: list[int] = []
    for index in np.argsort(-np.asarray(scores, np.float64), kind="stable").tolist():
        here = sequences[index]
        if all(
            edit_distance(here, sequences[other]) >= distance * max(len(here), len(sequences[other]), 1)
            for other in chosen
        ):
            chosen.append(index)
        if len(chosen) == count:
            break
    return chosen


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements of tokens.

    Column by column of the table of distances of all beginnings, whose differences of +1 and -1 downwards are kept as
    the bits of two whole numbers (Hyyrö 2003, after Myers 1999): texts of 4,000 tokens take 10 ms.
    """
    if not first:
        return len(second)
    places: dict[int, int] = {}  # of each token, a bit for every place in `first`
    for index, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << index
    every, last = (1 << len(first)) - 1, 1 << len(first) - 1
    rises, falls, distance = every, 0, len(first)
    for token in second:
        equal = places.get(token, 0)
        kept = (((equal & rises) + rises) ^ rises) | equal | falls  # where the diagonal has no difference
        up, down = falls | every & ~(kept | rises), rises & kept  # of each row, to the next column
        distance += bool(up & last) - bool(down & last)
        up, down = up << 1 | 1, down << 1
        rises, falls = (down | ~(kept | up)) & every, up & kept & every
    return distance


def _draw(log_weights: Floats, random: np.random.Generator) -> Ints:
    """One index of each column of (m, n), with probability proportional to exp."""
    cumulative = np.cumsum(np.exp(log_weights - log_weights.max(axis=0)), axis=0)
    drawn: Ints = (cumulative < random.random(log_weights.shape[1]) * cumulative[-1]).sum(axis=0)
    return drawn
