"""The prompts, six kinds of twenty, and which of them settings may be chosen on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PROMPTS = Path(__file__).with_name("prompts.jsonl")
KINDS = ("narrative", "factual", "technical", "conversational", "instruction", "code")
TUNING = (0, 3, 6)  # last digits of the numbers of tuning prompts: 36 of 120


@dataclass(frozen=True)
class Prompt:
    """`id`: kind-number."""

    id: str
    kind: str
    text: str

    @property
    def split(self) -> str:
        return "tuning" if int(self.id[-1]) in TUNING else "test"


def read_prompts(split: str | None = None) -> list[Prompt]:
    """Those of a split, or all, in an order that goes through the kinds in turn: any first n are balanced."""
    lines = map(json.loads, PROMPTS.read_text("utf-8").splitlines())
    prompts = [Prompt(line["id"], line["kind"], line["prompt"]) for line in lines]
    return [prompt for prompt in prompts if split in (None, prompt.split)]
