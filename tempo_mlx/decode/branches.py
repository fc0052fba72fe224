"""The rule of `--branches`: N different texts, each followed where the model is sure, branching where it is
not.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.step import Rejected, Removal
from tempo_mlx.decode.tree import Child, Choice, Frontier, best_children

Float32s = NDArray[np.float32]


class Branches:
    """Every text keeps one child; places left free go to the best other children. For `--branches`.

    The child kept is the best one, or one drawn from those with P(child | row) at or above the threshold.
    Texts whose last `merge_length` tokens agree are merged: the more probable one goes on. A free place goes
    to the child that makes the most probable text, among those at or above the threshold.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.width = config.branches
        self.threshold: float | None = config.threshold
        self.floor = float(np.log(max(config.threshold, np.finfo(np.float32).tiny)))
        self.merge_length = config.merge_length
        self.random = np.random.default_rng(config.seed)
        self.sampled = config.branch_choice == "sample" and config.temperature > 0

    def __call__(self, frontier: Frontier) -> Choice:
        own = [frontier.child(row, token) for row, token in enumerate(self.own(frontier.tempered))]
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
        ended = len(frontier.ended) + sum(child.ends for child in children)
        return Choice(children, rejected, lost, done=ended >= self.width)

    def own(self, tempered: Float32s) -> list[int]:
        """The child each row keeps."""
        best: list[int] = tempered.argmax(axis=1).tolist()
        if not self.sampled:
            return best
        return [self.draw(row, token) for row, token in zip(tempered, best, strict=True)]

    def draw(self, log_probs: Float32s, best: int) -> int:
        """One of the children (V,) at or above the threshold, by their probabilities; the best if there is none."""
        tokens = np.flatnonzero(log_probs >= self.floor)
        mass = np.cumsum(np.exp(log_probs[tokens], dtype=np.float64))
        place = self.random.random()
        return int(tokens[np.searchsorted(mass, place * mass[-1], side="right")]) if len(tokens) else best

    def others(self, frontier: Frontier, taken: set[tuple[int, int]]) -> Iterator[Child]:
        """Children at or above the threshold besides those taken, the most probable text first."""
        rows, tokens = best_children(frontier.tempered, 2 * self.width + len(frontier.nodes))
        likely = frontier.tempered[rows, tokens] >= self.floor
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
