"""Writes the run that the page shows to who opens it for the first time: the default model, a prompt with real forks.

    python scripts/write_example.py

Needs the default model (`tempo-mlx models pull smollm2-135m`). Run it again when the run file's format changes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import tempo_mlx

EXAMPLE = Path(__file__).parent.parent / "tempo_mlx" / "server" / "web" / "public" / "example.json"
PROMPT = "Once upon a time, deep in the forest, there lived"
SETTINGS = {"max_tokens": 76, "threshold": 0.07}


def main() -> None:
    run = tempo_mlx.generate(tempo_mlx.load("smollm2-135m"), PROMPT, **SETTINGS)
    phrases = [asdict(phrase) for phrase in run.phrases]
    EXAMPLE.write_text(json.dumps({"run": run.to_dict(), "phrases": phrases}, separators=(",", ":")) + "\n")
    forks = sum(bool(phrase["alternatives"]) for phrase in phrases)
    print(
        f"{EXAMPLE.name}: {len(run.steps)} steps, {forks} forks, {EXAMPLE.stat().st_size} bytes\n{run.final_text}"
    )


if __name__ == "__main__":
    main()
