"""Decoding on a tree: a row is one token that sees its own ancestors only, so every text is exact.

One forward pass a step runs the newest token of every text at once, on one cache. Which children the rows get
is a rule's business: branches.py, beam.py. Rows that no later row can see leave
lattice and cache at once. Log-probabilities are at temperature 1 and include the token that ends a text.

Shapes: k rows of the newest set, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Protocol

import numpy as np

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.decode.combine import shares
from tempo_mlx.decode.decoder import Decoder, Reading, Setup
from tempo_mlx.decode.step import Edge, Member, Rejected, Removal, Step
from tempo_mlx.lattice import Lattice


@dataclass(eq=False)
class Node:
    """The newest token of a text; the root stands for the prompt. `log_prob` is the whole text's."""

    token: int
    log_prob: float
    length: int
    branch: int
    parent: Node | None = None
    member: Member | None = None
    forced: bool = False  # not the model's choice
    finished: bool = False  # part of a text that has ended

    def tail(self, count: int | None = None) -> list[Node]:
        """The last `count` nodes of the text (all by default), in order."""
        nodes: list[Node] = []
        node = self
        while node.parent is not None and len(nodes) != count:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def token_ids(self, count: int | None = None) -> list[int]:
        return [node.token for node in self.tail(count)]

    def back(self) -> Iterator[int]:
        """The text's tokens, last to first."""
        node = self
        while node.parent is not None:
            yield node.token
            node = node.parent


@dataclass(frozen=True)
class Child:
    """A token after one of the rows. `log_prob`: of the text it makes; `ends`: it is the text's last."""

    row: int
    token: int
    log_prob: float
    ends: bool


@dataclass(frozen=True)
class Choice:
    """What a rule wants. The first child of a row continues its branch, others open new ones.

    lost: why a row without a child ends here, by row; "dropped" where the rule does not say. done: nothing further is
    wanted.
    """

    children: list[Child]
    rejected: list[Rejected] = field(default_factory=list)
    lost: dict[int, Removal] = field(default_factory=dict)
    done: bool = False


@dataclass(frozen=True)
class Frontier:
    """What a rule decides from. Tokens that must not come next have log-probability -inf.

    log_probs (k, V): at temperature 1. tempered (k, V): what is chosen from (control.py). nodes: the rows' texts, in
    slot order; forced: which of them have but one possible child. ended: texts that have ended.
    """

    log_probs: Float32s
    tempered: Float32s
    nodes: list[Node]
    forced: list[bool]
    ended: list[Node]
    ends: Callable[[Node, int], bool]

    def child(self, row: int, token: int) -> Child:
        node = self.nodes[row]
        log_prob = node.log_prob + float(self.log_probs[row, token])
        return Child(row, token, log_prob, self.ends(node, token))


class Rule(Protocol):
    """Chooses the next set. `width`: how many texts are wanted in the end; `threshold`: for the record."""

    width: int
    threshold: float | None

    def __call__(self, frontier: Frontier) -> Choice: ...


class Tree(Decoder):
    """The state of one run: the texts so far are `nodes` (one a row of the newest set) and `ended`."""

    def __init__(self, setup: Setup, rule: Rule) -> None:
        """Runs the prompt. Raises PromptError, and Interrupted."""
        super().__init__(setup)
        self.rule = rule
        self.lattice = Lattice(self.prompt_length)
        self.nodes = [Node(-1, 0.0, 0, 0)]
        self.ended: list[Node] = []
        self.by_slot: dict[int, Node] = {}  # alive
        self.num_branches = 1
        self.done = False
        self.rows = self.control(self.run_prompt(setup), [[]])
        self.exit_layer: int | None = None  # where the rows left the model
        self.waiting: list[int] = []  # the newest set's tokens, in slot order, until its rows are run

    @property
    def finished(self) -> bool:
        return self.done

    def advance(self) -> Step:
        """One step. The newest set's rows are run first, so that a run's last set never is."""
        if self.waiting:
            self.run_rows()
        frontier = self.frontier()
        return self.record(self.append(self.rule(frontier), frontier))

    def readings(self) -> list[Reading]:
        """The texts so far, ended or not, by falling mean log-probability per token; at most the rule's width, and
        under `best_of` the `branches` that are probable and say what no other does.
        """
        going = [] if self.done and self.ended else [node for node in self.nodes if node.length]
        texts = [*self.ended, *going]
        ranked = sorted(texts, key=lambda node: -node.log_prob / node.length)[: self.rule.width]
        readings = [reading_of(node) for node in ranked]
        if not self.config.best_of:
            return readings
        return most_different(readings, self.config.branches, self.config.branch_diversity)

    def run_rows(self) -> None:
        """Forward the newest set, all rows in one pass."""
        position = self.lattice.prompt_length + self.lattice.num_sets - 1
        positions = np.full(len(self.waiting), position)
        bias, parents = self.lattice.bias("lineage"), self.lattice.parents("best")
        texts = [node.token_ids() for node in self.nodes] if self.control.reads_texts else []
        self.control.ahead(texts)
        forward = self.model.forward(self.waiting, positions, bias, self.cache, parents=parents)
        assert forward.logits is not None
        self.rows = self.control(forward.logits, texts)
        self.exit_layer = forward.left_at
        self.waiting = []
        self.cache.settle(
            self.lattice.size - len(self.lattice.newest)
        )  # what ends has no row that goes on from it

    def frontier(self) -> Frontier:
        log_probs, tempered = self.rows.log_probs, self.rows.tempered
        forced = [self.guide(node.token_ids()) if self.guide else None for node in self.nodes]
        excluded = list(self.excluded(len(self.steps)))
        for array in (log_probs, tempered):
            array[:, excluded] = -np.inf
            for row, token in enumerate(forced):
                if token is not None:
                    array[row, np.arange(array.shape[1]) != token] = -np.inf
        is_forced = [token is not None for token in forced]
        return Frontier(log_probs, tempered, self.nodes, is_forced, self.ended, self.ends)

    def ends(self, node: Node, token: int) -> bool:
        """Whether `token` ends the text of `node`."""
        if token in self.eos_ids:
            return True
        return self.stops is not None and self.stops(chain([token], node.back()))

    def append(self, choice: Choice, frontier: Frontier) -> Step:
        """Record the children as a set, give those that do not end their text a row, drop what no row sees."""
        index, parents = len(self.steps), self.lattice.newest.tolist()
        new = sorted(self.grow(choice, frontier), key=lambda pair: pair[1].log_prob)  # in slot order
        kept = [(row, node) for row, node in new if not node.finished]
        weights = shares([member_of(node).probability for _, node in kept])
        removed: tuple[int, ...] = ()
        if kept:
            posterior = np.zeros((len(self.nodes), len(kept)))
            posterior[[row for row, _ in kept], np.arange(len(kept))] = 1.0
            slots = self.lattice.append(weights, posterior if parents else None).tolist()
            for slot, weight, (_, node) in zip(slots, weights.tolist(), kept, strict=True):
                node.member = replace(member_of(node), slot=slot, weight=weight)
                self.by_slot[slot] = node
            removed = self.compact(index, {parents[row]: why for row, why in choice.lost.items() if parents})
        self.ended += [node for _, node in new if node.finished]
        self.nodes = [node for _, node in kept]
        self.waiting = [node.token for node in self.nodes]
        self.done = choice.done or not kept
        members = [member_of(node) for _, node in reversed(new)]
        step = Step(
            step=index,
            position=self.lattice.prompt_length + index,
            threshold=self.rule.threshold,
            residual_probability=1.0 - sum(m.probability for m in members) / max(len(parents), 1),
            tokens=tuple(members),
            rejected=tuple(choice.rejected),
            exit_layer=self.exit_layer,
            masked=self.rows.masked,
        )
        step.removed = removed
        return step

    def grow(self, choice: Choice, frontier: Frontier) -> list[tuple[int, Node]]:
        """The chosen children as nodes, each with the row it comes from."""
        parents = self.lattice.newest.tolist()
        continued: set[int] = set()
        result = []
        for child in choice.children:
            parent = self.nodes[child.row]
            branch = parent.branch
            if child.row in continued:
                branch, self.num_branches = self.num_branches, self.num_branches + 1
            continued.add(child.row)
            probability = float(np.exp(frontier.tempered[child.row, child.token], dtype=np.float64))
            edges = (Edge(parents[child.row], 1.0, probability),) if parents else ()
            member = Member(child.token, probability, None, None, edges, branch=branch)
            forced = frontier.forced[child.row]
            node = Node(child.token, child.log_prob, parent.length + 1, branch, parent, member, forced)
            if child.ends:
                for earlier in (node, *reversed(parent.tail())):
                    if earlier.finished:
                        break
                    earlier.finished = True
            result.append((child.row, node))
        return result

    def compact(self, index: int, lost: dict[int, Removal]) -> tuple[int, ...]:
        """Drop every slot that no newest row sees from lattice and cache; returns those slots."""
        lattice, count = self.lattice, len(self.lattice.newest)
        unseen = ~lattice.gamma[:, : len(lattice.slots) - count].any(axis=0)
        dead = lattice.slots[: len(lattice.slots) - count][unseen]
        for slot in dead[::-1].tolist():  # children before parents, which end for the same reason
            node = self.by_slot.pop(slot)
            if node.finished:
                why = Removal("finished", node.log_prob, 0.0, unattended=True)
            else:
                why = lost.get(slot) or Removal("dropped", node.log_prob, 0.0)
            member = member_of(node)
            member.removed_after, member.removed_why = index, why
            for edge in member.parents:
                lost.setdefault(edge.slot, why)
        if len(dead):
            self.cache.keep(lattice.remove(dead)[:-count])
        return tuple(dead.tolist())


def member_of(node: Node) -> Member:
    assert node.member is not None
    return node.member


def reading_of(node: Node) -> Reading:
    nodes = node.tail()
    sums = [0.0, *(n.log_prob for n in nodes)]
    each = tuple(after - before for before, after in pairwise(sums))
    return Reading(tuple(n.token for n in nodes), each, node.finished, node.branch)


def best_children(scores: Float32s, count: int) -> tuple[Ints, Ints]:
    """Rows and tokens of the `count` highest scores of each row of (k, V), in no order."""
    k, vocabulary = scores.shape
    count = min(count, vocabulary)
    tokens = np.argpartition(scores, vocabulary - count, axis=1)[:, vocabulary - count :]
    return np.repeat(np.arange(k), count), tokens.ravel()


def most_different(texts: Sequence[Reading], count: int, worth: float) -> list[Reading]:
    """`count` of the texts, in their order: one by one that which adds most, its log-probability and `worth` nats for
    each pair of neighbours that none chosen before has, per token (maximal marginal relevance, Carbonell and Goldstein
    1998).
    """
    pairs = [set(pairwise(text.token_ids)) for text in texts]
    left = list(range(len(texts)))
    chosen: list[int] = []
    said: set[tuple[int, int]] = set()

    def adds(at: int) -> float:
        return (texts[at].log_prob + worth * len(pairs[at] - said)) / len(texts[at].token_ids)

    while left and len(chosen) < count:
        chosen.append(max(left, key=adds))
        left.remove(chosen[-1])
        said |= pairs[chosen[-1]]
    return [texts[at] for at in sorted(chosen)]
