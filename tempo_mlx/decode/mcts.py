"""Monte Carlo tree search over the next token, in the one cache, under ancestor visibility.

A simulation descends by PUCT (arXiv 1712.01815) to a node that has not been run, runs it, gives it children
by the selection rule, and rates it by a greedy rollout. Several are collected before one forward pass runs
them, a node under way counting as visited (arXiv 1810.11755). The most visited child of the root is the next
token; its subtree is kept, every other row leaves the cache.

Shapes: L rows of one forward pass, V vocabulary, n rows of the tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s
from tempo_mlx.decode.combine import shares
from tempo_mlx.decode.decoder import Decoder, DecoderSpec, Reading, Setup
from tempo_mlx.decode.prefill import Interrupted
from tempo_mlx.decode.selection import make_selector
from tempo_mlx.decode.step import Edge, Member, Rejected, Step
from tempo_mlx.errors import ConfigError
from tempo_mlx.lattice import ancestor_bias, ancestor_parents

LEAVES_AT_ONCE = 4


@dataclass(eq=False)
class SearchNode:
    """A token and what the search knows of it. `row`: its index in `Mcts.parents`; -1 for the root, which all
    see.
    """

    token: int
    log_prob: float  # of the token, at temperature 1
    probability: float  # at the run's temperature
    prior: float  # probability among its siblings
    length: int  # of the text up to here
    parent: SearchNode | None = None
    ends: bool = False
    row: int | None = None  # None: not run
    children: list[SearchNode] | None = None  # None: not run; empty: the text ends here
    masked: tuple[float, ...] | None = None  # see Controlled; once it was run
    visits: int = 0
    value_sum: float = 0.0
    pending: int = 0  # simulations under way

    @property
    def value(self) -> float:
        return self.value_sum / self.visits if self.visits else 0.0


@dataclass(frozen=True)
class Rollout:
    """What a value function rates: a text, of which the last tokens are a greedy rollout.

    `committed`: how many of its tokens are decided already; `finished`: the model ended it.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    committed: int
    finished: bool


Value = Callable[[Rollout], float]


class Mcts(Decoder):
    """The state of one search. Without a value function a node's worth is the mean, over the simulations
    through it, of the mean log-probability of the tokens from it on.
    """

    def __init__(self, setup: Setup) -> None:
        """Runs the prompt. Raises PromptError, and Interrupted."""
        super().__init__(setup)
        self.value = setup.functions.value
        self.by_threshold = self.config.selection == "threshold" and setup.functions.select is None
        width = 1 if self.config.temperature == 0 else int(self.config.max_parallel_tokens)
        self.select = make_selector(self.config, width, functions=setup.functions)
        self.text: list[SearchNode] = []  # decided
        self.root = SearchNode(-1, 0.0, 1.0, 1.0, 0, row=-1)
        # (n,) the cache's last rows, which only descendants see: row of the parent
        self.parents: list[int] = []
        self.low, self.high = math.inf, -math.inf  # of all values so far
        self.simulations = self.forwards = self.rows_run = self.max_depth = 0
        self.searches: list[list[dict[str, Any]]] = []  # of each step, when its token was chosen
        self.expand(self.root, self.run_prompt(setup)[0])

    @property
    def finished(self) -> bool:
        return bool(self.text) and self.text[-1].ends

    def advance(self) -> Step:
        """One token: search, then take the root's most visited child (of equals the more probable one)."""
        root = self.root
        if root.children is None:
            self.expand(root, self.run([root.token], [-1], [root.length])[0])
            self.parents = []  # everything that follows sees it
        children = root.children or []
        if len(children) > 1:
            self.search(self.config.mcts_simulations)
        chosen = max(children, key=lambda child: child.visits)
        self.searches.append(visited(root))
        step = self.step_of(chosen, children)
        self.commit(chosen)
        return self.record(step)

    def readings(self) -> list[Reading]:
        """The text so far."""
        ids, log_probs = (
            zip(*((node.token, node.log_prob) for node in self.text), strict=True) if self.text else ((), ())
        )
        return [Reading(ids, log_probs, self.finished, 0)] if ids else []

    def statistics(self, token_text: Callable[[int], str]) -> dict[str, Any]:
        """For the run file: totals, and for each step what was known when its token was chosen (see `visited`).

        rows: run for search and text, rollouts included; max_depth: of a simulation's leaf, below its root.
        """
        steps = [
            {"nodes": [{**node, "text": token_text(node["id"])} for node in nodes]} for nodes in self.searches
        ]
        totals = {"simulations": self.simulations, "forward_passes": self.forwards, "rows": self.rows_run}
        return {**totals, "max_depth": self.max_depth, "steps": steps}

    # -- the search

    def search(self, simulations: int) -> None:
        """So many simulations from the root. Raises Interrupted between forward passes."""
        done = 0
        while done < simulations and self.has_room():
            if reason := self.interrupted():
                raise Interrupted(reason)
            leaves: list[SearchNode] = []
            while len(leaves) < min(LEAVES_AT_ONCE, simulations - done):
                leaf = self.descend()
                if leaf in leaves:
                    break
                for node in lineage(leaf):
                    node.pending += 1
                leaves.append(leaf)
            self.rate(leaves)
            done += len(leaves)
        self.simulations += done

    def descend(self) -> SearchNode:
        """From the root along the best scores to a node that has not been run, or that ends its text."""
        node = self.root
        while node.children:
            tries = sum(child.visits + child.pending for child in node.children)
            scores = [self.score(node, child, tries) for child in node.children]
            node = node.children[scores.index(max(scores))]
        return node

    def score(self, parent: SearchNode, child: SearchNode, tries: int) -> float:
        """PUCT, values scaled to [0, 1] over the whole tree (arXiv 1911.08265). An unvisited child is worth
        as much as its parent.
        """
        worth = child.value if child.visits else parent.value
        span = self.high - self.low
        explored = math.sqrt(tries + 1) / (1 + child.visits + child.pending)
        return (
            (worth - self.low) / span if span > 0 else 0.0
        ) + self.config.mcts_c_puct * child.prior * explored

    def rate(self, leaves: list[SearchNode]) -> None:
        """Run what has not been run, roll it out, and back up what each leaf is worth."""
        new = [leaf for leaf in leaves if leaf.children is None]
        rollouts: dict[SearchNode, list[tuple[int, float]]] = {}
        if new:
            above = [
                leaf.parent.row for leaf in new if leaf.parent is not None and leaf.parent.row is not None
            ]
            logits = self.run([leaf.token for leaf in new], above, [leaf.length for leaf in new])
            for index, leaf in enumerate(new):
                leaf.row = len(self.parents) - len(new) + index
                self.expand(leaf, logits[index])
            rollouts = self.roll_out(new, logits)
        for leaf in leaves:
            self.back_up(leaf, rollouts.get(leaf, []))

    def expand(self, node: SearchNode, logits: Float32s) -> None:
        """Give a node the children that the selection rule keeps of its distribution; logits (V,)."""
        rows = self.control(logits[None], [self.tokens_to(node)])
        log_probs, tempered = rows.log_probs[0], rows.tempered[0]
        node.masked = rows.masked
        tokens = self.selected(node.length, log_probs, np.exp(tempered))
        probabilities = np.exp(tempered[tokens], dtype=np.float64)
        priors = shares(probabilities)
        node.children = []
        for token, probability, prior in zip(tokens, probabilities.tolist(), priors.tolist(), strict=True):
            child = SearchNode(token, float(log_probs[token]), probability, prior, node.length + 1, node)
            child.ends = self.ends(child)
            if child.ends or self.position(child.length) >= self.model.architecture.max_position_embeddings:
                child.children = []
            node.children.append(child)

    def selected(self, length: int, log_probs: Float32s, probabilities: Float32s) -> list[int]:
        """What may follow a text so long, best first: nothing is renormalised for what must not."""
        excluded = list(self.excluded(length))
        if excluded and not np.delete(probabilities, excluded).any():  # all others underflowed
            eligible = log_probs.copy()
            eligible[excluded] = -np.inf
            return [int(eligible.argmax())]
        tokens: list[int] = self.select(probabilities, length, excluded).tolist()
        return tokens

    def roll_out(
        self, leaves: list[SearchNode], logits: Float32s
    ) -> dict[SearchNode, list[tuple[int, float]]]:
        """Continue each leaf greedily, all at once; logits (L, V): of the leaves' rows. Leaves the cache as it was.

        Returns the tokens and their log-probabilities.
        """
        kept, limit = len(self.parents), self.model.architecture.max_position_embeddings
        texts: dict[SearchNode, list[tuple[int, float]]] = {leaf: [] for leaf in leaves}
        rows = {leaf: leaf.row or 0 for leaf in leaves}
        while leaves:
            going = []
            sofar = [[*self.tokens_to(leaf), *(token for token, _ in texts[leaf])] for leaf in leaves]
            log_probs = self.control(logits, sofar).log_probs
            for leaf, distribution in zip(leaves, log_probs, strict=True):
                length = leaf.length + len(texts[leaf]) + 1
                distribution[list(self.excluded(length - 1))] = -np.inf
                token = int(distribution.argmax())
                texts[leaf].append((token, float(distribution[token])))
                unfinished = token not in self.eos_ids and self.position(length) < limit
                if unfinished and len(texts[leaf]) < self.config.mcts_depth:
                    going.append(leaf)
            leaves = going
            if leaves:
                lengths = [leaf.length + len(texts[leaf]) for leaf in leaves]
                logits = self.run(
                    [texts[leaf][-1][0] for leaf in leaves], [rows[leaf] for leaf in leaves], lengths
                )
                rows.update({leaf: len(self.parents) - len(leaves) + i for i, leaf in enumerate(leaves)})
        self.cache.truncate(len(self.cache) - len(self.parents) + kept)
        del self.parents[kept:]
        return texts

    def back_up(self, leaf: SearchNode, rollout: list[tuple[int, float]]) -> None:
        """Count a simulation, and what it was worth, at every node from the leaf to the root."""
        rated = None if self.value is None else self.value(self.rollout(leaf, rollout))
        if self.value is not None and not (isinstance(rated, Real) and math.isfinite(rated)):
            raise ConfigError(f"The value function returned {rated}; it must return a finite number.")
        total, count = sum(log_prob for _, log_prob in rollout), len(rollout)
        depth = leaf.length - self.root.length
        for node in lineage(leaf):
            if node is not self.root:
                total, count = total + node.log_prob, count + 1
            worth = total / count if rated is None else rated
            node.visits += 1
            node.value_sum += worth
            node.pending -= 1
            self.low, self.high = min(self.low, worth), max(self.high, worth)
        self.max_depth = max(self.max_depth, depth)

    def rollout(self, leaf: SearchNode, rollout: list[tuple[int, float]]) -> Rollout:
        nodes = [*self.text, *reversed(lineage(leaf)[:-1])]
        pairs = [*((node.token, node.log_prob) for node in nodes), *rollout]
        ids, log_probs = zip(*pairs, strict=True)
        return Rollout(ids, log_probs, len(self.text), finished=leaf.ends or ids[-1] in self.eos_ids)

    # -- the cache

    def run(self, tokens: Sequence[int], parents: Sequence[int], lengths: Sequence[int]) -> Float32s:
        """Append rows, each under its parent's, and return their logits (L, V)."""
        shared = len(self.cache) - len(self.parents)
        self.parents += parents
        bias = np.zeros((len(tokens), shared + len(self.parents)), np.float32)
        bias[:, shared:] = ancestor_bias(self.parents, len(tokens))
        positions = np.array([self.position(length) for length in lengths])
        continued = ancestor_parents(self.parents, len(tokens), shared)
        forward = self.model.forward(tokens, positions, bias, self.cache, parents=continued)
        assert forward.logits is not None
        self.forwards += 1
        self.rows_run += len(tokens)
        return forward.logits

    def commit(self, chosen: SearchNode) -> None:
        """Make `chosen` the root; keep its subtree, drop every other row."""
        shared = len(self.cache) - len(self.parents)
        alive = [node for node in subtree(chosen) if node.row is not None]
        alive.sort(key=lambda node: node.row or 0)
        old = [node.row or 0 for node in alive]
        self.cache.keep(np.concatenate([np.arange(shared), shared + np.array(old, np.int64)]))
        self.parents = []
        for index, node in enumerate(alive):  # the first is `chosen`, if it was run: all that follow see it
            node.row = index - 1
            if index and node.parent is not None and node.parent.row is not None:
                self.parents.append(node.parent.row)
        chosen.row, chosen.parent = -1, None
        self.text.append(chosen)
        self.root.children = []
        self.root = chosen

    def tokens_to(self, node: SearchNode) -> list[int]:
        """The text up to a node, its own token included, where something reads it: it grows with every step."""
        if not self.control.reads_texts:
            return []
        return [each.token for each in (*self.text, *reversed(lineage(node)[:-1]))]

    def position(self, length: int) -> int:
        """Of the last token of a text of this length."""
        return self.prompt_length + length - 1

    def has_room(self) -> bool:
        """Whether another batch, rollouts included, stays under the limit on the cache."""
        limit = self.config.max_cache_tokens
        return limit is None or len(self.cache) + LEAVES_AT_ONCE * self.config.mcts_depth <= limit

    def ends(self, node: SearchNode) -> bool:
        """Whether the last token of a text ends it."""
        if node.token in self.eos_ids or self.stops is None:
            return node.token in self.eos_ids
        return self.stops(n.token for n in chain(lineage(node)[:-1], reversed(self.text)))

    def step_of(self, chosen: SearchNode, children: list[SearchNode]) -> Step:
        """The step for the record: in a run file the text is a chain, whatever else the cache held."""
        index = len(self.text)
        slot = self.prompt_length + index
        edges = (Edge(slot - 1, 1.0, chosen.probability),) if index else ()
        tries = sum(child.visits for child in children)
        own_slot, weight = (None, None) if chosen.ends else (slot, 1.0)
        others = [
            Rejected(child.token, child.probability, f"{child.visits} of {tries} visits")
            for child in children
            if child is not chosen
        ]
        return Step(
            step=index,
            position=slot,
            threshold=self.config.threshold if self.by_threshold else None,
            residual_probability=1.0 - chosen.probability,
            tokens=(Member(chosen.token, chosen.probability, own_slot, weight, edges),),
            rejected=tuple(others),
            masked=self.root.masked,
        )


def lineage(node: SearchNode) -> list[SearchNode]:
    """The node, its parent, and so on to the root."""
    nodes = [node]
    while nodes[-1].parent is not None:
        nodes.append(nodes[-1].parent)
    return nodes


def subtree(node: SearchNode) -> list[SearchNode]:
    """The node and all below it."""
    nodes = [node]
    for each in nodes:
        nodes += each.children or []
    return nodes


def visited(root: SearchNode) -> list[dict[str, Any]]:
    """The root's children and every visited node below: parents first, `parent` is an index, None for the
    root.
    """
    index: dict[SearchNode, int | None] = {root: None}
    result: list[dict[str, Any]] = []
    for node in subtree(root):
        for child in sorted(node.children or [], key=lambda child: -child.visits):
            if node in index and (child.visits or node is root):
                index[child] = len(result)
                entry = {"parent": index[node], "id": child.token, "prior": child.prior}
                result.append({**entry, "visits": child.visits, "value": child.value})
    return result


MCTS = DecoderSpec("mcts", Mcts, functions=("select", "value", "logits_processors"))
