"""Every command line of the README and the docs does what it is there for: it runs, on a tiny model where any will do.

Those that talk to a server are in test_server_docs.py; those over several machines in test_scale.py; the tutorial's in
test_tutorial.py.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

from tempo_mlx.cli.main import app, main
from tempo_mlx.weights.registry import KNOWN, PACKAGED
from tests.twins import twin

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "tutorial.md"})]
LINES = sorted({
    line
    for page in PAGES
    for line in re.findall(r"^(?:    )?(tempo-mlx (?!\w+s \w+ \w+ )[a-z].*)$", page.read_text("utf-8"), re.M)
    if shlex.split(line, comments=True)[1] in {command.name or command.callback.__name__  # type: ignore[union-attr]
                                              for command in app.registered_commands} | {"models", "run"}
})  # fmt: skip
ENDLESS = ("serve",)  # understood here, started elsewhere
LONG = ("calibrate",)


def test_the_commands_are_found() -> None:
    commands = {shlex.split(line, comments=True)[1] for line in LINES}
    assert {"generate", "ask", "chat", "show", "verify", "models", "doctor", "serve"} <= commands
    assert len(LINES) > 15


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[pytest.mark.slow] if "--early-exit" in line else []) for line in LINES]
)
def test_a_command_of_the_docs_runs(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(line, comments=True)[1:]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("TEMPO_MAX_TOKENS", "3")
    (tmp_path / "prompt.txt").write_text("Once upon a time\n")
    (tmp_path / "schema.json").write_text('{"enum": ["yes", "no"]}')
    if words[0] in (*ENDLESS, *LONG):
        typer.main.get_command(app).make_context("tempo-mlx", list(words))
        return
    if "--early-exit" not in words:  # which is calibrated for the default model
        monkeypatch.setenv("MODEL_PATH", str(twin("llama")))
    if "run.json" in words and words[0] in ("show", "verify"):
        assert main(["generate", "Once", "--json-output-file", "run.json"]) == 0
    typed = b"Hello\n"
    if "<" in words:
        typed = (tmp_path / words.pop(words.index("<") + 1)).read_bytes()
        words.remove("<")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    named = (
        {words[1]}
        if words[0] == "run"
        else {words[i + 1] for i, word in enumerate(words) if word == "--model"}
    )
    assert named <= {*KNOWN, *PACKAGED}, named
    words = [str(twin("llama")) if word in named else word for word in words]
    capsys.readouterr()
    assert main(words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()
