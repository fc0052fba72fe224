"""The examples of the docs do what they are there for."""

from __future__ import annotations

import re
import sys
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


@pytest.mark.slow
def test_the_python_page_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Block after block. On other systems than Linux numbers may round otherwise, so there they only run."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    page = (DOCS / "python.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", page, re.DOTALL)
    assert len(blocks) > 15 and "```text\n```" not in page
    for code, said in blocks:
        exec(compile(code, "docs/python.md", "exec"), names)
        printed = capsys.readouterr().out
        assert printed == said or sys.platform != "linux", code


def test_every_block_of_code_has_a_test_that_runs_it() -> None:
    """Here and in test_functions, test_server_docs, test_tutorial, test_commands_of_docs; api.md shows signatures."""
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    with_code = {language: {page.stem for page in pages if f"```{language}\n" in page.read_text("utf-8")}
                 for language in ("python", "sh")}  # fmt: skip
    assert with_code["python"] == {"README", "api", "extend", "pruning", "python", "server", "tutorial"}
    assert with_code["sh"] == {"control", "server", "tutorial"}
