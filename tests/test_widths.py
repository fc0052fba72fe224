"""Terminals of different widths: nothing is cut, and lines break between words."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tempo_mlx.cli.console import print_facts, say_figures
from tempo_mlx.cli.main import main
from tempo_mlx.report.answers import Answer, Answers
from tempo_mlx.report.bars import ROWS, bars
from tempo_mlx.weights.registry import KNOWN
from tests.runs import sky_run

WIDTHS = pytest.mark.parametrize("columns", [40, 80, 120, 200])
Show = Callable[..., list[str]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", self.getvalue()).splitlines()]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Show:
    """The lines that a command prints, whose stdout and stderr are one terminal."""

    def printed(columns: int, *arguments: str) -> list[str]:
        terminal = Terminal()
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        main(arguments)
        return terminal.lines()

    return printed


def console(columns: int) -> tuple[Console, Terminal]:
    terminal = Terminal()
    return Console(file=terminal, width=columns, force_terminal=True, color_system=None), terminal


@WIDTHS
def test_an_error_breaks_between_words(show: Show, columns: int) -> None:
    lines = show(columns, "generate", "hi", "there")
    assert all(len(line) <= columns for line in lines)
    assert " ".join(lines) == (
        "Error: Words are left over (there); put the whole prompt in quotes: "
        'tempo-mlx generate "Once upon a time".'
    )


def test_an_error_drives_no_terminal(show: Show) -> None:
    assert show(80, "show", "\x1b[2Jrun.json") == [
        "Error: Cannot read ␛[2Jrun.json: No such file or directory."
    ]


@WIDTHS
def test_names_of_models_are_whole(show: Show, columns: int) -> None:
    text = "\n".join(show(columns, "models", "list"))
    for model in KNOWN.values():
        assert re.search(rf"^{re.escape(model.name)}\b", text, re.M)
        assert re.search(rf"(^|\s){re.escape(model.repo)},(\s|$)", text, re.M)


@WIDTHS
@pytest.mark.parametrize("view", ["--steps", "--schedule", "--show-probabilities"])
def test_no_view_of_a_run_is_cut(show: Show, columns: int, view: str, tmp_path: Path) -> None:
    run = sky_run()
    run.save(tmp_path / "run.json")
    lines = show(columns, "show", str(tmp_path / "run.json"), view)
    assert lines and all(len(line) <= columns and "…" not in line for line in lines)
    if view == "--steps":
        for token in (token for step in run.steps for token in step.tokens):
            assert f"{token.probability:.4f}" in "\n".join(lines)


def test_the_last_line_of_a_run_breaks_at_its_bars() -> None:
    out, terminal = console(40)
    say_figures(out, "100 steps | 6.4 steps/s | 204 rows, 2.0 a step | first token after 0.2 s")
    assert terminal.lines() == [
        "100 steps | 6.4 steps/s |",
        "204 rows, 2.0 a step |",
        "first token after 0.2 s",
    ]


def test_facts_go_on_under_their_values_and_a_path_stays_whole() -> None:
    out, terminal = console(40)
    path = "/a/path/that/is/longer/than/a/line/of/this/terminal.gguf"
    print_facts(out, {"path": path, "on a GPU": "319.3 MB: weights 269.0 MB (float16), cache"})
    assert terminal.lines() == [
        f"path      {path}",
        "on a GPU  319.3 MB: weights 269.0 MB",
        "          (float16), cache",
    ]


@WIDTHS
def test_answers_are_told_apart(columns: int) -> None:
    texts = ["The capital of France is Paris.", "The capital of France is Paris, France.", "word " * 200]
    answers = Answers("?", tuple(Answer(text, 0.3, 0.4) for text in texts), 0.1)
    out, terminal = console(columns)
    out.print(bars(answers, columns))
    lines = terminal.lines()
    assert all(len(line) <= columns for line in lines)
    said = " ".join(" ".join(re.sub(r"30%.*", "", line) for line in lines).split())
    assert said.startswith(f"{texts[0]} {texts[1]} word word")
    assert said.count("…") == 1 and said.count("word") < 200
    out.print(bars(Answers("?", answers[2:], 0.7), columns))
    assert " ".join(terminal.lines()).count("word") >= 200 + said.count("word"), "the best is there whole"


@WIDTHS
def test_wide_characters_take_no_more_lines(columns: int) -> None:
    answers = Answers("?", (Answer("Yes", 0.5, 0.6), Answer("\u4f60\u597d\u4e16\u754c" * 60, 0.3, 0.4)), 0.2)
    out, terminal = console(columns)
    out.print(bars(answers, columns))
    assert len(terminal.lines()) == 1 + ROWS + 1
