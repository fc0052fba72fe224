"""Token ids from outside: whole numbers that have a row in the model's embedding. No tensor library checks that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

import numpy as np

from tempo_mlx.errors import PromptError, TempoError
from tempo_mlx.strict import kind_of


def listed(values: object) -> list[Any] | None:
    """What a caller gives one after the other; None where that is a text, or nothing of the kind."""
    if isinstance(values, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(values, Iterable):
        return None
    try:
        return list(values)
    except TypeError:  # numpy calls a single number iterable, too
        return None


def token_ids(
    values: object, vocabulary: int, what: str = "The prompt", error: type[TempoError] = PromptError
) -> tuple[int, ...]:
    """`values` (of `what`, for the message) as ids below `vocabulary`; numpy's whole numbers are some, true is none.

    Raises `error`. A backend would read beside its arrays where an id has no row.
    """
    found = listed(values)
    if found is None:
        raise error(f"{what} must be text or token ids, not {kind_of(values)}.")
    ids = []
    for place, value in enumerate(found):
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
