"""Samples on one tree that share rows as long as they say the same: spread over the distribution, or never the same.

Both are of the distribution that is chosen from: tempered, truncated and scaled to sum 1. `arithmetic`: every text is
an ordinary sample, but together they share no luck (arXiv 2210.15458). `stochastic-beam`: texts without replacement,
drawn as by Gumbel-top-k over all texts (arXiv 1903.06059); how probable each was to be among them is known, which makes
estimates of anything the texts say unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s, Floats, Ints
from tempo_mlx.decode.beam import Samples
from tempo_mlx.decode.decoder import DecoderSpec, Reading, Setup
from tempo_mlx.decode.selection import draw
from tempo_mlx.decode.step import Removal
from tempo_mlx.decode.tree import Child, Choice, Frontier, Node, Tree, reading_of


class Arithmetic(Samples):
    """Number i has the code (i / n + U) mod 1, U uniform: each code alone is uniform, together they are even.

    A code says which token its text goes on with, by its place among the cumulated probabilities, and its place within
    the token is the code of what follows. Once a text has a row of its own, what is left of its code is uniform given
    all before; it is drawn anew, since a long text's would be rounded away.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.seed = setup.config.seed
        shift = np.random.default_rng(self.seed).random()
        first = [(number, (number / self.width + shift) % 1.0) for number in range(self.width)]
        self.codes: dict[tuple[Node | None, int], list[tuple[int, float]]] = {(None, -1): first}

    def of(self, node: Node) -> list[tuple[int, float]]:
        return self.codes.get((node.parent, node.token), [])

    def __call__(self, frontier: Frontier) -> Choice:
        children: list[Child] = []
        for row, node in enumerate(frontier.nodes):
            tokens, chances = kept_of(self, frontier, row)
            codes = self.of(node)
            if len(codes) == 1:
                number = codes[0][0]
                codes = [(number, np.random.default_rng([self.seed, number, node.length]).random())]
            above = np.cumsum(chances)
            for number, code in codes:
                at = draw(chances, code)
                within = (code * above[-1] - (above[at] - chances[at])) / chances[at]
                key = (node, int(tokens[at]))
                if key not in self.codes:
                    self.codes[key] = []
                    children.append(frontier.child(row, int(tokens[at])))
                self.codes[key].append((number, min(max(within, 0.0), math.nextafter(1.0, 0.0))))
        return Choice(children)


class StochasticBeam(Samples):
    """Of all texts those with the greatest log P + Gumbel noise, found from the top: a beginning's noise is the
    greatest of all texts that begin so. `bound`: the greatest noise that is not among them.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.seed = setup.config.seed
        self.noisy: dict[tuple[Node | None, int], tuple[float, float]] = {(None, -1): (0.0, math.inf)}
        self.beam: set[tuple[Node | None, int]] = {(None, -1)}
        self.bound = -math.inf

    def of(self, node: Node) -> tuple[float, float]:
        """(log P, the same with noise) of a text."""
        return self.noisy.get((node.parent, node.token), (node.log_prob, -math.inf))

    def __call__(self, frontier: Frontier) -> Choice:
        found: list[tuple[float, Child | None, tuple[Node | None, int]]] = []
        for node in frontier.ended:
            key = (node.parent, node.token)
            if key in self.beam:
                found.append((self.noisy[key][1], None, key))
        for row, node in enumerate(frontier.nodes):
            tokens, chances = kept_of(self, frontier, row)
            log_prob, noisy = self.of(node)
            logs = log_prob + np.log(chances)
            noise = np.random.default_rng([self.seed, *node.token_ids()]).gumbel(size=len(tokens))
            free = logs + noise  # the greatest of all is free: were it fixed, the weights would be biased
            noised = free if noisy == math.inf else conditioned(free, noisy)
            best = np.argsort(-noised, kind="stable")[: self.width + 1]  # the rest decides nothing
            for at in best.tolist():
                key = node, int(tokens[at])
                self.noisy[key] = float(logs[at]), float(noised[at])
                found.append((float(noised[at]), frontier.child(row, key[1]), key))
        found.sort(key=lambda item: -item[0])
        self.beam = {key for *_, key in found[: self.width]}
        if len(found) > self.width:
            self.bound = max(self.bound, found[self.width][0])
        lost = {row: Removal("beam", node.log_prob, self.bound) for row, node in enumerate(frontier.nodes)}
        return Choice([child for _, child, _ in found[: self.width] if child is not None], lost=lost)


def kept_of(rule: Samples, frontier: Frontier, row: int) -> tuple[Ints, Floats]:
    """The tokens that may be drawn after a row, by id, and their probabilities, which sum to 1."""
    probabilities: Float32s = np.exp(frontier.tempered[row])
    if not probabilities.any():  # what may come next has underflowed: no rule can tell it apart
        return np.array([frontier.tempered[row].argmax()]), np.ones(1)
    tokens = np.sort(rule.select(probabilities, frontier.nodes[row].length, ()))
    chances = probabilities[tokens].astype(np.float64)
    tokens, chances = tokens[chances > 0.0], chances[chances > 0.0]
    return tokens, chances / chances.sum()


def conditioned(noisy: Floats, greatest: float) -> Floats:
    """The same noise (n,), given that the greatest of it is `greatest` (section 4.1 and appendix B.3 of the paper)."""
    top = noisy.max()
    with np.errstate(divide="ignore"):
        v = greatest - noisy + np.log1p(-np.exp(np.minimum(noisy - top, 0.0)))
    result: Floats = greatest - np.maximum(v, 0.0) - np.log1p(np.exp(-np.abs(v)))
    result[noisy == top] = greatest
    return result


class ArithmeticTree(Tree):
    """A text is given as often as it was drawn."""

    def __init__(self, setup: Setup) -> None:
        self.drawn = Arithmetic(setup)
        super().__init__(setup, self.drawn)

    def readings(self) -> list[Reading]:
        nodes = self.ended if self.done else [*self.ended, *(node for node in self.nodes if node.length)]
        numbered = [(number, node) for node in nodes for number, _ in self.drawn.of(node)]
        return [reading_of(node) for _, node in sorted(numbered, key=lambda item: item[0])]


class StochasticTree(Tree):
    """Texts by falling probability, with what each stands for."""

    def __init__(self, setup: Setup) -> None:
        self.drawn = StochasticBeam(setup)
        super().__init__(setup, self.drawn)

    def texts(self) -> list[Node]:
        nodes = [*self.ended, *(node for node in self.nodes if node.length)]
        kept = [node for node in nodes if (node.parent, node.token) in self.drawn.beam]
        return sorted(kept, key=lambda node: -self.drawn.of(node)[0])

    def readings(self) -> list[Reading]:
        return [reading_of(node) for node in self.texts()]

    def statistics(self, token_text: Callable[[int], str]) -> dict[str, Any]:
        """bound: of noise, from which on a text was drawn; null where all were. weights: of each text, what it stands
        for: its probability over that of being drawn; their sum over texts estimates how probable such texts are.
        """
        bound = self.drawn.bound
        logs = [self.drawn.of(node)[0] for node in self.texts()]
        return {"bound": None if bound == -math.inf else bound, "weights": weights_of(logs, bound)}


def weights_of(logs: Sequence[float], bound: float) -> list[float]:
    """P(text) / P(drawn | bound), with P(drawn | bound) = 1 - exp(-exp(log P - bound))."""
    if bound == -math.inf:
        return [math.exp(log) for log in logs]
    return [math.exp(log) / -math.expm1(-math.exp(min(log - bound, 700.0))) for log in logs]


def samples(setup: Setup) -> Tree:
    kinds = {"arithmetic": ArithmeticTree, "stochastic-beam": StochasticTree}
    kind = kinds.get(setup.config.sampling)
    return Tree(setup, Samples(setup)) if kind is None else kind(setup)


SAMPLE = DecoderSpec("sample", samples, texts="beam_width", functions=("select", "logits_processors"))
