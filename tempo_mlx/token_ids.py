"""Token ids from outside: whole numbers that have a row in the model's embedding. No tensor library checks that."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index

import numpy as np

from tempo_mlx.errors import PromptError, TempoError
from tempo_mlx.strict import kind_of


def token_ids(
    values: object, vocabulary: int, what: str = "The prompt", error: type[TempoError] = PromptError
) -> tuple[int, ...]:
    """`values` (of `what`, for the message) as ids below `vocabulary`; numpy's whole numbers are some, true is none.

    Raises `error`. A backend would read beside its arrays where an id has no row.
    """
    if isinstance(values, (str, bytes, bytearray, memoryview)) or not isinstance(values, Iterable):
        raise error(f"{what} must be text or token ids, not {kind_of(values)}.")
    ids = []
    for place, value in enumerate(values):
        try:
            token = index(value)
        except TypeError:
            token = None
        if token is None or isinstance(value, (bool, np.bool_)):
            raise error(f"{what} holds {kind_of(value)} at place {place}; token ids are whole numbers.")
        if not 0 <= token < vocabulary:
            said = token if token.bit_length() <= 64 else f"of {token.bit_length()} bits"
            raise error(
                f"{what} holds token {said} at place {place}, which the model's vocabulary does not have; its ids go "
                f"from 0 to {vocabulary - 1}."
            )
        ids.append(token)
    return tuple(ids)
