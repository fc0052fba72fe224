"""Running a prompt into a cache, in chunks, so that it can be stopped and so that a known prefix is not run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s
from tempo_mlx.errors import PromptError
from tempo_mlx.model.forward import Model
from tempo_mlx.token_ids import token_ids

CHUNK = 512
Interrupt = Callable[[], str | None]  # asked now and then: why a run shall end, None to go on


class Interrupted(Exception):
    """Raised inside a decoder when an `Interrupt` gave a reason, which becomes the run's finish_reason."""


def never() -> str | None:
    """The `Interrupt` of a caller that never stops a run."""
    return None


def check_prompt(model: Model, prompt_ids: Sequence[int]) -> None:
    """PromptError unless the prompt has a token, leaves room for at least one more, and is of the vocabulary."""
    limit = model.architecture.max_position_embeddings
    if not len(prompt_ids):
        raise PromptError("The prompt is empty; give it at least one character.")
    if len(prompt_ids) >= limit:
        raise PromptError(
            f"The prompt has {len(prompt_ids)} tokens and the model's context is {limit}; shorten the prompt."
        )
    token_ids(prompt_ids, model.architecture.vocab_size)


def prefill(model: Model, prompt_ids: Sequence[int], cache: Any, interrupted: Interrupt) -> Float32s:
    """Append the prompt's rows that `cache` does not hold yet; return the last row's logits (1, V).

    A cache that holds a prefix of the prompt (at most all but its last token) is continued. Raises Interrupted
    between chunks when `interrupted()` returns a reason.
    """
    ids = np.asarray(prompt_ids, np.int64)
    start, end = len(cache), len(ids)
    while True:
        if reason := interrupted():
            raise Interrupted(reason)
        stop = min(start + CHUNK, end)
        out = model.forward(
            ids[start:stop], np.arange(start, stop), None, cache, logits="last" if stop == end else "none"
        )
        if stop == end:
            assert out.logits is not None
            return out.logits
        start = stop
