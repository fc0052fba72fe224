"""A superposed or plain run, step by step: the decoder itself, given the recorded choices and the dense pass's rows.

Each recorded set enters the lattice with its recorded weights and edges, so posteriors and removals follow from the
file alone, to the last bit; whatever the model says is held against it within its tolerance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tempo_mlx.arrays import Float32s
from tempo_mlx.decode.decoder import Setup
from tempo_mlx.decode.functions import Functions
from tempo_mlx.decode.pruning import PruneRule
from tempo_mlx.decode.rules import make_rules
from tempo_mlx.decode.step import BY_HAND, Removal, RunStep, RunToken, Step
from tempo_mlx.decode.strategies import is_unsupported, make_strategy, screen, shows_attention
from tempo_mlx.decode.tempo import Tempo
from tempo_mlx.report.records import PINNED
from tempo_mlx.report.verify.book import FROM_FILE, Book
from tempo_mlx.report.verify.choices import (
    best_first,
    candidates_of,
    check_eligible,
    check_masked,
    check_possible,
    check_set,
    say_drawn,
    selection_of,
)
from tempo_mlx.report.verify.claims import Claims
from tempo_mlx.report.verify.dense import Alive, DenseRun, Replayed

ATTENTION = 0.1  # times the tolerance of a probability: attention mass agrees to so much (1e-5 in float32)
SUPPORT = 5e-5  # what is lost where a reason is written with four places


def replay_lattice(claims: Claims, dense: DenseRun, book: Book) -> None:
    LatticeReplay(claims, dense, book).run()


class LatticeReplay:
    """The state of one replay."""

    def __init__(self, claims: Claims, dense: DenseRun, book: Book) -> None:
        self.claims, self.book = claims, book
        run, config = claims.run, claims.config
        own = None
        if "prune" in claims.own:  # not to be known, but what it looked at is recorded
            own = PruneRule(lambda context: (), needs_attention=has_looked(claims))
        self.single = run.decoder == "plain"
        self.rules = make_rules(config, Functions(prune=own), single=self.single)
        attention = self.rules.prune is not None and self.rules.prune.needs_attention
        probes = self.rules.screen is not None and self.rules.screen.coherence is not None
        model = Replayed(dense, claims.loaded.model, attention=attention or probes, one_by_one=probes)
        self.cache: Alive = model.alive
        self.guide = claims.answers.guide
        setup = Setup(
            model,
            run.prompt.token_ids,
            config,
            claims.eos_ids,
            model.alive,
            guide=self.guide,
            functions=claims.functions,
            constraint=claims.constraint,
        )
        self.tempo = Tempo(setup, self.rules)

    def run(self) -> None:
        steps = self.claims.run.steps
        book, config = self.book, self.claims.config
        book.did("probabilities", "edges", "sets", "posteriors")
        if config.pruning_signal is not None and "prune" not in self.claims.own:
            book.did(f"removals by {config.pruning_signal}")
        for record in steps:
            if self.tempo.run():
                self.weigh()
            self.check(record)
            self.tempo.enter(Step.of(_without_evidence(record)))
        if self.claims.last_was_run and self.tempo.run():
            self.weigh()
        self.tempo.note_evidence()
        for record, step in zip(steps, self.tempo.steps, strict=True):
            for token, member in zip(record.tokens, step.tokens, strict=True):
                self.check_evidence(record.step, token, member)

    # -- what a set's rows show of earlier sets

    def weigh(self) -> None:
        """Hold the removals after the set just run against the rule's, and make the recorded ones."""
        tempo, newest = self.tempo, self.tempo.lattice.num_sets - 1
        recorded = {
            token.slot: token
            for step in self.claims.run.steps
            for token in step.tokens
            if token.removed_after == newest and token.slot is not None
        }
        expected = {entry.slot: entry.why for entry in tempo.weigh()}
        if "prune" in self.claims.own:
            self.book.open("what the function prune removed")
        elif self.edited and self.claims.config.pruning_signal == "attention":
            self.book.open(
                "removals by attention after a reader went back, which forgets what earlier rows attended to"
            )
        else:
            for slot in sorted({*recorded, *expected}):
                self.check_removal(newest, slot, recorded.get(slot), expected.get(slot))
        slots = tuple(sorted(slot for slot in recorded if slot in tempo.members))
        tempo.note_evidence(slots)
        for slot in slots:
            tempo.members[slot].removed_after = newest
        tempo.drop(slots)

    def check_removal(self, newest: int, slot: int, token: RunToken | None, why: Removal | None) -> None:
        book = self.book
        if token is None:
            assert why is not None
            if slot in self.kept_by_hand or self.is_close(why):
                return
            book.lie(
                "removal",
                f"Slot {slot} stays after step {newest}; its {why.signal} {why.score:.6g} is under "
                f"{why.threshold:.6g}, so it is removed.",
            )
            return
        said = token.removed_why
        if said is not None and said.signal == BY_HAND:
            book.open(f"that slot {slot} was removed by hand after step {newest}")
            return
        if why is None or said is None or said.signal != why.signal or said.unattended != why.unattended:
            if why is None and said is not None and self.is_close(said):
                return
            book.lie(
                "removal",
                f"The file says that {token.text!r} (slot {slot}) was removed after step {newest} ({_why(said)}); "
                f"computed: {_why(why)}.",
            )
            return
        slack = self.slack
        book.number("removal score", newest, token.text, said.score, why.score, slack)
        book.number("removal threshold", newest, token.text, said.threshold, why.threshold, slack)

    @property
    def edited(self) -> bool:
        """Whether a reader chose one of the sets so far."""
        steps = self.claims.run.steps[: len(self.tempo.steps)]
        return any(item.why == BY_HAND for step in steps for item in step.rejected)

    @property
    def kept_by_hand(self) -> frozenset[int]:
        """Slots that a reader pinned, of a run that says so."""
        rule = (self.claims.run.custom or {}).get(PINNED)
        return frozenset(map(int, re.findall("[0-9]{1,9}", rule.name))) if rule is not None else frozenset()

    @property
    def slack(self) -> float:
        """Of a removal's score: attention is the model's, all else follows from the file."""
        config = self.claims.config
        if config.pruning_signal != "attention":
            return FROM_FILE
        steep = config.sigmoid_steepness / (4.0 * max(config.attention_threshold, 1e-3))
        return min(0.5, ATTENTION * self.book.tolerance.base * max(1.0, steep))

    def is_close(self, why: Removal) -> bool:
        return (
            self.claims.config.pruning_signal == "attention" and abs(why.score - why.threshold) <= self.slack
        )

    def check_evidence(self, step: int, token: RunToken, member: RunToken) -> None:
        """The last posterior, and attention, of a member."""
        for name, tolerance in (
            ("posterior", FROM_FILE),
            ("attention", ATTENTION * self.book.tolerance.base),
        ):
            recorded, computed = getattr(token, name), getattr(member, name)
            if recorded is None or computed is None:
                self.book.same(f"the {name} of slot {token.slot} in step {step}", recorded, computed)
            else:
                self.book.number(name, step, token.text, recorded, computed, tolerance)

    # -- what they say comes next

    def check(self, record: RunStep) -> None:
        book, early = self.book, self.claims.is_early(record.step)
        distribution = self.tempo.combine()
        rows = np.exp(self.tempo.log_probs)
        slots = self.tempo.lattice.newest.tolist() if record.step else []
        for token in record.tokens:
            ends = token.id in self.claims.eos_ids
            if ends != (token.slot is None):
                end = "ends the text and has a slot" if ends else "has no slot and does not end the text"
                book.lie("ends", f"In step {record.step}, {token.text!r} {end}.")
            for edge in token.parents:
                row = rows[slots.index(edge.slot)]
                self.number("P(token|parent)", record, token.text, edge.forward, row, token.id, early)
        for item in candidates_of(record):
            self.number("probability", record, item.text, item.probability, distribution, item.id, early)
        self.check_grammar(record)
        self.choice(record, distribution, early)

    def check_grammar(self, record: RunStep) -> None:
        """Tokens that may follow the text, and how probable all others were."""
        check_masked(self.book, record, self.tempo.masked)
        if (constraint := self.claims.constraint) is None:
            return
        allowed = constraint.allowed([self.tempo.text])[0]
        for token in record.tokens:
            if not allowed[token.id]:
                self.book.lie(
                    "grammar", f"In step {record.step}, {token.text!r} is not what the grammar allows."
                )

    def number(
        self,
        what: str,
        record: RunStep,
        text: str,
        said: float,
        distribution: Float32s,
        token: int,
        early: bool,
    ) -> None:
        slack = float("inf") if early else self.book.tolerance.of(distribution, token)
        self.book.number(what, record.step, text, said, float(distribution[token]), slack)

    def choice(self, record: RunStep, distribution: Float32s, early: bool) -> None:
        """Whether the set is what the rule selects."""
        book, config, index = self.book, self.claims.config, record.step
        excluded = self.claims.excluded(index)
        ids = [token.id for token in record.tokens]
        kept = best_first(candidates_of(record))
        best = self.best(distribution, excluded)
        forced = self.guide([step.tokens[0].id for step in self.tempo.steps]) if self.guide else None
        by_hand = any(item.why == BY_HAND for item in record.rejected)
        drawn = self.rules.sampled and forced is None
        if not drawn and not by_hand and forced is None:
            book.agreed.append(best == ids[0])
            if early:
                book.early_agreed.append(best == ids[0])
        threshold = None if "select" in self.claims.own else self._threshold(index)
        old = self.single and record.threshold == config.threshold  # of an older file; it decided nothing
        if "schedule" not in self.claims.own and not old:
            book.same(f"the threshold of step {index}", record.threshold, threshold)
        if forced is not None:
            book.same(f"the tokens of step {index}, which the thinking budget forces", ids, [forced])
        elif by_hand:
            book.open(f"that the tokens of step {index} were chosen by hand")
        elif "decoder" in self.claims.own or "select" in self.claims.own:
            book.open("what the functions of the run's own selected")
            check_eligible(book, index, kept, excluded)
        elif drawn:
            book.same(f"the number of tokens drawn in step {index}", len(kept), 1)
            check_eligible(book, index, kept, excluded)
            for candidate in kept:
                check_possible(book, index, candidate, distribution)
            say_drawn(book, self.claims.config)
        else:
            selection = selection_of(config, index, self.rules.width, excluded)
            if "schedule" in self.claims.own and record.threshold is not None:
                book.open("the thresholds of the function schedule")
                selection = type(selection)("threshold", record.threshold, selection.width, excluded)
            check_set(book, index, kept, selection, None if early else distribution)
            self.screening(record, distribution, early)

    def _threshold(self, step: int) -> float | None:
        schedule = self.rules.threshold
        return None if schedule is None else schedule(step)

    def best(self, distribution: Float32s, excluded: frozenset[int]) -> int:
        masked = distribution.copy()
        masked[list(excluded)] = -1.0
        return int(masked.argmax())

    def screening(self, record: RunStep, distribution: Float32s, early: bool) -> None:
        """Which of the selected tokens were dropped before they joined the set, and why."""
        if early:
            return
        selected = np.array([candidate.id for candidate in best_first(candidates_of(record))])
        before = self.cache.slots
        dropped, _ = screen(self.tempo, self.rules.screen, selected, distribution)
        self.cache.slots = before
        said = {item.id: item.why for item in record.rejected}
        if self.rules.screen is not None:
            self.book.did(f"candidates dropped by {self.claims.config.pruning_strategy}")
        for token in sorted({*said, *dropped}):
            if not same_reason(said.get(token), dropped.get(token), SUPPORT + self.book.tolerance.base):
                self.book.same(
                    f"why token {token} was dropped in step {record.step}",
                    said.get(token),
                    dropped.get(token),
                )


def has_looked(claims: Claims) -> bool:
    """Whether a run records attention that no probe of its candidates has shown."""
    run, strategy = claims.run, make_strategy(claims.config)
    probed = {step.step for step in run.steps if shows_attention(strategy, claims.config, step)}
    last = len(run.steps) - (1 if claims.last_was_run else 2)
    seen = (token for step in run.steps for token in step.tokens if token.attention is not None)
    return any((last if token.removed_after is None else token.removed_after) not in probed for token in seen)


def same_reason(said: str | None, computed: str | None, tolerance: float) -> bool:
    """Whether two reasons say the same, numbers within a tolerance; a close call may go either way."""
    if said is None or computed is None:
        reason = said or computed or ""
        numbers = [float(number) for number in _NUMBER.findall(reason)]
        close = len(numbers) == 2 and abs(numbers[0] - numbers[1]) <= 2 * tolerance
        return said == computed or (is_unsupported(reason) and close)
    if _NUMBER.sub("", said) != _NUMBER.sub("", computed):
        return False
    pairs: Sequence[tuple[str, str]] = list(
        zip(_NUMBER.findall(said), _NUMBER.findall(computed), strict=True)
    )
    return all(a == b or ("." in a and abs(float(a) - float(b)) <= 2 * tolerance) for a, b in pairs)


_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def _without_evidence(record: RunStep) -> RunStep:
    """As it was when the step was chosen."""
    tokens = (
        RunToken(
            **{
                **vars(token),
                "removed_after": None,
                "removed_why": None,
                "posterior": None,
                "attention": None,
            }
        )
        for token in record.tokens
    )
    return type(record)(**{**vars(record), "tokens": tuple(tokens)})


def _why(why: Removal | None) -> str:
    return "it stays" if why is None else f"{why.signal} {why.score:.6g} under {why.threshold:.6g}"
