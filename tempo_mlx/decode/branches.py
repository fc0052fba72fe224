"""The rule of `--branches`: N different texts, each followed where the model is sure, branching where it is
not.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.decoder import DecoderSpec, Setup
from tempo_mlx.decode.selection import draw, entropy
from tempo_mlx.decode.step import Rejected, Removal
from tempo_mlx.decode.tree import Child, Choice, Frontier, Tree, best_children


class Branches:
    """Every text keeps one child; places left free go to the best other children. For `--branches`.

    The child kept is the best one, or one drawn from those with P(child | row) at or above the threshold.
    Texts whose last `merge_length` tokens agree are merged: the more probable one goes on. A free place goes
    to the child that makes the most probable text, among those at or above the threshold.

    With `branch_diversity` a child counts as less probable, by a factor of exp(-branch_diversity), for the text
    that keeps it if it would follow its token in another text too, anywhere: the Hamming penalty of diverse beam
    search (arXiv 1610.02424) on pairs of tokens instead of places, among the children above the threshold only.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.width = max(config.branches, config.best_of)
        self.threshold: float | None = config.threshold
        self.floor = float(np.log(max(config.threshold, np.finfo(np.float32).tiny)))
        self.gate = config.branch_entropy
        self.merge_length = config.merge_length
        self.diversity = config.branch_diversity
        self.pairs: set[tuple[int, int]] = set()  # neighbours in any text so far
        self.random = np.random.default_rng(config.seed)
        self.sampled = config.branch_choice == "sample" and config.temperature > 0

    def __call__(self, frontier: Frontier) -> Choice:
        own = [frontier.child(row, token) for row, token in enumerate(self.own(frontier))]
        own.sort(key=lambda child: -child.log_prob)
        children: list[Child] = []
        rejected: list[Rejected] = []
        lost: dict[int, Removal] = {}
        endings: dict[object, Child] = {}  # by their last tokens, the most probable text first
        for child in own:
            ending = self.ending(frontier, child)
            other = endings.setdefault(ending, child)
            if other is child:
                children.append(child)
            else:
                lost[child.row] = Removal("merged", child.log_prob, other.log_prob)
                probability = float(np.exp(frontier.tempered[child.row, child.token]))
                rejected.append(Rejected(child.token, probability, "merged"))
        free = self.width - sum(not child.ends for child in children)
        taken = {(child.row, child.token) for child in own}
        for child in self.others(frontier, taken) if free else ():
            ending = self.ending(frontier, child)
            if ending in endings:
                continue
            endings[ending] = child
            children.append(child)
            free -= not child.ends
            if not free:
                break
        self.pairs.update((frontier.nodes[child.row].token, child.token) for child in children)
        ended = len(frontier.ended) + sum(child.ends for child in children)
        return Choice(children, rejected, lost, done=ended >= self.width)

    def own(self, frontier: Frontier) -> list[int]:
        """The child each row keeps; the most probable text chooses first."""
        tokens: list[int] = frontier.tempered.argmax(axis=1).tolist()
        if not self.sampled and not self.diversity:
            return tokens
        taken = set(self.pairs)
        places = self.random.random(len(tokens)).tolist() if self.sampled else [0.0] * len(tokens)
        for row in reversed(range(len(tokens))):
            tokens[row] = self.pick(frontier, row, tokens[row], taken, places[row])
            taken.add((frontier.nodes[row].token, tokens[row]))
        return tokens

    def pick(self, frontier: Frontier, row: int, best: int, taken: set[tuple[int, int]], place: float) -> int:
        """The best child at or above the threshold, or (sampled) that at `place`, 0..1, of their probabilities;
        `best` if there is none. taken: pairs of neighbours to turn away from.
        """
        tokens = np.flatnonzero(frontier.tempered[row] >= self.floor)
        if not len(tokens):
            return best
        scores = frontier.tempered[row, tokens].astype(np.float64)
        if self.diversity:
            node = frontier.nodes[row]
            elsewhere = taken - {(a.token, b.token) for a, b in pairwise(node.tail())}
            scores -= self.diversity * np.array(
                [(node.token, token) in elsewhere for token in tokens.tolist()]
            )
        if not self.sampled:
            return int(tokens[scores.argmax()])
        return int(tokens[draw(np.exp(scores), place)])

    def others(self, frontier: Frontier, taken: set[tuple[int, int]]) -> Iterator[Child]:
        """Children at or above the threshold besides those taken, the most probable text first; where there is a gate,
        only of rows whose next token is uncertain enough (arXiv 2601.15296).
        """
        rows, tokens = best_children(frontier.tempered, 2 * self.width + len(frontier.nodes))
        likely = frontier.tempered[rows, tokens] >= self.floor
        if self.gate:
            likely &= np.array([entropy(np.exp(row)) for row in frontier.tempered])[rows] >= self.gate
        rows, tokens = rows[likely], tokens[likely]
        sums = np.array([node.log_prob for node in frontier.nodes])[rows] + frontier.log_probs[rows, tokens]
        for index in np.argsort(-sums, kind="stable").tolist():
            if (int(rows[index]), int(tokens[index])) not in taken:
                yield frontier.child(int(rows[index]), int(tokens[index]))

    def ending(self, frontier: Frontier, child: Child) -> object:
        """What texts that are to be merged have in common; a text that nothing can follow is like no other."""
        if not self.merge_length or child.ends or frontier.forced[child.row]:
            return child
        nodes = frontier.nodes[child.row].tail(self.merge_length - 1)
        return child if any(node.forced for node in nodes) else (*(node.token for node in nodes), child.token)


def branches(setup: Setup) -> Tree:
    return Tree(setup, Branches(setup.config))


TREE = DecoderSpec("tree", branches, log_probs=True, texts="branches", functions=("logits_processors",))
