"""docs/tutorial.md, block after block, and the README's: what a newcomer types, and what is printed then."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tempo_mlx.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"```(sh|python)\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


@pytest.mark.slow
def test_the_tutorial_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On other systems than Linux numbers may round otherwise, so there it only runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEMPO_VIEW", "phrases")  # as on a terminal
    monkeypatch.setenv("TEMPO_DEVICE", "cpu")
    blocks = BLOCK.findall(PAGE.read_text("utf-8"))
    assert len(blocks) >= 10
    (readme,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    blocks.append(("python", readme, ""))
    names: dict[str, Any] = {}
    for language, code, said in blocks:
        if language == "python":
            exec(compile(code, PAGE.name, "exec"), names)
        else:
            assert main(shlex.split(code)[1:]) == ("forged" in code), code
        printed = capsys.readouterr()
        if said:
            assert printed.out.strip() == said.strip() or sys.platform != "linux", code
        elif "verify" in code:
            assert ("NOT exact:" if "forged" in code else "\nExact:") in printed.out
        elif "--steps" in code:
            assert "removed" in printed.out
    assert "Paris" in printed.out and (tmp_path / "run.json").exists()
    figure = runpy.run_path(str(ROOT / "scripts" / "method_figure.py"))
    assert figure["PICTURE"].read_text("utf-8") == figure["picture"](figure["run"](names["model"])) or (
        sys.platform != "linux"
    )


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_says() -> None:
    pytest.importorskip("pandas")
    tour = runpy.run_path(str(ROOT / "scripts" / "write_tour.py"))
    kept, made = json.loads(tour["NOTEBOOK"].read_text("utf-8")), tour["notebook"]()
    assert [cell["source"] for cell in kept["cells"]] == [cell["source"] for cell in made["cells"]]
    assert plain(kept) == plain(made) or sys.platform != "linux"


def plain(notebook: dict[str, Any]) -> list[Any]:
    """What its cells print, and what their values are; how pandas lays out a table is its own affair."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    return [output.get("text") or output["data"]["text/plain"] for output in outputs]
