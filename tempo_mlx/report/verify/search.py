"""A tree search: its text row by row, and of what it says it found all that follows from file and model.

The order of the simulations is not recorded, so which child was tried when is not repeated (`--rerun` does). But every
node that was visited was rolled out once, and its value is a mean over the simulations below it; so from the visits of
a step follow its values, the token chosen, and the totals but for the number of forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from tempo_mlx.arrays import Float32s, Floats
from tempo_mlx.decode.decoder import Reading
from tempo_mlx.decode.score import LOGITS_AT_ONCE, texts_to
from tempo_mlx.decode.step import RunStep
from tempo_mlx.errors import RunFileError
from tempo_mlx.lattice import ancestor_bias, ancestor_parents
from tempo_mlx.report.stops import Stops
from tempo_mlx.report.verify.book import FROM_FILE, Book
from tempo_mlx.report.verify.choices import (
    best_first,
    candidates_of,
    check_eligible,
    check_masked,
    check_set,
    selection_of,
)
from tempo_mlx.report.verify.claims import Claims
from tempo_mlx.report.verify.dense import DenseRun, Replayed
from tempo_mlx.strict import Number, Record, Text, Whole, read

Ids = tuple[int, ...]
MOST_VISITS = 10**12  # more than any search makes; a float still tells them apart


@dataclass(frozen=True)
class Visited(Record):
    """A node as a step's search left it."""

    parent: Annotated[Whole | None, "index of the node above; null below the root"]
    id: Annotated[Whole, "its token"]
    prior: Annotated[Number, "probability among its siblings"]
    visits: Annotated[Whole, "simulations through it"]
    value: Annotated[Number, "mean over them"]
    text: Annotated[Text, "of its token"]


@dataclass(frozen=True)
class Rollout:
    """The greedy text after a node: its log-probabilities summed, their number. `sure`: no close call in it."""

    total: float
    count: int
    sure: bool


@dataclass
class Totals:
    simulations: int = 0
    rows: int = 0
    max_depth: int = 0


class SearchReplay:
    """What is known of a search, step by step. Texts are the tokens after the prompt."""

    def __init__(self, claims: Claims, dense: DenseRun, book: Book) -> None:
        self.claims, self.book, self.control = claims, book, claims.control
        self.model = claims.loaded.model
        self.rows = Replayed(dense, self.model, attention=False, one_by_one=False)
        tokenizer, config = claims.loaded.tokenizer, claims.config
        self.stops = Stops(tokenizer, config.stop) if config.stop else None
        self.width = 1 if config.temperature == 0 else int(config.max_parallel_tokens)
        self.searches = searches_of(claims)
        self.text: Ids = ()
        self.log_probs: list[float] = []
        self.known: dict[Ids, float] = {}  # log-probability of a text's last token
        self.rolled: dict[Ids, Rollout] = {}
        # of a text's last token among its siblings, for each number of them that the rule may keep
        self.priors: dict[Ids, Floats] = {}
        self.before: dict[Ids, int] = {}  # visits when the step before was chosen
        self.totals = Totals()
        self.cache = self.model.new_cache()

    def run(self) -> list[Reading]:
        run, book = self.claims.run, self.book
        book.did("probabilities", "edges", "sets", "visits and values of the search")
        book.open("in what order the search tried its nodes, and its number of forward passes (--rerun)")
        for record, nodes in zip(run.steps, self.searches, strict=True):
            forward = self.rows.forward([0], [0], None, self.rows.alive)
            assert forward.logits is not None
            rows = self.control(forward.logits, [self.text])
            log_probs = rows.log_probs[0]
            check_masked(book, record, rows.masked)
            self.check_step(record, rows.tempered[0])
            self.known.update(
                {(*self.text, node.id): float(log_probs[node.id]) for node in nodes if node.parent is None}
            )
            self.check_nodes(record, nodes)
            token = record.tokens[0].id
            self.log_probs.append(float(log_probs[token]))
            self.text = (*self.text, token)
        self.check_totals()
        return [Reading(self.text, tuple(self.log_probs), self.ends(self.text), 0)] if self.text else []

    def check_totals(self) -> None:
        """A search that was interrupted has run rows that no step tells of."""
        run, book = self.claims.run, self.book
        tree, whole = run.tree or {}, run.finish_reason in ("stop", "length")
        if not run.steps:
            return
        book.same("tree.simulations", tree.get("simulations"), self.totals.simulations)
        if whole:
            book.same("tree.max_depth", tree.get("max_depth"), self.totals.max_depth)
        passes, rows = tree.get("forward_passes"), tree.get("rows")
        unsure = sum(not rollout.sure for rollout in self.rolled.values()) * self.claims.config.mcts_depth
        if whole and not (isinstance(rows, int) and abs(rows - self.totals.rows) <= unsure):
            book.same("tree.rows", rows, self.totals.rows)
        if not (isinstance(passes, int) and isinstance(rows, int) and 0 <= passes <= rows):
            book.lie("tree", f"The file says {passes!r} as tree.forward_passes, and {rows!r} as tree.rows.")

    def ends(self, text: Ids) -> bool:
        if text[-1] in self.claims.eos_ids:
            return True
        return self.stops is not None and self.stops(reversed(text))

    def is_last(self, text: Ids) -> bool:
        """Whether nothing can follow."""
        limit = self.model.architecture.max_position_embeddings
        return self.ends(text) or self.claims.run.prompt_length + len(text) - 1 >= limit

    # -- the text

    def check_step(self, record: RunStep, tempered: Float32s) -> None:
        book, config, index = self.book, self.claims.config, record.step
        distribution = np.exp(tempered)
        for item in candidates_of(record):
            slack = book.tolerance.of(distribution, item.id)
            book.number(
                "probability", index, item.text, item.probability, float(distribution[item.id]), slack
            )
        book.same(f"the number of tokens of step {index}", len(record.tokens), 1)
        token = record.tokens[0]
        if self.ends((*self.text, token.id)) != (token.slot is None):
            book.lie(
                "ends",
                f"In step {index}, {token.text!r} ends the text and has a slot, or has none and does not.",
            )
        by_threshold = config.selection == "threshold" and "select" not in self.claims.own
        threshold = config.threshold if by_threshold else None
        book.same(f"the threshold of step {index}", record.threshold, threshold)
        kept = best_first(candidates_of(record))
        excluded = self.claims.excluded(index)
        masked = distribution.copy()
        masked[list(excluded)] = -1.0
        book.agreed.append(int(masked.argmax()) == kept[0].id)
        if self.claims.own & {"select", "decoder"}:
            book.open("what functions of the run's own selected")
            check_eligible(book, index, kept, excluded)
        else:
            check_set(book, index, kept, selection_of(config, index, self.width, excluded), distribution)

    # -- the search of one step

    def check_nodes(self, record: RunStep, nodes: tuple[Visited, ...]) -> None:
        texts = texts_of(self.text, nodes, record.step)
        visits = dict(zip(texts, (node.visits for node in nodes), strict=True))
        for node in nodes:
            self.book.same(
                f"the text of node {node.id} of step {record.step}",
                node.text,
                self.claims.loaded.tokenizer.token_text(node.id),
            )
        if any(self.is_last(text[:-1]) for text in texts if len(text) > 1):
            self.book.lie("tree", f"The search of step {record.step} goes on where a text has ended.")
            return
        self.check_choice(record, nodes)
        self.check_visits(record.step, texts, visits)
        if len(set(texts)) < len(texts):
            self.book.lie("tree", f"The search of step {record.step} lists a node twice.")
            return
        self.roll_out([text for text in texts if visits[text] and not self.before.get(text)])
        if "select" not in self.claims.own:
            self.check_priors(record.step, texts, nodes)
        if "value" in self.claims.own:
            self.book.open("the values that the function value gave")
        else:
            self.check_values(record.step, texts, nodes)
        self.before = {
            text: count for text, count in visits.items() if text[len(self.text)] == record.tokens[0].id
        }

    def check_priors(self, step: int, texts: list[Ids], nodes: tuple[Visited, ...]) -> None:
        """Of nodes below the root's children: shares of what their rule selects. Where the last bits decide how many
        that is, one number of them must be right for all siblings.
        """
        siblings: dict[Ids, list[tuple[Visited, Floats]]] = {}
        for text, node in zip(texts, nodes, strict=True):
            if node.parent is not None and text in self.priors:
                siblings.setdefault(text[:-1], []).append((node, self.priors[text]))
        for family in siblings.values():
            computed = np.array([shares for _, shares in family])
            fit = int(np.abs(computed - [[node.prior] for node, _ in family]).max(axis=0).argmin())
            for node, shares in family:
                share, slack = float(shares[fit]), 4.0 * self.book.tolerance.worst
                self.book.number("prior of a deeper node", step, node.text, node.prior, share, slack)
                if not share:
                    self.book.lie(
                        "tree",
                        f"The search of step {step} tries {node.text!r}, which its rule does not select.",
                    )

    def check_choice(self, record: RunStep, nodes: tuple[Visited, ...]) -> None:
        """The token is the most visited child of the root, of equals the more probable one; priors are shares."""
        book, index = self.book, record.step
        items = best_first(candidates_of(record))
        children = {node.id: node for node in nodes if node.parent is None}
        if not book.same(
            f"the nodes below the root of step {index}", sorted(children), sorted(i.id for i in items)
        ):
            return
        tries = sum(node.visits for node in children.values())
        chosen = max(items, key=lambda item: children[item.id].visits)
        book.same(f"the token chosen in step {index}", record.tokens[0].id, chosen.id)
        mass = sum(item.probability for item in items)
        for item in items:
            share = item.probability / mass if mass > 0.0 else children[item.id].prior
            book.number("prior", index, item.text, children[item.id].prior, share, FROM_FILE)
        others = [
            (item.id, f"{children[item.id].visits} of {tries} visits") for item in items if item is not chosen
        ]
        book.same(
            f"what is rejected in step {index}", [(item.id, item.why) for item in record.rejected], others
        )

    def check_visits(self, step: int, texts: list[Ids], visits: Mapping[Ids, int]) -> None:
        """A node is visited once for itself, and once for each visit below it; a search makes so many simulations."""
        book, config = self.book, self.claims.config
        below: dict[Ids, int] = {}
        for text in texts:
            below[text[:-1]] = below.get(text[:-1], 0) + visits[text]
            if not visits[text] and len(text) > len(self.text) + 1:
                book.lie("tree", f"Step {step} lists a node that no simulation of its search has visited.")
            if visits[text] < self.before.get(text, 0):
                book.lie("tree", f"Step {step} says fewer visits of a node than the step before.")
        for text in texts:
            expected = below.get(text, 0) + 1
            if visits[text] and not self.is_last(text) and visits[text] != expected:
                book.lie(
                    "tree",
                    f"In the search of step {step}, a node has {visits[text]} visits; those below it make {expected}.",
                )
        kept_texts = [text for text in self.before if self.before[text] and len(text) > len(self.text)]
        if missing := [text for text in kept_texts if text not in visits]:
            book.lie(
                "tree", f"The search of step {step} lacks {len(missing)} nodes that were visited before."
            )
        tries = below.get(self.text, 0)
        kept = sum(count for text, count in self.before.items() if len(text) == len(self.text) + 1)
        wide = sum(len(text) == len(self.text) + 1 for text in texts) > 1
        if not config.max_cache_tokens:
            book.same(f"the simulations of step {step}", tries - kept, config.mcts_simulations if wide else 0)
        self.totals.simulations += tries - kept
        deep = [len(text) - len(self.text) for text in texts if self.was_leaf(text, visits)]
        self.totals.max_depth = max([self.totals.max_depth, *deep])
        unrun = self.text and not self.visited_root
        self.totals.rows += bool(unrun)

    def was_leaf(self, text: Ids, visits: Mapping[Ids, int]) -> bool:
        before = self.before.get(text, 0)
        return visits[text] > before and (not before or self.is_last(text))

    @property
    def visited_root(self) -> bool:
        """Whether the search before had run the newest token already."""
        return self.before.get(self.text, 0) > 0

    def check_values(self, step: int, texts: list[Ids], nodes: tuple[Visited, ...]) -> None:
        """The value of a node is the mean, over the simulations through it, of the mean log-probability from it on."""
        sums = dict.fromkeys(texts, 0.0)
        unsure: set[Ids] = set()
        for text, node in zip(texts, nodes, strict=True):
            rollout = self.rolled.get(text)
            times = 1 if rollout else node.visits if self.is_last(text) else 0
            total, count = (rollout.total, rollout.count) if rollout else (0.0, 0)
            above = text
            while times and len(above) > len(self.text):
                total, count = total + self.known[above], count + 1
                sums[above] += times * total / count
                if rollout is not None and not rollout.sure:
                    unsure.add(above)
                above = above[:-1]
        for text, node in zip(texts, nodes, strict=True):
            if text not in unsure:
                expected = sums[text] / node.visits if node.visits else 0.0
                slack = 4.0 * self.book.tolerance.base
                self.book.number("value", step, node.text, node.value, expected, slack)

    # -- rollouts

    def roll_out(self, texts: list[Ids]) -> None:
        """Continue each text that can go on greedily, all at once, on the rows of the prompt and of the text so far."""
        base = [*self.claims.run.prompt.token_ids, *self.text]
        shared = len(base) - 1
        have = len(self.cache)
        if have < shared:
            self.model.forward(base[have:shared], range(have, shared), None, self.cache, logits="none")
        rows: dict[Ids, int] = {self.text: 0}
        tokens, parents = [base[-1]], [-1]
        paths = {text[:length] for text in texts for length in range(len(self.text) + 1, len(text) + 1)}
        for path in sorted(paths, key=len):
            if not self.is_last(path):
                rows[path] = len(tokens)
                tokens.append(path[-1])
                parents.append(rows[path[:-1]])
        going = {text: Rollout(0.0, 0, True) for text in texts if text in rows}
        places = {text: (rows[text], len(text)) for text in going}
        done = 0
        while done < len(tokens) and texts:
            found = dict(self.distributions(tokens, parents, done, shared, rows, paths))
            done = len(tokens)
            for text, (row, length) in list(places.items()):
                token, log_prob, sure = found[row][self.length_key(length)]
                before = going[text]
                going[text] = Rollout(before.total + log_prob, before.count + 1, before.sure and sure)
                self.totals.rows += 1
                if self.goes_on(token, length + 1) and going[text].count < self.claims.config.mcts_depth:
                    places[text] = len(tokens), length + 1
                    tokens.append(token)
                    parents.append(row)
                else:
                    del places[text]
        self.rolled.update(going)
        self.cache.truncate(shared)

    def length_key(self, length: int) -> bool:
        """Whether the text so long must not end yet."""
        return bool(self.claims.excluded(length))

    def goes_on(self, token: int, length: int) -> bool:
        limit = self.model.architecture.max_position_embeddings
        return token not in self.claims.eos_ids and self.claims.run.prompt_length + length - 1 < limit

    def distributions(
        self,
        tokens: list[int],
        parents: list[int],
        start: int,
        shared: int,
        rows: dict[Ids, int],
        paths: set[Ids],
    ) -> Iterator[tuple[int, dict[bool, tuple[int, float, bool]]]]:
        """Run the rows from `start` on: of each its greedy token, its log-probability, and whether that is no close
        call, with the end allowed and not.
        """
        depth = [0] * len(tokens)
        for row in range(1, len(tokens)):
            depth[row] = depth[parents[row]] + 1
        chunk = max(1, LOGITS_AT_ONCE // self.model.architecture.vocab_size)
        after: dict[int, list[Ids]] = {}
        for path in paths:
            after.setdefault(rows[path[:-1]], []).append(path)
        for first in range(start, len(tokens), chunk):
            stop = min(first + chunk, len(tokens))
            bias = np.zeros((stop - first, shared + stop), np.float32)
            bias[:, shared:] = ancestor_bias(parents[:stop], stop - first)
            positions = np.array([shared + depth[row] for row in range(first, stop)])
            parents_of = ancestor_parents(parents[:stop], stop - first, shared)
            forward = self.model.forward(tokens[first:stop], positions, bias, self.cache, parents=parents_of)
            assert forward.logits is not None
            below = range(first, stop) if self.control.reads_texts else ()
            texts = texts_to(below, np.array(tokens), np.array(parents))
            found = self.control(forward.logits, [[*self.text, *text] for text in texts])
            for index, log_probs in enumerate(found.log_probs):
                for path in after.get(first + index, ()) if not start else ():
                    self.known[path] = float(log_probs[path[-1]])
                    self.priors[path] = self.prior(path, np.exp(found.tempered[index]))
                yield first + index, {ended: self.greedy(log_probs, ended) for ended in (False, True)}

    def prior(self, path: Ids, distribution: Float32s) -> Floats:
        """A token's share of what the rule selects of its row's distribution (V,), for each number of tokens that this
        may be where the last bits decide it; 0 where the token is not among so many.
        """
        length, slack = len(path) - 1, 2.0 * self.book.tolerance.worst
        selection = selection_of(self.claims.config, length, self.width, self.claims.excluded(length))
        distribution[list(selection.excluded)] = 0.0
        own = float(distribution[path[-1]])
        width = min(selection.width, len(distribution))
        best = np.sort(np.partition(distribution, -width)[-width:].astype(np.float64))[::-1]
        numbers = selection.numbers(best, slack)
        if not best[0]:
            return np.ones(1)  # all that may follow has underflowed; one does
        masses = np.cumsum(best)[numbers - 1]
        return np.where(own >= best[numbers - 1] - slack, own / masses, 0.0)

    def greedy(self, log_probs: Float32s, without_end: bool) -> tuple[int, float, bool]:
        masked = log_probs.copy()
        if without_end:
            masked[list(self.claims.eos_ids)] = -np.inf
        second, best = np.argpartition(masked, -2)[-2:].tolist()
        if masked[second] > masked[best]:
            second, best = best, second
        sure = bool(masked[second] < masked[best] - 8.0 * self.book.tolerance.base)
        return best, float(masked[best]), sure


def texts_of(text: Ids, nodes: tuple[Visited, ...], step: int) -> list[Ids]:
    """Of each node the tokens from the prompt on. Raises RunFileError where a node is above itself."""
    texts: list[Ids] = []
    for index, node in enumerate(nodes):
        if node.parent is not None and node.parent >= index:
            raise RunFileError(f"In the run's tree, node {index} of step {step} must come after its parent.")
        texts.append((*(text if node.parent is None else texts[node.parent]), node.id))
    return texts


def searches_of(claims: Claims) -> list[tuple[Visited, ...]]:
    """What the run's `tree` says of each step. Raises RunFileError where it does not."""
    tree, steps = claims.run.tree or {}, claims.run.steps
    said = tree.get("steps")
    if not isinstance(said, list) or len(said) != len(steps):
        raise RunFileError(f"The run's tree must say what was searched in each of its {len(steps)} steps.")
    found = []
    for index, entry in enumerate(said):
        nodes = entry.get("nodes") if isinstance(entry, dict) else None
        where = f"tree.steps[{index}].nodes"
        listed: tuple[Visited, ...] = read(tuple[Visited, ...], nodes, RunFileError, where=where)
        largest = max((node.id for node in listed), default=0)
        if largest >= claims.loaded.model.architecture.vocab_size:
            raise RunFileError(
                f"The run's tree holds token {largest}, which is not in the model's vocabulary."
            )
        if max((node.visits for node in listed), default=0) > MOST_VISITS:
            raise RunFileError(f"The run's tree says more than {MOST_VISITS} visits of a node.")
        found.append(listed)
    return found
