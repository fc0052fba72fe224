"""Write docs/tour.ipynb: cells of a first tour, with what they print and show.

`python scripts/write_tour.py`, with the default model on the CPU. A test runs the cells again and compares.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tour.ipynb"
CELLS = [
    """\
# A tour of tempo-mlx

A language model gives everything that could come next a probability; usually one thing is taken and the rest is
forgotten. tempo-mlx keeps all that is probable enough and carries it on together. These cells run in a minute on any
machine; the model is small, and knows little. [Ten minutes](tutorial.md) tells the same on a command line.""",
    """\
import tempo_mlx

model = tempo_mlx.load("smollm2-135m", device="cpu")""",
    """\
## A text, and what else it could have said

A run that ends a cell shows itself: the most probable text, and in brackets what other probable texts have in its
place.""",
    """\
run = tempo_mlx.generate(model, "Deep in the forest, a mysterious creature", max_tokens=17)
run""",
    """\
Behind it are *sets*: tokens (words, or pieces of words) that share one place in the text. `posterior` says how much of
what followed uses a token.""",
    """\
run.to_dataframe()[["step", "text", "probability", "posterior"]].head(7).round(4)""",
    """\
## Several texts

Branches are whole texts, each exactly what the model would say alone, with its log-probability.""",
    """\
branches = tempo_mlx.generate(model, "The best thing about the sea is", branches=3, max_tokens=8)
branches""",
    """\
## Answers

The most probable answers to a question, how probable each is, and how much was not looked at.""",
    """\
question = "What is the capital of France? Answer with one word."
tempo_mlx.ask(model, question, leaves=4, max_tokens=8)""",
    """\
## A rule of your own

What came later removes what it makes improbable. Here a function decides: two steps later, a token needs half of what
the best of its set has.""",
    """\
def lagging(context):
    for view in context.sets:
        if context.step - view.step >= 2:
            yield from view.under(view.posterior, view.posterior.max() / 2, "lagging")


pruned = tempo_mlx.generate(model, "Deep in the forest, a mysterious creature", max_tokens=12, prune=lagging)
removed = [token.text for step in pruned.steps for token in step.tokens if token.removed_why]
print(len(removed), "removed, the first of them", removed[:3])""",
    """\
## Proof

A run holds enough to compute each of its numbers again, in one pass over all its tokens, without what made them.""",
    """\
from tempo_mlx.report.verify import verify

print("exact" if verify(pruned, model).ok else "NOT exact")""",
]


def notebook() -> dict[str, Any]:
    """Every cell, run one after the other."""
    names: dict[str, Any] = {}
    cells = []
    for number, source in enumerate(CELLS):
        cell: dict[str, Any] = {
            "id": f"cell-{number}",
            "metadata": {},
            "source": source.splitlines(keepends=True),
        }
        if re.match(r"#|[A-Z]", source):
            cells.append({"cell_type": "markdown", **cell})
        else:
            cells.append(
                {"cell_type": "code", **cell, "execution_count": None, "outputs": run(source, names)}
            )
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def run(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """What the cell prints, and how the value of its last line shows itself."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(tree, "tour.ipynb", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "tour.ipynb", "eval"), names) if last else None
    outputs: list[dict[str, Any]] = []
    if out.getvalue():
        outputs.append(
            {"output_type": "stream", "name": "stdout", "text": out.getvalue().splitlines(keepends=True)}
        )
    if value is not None:
        shown = {"text/html": value._repr_html_().splitlines(keepends=True), "text/plain": [repr(value)]}
        outputs.append(
            {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": shown}
        )
    return outputs


if __name__ == "__main__":
    NOTEBOOK.write_text(json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n", "utf-8")
