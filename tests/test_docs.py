"""The examples of the docs do what they are there for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import tempo_mlx

pytest.importorskip("torch")

from tests.test_tempo import PROMPT, loaded, plain_model

__all__ = ["loaded", "plain_model"]  # fixtures
DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_pruning_rule_of_the_docs_prunes(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (DOCS / "pruning.md").read_text(), re.DOTALL)
    assert code is not None
    generate = tempo_mlx.generate
    monkeypatch.setattr(
        tempo_mlx, "generate", lambda model, prompt, **rest: generate(model, PROMPT, threshold=0.06, **rest)
    )
    names: dict[str, Any] = {"model": loaded}
    exec(code.group(1), names)
    run = names["run"]
    removed = [(s.step, t) for s in run.steps for t in s.tokens if t.removed_after is not None]
    assert removed
    assert all(t.removed_why.signal == "stale" and t.removed_after >= step + 3 for step, t in removed)
    assert all(sum(t.removed_after is None for t in s.tokens) <= 1 for s in run.steps[:-5])
