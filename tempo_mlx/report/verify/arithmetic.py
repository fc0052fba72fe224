"""What follows from other numbers of the file: positions, slots, weights, edges, residuals. No model is asked."""

from __future__ import annotations

import numpy as np

from tempo_mlx.decode.step import RunStep, RunToken
from tempo_mlx.report.verify.book import FROM_FILE, SUMMED, Book
from tempo_mlx.report.verify.claims import Claims
from tempo_mlx.report.verify.dense import in_slot_order

UNDERFLOWN = 1e-290  # joint probabilities below: their ratios are lost
EDGES = 1e-9  # of P(i|j), which the run computed from logarithms


def check_arithmetic(claims: Claims, book: Book) -> None:
    """Every step by itself and the one before it."""
    rows: list[RunToken] = []
    for record in claims.run.steps:
        _check_places(claims, record, book)
        _check_weights(claims, record, max(len(rows), 1), book)
        if claims.run.is_lattice:
            _check_edges(claims, record, rows, book)
        else:
            _check_lines(record, book)
        _check_exit(claims, record, book)
        rows = in_slot_order(record)
    book.did("positions, slots and weights")


def _check_places(claims: Claims, record: RunStep, book: Book) -> None:
    """Positions count steps, not slots; the best of a set has the highest slot."""
    book.same(f"the position of step {record.step}", record.position, claims.run.prompt_length + record.step)
    own = claims.run.is_lattice and not claims.config.custom_rope
    absent = ["branch"] if claims.run.is_lattice else []
    if claims.run.decoder == "mcts":
        absent = ["branch", "posterior", "attention", "removed_after"]
    for token in record.tokens:
        place = f"the position of {token.text!r} in step {record.step}"
        book.same(place, token.position, token.slot if own else None)
        for name in absent:
            book.same(f"the {name} of {token.text!r} in step {record.step}", getattr(token, name), None)
    slots = [token.slot for token in record.tokens if token.slot is not None]
    book.same(f"the order of the slots of step {record.step}", slots, sorted(slots, reverse=True))
    if claims.run.is_lattice:
        order = [(-token.probability, token.id) for token in record.tokens]
        book.same(f"the order of the tokens of step {record.step}", order, sorted(order))


def _check_weights(claims: Claims, record: RunStep, rows: int, book: Book) -> None:
    members = [token for token in record.tokens if token.slot is not None]
    mass = sum(token.probability for token in members)
    for token in members:
        if token.weight is not None:
            share = token.probability / mass if mass > 0.0 else 1.0 / len(members)
            book.number("weight in its set", record.step, token.text, token.weight, share, FROM_FILE)
    # Of a tree the mean over the rows that the tokens follow.
    total = sum(token.probability for token in record.tokens) / (1 if claims.run.is_lattice else rows)
    book.number(
        "residual probability", record.step, None, record.residual_probability, 1.0 - total, FROM_FILE
    )


def _check_edges(claims: Claims, record: RunStep, rows: list[RunToken], book: Book) -> None:
    """P(i|j) is the share of row i in w(i) P(j|i); under most rules these make the probability, too."""
    weights = {token.slot: token.weight or 0.0 for token in rows}
    newest = max((token.slot or 0 for token in rows), default=0)
    for token in record.tokens:
        joint = {edge.slot: weights[edge.slot] * edge.forward for edge in token.parents}
        mass = sum(joint.values())
        for edge in token.parents:
            lost = mass < UNDERFLOWN
            share = edge.posterior if lost else joint[edge.slot] / mass
            book.number("P(parent|token)", record.step, token.text, edge.posterior, share, EDGES)
        if not token.parents:
            continue
        forward = {edge.slot: edge.forward for edge in token.parents}
        combined = {
            "mix": mass,
            "mean": float(np.mean(list(forward.values()))),
            "last": forward.get(newest, token.probability),
        }
        said = token.probability
        expected = (
            next(iter(forward.values())) if len(forward) == 1 else combined.get(claims.config.combine, said)
        )
        book.number("probability from its parents", record.step, token.text, said, expected, SUMMED)


def _check_lines(record: RunStep, book: Book) -> None:
    """A row of a tree follows one other, and its probability is that edge's."""
    for token in record.tokens:
        if record.step:
            book.same(f"the number of parents of {token.text!r} in step {record.step}", len(token.parents), 1)
        for edge in token.parents:
            book.number("P(parent|token)", record.step, token.text, edge.posterior, 1.0, FROM_FILE)
            book.number(
                "P(token|parent)", record.step, token.text, edge.forward, token.probability, FROM_FILE
            )


def _check_exit(claims: Claims, record: RunStep, book: Book) -> None:
    """A step can have left early only where the settings allow it, and where the audit knows the exit."""
    layer = record.exit_layer
    if layer is None:
        return
    where = f"step {record.step} left the model after layer {layer}"
    if not claims.config.early_exit:
        book.lie("exit", f"The file says that {where}, but config.early_exit is off.")
        return
    audit = claims.run.early_exit or {}
    exits = audit.get("exits")
    known = [each.get("layer") for each in exits if isinstance(each, dict)] if isinstance(exits, list) else []
    if layer not in known:
        book.lie("exit", f"The file says that {where}, but its early_exit section knows no such exit.")
