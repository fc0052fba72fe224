"""Was the run what it says? Everything in its file that follows from model, tokenizer and settings, computed anew."""

from __future__ import annotations

from collections.abc import Sequence

from tempo_mlx.decode.control import Processor
from tempo_mlx.decode.functions import PROCESSORS
from tempo_mlx.decode.tree import Tree
from tempo_mlx.errors import DeadEndError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify.arithmetic import check_arithmetic
from tempo_mlx.report.verify.book import Book, Verification, holds_target, tolerance_for
from tempo_mlx.report.verify.claims import Claims, read_claims
from tempo_mlx.report.verify.dense import dense_run
from tempo_mlx.report.verify.enumeration import EnumerationReplay
from tempo_mlx.report.verify.lattice import replay_lattice
from tempo_mlx.report.verify.rerun import is_number, unlike
from tempo_mlx.report.verify.search import SearchReplay
from tempo_mlx.report.verify.texts import check_ending, check_readings, check_texts
from tempo_mlx.report.verify.tree import replay_tree


def verify(run: Run, loaded: LoadedModel, logits_processors: Sequence[Processor] = ()) -> Verification:
    """Recompute a run: one dense forward pass over its tokens, and what follows from it and from the file.

    How far numbers may differ depends on what `loaded` computes with and on the temperature, on nothing that the file
    says of itself. logits_processors: the run's own, which its file names and does not hold. Raises ModelError where
    `loaded` is not the run's model, ConfigError where they are not the run's, RunFileError for what no run can say.
    """
    claims = read_claims(run, loaded, logits_processors)
    book = Book(tolerance_for(loaded.model, run, claims.config))
    rows = 0
    if claims.run.config.get("decoder") != run.decoder:
        book.same("decoder", run.decoder, run.config.get("decoder"))
    elif run.steps:
        try:
            rows = replay(claims, book)
        except DeadEndError as error:
            book.lie("grammar", f"The file's texts are not of its grammar. {error}")
    else:
        check_texts(claims, book)
    hold_to_agreement(claims, book)
    for name, rule in (run.custom or {}).items():
        if name == PROCESSORS:
            continue
        book.open(f"the run's own {name}, {rule.name} (decode again from Python with it)")
    book.open("timing and versions")
    return Verification(
        worst=tuple(sorted(book.worst.values(), key=lambda difference: difference.gravity, reverse=True)),
        findings=book.findings,
        recomputed=tuple(book.recomputed),
        left_open=tuple(book.left_open),
        tolerance=book.tolerance.worst,
        steps=len(run.steps),
        rows=rows,
        compared=book.compared,
        agreement=sum(book.agreed) / len(book.agreed) if book.agreed else 1.0,
        early=sum(claims.is_early(step.step) for step in run.steps),
    )


def replay(claims: Claims, book: Book) -> int:
    """All checks of a run that has steps; returns the number of rows of the dense pass."""
    check_arithmetic(claims, book)
    dense = dense_run(claims)
    readings, finished = None, None
    if claims.run.is_lattice:
        replay_lattice(claims, dense, book)
    elif claims.run.decoder == "mcts":
        readings = SearchReplay(claims, dense, book).run()
        finished = bool(readings) and readings[0].finished
    elif claims.spec.masses:
        readings, finished = EnumerationReplay(claims, dense, book).run()
    else:
        tree = replay_tree(claims, dense, book)
        if tree is not None and "decoder" not in claims.own:
            readings, finished = tree.readings(), tree.finished
            check_statistics(claims, tree, book)
    check_texts(claims, book)
    check_readings(claims, book, readings)
    check_ending(claims, book, finished)
    if claims.run.is_lattice:
        book.same("tree", claims.run.tree, None)
    return len(dense.tokens)


def check_statistics(claims: Claims, tree: Tree, book: Book) -> None:
    """What the file says of its texts as a whole, such as the weights of samples without repeats."""
    slack = 4.0 * book.tolerance.worst * len(claims.run.steps)
    computed = tree.statistics(claims.loaded.tokenizer.token_text)
    for place, said, again in unlike("tree", claims.run.tree, computed):
        if is_number(said) and is_number(again):
            book.number(place, 0, None, said, again, slack * max(abs(again), 1.0))
        else:
            book.same(place, said, again)


def hold_to_agreement(claims: Claims, book: Book) -> None:
    """Of the steps that left the model early, which are not held to exactness."""
    config = claims.config
    if config.early_exit != (claims.run.early_exit is not None):
        said = "an" if claims.run.early_exit is not None else "no"
        book.lie("exit", f"The file has {said} early_exit section; config.early_exit is {config.early_exit}.")
    if not book.early_agreed:
        return
    target = min(config.confidence_thresholds, default=config.exit_target_agreement)
    if config.raw_confidence:
        book.open("the agreement of steps that left early by raw confidence, which promises none")
    elif not holds_target(book.early_agreed, target):
        book.lie(
            "agreement",
            f"Of {len(book.early_agreed)} steps that left the model early, {sum(book.early_agreed)} agree with the "
            f"whole model; that is not compatible with the target of {target:g}.",
        )
