"""A model that looks on: the same forward pass, with what the server wants to know of it kept aside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.decode.combine import log_probabilities
from tempo_mlx.model.forward import Forward, Logits, Model
from tempo_mlx.sessions.arena import Top, top_tokens


class Watched:
    """A model that remembers the top tokens of every logits row, by slot.

    For decoders that run their rows in slot order (superposed, plain, tree). `top[slot]`; the prompt's last row
    stands under its own slot.
    """

    def __init__(self, model: Model, count: int, temperature: float) -> None:
        self.model, self.count, self.temperature = model, count, temperature
        self.architecture, self.info = model.architecture, model.info
        self.top: dict[int, Top] = {}
        self.rows = 0

    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: Any,
        *,
        logits: Logits = "all",
        **rest: Any,
    ) -> Forward:
        out = self.model.forward(tokens, positions, bias, cache, logits=logits, **rest)
        self.rows += len(tokens)
        if out.logits is not None:
            first = self.rows - len(out.logits)
            for slot, row in enumerate(log_probabilities(out.logits, self.temperature), first):
                self.top[slot] = top_tokens(row, self.count)
        return out

    def new_cache(self) -> Any:
        return self.model.new_cache()

    def embeddings(self, tokens: Sequence[int]) -> Float32s:
        return self.model.embeddings(tokens)
