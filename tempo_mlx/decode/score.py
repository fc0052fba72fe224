"""Exact log-probabilities of many continuations of one prompt, in one pass over the tree they make.

Continuations share the prompt's rows and those of every beginning they have in common; each row sees the
prompt and its own ancestors, so the numbers are those of each text run alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s, Floats, Ints
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.combine import log_probabilities
from tempo_mlx.decode.constraint import check_grammar, make_constraint
from tempo_mlx.decode.control import Control
from tempo_mlx.decode.decoder import Reading
from tempo_mlx.decode.paths import candidate_paths, choose_distinct, readings_at_hand
from tempo_mlx.decode.prefill import CHUNK, Interrupt, Interrupted, check_prompt, never, prefill
from tempo_mlx.decode.step import Step
from tempo_mlx.errors import PromptError
from tempo_mlx.lattice import ancestor_bias, ancestor_parents
from tempo_mlx.loading import LoadedModel
from tempo_mlx.model.forward import Model
from tempo_mlx.settings import shown
from tempo_mlx.token_ids import listed, token_ids

LOGITS_AT_ONCE = 1 << 25  # numbers: rows are run in chunks that stay below
TREE = 1024  # tokens of sequences that share one tree: each row runs over all before it, its own or not


@dataclass(frozen=True)
class Score:
    """One continuation: its tokens, and the natural logarithm of each one's probability."""

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]

    @property
    def log_prob(self) -> float:
        return sum(self.log_probs)

    @property
    def mean_log_prob(self) -> float:
        """Per token; 0 for an empty continuation."""
        return self.log_prob / max(len(self.log_probs), 1)


def score(
    loaded: LoadedModel,
    prompt: str | Sequence[int],
    continuations: Sequence[str | Sequence[int]],
    config: GenerateConfig | None = None,
) -> list[Score]:
    """Score each continuation (text, or token ids) of a prompt (likewise), in the order given.

    A text is tokenized together with the prompt where the prompt's tokens stay the same, else on its own. The
    model is not asked whether the text ends there. config: its controls change the distributions (control.py), at
    temperature 1. Raises PromptError, ConfigError.
    """
    tokenizer = loaded.tokenizer
    vocabulary = loaded.model.architecture.vocab_size
    prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(token_ids(prompt, vocabulary))
    sequences: list[list[int]] = []
    items = listed(continuations)
    if items is None:
        raise PromptError(
            f"continuations is {shown(continuations)}; give a list of texts, or of lists of token ids."
        )
    for item in items:
        if not isinstance(item, str):
            sequences.append(list(token_ids(item, vocabulary, "A continuation")))
            continue
        joint = tokenizer.encode(prompt + item) if isinstance(prompt, str) else []
        same = len(joint) > len(prompt_ids) and joint[: len(prompt_ids)] == prompt_ids
        sequences.append(joint[len(prompt_ids) :] if same else tokenizer.encode(item, add_special=False))
    control = None
    if config is not None:
        check_grammar(config)
        control = Control(config, prompt_ids, tokenizer.eos_ids, make_constraint(config, tokenizer))
    with loaded.lock:
        log_probs = score_sequences(loaded.model, prompt_ids, sequences, control=control)
    return [
        Score(
            item if isinstance(item, str) else tokenizer.decode(ids, continues=True),
            tuple(ids),
            tuple(each.tolist()),
        )
        for item, ids, each in zip(items, sequences, log_probs, strict=True)
    ]


def score_sequences(
    model: Model,
    prompt_ids: Sequence[int],
    sequences: Sequence[Sequence[int]],
    cache: Any | None = None,
    interrupted: Interrupt = never,
    control: Control | None = None,
) -> list[Floats]:
    """The log-probability of every token of every sequence, each after the prompt and its own beginning.

    cache: holds the prompt in its first slots, which are taken from there; it is left as it is.
    control: what changes the distributions, if anything does.
    Raises PromptError for a prompt or sequence the model has no room for, Interrupted between two passes.
    """
    check_prompt(model, prompt_ids)
    _check_lengths(model, len(prompt_ids), sequences)
    shared = len(prompt_ids) - 1
    if cache is None or model.architecture.recurrent:  # the states at the prompt's end may be gone
        cache = model.new_cache()
        if shared:
            prefill(model, prompt_ids[:-1], cache, interrupted)
    else:  # without its other slots: every row would run over them all
        cache = cache.copy()
        cache.keep(np.arange(shared))
    whole = model.architecture.recurrent and len(sequences)  # whose states would be those of one group's end
    groups = [sequences] if whole else in_groups(sequences, TREE)
    return [
        found
        for group in groups
        for found in _score_tree(model, prompt_ids, group, cache, control, interrupted)
    ]


def in_groups(sequences: Sequence[Sequence[int]], most: int) -> Iterator[Sequence[Sequence[int]]]:
    """Sequences that follow each other, together of at most so many tokens, or one alone."""
    start = size = 0
    for at, sequence in enumerate(sequences):
        if at > start and size + len(sequence) > most:
            yield sequences[start:at]
            start, size = at, 0
        size += len(sequence)
    if start < len(sequences):
        yield sequences[start:]


def _score_tree(
    model: Model,
    prompt_ids: Sequence[int],
    sequences: Sequence[Sequence[int]],
    cache: Any,
    control: Control | None,
    interrupted: Interrupt,
) -> list[Floats]:
    """As `score_sequences`; cache holds the prompt but its last token, which is the root of the tree."""
    shared = len(prompt_ids) - 1
    tokens, parents, row_of = make_trie(prompt_ids[-1], sequences)
    positions = shared + depths(parents)
    wanted = np.array([token for sequence in sequences for token in sequence], np.int64)
    rows = np.concatenate([np.empty(0, np.int64), *row_of])
    found = np.empty(len(wanted))
    chunk = max(1, min(512, LOGITS_AT_ONCE // model.architecture.vocab_size))
    for start in range(0, len(tokens), chunk):
        if reason := interrupted():
            raise Interrupted(reason)
        stop = min(start + chunk, len(tokens))
        bias = np.zeros((stop - start, shared + stop), np.float32)
        bias[:, shared:] = ancestor_bias(parents[:stop], stop - start)
        continued = ancestor_parents(parents[:stop], stop - start, shared)
        if start == 0 and shared:  # the root
            continued[0, shared - 1] = 1.0
        forward = model.forward(tokens[start:stop], positions[start:stop], bias, cache, parents=continued)
        assert forward.logits is not None
        if stop < len(tokens):  # no later row continues one before these
            cache.settle(shared + int(parents[stop:].min()) + 1)
        here = np.flatnonzero((rows >= start) & (rows < stop))
        if control is None:
            log_probs = log_probabilities(forward.logits)
        else:
            texts = texts_to(range(start, stop), tokens, parents) if control.reads_texts else []
            log_probs = control.score(forward.logits, texts)
        found[here] = log_probs[rows[here] - start, wanted[here]]
    cache.truncate(shared)
    return np.split(found, np.cumsum([len(sequence) for sequence in sequences])[:-1])


def score_prompt(
    model: Model, prompt_ids: Sequence[int], cache: Any, interrupted: Interrupt = never
) -> Iterator[tuple[Ints, Float32s]]:
    """Of every token of a prompt but the first: its id, and the log-probabilities (V,) it was among.

    In chunks: ids (n,), rows (n, V). Afterwards `cache`, which is empty, holds all of the prompt but its last token.
    Raises PromptError, Interrupted.
    """
    check_prompt(model, prompt_ids)
    ids = np.asarray(prompt_ids, np.int64)
    chunk = max(1, min(CHUNK, LOGITS_AT_ONCE // model.architecture.vocab_size))
    for start in range(0, len(ids) - 1, chunk):
        if reason := interrupted():
            raise Interrupted(reason)
        stop = min(start + chunk, len(ids) - 1)
        forward = model.forward(ids[start:stop], np.arange(start, stop), None, cache)
        assert forward.logits is not None
        yield ids[start + 1 : stop + 1], log_probabilities(forward.logits)


def make_trie(root: int, sequences: Sequence[Sequence[int]]) -> tuple[Ints, Ints, list[Ints]]:
    """Tokens (n,) and parents (n,) of the rows to run, parents first, and the row each token is read from.

    Row 0 is `root`. A token that nothing follows needs no row.
    """
    tokens, parents = [root], [-1]
    rows: dict[tuple[int, int], int] = {}
    row_of = []
    for sequence in sequences:
        path = [0] if len(sequence) else []
        for token in sequence[:-1]:
            key = path[-1], int(token)
            if key not in rows:
                rows[key] = len(tokens)
                tokens.append(int(token))
                parents.append(path[-1])
            path.append(rows[key])
        row_of.append(np.array(path, np.int64))
    return np.array(tokens, np.int64), np.array(parents, np.int64), row_of


def texts_to(rows: Iterable[int], tokens: Ints, parents: Ints) -> list[list[int]]:
    """Of each row the tokens from below row 0 down to its own."""
    texts = []
    for row in rows:
        text: list[int] = []
        while row > 0:
            text.append(int(tokens[row]))
            row = int(parents[row])
        texts.append(text[::-1])
    return texts


def depths(parents: Ints) -> Ints:
    """(n,): how many rows are above each; parents come before their children."""
    result = np.zeros(len(parents), np.int64)
    for row in range(1, len(parents)):
        result[row] = result[parents[row]] + 1
    return result


def read_paths(
    model: Model,
    prompt_ids: Sequence[int],
    steps: Sequence[Step],
    config: GenerateConfig,
    cache: Any,
    control: Control | None = None,
    every: bool = False,
) -> list[Reading]:
    """For `--paths`: different readings of a lattice, each with its own exact log-probabilities, best first.

    Candidates come from the lattice's edges (decode/paths.py) and are scored anew, since the rows of a
    lattice see mixtures; cache: the lattice's own. every: all readings at hand, as version 0.1.0 did.
    """
    if every:
        candidates = readings_at_hand(steps, config.paths, config.seed)
    else:
        candidates = candidate_paths(steps, config.paths, config.seed, config.path_distance)
    log_probs = score_sequences(model, prompt_ids, candidates, cache, control=control)
    means = [float(each.mean()) for each in log_probs]
    chosen = choose_distinct(candidates, means, config.paths, config.path_distance)
    return [
        Reading(tuple(candidates[i]), tuple(log_probs[i].tolist()), finished=False, branch=rank)
        for rank, i in enumerate(chosen)
    ]


def _check_lengths(model: Model, prompt_length: int, sequences: Sequence[Sequence[int]]) -> None:
    limit = model.architecture.max_position_embeddings
    longest = max((len(sequence) for sequence in sequences), default=0)
    if prompt_length + longest > limit:
        raise PromptError(
            f"Prompt and continuation have {prompt_length + longest} tokens and the model's context is {limit}; "
            "shorten them."
        )
    for sequence in sequences:
        token_ids(sequence, model.architecture.vocab_size, "A continuation")
