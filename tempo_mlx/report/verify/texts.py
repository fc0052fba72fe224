"""All text of a run, read anew from its tokens; its readings and their log-probabilities; and why it ended."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tempo_mlx.decode.decoder import Reading
from tempo_mlx.decode.paths import trace
from tempo_mlx.decode.score import read_paths, score_sequences
from tempo_mlx.decode.step import Step
from tempo_mlx.report.build import build_run
from tempo_mlx.report.records import RunPath, RunPrompt
from tempo_mlx.report.run import Run
from tempo_mlx.report.stops import Stops
from tempo_mlx.report.text import Detokenizer
from tempo_mlx.report.text import Tokenizer as Spelling
from tempo_mlx.report.verify.book import FROM_FILE, Book
from tempo_mlx.report.verify.claims import Claims
from tempo_mlx.weights import Tokenizer

A_TOKEN = 4.0  # times the tolerance of a probability: of a log-probability, by the token


def check_texts(claims: Claims, book: Book) -> None:
    """Every text follows from token ids, by the tokenizer."""
    run, tokenizer = claims.run, claims.loaded.tokenizer
    book.did("texts")
    if not is_spelled(run.prompt, tokenizer):
        book.same("prompt.text", run.prompt.text, tokenizer.decode(run.prompt.token_ids))
    again = read_again(claims, tokenizer)
    if texts_of(again) != texts_of(run):
        earlier = read_again(claims, SaysAtOnce(tokenizer))
        again = earlier if texts_of(earlier) == texts_of(run) else again
    for record, step in zip(run.steps, again.steps, strict=True):
        for token, other in zip(record.tokens, step.tokens, strict=True):
            book.same(f"the text of token {token.id} in step {record.step}", token.text, other.text)
        for item, dropped in zip(record.rejected, step.rejected, strict=True):
            book.same(f"the text of rejected token {item.id} in step {record.step}", item.text, dropped.text)
    for index, (path, other_path) in enumerate(zip(run.paths, again.paths, strict=True)):
        book.same(f"the text of path {index}", path.text, other_path.text)
    book.same("text", run.text, again.text)
    book.same("final_text", run.final_text, again.final_text)
    book.same("reasoning", run.reasoning, again.reasoning)


def is_spelled(prompt: RunPrompt, tokenizer: Tokenizer) -> bool:
    """Whether text and tokens are each other's, whichever of them was given."""
    ids, text = list(prompt.token_ids), prompt.text
    return (
        ids in (tokenizer.encode(text), tokenizer.encode(text, add_special=False))
        or tokenizer.decode(ids) == text
    )


def texts_of(run: Run) -> list[list[str]]:
    return [[token.text for token in step.tokens] for step in run.steps]


class SaysAtOnce:
    """A tokenizer whose tokens say what is whole of them, though they end inside a character: as in older files."""

    def __init__(self, tokenizer: Spelling) -> None:
        self.tokenizer, self.token_text = tokenizer, tokenizer.token_text

    def detokenizer(self, *, continues: bool = False) -> Detokenizer:
        return _AtOnce(self.tokenizer.detokenizer(continues=continues))


class _AtOnce:
    def __init__(self, inner: Detokenizer) -> None:
        self.open, self.add, self.finish = False, inner.add, inner.finish


def read_again(claims: Claims, tokenizer: Spelling) -> Run:
    """The run with every text read from its tokens."""
    run, config = claims.run, claims.config
    answers = [claims.answers.read(path.token_ids) for path in run.paths]
    built = build_run(
        [Step.of(step) for step in run.steps],
        prompt=run.prompt,
        model_info=run.model,
        config={"stop": config.stop},
        tokenizer=tokenizer,
        decoder=run.decoder,
        finish_reason=run.finish_reason,
        timing={},
        paths=[
            RunPath(path.token_ids, answer, path.logprob, path.exact)
            for path, (_, answer) in zip(run.paths, answers, strict=True)
        ],
        tree=run.tree,
    )
    values = dict(vars(built))
    if claims.answers.thinks:
        alone = answers and not run.is_lattice
        values["reasoning"], values["final_text"] = (
            answers[0] if alone else claims.answers.split(built.final_text)
        )
    return Run(**values)


def check_readings(claims: Claims, book: Book, readings: Sequence[Reading] | None) -> None:
    """The paths, and their order. readings: what the decoder makes of the steps; None where it cannot be followed."""
    run = claims.run
    if run.is_lattice:
        readings = _searched(claims)
        if readings and not _same(run, readings):
            earlier = _searched(claims, every=True)
            readings = earlier if _same(run, earlier) else readings
    _check_log_probs(claims, book)
    if readings is None:
        return
    book.did("paths")
    if _same(run, readings):
        return
    recorded, computed = [p.token_ids for p in run.paths], [r.token_ids for r in readings]
    said = [p.logprob / max(len(p.token_ids), 1) for p in run.paths]
    found = [reading.log_prob / max(len(reading.token_ids), 1) for reading in readings]
    slack = A_TOKEN * book.tolerance.base
    close = len(recorded) == len(computed) and np.allclose(said, found, rtol=0.0, atol=slack)
    shaken = any(claims.is_early(step.step) for step in run.steps)
    if not close and not shaken:
        book.same("the tokens of the paths, in their order", recorded, computed)


def _same(run: Run, readings: Sequence[Reading]) -> bool:
    return [path.token_ids for path in run.paths] == [reading.token_ids for reading in readings]


def _searched(claims: Claims, every: bool = False) -> list[Reading]:
    """The paths of a lattice, as the settings ask for them; `every`: as version 0.1.0 found them."""
    run, config, model = claims.run, claims.config, claims.loaded.model
    if not config.paths or not run.steps:
        return []
    cache, ids = model.new_cache(), run.prompt.token_ids
    if len(ids) > 1:
        model.forward(ids[:-1], range(len(ids) - 1), None, cache, logits="none")
    return read_paths(model, ids, [Step.of(step) for step in run.steps], config, cache, claims.control, every)


def _check_log_probs(claims: Claims, book: Book) -> None:
    """Exact ones by a forward pass over each text; others by the edges of the lattice."""
    run = claims.run
    if not run.paths:
        return
    texts = [path.token_ids for path in run.paths]
    found = score_sequences(claims.loaded.model, run.prompt.token_ids, texts, control=claims.control)
    shaken = not run.is_lattice and any(claims.is_early(step.step) for step in run.steps)
    for index, (path, log_probs) in enumerate(zip(run.paths, found, strict=True)):
        count = max(len(path.token_ids), 1)
        slack = A_TOKEN * book.tolerance.base
        computed = float(log_probs.sum())
        if not path.exact:
            slack = FROM_FILE * 1e3
            edges = trace(run.steps, path.token_ids)
            if not edges:
                book.lie("path", f"Path {index} takes tokens that no path through the steps has.")
                continue
            computed = sum(chosen.logprob for chosen in edges)
        if shaken:
            slack = float("inf")
        at = max(len(path.token_ids) - 1, 0)
        book.number("path, log P a token", at, path.text, path.logprob / count, computed / count, slack)


def check_ending(claims: Claims, book: Book, finished: bool | None) -> None:
    """finish_reason, as far as steps and settings tell. finished: the decoder's own word, None where it has none."""
    run, config, reason = claims.run, claims.config, claims.run.finish_reason
    count = len(run.steps)
    context = claims.loaded.model.architecture.max_position_embeddings
    if count > config.max_tokens:
        book.lie("length", f"The run has {count} steps; config.max_tokens is {config.max_tokens}.")
    if run.is_lattice:
        finished = _lattice_has_ended(claims, book)
    at_context = run.prompt_length + count >= context
    at_length = count >= config.max_tokens or at_context
    if claims.spec.masses:  # whose texts see to their length themselves
        passes = (run.tree or {}).get("passes")
        at_context, at_length = False, config.max_passes is not None and passes == config.max_passes
    if finished is None or not count:
        return
    book.did("finish_reason")
    if finished:
        book.same("finish_reason", reason, "stop")
    elif reason == "stop":
        book.lie("ending", "The file says that the text ended (finish_reason stop); nothing in it ends it.")
    elif at_context:
        book.same("finish_reason", reason, "length")
    elif reason == "length" and not at_length:
        book.lie(
            "ending", f"The file says finish_reason length after {count} steps; nothing limits it there."
        )
    elif at_length and reason != "length" and not claims.own:
        book.same("finish_reason", reason, "length")
    if reason in ("cancelled", "timeout", "memory"):
        book.open(f"that the run ended early ({reason})")
    if reason == "memory" and config.max_cache_tokens is None:
        book.lie(
            "ending", "The file says that the cache was full (memory), but config.max_cache_tokens is off."
        )
    if reason == "timeout" and run.config.get("timeout") is None:
        book.lie("ending", "The file says that time was up (timeout), but config.timeout is off.")


def _lattice_has_ended(claims: Claims, book: Book) -> bool:
    """Whether its best token, or a stop string, ends the text at the last step; at none before."""
    run, stops = claims.run, Stops(claims.loaded.tokenizer, claims.config.stop)
    for record in run.steps[:-1]:
        if record.tokens[0].id in claims.eos_ids:
            book.lie("ending", f"The best token of step {record.step} ends the text, but the file goes on.")
    if run.steps and run.steps[-1].tokens[0].id in claims.eos_ids:
        return True
    path = [token.id for token in run.best_path() if token.slot is not None and (token.removed_after is None or (
        token.removed_why is not None and token.removed_why.unattended))]  # fmt: skip
    return bool(stops.strings) and stops(reversed(path), new=len(path))
