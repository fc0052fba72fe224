"""What another model thinks of the recorded texts, which it reads with its own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tempo_mlx
from benchmarks.quality.arms import Arm
from benchmarks.quality.prompts import Prompt
from benchmarks.quality.running import words_of
from benchmarks.studies import Record, append_record, read_records
from tempo_mlx.weights import Tokenizer


def run_judge(
    judge: tempo_mlx.LoadedModel,
    arms: Sequence[Arm],
    prompts: Sequence[Prompt],
    folder: Path,
    judged: Path,
    tokenizer: Callable[[], Tokenizer],
) -> Iterator[str]:
    """Append a line to `judged` for each of `folder` that has none there. tokenizer: the writer's, for `words_of`."""
    asked = {prompt.id: prompt for prompt in prompts}
    for arm in arms:
        path = judged / f"{arm.name}.jsonl"
        done = {line["prompt"] for line in read_records(path)}
        for record in read_records(folder / f"{arm.name}.jsonl"):
            if record["prompt"] in asked.keys() - done:
                append_record(path, rate(judge, asked[record["prompt"]], record, tokenizer))
                yield f"{arm.label}: {record['prompt']}"


def rate(
    judge: tempo_mlx.LoadedModel, prompt: Prompt, record: Record, tokenizer: Callable[[], Tokenizer]
) -> Record:
    """By reading whose tokens were kept: each text's negative log-probability in nats, its tokens to the judge, and its
    bytes, since tokens of two models are of different lengths.
    """
    readings = {}
    for reading, texts in record["readings"].items():
        if "ids" in texts[0]:
            words = [words_of(text, tokenizer) for text in texts]
            scores = tempo_mlx.score(judge, prompt.text, words)
            readings[reading] = [
                [round(-score.log_prob, 3), len(score.log_probs), len(score.text.encode())]
                for score in scores
            ]
    return {"prompt": prompt.id, "readings": readings}
