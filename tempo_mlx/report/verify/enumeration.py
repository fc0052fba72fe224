"""An enumeration: its tree, text by text, and that nothing more probable was passed over.

The dense pass says what may follow each token. From that it is known which paths there are and what they weigh, so the
record is held to the order itself, and not to a repetition of the search: whatever was followed at once, each path must
be the heaviest that was left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np

from tempo_mlx.arrays import Float32s, Floats
from tempo_mlx.decode.control import Controlled
from tempo_mlx.decode.decoder import Reading
from tempo_mlx.decode.enumeration import masses_of
from tempo_mlx.decode.selection import entropy, make_selector
from tempo_mlx.decode.step import RunStep, RunToken
from tempo_mlx.report.stops import Stops
from tempo_mlx.report.verify.book import FROM_FILE, Book
from tempo_mlx.report.verify.choices import selection_of
from tempo_mlx.report.verify.claims import Claims
from tempo_mlx.report.verify.dense import DenseRun, Replayed

MASSES = ("found", "open", "truncated", "merged", "unsure")
EFFORT = ("passes", "rows", "most_slots")


@dataclass(eq=False)
class Known:
    """A recorded token, or the prompt (None), and what may follow it. sure: what is kept, but for what the last bits
    decide, with its log-probability here; unsure: the probability of the rest that may be kept.
    """

    token: RunToken | None
    above: Known | None
    log_prob: float  # of the text
    length: int
    doubt: float = 0.0  # what the text is weighed by under the order of that name
    best: float = 0.0  # log-probability of the most probable token here
    sure: dict[int, float] = field(default_factory=dict)
    unsure: float = 0.0
    gone: float = 0.0
    allowed: set[int] = field(default_factory=set)
    children: dict[int, Known] = field(default_factory=dict)

    def line(self) -> Iterator[Known]:
        node: Known | None = self
        while node is not None and node.token is not None:
            yield node
            node = node.above

    def ids(self, count: int | None = None) -> tuple[int, ...]:
        nodes = list(self.line())[:count]
        return tuple(node.token.id for node in reversed(nodes) if node.token is not None)


@dataclass(eq=False)
class Followed:
    """One path of the record: its own tokens. cut: why it goes no further, where nothing ends its text."""

    nodes: list[Known]
    leaf: bool
    cut: Literal["", "merged", "unsure"] = ""

    @property
    def tip(self) -> Known:
        return self.nodes[-1]

    def start(self, slack: float) -> Known:
        """Where it begins: in a file of an unfinished run, its tokens may begin on a path that is not recorded."""
        for node in reversed(self.nodes):
            if node.above is not None and node.log_prob - node.above.log_prob < node.above.best - slack:
                return node
        return self.nodes[0]


class EnumerationReplay:
    def __init__(self, claims: Claims, dense: DenseRun, book: Book) -> None:
        self.claims, self.book = claims, book
        self.model = Replayed(dense, claims.loaded.model, attention=False, one_by_one=False)
        config = claims.config
        self.select = make_selector(config, claims.loaded.model.architecture.vocab_size)
        self.stops = Stops(claims.loaded.tokenizer, config.stop) if config.stop else None
        context = claims.loaded.model.architecture.max_position_embeddings - claims.run.prompt_length
        self.longest = min(config.max_tokens, context)
        self.root = Known(None, None, 0.0, 0)
        self.slack = 4.0 * book.tolerance.base  # of a log-probability, by the token
        self.whole, self.by_doubt = claims.run.finish_reason == "stop", config.leaf_order == "doubt"

    def run(self) -> tuple[list[Reading], bool]:
        """The leaves, and whether the enumeration had come to its end."""
        book = self.book
        book.did("probabilities", "edges", "paths and their order", "ends of texts", "masses")
        book.open("passes, rows and slots that the enumeration took")
        rows = [self.root]
        for record in self.claims.run.steps:
            forward = self.model.forward([0], [0], None, self.model.alive)
            assert forward.logits is not None
            texts = [list(row.ids()) for row in rows]
            rows = self.follow(record, rows, self.claims.control(forward.logits, texts))
        paths = self.paths()
        self.check_cuts(paths)
        open_ = [
            (node.doubt - node.best if self.by_doubt else node.log_prob) + log_prob
            for node in self.nodes()
            for token, log_prob in node.sure.items()
            if token not in node.children
        ]
        heaviest = max(open_, default=-math.inf)
        self.check_order(paths, heaviest)
        self.check_masses(paths)
        leaves = [path for path in paths if path.leaf] or [path for path in paths if not path.cut]
        readings = [self.reading(number, path) for number, path in enumerate(leaves)]
        return readings, self.has_ended(paths, heaviest)

    def follow(self, record: RunStep, rows: list[Known], after: Controlled) -> list[Known]:
        """The tokens of a step, held against the rows before it; those that have a slot, in slot order."""
        book, config = self.book, self.claims.config
        by_slot = {row.token.slot if row.token else None: (row, i) for i, row in enumerate(rows)}
        used = {token.parents[0].slot if token.parents else None for token in record.tokens}
        threshold = config.threshold if config.selection == "threshold" else None
        book.same(f"the threshold of step {record.step}", record.threshold, threshold)
        book.same(f"what is rejected in step {record.step}", record.rejected, ())
        book.same(f"what a grammar took away in step {record.step}", record.masked, None)
        masses, chances = masses_of(after), np.exp(after.tempered)
        for slot in used:
            row, index = by_slot[slot]
            self.learn(row, masses[index], chances[index])
        new = []
        for token in record.tokens:
            above, index = by_slot[token.parents[0].slot if token.parents else None]
            mass = float(masses[index][token.id])
            book.number("probability", record.step, token.text, token.probability, mass, book.tolerance.base)
            log_prob = above.log_prob + log_of(mass)
            for name in ("removed_after", "removed_why", "posterior", "attention"):
                book.same(f"the {name} of {token.text!r} in step {record.step}", getattr(token, name), None)
            doubt = above.doubt + log_of(mass) - above.best
            node = Known(token, above, log_prob, above.length + 1, doubt)
            if token.id in above.children or token.id not in above.allowed:
                book.lie(
                    "selection", f"Step {record.step} has {token.text!r} where it is not kept, or twice."
                )
            above.children[token.id] = node
            if self.ends(node) != (token.slot is None):
                book.lie(
                    "ends", f"In step {record.step}, {token.text!r} ends its text and has a slot, or neither."
                )
            new.append(node)
        new.reverse()
        if any(a.log_prob > b.log_prob + self.slack * b.length for a, b in pairwise(new)):
            book.lie("order", f"The tokens of step {record.step} are not in the order of their texts.")
        return [node for node in new if node.token is not None and node.token.slot is not None]

    def learn(self, row: Known, masses: Floats, chances: Float32s) -> None:
        """What the rule keeps after a row, as far as that is sure."""
        config, slack = self.claims.config, 2.0 * self.book.tolerance.base
        excluded = self.claims.excluded(row.length)
        kept = self.select(chances, row.length, excluded)
        row.best = log_of(masses[kept[0]])
        row.gone = 1.0 - float(masses[kept].sum())
        selection = selection_of(config, row.length, len(chances), excluded)
        by_value = selection.rule in ("threshold", "min-p")
        floor = selection.floor(float(chances[kept[0]])) if by_value else float(chances[kept[-1]])
        eligible = chances.copy()
        eligible[list(excluded)] = 0.0
        close = np.abs(eligible - floor) <= slack
        if self.claims.control.truncations:  # whose edge the last bits decide, too
            close |= np.abs(masses - masses[chances > 0.0].min()) <= slack
        near = np.flatnonzero(close)
        if config.branch_entropy:
            beyond = entropy(chances) - config.branch_entropy
            if abs(beyond) <= 100.0 * slack:
                near = kept
            elif beyond < 0.0:
                row.gone += float(masses[kept[1:]].sum())
                kept, near = kept[:1], near[:0]
        unsure = set(near.tolist()) - {int(kept[0])}
        row.unsure = float(masses[sorted(unsure)].sum())
        row.sure = {token: log_of(masses[token]) for token in kept.tolist() if token not in unsure}
        row.allowed = unsure | row.sure.keys()

    def ends(self, node: Known) -> bool:
        ids = node.ids()
        return ids[-1] in self.claims.eos_ids or (self.stops is not None and self.stops(reversed(ids)))

    def nodes(self) -> Iterator[Known]:
        todo = [self.root]
        for node in todo:
            todo += node.children.values()
            yield node

    # -- paths

    def paths(self) -> list[Followed]:
        """The record's branches, in order, each a chain that ends where nothing else goes on."""
        own: dict[int | None, list[Known]] = {}
        for node in self.nodes():  # by length
            if node.token is not None:
                own.setdefault(node.token.branch, []).append(node)
        if not self.book.same(
            "the numbers of the branches", sorted(own, key=str), sorted(range(len(own)), key=str)
        ):
            return []
        found = []
        for number in range(len(own)):
            nodes = own[number]
            follows = all(after.above is before for before, after in pairwise(nodes))
            last = nodes[-1]
            if not follows or last.children:
                self.book.lie("branch", f"Branch {number} is not one text to its end.")
            if self.whole:
                self.check_greedy(number, nodes[1:])
            ended = last.token is not None and last.token.slot is None
            found.append(Followed(nodes, ended or last.length >= self.longest))
        return found

    def check_greedy(self, number: int, nodes: list[Known]) -> None:
        for node in nodes:
            assert node.above is not None
            here = node.log_prob - node.above.log_prob
            self.book.agreed.append(here >= node.above.best)
            if here < node.above.best - self.slack:
                self.book.lie(
                    "children", f"Branch {number} leaves its most probable text at token {node.length}."
                )

    def check_cuts(self, paths: list[Followed]) -> None:
        """A text ends where it repeats one before it, or is less sure than the first ones, and else nowhere."""
        count = self.claims.config.merge_length
        endings: dict[tuple[int, ...], list[Known]] = {}
        least, first = -math.inf, list[float]()
        for number, path in enumerate(paths):
            going = path.nodes[:-1] if path.leaf else path.nodes
            faults = ((at, self.fault(node, at + 1, endings, least)) for at, node in enumerate(going))
            at, fault = next(((at, fault) for at, fault in faults if fault), (None, ""))
            last = len(path.nodes) - 1
            if not path.leaf and (at == last or (at is None and self.doubtful(path.tip, least))):
                path.cut = "merged" if fault == "merged" else "unsure"  # and every text before it is settled
            if self.whole and at is not None and at < last:
                self.book.lie(
                    "merged", f"Branch {number} repeats a text before it or is unsure, and goes on."
                )
            elif self.whole and not path.leaf and not path.cut:
                self.book.lie("ends", f"Branch {number} ends where nothing ends it.")
            for node in path.nodes if count else ():
                if node.length >= count:
                    endings.setdefault(node.ids(count), []).append(node)
            if path.leaf and len(first) < self.claims.config.warmup:
                first.append(min(map(self.confidence, path.tip.line())))
                if len(first) == self.claims.config.warmup and min(first) < math.inf:
                    least = min(first)

    def fault(
        self, node: Known, own: int, endings: Mapping[tuple[int, ...], list[Known]], least: float
    ) -> Literal["", "merged", "unsure"]:
        """Why a path goes no further than a token, the `own`th of its own, if that is sure."""
        count = self.claims.config.merge_length
        others = endings.get(node.ids(count), ()) if count and own >= count else ()
        mine = set(map(id, node.line())) if others else set()
        if any(id(other) not in mine for other in others):
            return "merged"
        return "unsure" if self.confidence(node) < least - self.slack else ""

    def doubtful(self, node: Known, least: float) -> bool:
        """Whether the last bits decide that the model is unsure."""
        return abs(self.confidence(node) - least) <= self.slack

    def confidence(self, node: Known) -> float:
        """Mean log-probability of the last tokens of a text; infinite for one that is too short."""
        window = self.claims.config.confidence_window
        line = [*islice(node.line(), window)]
        if len(line) < window or line[-1].above is None:
            return math.inf
        return (node.log_prob - line[-1].above.log_prob) / window

    def weight(self, path: Followed) -> float:
        start = path.start(self.slack)
        return start.doubt if self.by_doubt else start.log_prob

    def check_order(self, paths: list[Followed], heaviest: float) -> None:
        """Each path is the heaviest that was left; none follows once enough was found."""
        book, config = self.book, self.claims.config
        weights = [0.0, *map(self.weight, paths[1:])]
        for number, (before, after) in enumerate(pairwise(weights), 1):
            if after > before + self.slack * paths[number].nodes[0].length:
                book.lie("order", f"Branch {number} weighs more where it begins than the one before it.")
        if not self.whole or not paths:
            return
        if heaviest > weights[-1] + self.slack * self.longest:
            book.lie(
                "order",
                f"A text that weighs {math.exp(heaviest):.3g} where it begins was passed over for one that weighs "
                f"{math.exp(weights[-1]):.3g}.",
            )
        earlier = [path for path in paths[:-1] if path.leaf]
        found = sum(math.exp(path.tip.log_prob) for path in earlier)
        enough = config.coverage is not None and found >= config.coverage + self.slack * self.longest
        count = self.texts_of(earlier)
        if count >= config.leaves or enough:
            book.lie("length", f"The file goes on after {count} texts, when enough was found.")

    def texts_of(self, paths: list[Followed]) -> int:
        """How many different texts they say."""
        return len({self.claims.answers.said(path.tip.ids()) for path in paths})

    def has_ended(self, paths: list[Followed], heaviest: float) -> bool:
        """Whether enough was found, or all there is; as the file says, where the last bits decide that."""
        config = self.claims.config
        leaves = [path for path in paths if path.leaf]
        found = sum(math.exp(path.tip.log_prob) for path in leaves)
        if len(leaves) + sum(bool(path.cut) for path in paths) < len(paths) or not paths:
            return False
        slack = self.slack * self.longest
        beyond = heaviest - (self.weight(paths[-1]) if len(paths) > 1 else 0.0)
        unsure = any(node.unsure for node in self.nodes())
        if abs(beyond) <= slack or (config.coverage is not None and abs(found - config.coverage) <= slack):
            return self.whole
        if self.texts_of(leaves) >= config.leaves or (
            config.coverage is not None and found >= config.coverage
        ):
            return beyond < 0.0
        return heaviest == -math.inf and (self.whole or not unsure)

    # -- masses

    def check_masses(self, paths: list[Followed]) -> None:
        book, tree = self.book, self.claims.run.tree or {}
        book.same("what tree says", sorted(tree), sorted((*MASSES, *EFFORT)))
        said = {name: value for name in MASSES if isinstance(value := tree.get(name), int | float)}
        visited = [node for node in self.nodes() if node.children]
        spent = {name: tree.get(name) for name in EFFORT}
        if not self.plausible(spent, len(visited) - 1, max((path.tip.length for path in paths), default=1)):
            book.lie("tree", f"The file says {spent} of an enumeration of {len(visited)} places.")
        if len(said) < len(MASSES):
            book.lie("tree", "The file lacks a mass in tree.")
            return
        recorded = {
            "found": sum(math.exp(log_prob_in_file(path.tip)) for path in paths if path.leaf),
        } | {
            cut: sum(math.exp(log_prob_in_file(path.tip)) for path in paths if path.cut == cut)
            for cut in ("merged", "unsure")
        }
        for name, mass in recorded.items():
            book.number(f"mass {name}", 0, None, said[name], mass, FROM_FILE * 1e3)
        book.number("sum of the masses", 0, None, sum(said.values()), 1.0, FROM_FILE * 1e3)
        gone = sum(math.exp(node.log_prob) * node.gone for node in visited)
        slack = sum(math.exp(node.log_prob) * (node.unsure + self.slack) for node in visited)
        book.number(
            "mass truncated", 0, None, said["truncated"], gone, slack + gone * self.slack * self.longest
        )

    def plausible(self, spent: dict[str, Any], places: int, longest: int) -> bool:
        """Whether an enumeration of so many places can have taken that."""
        passes, rows, slots = (spent[name] for name in EFFORT)
        if not all(isinstance(value, int) for value in (passes, rows, slots)):
            return False
        prompt = self.claims.run.prompt_length
        limit = self.claims.config.max_passes
        fits = places <= rows and min(longest - 1, rows) <= passes <= rows
        return fits and prompt <= slots <= prompt + rows and (limit is None or passes <= limit)

    def reading(self, number: int, path: Followed) -> Reading:
        nodes = list(path.tip.line())[::-1]
        sums = [0.0, *(node.log_prob for node in nodes)]
        each = tuple(after - before for before, after in pairwise(sums))
        return Reading(path.tip.ids(), each, path.leaf, number)


def log_of(mass: float) -> float:
    return math.log(max(mass, 1e-300))


def log_prob_in_file(node: Known) -> float:
    """Of a text, by the probabilities that the file says of its tokens."""
    return sum(log_of(each.token.probability) for each in node.line() if each.token is not None)
