"""Write docs/gallery.md and the ten runs that it shows, in docs/gallery.

`python scripts/write_gallery.py`, in the directory where the .gguf file of Qwen is (it is not of this repository). Each
run is what its command makes, on the CPU; a test holds the page against the files.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from tempo_mlx.cli.main import main
from tempo_mlx.report.html import to_embed
from tempo_mlx.report.run import Run
from tempo_mlx.report.styles import raw, styled_phrases

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, FOLDER = DOCS / "gallery.md", DOCS / "gallery"
QWEN = "-m qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
FOREST = 'generate "Deep in the forest, a mysterious creature" -n 24'
SEA = 'generate "The best thing about the sea is" -n 16'
RUNS = {  # by name: what it is, its command, what to look at
    "story": (
        "A story",
        FOREST,
        "Press a marked word to see what other probable texts have in its place. Below are the sets "
        "of tokens that they were read from.",
    ),
    "fact": (
        "A fact",
        'generate "The capital of France is" -n 16 --threshold 0.04',
        "Sure of the capital, and of little that follows.",
    ),
    "pruned": (
        "The same story, pruned",
        f"{FOREST} --use-retroactive-pruning",
        "What came later removed members; press one that is struck out to read why.",
    ),
    "original": (
        "The same story, as the original had it",
        f"{FOREST} --preset original",
        "Every row sees every member at full strength, and the best member alone says what comes "
        "next. See how the text suffers.",
    ),
    "code": (
        "A program",
        f'generate "def fibonacci(n):" -n 40 {QWEN}',
        "Qwen knows this one. What it hesitates about are names and layout.",
    ),
    "branches": (
        "Four texts at once",
        f"{SEA} --branches 4",
        "Each is exactly what the model would say alone. What they share was run once.",
    ),
    "different": (
        "Four different texts",
        f"{SEA} --branches 4 --best-of 8 --branch-diversity 1",
        "Eight are followed, and turned away from what others say; four that are probable and "
        "different are kept.",
    ),
    "beams": (
        "Beam search",
        f"{SEA} --decoder beam --beam-width 4",
        "The four most probable texts: hardly different.",
    ),
    "drawn": (
        "Drawn without repeats",
        f"{SEA} --decoder sample --sampling stochastic-beam --beam-width 4",
        "Four different texts, by chance, each with the weight that makes sums over them estimates "
        "without bias.",
    ),
    "answers": (
        "Answers",
        f'ask "What is the capital of France? Answer with one word." -n 12 {QWEN} --format json',
        "What Qwen may answer, how probable each answer is, and how much was not looked at.",
    ),
}
INTRODUCTION = """\
# Gallery

Ten runs of small models, as they came; written by `python scripts/write_gallery.py`. On the site each is shown by
[`<tempo-run>`](embed.md), in which everything can be pressed; elsewhere the text stands below its command, and the file
can be opened on the page of `tempo-mlx serve`.
"""


def made(command: str) -> tuple[str, str]:
    """What the viewer shows, as JSON, and the text of it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        kept = Path(folder) / "run.json"
        words = shlex.split(command)
        assert main(words if words[0] == "ask" else [*words, "--json-output-file", str(kept)]) == 0, command
        shown = (
            out.getvalue() if words[0] == "ask" else to_embed(kept.read_text("utf-8"), Run.load(kept).phrases)
        )
    return shown, text_of(json.loads(shown))


def text_of(shown: dict[str, Any]) -> str:
    """For readers without the viewer."""
    if "answers" in shown:
        lines = [f"{answer['lower']:.0%} {answer['text']}" for answer in shown["answers"][:4]]
        return "\n".join([*lines, f"{shown['not_looked_at']:.0%} not looked at"])
    run = Run.from_json(json.dumps(shown["run"]))
    if run.is_lattice:
        lines = raw(styled_phrases(run.phrases)).strip().splitlines()
        return "\n".join(textwrap.fill(line, 110, subsequent_indent="    ") for line in lines)
    return "\n".join(text.text.strip() for text in run.texts)


def page() -> str:
    parts = [INTRODUCTION]
    for number, (name, (title, command, words)) in enumerate(RUNS.items(), 1):
        text = text_of(json.loads((FOLDER / f"{name}.json").read_text("utf-8")))
        parts.append(
            f"## {number}. {title}\n\n`tempo-mlx {command}`\n\n{words}\n\n```text\n{text}\n```\n\n"
            f'<tempo-run src="gallery/{name}.json"></tempo-run>\n\n[The file](gallery/{name}.json)\n'
        )
    return "\n".join(parts)


if __name__ == "__main__":
    os.environ["TEMPO_DEVICE"] = "cpu"
    FOLDER.mkdir(exist_ok=True)
    for name, (_, command, _) in RUNS.items():
        (FOLDER / f"{name}.json").write_text(made(command)[0].strip() + "\n", "utf-8")
    PAGE.write_text(page(), "utf-8")
