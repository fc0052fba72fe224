"""A text as it is given: without what ends it, up to a stop string, and with reasoning told from the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode import thinking
from tempo_mlx.report.stops import cut_at_stop
from tempo_mlx.weights import Tokenizer


@dataclass(frozen=True)
class Reader:
    """How the texts of a decoding are read. prompt: the text that they continue."""

    tokenizer: Tokenizer
    config: GenerateConfig
    prompt: str

    @property
    def opened(self) -> bool:
        """Whether the prompt ends inside a block of reasoning."""
        return thinking.is_open(self.prompt, self.tokenizer.reasoning)

    @property
    def thinks(self) -> bool:
        """Whether reasoning is told from the answer: where it was asked for, or the model marks it anyway."""
        return self.config.enable_thinking or (self.config.chat and self.tokenizer.reasoning.always)

    @property
    def guide(self) -> thinking.Budget | None:
        """What closes the reasoning, where the settings limit it."""
        budget = self.config.thinking_budget
        return None if budget is None else thinking.Budget(self.tokenizer, budget, self.opened)

    def read(self, ids: Sequence[int]) -> tuple[str | None, str]:
        """(reasoning, answer) of tokens that follow the prompt."""
        shown = ids[:-1] if ids and ids[-1] in self.tokenizer.eos_ids else ids
        return self.split(cut_at_stop(self.tokenizer.decode(shown, continues=True), self.config.stop))

    def said(self, ids: Sequence[int]) -> str:
        """What two texts have in common that a reader would not tell apart."""
        return self.read(ids)[1].strip()

    def split(self, text: str) -> tuple[str | None, str]:
        """(reasoning, answer) of a text; reasoning only where it is told apart."""
        if not self.thinks:
            return None, text
        return thinking.split(text, self.opened, self.tokenizer.reasoning)
