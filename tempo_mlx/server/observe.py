"""What the server wants to know of a decoding beside what it chooses."""

from __future__ import annotations

from tempo_mlx.arrays import Float32s
from tempo_mlx.sessions.arena import Top, top_tokens


class Rivals:
    """The top tokens of every distribution that is chosen from, by the slot of its row: `top[slot]`.

    For decoders that run their rows in slot order (superposed, plain, tree); the prompt's last row is the first.
    """

    def __init__(self, first: int, count: int) -> None:
        self.next, self.count = first, count
        self.top: dict[int, Top] = {}

    def __call__(self, rows: Float32s) -> None:
        """rows (k, V): log-probabilities."""
        for row in rows:
            self.top[self.next] = top_tokens(row, self.count)
            self.next += 1
