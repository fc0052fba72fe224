"""Filling in: prompts of a text's beginning and end, for models with tokens that mark them."""

from __future__ import annotations

from typing import Protocol

# Before the beginning, before the end, before what is to be filled in.
_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen-Coder
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)
# What such models write where the middle ends; which of them a model has, its vocabulary says.
_ENDS = (
    "<|endoftext|>",
    "<|fim_pad|>",
    "<|file_sep|>",
    "<|repo_name|>",
    "<file_sep>",
    "▁<EOT>",
    "<|cursor|>",
)


class Vocabulary(Protocol):
    def token_id(self, token: str) -> int | None: ...
    def encode(self, text: str, add_special: bool = True) -> list[int]: ...


def infilling_prompt(tokenizer: Vocabulary, before: str, after: str) -> list[int] | None:
    """Token ids after which the model writes what stands between two texts; None where it was not taught to."""
    for marks in _MARKS:
        first, second, third = map(tokenizer.token_id, marks)
        if first is not None and second is not None and third is not None:
            one, two = (tokenizer.encode(text, add_special=False) for text in (before, after))
            return [first, *one, second, *two, third]
    return None


def infilling_ends(tokenizer: Vocabulary) -> list[str]:
    """Texts at which it is over."""
    return [text for text in _ENDS if tokenizer.token_id(text) is not None]
