"""How a model marks what is reasoning, as its chat template tells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reasoning:
    """Reasoning stands between `open` and `close`.

    closing: what is written to end it early. answer: what goes before an answer without reasoning. always: the model
    marks its reasoning whether it was asked to reason or not.
    """

    open: str
    close: str
    closing: str
    answer: str = ""
    always: bool = False


THINK = Reasoning("<think>", "</think>", "\n</think>\n\n")
_FINAL = "<|channel|>final<|message|>"
_HARMONY_CLOSE = f"<|end|><|start|>assistant{_FINAL}"  # OpenAI's harmony format: messages on channels
# What only the templates of these models hold -> their marks
_BY_TEMPLATE = {
    "<|channel|>": Reasoning(
        "<|channel|>analysis<|message|>", _HARMONY_CLOSE, _HARMONY_CLOSE, _FINAL, always=True
    ),
    "<|channel>": Reasoning("<|channel>thought\n", "<channel|>", "\n<channel|>"),  # Gemma 4
    "[THINK]": Reasoning("[THINK]", "[/THINK]", "[/THINK]"),  # Magistral
}


def reasoning_of(templates: Iterable[str]) -> Reasoning:
    """The marks that a model's chat templates show; <think> where they show none."""
    whole = "\n".join(templates)
    return next((marks for word, marks in _BY_TEMPLATE.items() if word in whole), THINK)
