"""A tree of texts (branches, beams, samples), step by step: the decoder itself, made to choose what was recorded.

Its rule says what it would have chosen from the rows of the dense pass. Where that is something else, and not by a
hair, the file is wrong; all else of a step, and the texts in the end, follows and is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tempo_mlx.arrays import Float32s
from tempo_mlx.decode.beam import Samples
from tempo_mlx.decode.branches import Branches
from tempo_mlx.decode.decoder import Setup
from tempo_mlx.decode.sampling import Arithmetic, StochasticBeam
from tempo_mlx.decode.step import Removal, RunStep, RunToken, Step
from tempo_mlx.decode.tree import Child, Choice, Frontier, Rule, Tree
from tempo_mlx.report.stops import Stops
from tempo_mlx.report.verify.book import Book
from tempo_mlx.report.verify.choices import check_drawn, check_masked, say_drawn
from tempo_mlx.report.verify.claims import Claims
from tempo_mlx.report.verify.dense import DenseRun, Replayed


def replay_tree(claims: Claims, dense: DenseRun, book: Book) -> Tree | None:
    """The decoder at its end; None where the record cannot be followed so far."""
    run, config, tokenizer = claims.run, claims.config, claims.loaded.tokenizer
    model = Replayed(dense, claims.loaded.model, attention=False, one_by_one=False)
    setup = Setup(
        model,
        run.prompt.token_ids,
        config,
        claims.eos_ids,
        model.alive,
        guide=claims.answers.guide,
        stops=Stops(tokenizer, config.stop) if config.stop else None,
        functions=claims.functions,
        constraint=claims.constraint,
    )
    tree = claims.spec.start(setup)
    assert isinstance(tree, Tree)
    recorded = Recorded(tree.rule, claims, book)
    tree.rule = recorded
    book.did("probabilities", "edges", "children by their rule", "ends of texts", "removals")
    for record in run.steps:
        if tree.done:
            book.lie("length", f"All texts have ended before step {record.step}, where the file goes on.")
            return None
        recorded.begin(record)
        recorded.compare(tree.advance())
        if recorded.lost:
            return None
    for record, step in zip(run.steps, tree.steps, strict=True) if not recorded.foreign else ():
        for token, member in zip(record.tokens, step.tokens, strict=True):
            recorded.compare_removal(record.step, token, member)
    return tree


class Recorded:
    """A rule that chooses what the record says, after asking the run's own rule."""

    def __init__(self, rule: Rule, claims: Claims, book: Book) -> None:
        self.rule, self.claims, self.book = rule, claims, book
        self.width, self.threshold = rule.width, rule.threshold
        self.record = claims.run.steps[0]
        self.rows: list[int] = []  # slots of the rows that are continued
        self.tempered: list[
            Float32s
        ] = []  # of each of the step's tokens, the log-probabilities it was chosen from
        self.lost = False  # the record is not what the rule makes; nothing can be said of what follows
        self.early = self.shaken = (
            False  # this step left the model early; this or one before, and with it sums
        )
        self.drawn = isinstance(rule, Samples) or (isinstance(rule, Branches) and rule.sampled)
        self.foreign = (
            "decoder" in claims.own
        )  # what such a decoder thinks of ranks and branches is not known
        self.free = self.foreign or "select" in claims.own

    def begin(self, record: RunStep) -> None:
        self.record = record
        self.early = self.claims.is_early(record.step)
        self.shaken |= self.early

    def __call__(self, frontier: Frontier) -> Choice:
        """The recorded children; in the rule's own words where it wants the same."""
        book, children = self.book, self.children(frontier)
        shared = isinstance(self.rule, (Arithmetic, StochasticBeam))
        if (
            isinstance(self.rule, Samples)
            and not shared
            and any(node.branch >= self.width for node in frontier.nodes)
        ):
            self.lost = True
            book.lie("children", f"Before step {self.record.step} a sample has split in two.")
            return Choice(children, lost={row: self.said(row) for row in range(len(frontier.nodes))})
        own = self.rule(frontier)
        by_pair = {(child.row, child.token): child for child in children}
        wanted = [(child.row, child.token) for child in own.children]
        same = sorted(by_pair) == sorted(wanted)
        if not self.drawn and not self.free and not any(frontier.forced):
            book.agreed.append(same)
            if self.early:
                book.early_agreed.append(same)
        if self.free:
            book.open("what functions of the run's own chose")
        elif self.drawn:
            say_drawn(book, self.claims.config)
            self.check_drawn(frontier, children)
        elif self.shaken and not same:
            book.open("which texts go on once steps have left the model early")
        elif not same and not self.is_close(frontier, children, own.children):
            self.lost = True
            book.lie("children", self.sentence(frontier, set(by_pair), set(wanted)))
        if same and len(by_pair) == len(children):
            lost = {row: own.lost.get(row) or self.said(row) for row in range(len(frontier.nodes))}
            rejected = list(self.record.rejected) if self.free else own.rejected
            return Choice([by_pair[pair] for pair in wanted], rejected, lost, own.done and not self.free)
        lost = {row: self.said(row) for row in range(len(frontier.nodes))}
        ended = len(frontier.ended) + sum(child.ends for child in children)
        done = isinstance(self.rule, Branches) and not self.free and ended >= self.width
        return Choice(children, list(self.record.rejected), lost, done)

    def children(self, frontier: Frontier) -> list[Child]:
        """The recorded tokens, ranked as they are recorded; a row's own branch before those it opens."""
        rows = {slot: row for row, slot in enumerate(self.rows)}
        found: list[tuple[bool, int, Child]] = []
        before = -math.inf
        for token in reversed(self.record.tokens):
            row = rows[token.parents[0].slot] if token.parents else 0
            child = frontier.child(row, token.id)
            if child.log_prob < before - self.slack(frontier) and not (self.shaken or self.foreign):
                self.book.lie(
                    "order", f"The tokens of step {self.record.step} are not in the order of their texts."
                )
            if child.ends != (token.slot is None):
                end = (
                    "ends its text and has a slot" if child.ends else "has no slot and does not end its text"
                )
                self.book.lie("ends", f"In step {self.record.step}, {token.text!r} {end}.")
            before = max(child.log_prob, math.nextafter(before, math.inf))
            branch = -1 if token.branch is None else token.branch
            child = replace(child, log_prob=before, ends=token.slot is None)
            found.append((branch != frontier.nodes[row].branch, branch, child))
        self.tempered = [
            frontier.tempered[rows[token.parents[0].slot] if token.parents else 0]
            for token in self.record.tokens
        ]
        return [child for *_, child in sorted(found, key=lambda item: item[:2])]

    def slack(self, frontier: Frontier) -> float:
        """Of the log-probability of a text."""
        return 4.0 * self.book.tolerance.base * (frontier.nodes[0].length + 1)

    def is_close(self, frontier: Frontier, recorded: Sequence[Child], wanted: Sequence[Child]) -> bool:
        """Whether what differs is as good as what the rule wants in its place, so that the last bits decided."""
        pairs = [{(child.row, child.token) for child in part} for part in (recorded, wanted)]
        extra = [child for child in recorded if (child.row, child.token) not in pairs[1]]
        missing = [child for child in wanted if (child.row, child.token) not in pairs[0]]
        slack = 2.0 * self.slack(frontier) / min(1.0, self.claims.config.temperature or 1.0)
        if isinstance(self.rule, Branches):
            held = [float(frontier.tempered[child.row, child.token]) for child in (*extra, *missing)]
            if any(abs(log_prob - self.rule.floor) <= slack for log_prob in held):
                return True
        scores = [sorted(child.log_prob for child in part) for part in (extra, missing)]
        if len(extra) != len(missing):
            return False
        return all(abs(a - b) <= slack for a, b in zip(*scores, strict=True))

    def check_drawn(self, frontier: Frontier, children: Sequence[Child]) -> None:
        """Drawn tokens are among those that may be drawn."""
        step, config = self.record.step, self.claims.config
        if self.early:
            return
        if isinstance(self.rule, Branches):
            config = replace(config, selection="threshold")
        for child in children:
            distribution = np.exp(frontier.tempered[child.row])
            check_drawn(self.book, step, config, child.token, distribution)

    def said(self, row: int) -> Removal:
        """Why a row ended, by the record."""
        for token in (token for step in self.claims.run.steps for token in step.tokens):
            if self.rows and token.slot == self.rows[row] and token.removed_why is not None:
                return token.removed_why
        return Removal("nothing", 0.0, 0.0)

    def sentence(
        self, frontier: Frontier, recorded: set[tuple[int, int]], wanted: set[tuple[int, int]]
    ) -> str:
        return (
            f"Step {self.record.step} chooses (row, token) {sorted(recorded - wanted)} of its {len(frontier.nodes)} "
            f"rows, where {self.claims.run.decoder} would choose {sorted(wanted - recorded)}."
        )

    def compare(self, step: Step) -> None:
        """Hold the record of a step against the step that was made of it."""
        record, book = self.record, self.book
        where = f"step {record.step}"
        if not self.foreign:
            book.same(f"the threshold of {where}", record.threshold, step.threshold)
        for token, member, row in zip(record.tokens, step.tokens, self.tempered, strict=True):
            slack = math.inf if self.early else book.tolerance.of(np.exp(row), token.id)
            book.number("probability", record.step, token.text, token.probability, member.probability, slack)
            book.same(f"the slot of {token.text!r} in {where}", token.slot, member.slot)
            if not self.foreign:
                book.same(f"the branch of {token.text!r} in {where}", token.branch, member.branch)
        said = [(item.id, item.why) for item in record.rejected]
        if book.same(f"what is rejected in {where}", said, [(item.id, item.why) for item in step.rejected]):
            for mine, theirs in zip(record.rejected, step.rejected, strict=True):
                slack = math.inf if self.shaken else book.tolerance.worst
                book.number(
                    "probability", record.step, mine.text, mine.probability, theirs.probability, slack
                )
        check_masked(book, record, step.masked)
        self.rows = sorted(token.slot for token in record.tokens if token.slot is not None)

    def compare_removal(self, step: int, token: RunToken, member: RunToken) -> None:
        where = f"{token.text!r} (slot {token.slot}) of step {step}"
        self.book.same(f"the step after which {where} was removed", token.removed_after, member.removed_after)
        for name in ("posterior", "attention"):
            self.book.same(f"the {name} of {where}", getattr(token, name), None)
        mine, theirs = token.removed_why, member.removed_why
        if mine is None or theirs is None:
            self.book.same(f"why {where} was removed", mine, theirs)
            return
        said, computed = (mine.signal, mine.unattended), (theirs.signal, theirs.unattended)
        self.book.same(f"the reason why {where} was removed", said, computed)
        # Both are log-probabilities of texts, held by the token.
        length = (token.removed_after or 0) + 1
        slack = math.inf if self.shaken else 4.0 * self.book.tolerance.base
        for name in ("score", "threshold"):
            recorded, again = getattr(mine, name), getattr(theirs, name)
            self.book.number(
                f"removal {name} a token", step, token.text, recorded / length, again / length, slack
            )
