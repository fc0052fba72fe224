"""Perplexity of the recorded texts under another model, which reads them with its own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tempo_mlx
from benchmarks.quality.prompts import read_prompts
from benchmarks.quality.running import read_records


def run_judge(loaded: tempo_mlx.LoadedModel, tokenizer: Any, folder: Path, name: str) -> Iterator[str]:
    """Append to judge/NAME/ARM.jsonl, for every prompt of the test split that has no line there, a list by
    reading of [negative log-probability, tokens] of its texts. tokenizer: of the model that wrote them.
    """
    prompts = {prompt.id: prompt.text for prompt in read_prompts("test")}
    for source in sorted((folder / "test").glob("*.jsonl")):
        path = folder / "judge" / Path(name).name / source.name
        path.parent.mkdir(parents=True, exist_ok=True)
        done = {line["prompt"] for line in read_records(path)}
        for record in read_records(source):
            if record["prompt"] in done:
                continue
            line: dict[str, Any] = {"prompt": record["prompt"], "readings": {}}
            for reading, texts in record["readings"].items():
                if "ids" in texts[0]:
                    words = [tokenizer.decode(text["ids"], continues=True) for text in texts]
                    scores = tempo_mlx.score(loaded, prompts[record["prompt"]], words)
                    line["readings"][reading] = [[round(-s.log_prob, 3), len(s.log_probs)] for s in scores]
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
            yield f"judge: {source.stem}: {record['prompt']}"
