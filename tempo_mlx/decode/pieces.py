"""Work that can be done a piece at a time, between other things."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

R = TypeVar("R")
Pieces = Generator[None, None, R]  # gives way after each piece, and returns what the work comes to


def whole(pieces: Pieces[R]) -> R:
    """All of it at once."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: R = end.value
            return result
