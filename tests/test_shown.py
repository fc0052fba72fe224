"""What a person, or a pipe, gets to see of a run."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import tempo_mlx
from tempo_mlx.cli.console import make_consoles, waiting
from tempo_mlx.cli.generate import chat_hint, decode
from tempo_mlx.cli.main import main
from tempo_mlx.cli.verify import _table
from tempo_mlx.output_config import OutputConfig
from tempo_mlx.report.phrases import phrases_in
from tempo_mlx.report.run import Run
from tempo_mlx.report.styles import LISTED, raw, styled_phrases
from tempo_mlx.resolution import resolve
from tests.runs import EOS, make_run, members, sky_steps, step
from tests.twins import twin

PROMPT = "Hello there, world"


@pytest.fixture
def model() -> str:
    return str(twin("llama"))


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")


def generate(model: str, *arguments: str) -> int:
    return main(["generate", PROMPT, "--model", model, "--max-tokens", "6", *arguments])


TEN = (
    "Hello", "The sky", "Once upon a time", "1 + 1 =", "def f(x):", "\u00c4pfel und", "\u05e9\u05dc\u05d5\u05dd",
    "a\\tb", "?", "In the beginning there was",
)  # fmt: skip


@pytest.mark.parametrize("prompt", TEN)
def test_a_pipe_gets_the_best_text(model: str, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "--threshold",
        "0.02",
        "-n",
        "12",
        "--min-steps",
        "12",
        "--use-retroactive-pruning",
        "--pruning-window",
        "2",
    ]
    assert main(["generate", prompt, "-m", model, *settings, "--json-output-file", "run.json"]) == 0
    run = Run.load("run.json")
    assert any(len(step.tokens) > 1 for step in run.steps)
    assert capsys.readouterr().out == run.final_text + "\n"


@pytest.mark.parametrize("form", ["phrases", "text", "sets"])
def test_a_view_can_be_asked_for_anywhere(model: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--threshold", "0.02", "--view", form]
    assert generate(model, *settings, "--json-output-file", "run.json") == 0
    run, out = Run.load("run.json"), capsys.readouterr().out
    expected = {"text": run.final_text, "sets": run.text}
    expected["phrases"] = raw(styled_phrases(phrases_in(run.steps, run.final_text)))
    if form == "sets":  # whose parts of characters are read alone while they come
        assert out.count("[") == run.text.count("[") > 0
        return
    assert out == expected[form] + "\n"
    assert main(["show", "run.json", "--view", form]) == 0
    assert capsys.readouterr().out == out


def test_a_higher_bound_shows_fewer_alternatives(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for least in ("0.01", "0.9"):
        assert generate(model, "--threshold", "0.01", "--view", "phrases", "--show-above", least) == 0
        shown.append(capsys.readouterr().out.count("/"))
    assert shown[0] > shown[1] == 0


def test_a_model_that_ends_at_once_is_to_be_asked(model: str) -> None:
    loaded = tempo_mlx.load(model)
    config = {"chat": False, "stop": []}
    ended = make_run([step(0, members({EOS: 0.9}, 3))], config=config, finish_reason="stop")
    hint = chat_hint(ended, loaded)
    assert hint is not None and "tempo-mlx ask" in hint and "--chat" in hint
    assert chat_hint(replace(ended, config={**config, "chat": True}), loaded) is None
    said = make_run(sky_steps(), config=config, finish_reason="stop")
    assert chat_hint(said, loaded) is None
    assert chat_hint(replace(said, final_text="<|im_end|>\n"), loaded) == hint
    assert chat_hint(replace(said, final_text="", config={**config, "stop": [" was"]}), loaded) is None


def test_a_spinner_says_what_is_waited_for_until_text_comes() -> None:
    def shown(quiet: bool = False, terminal: bool = True) -> str:
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=60, _environ={"TERM": "xterm"})
        with waiting(console, "Loading a model ...", quiet) as ended:
            ended()
        return file.getvalue()

    assert "Loading a model ..." in shown()
    assert shown(quiet=True) == shown(terminal=False) == ""


def test_ask_answers_and_never_shows_the_template(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "Hello", "-m", model, "-n", "6", "--json-output-file", "run.json"]) == 0
    out = capsys.readouterr().out
    run = Run.load("run.json")
    assert run.config["chat"] and "<|" in run.prompt.text and run.decoder == "enumerate"
    assert out.rstrip("\n") in [path.text.strip() for path in run.paths]
    assert main(["show", "run.json"]) == 0
    assert "<|" not in capsys.readouterr().out
    assert generate(model, "--chat", "--json-output-file", "again.json") == 0
    assert Run.load("again.json").prompt.text == run.prompt.text.replace("Hello", PROMPT)


def test_a_system_message_from_a_file(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "system.txt").write_text("Be brief.\n")
    prompts = []
    for given in (["--system-file", "system.txt"], ["-s", "Be brief."], ["--system-prompt", "Be brief."]):
        assert main(["ask", "Hello", "-m", model, "-n", "2", "--format", "json", *given]) == 0
        prompts.append(json.loads(capsys.readouterr().out)["run"]["prompt"]["text"])
    assert "Be brief." in prompts[0] and len(set(prompts)) == 1


def test_short_names_of_everyday_settings(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Hello", "-m", model, "-n", "2", "-t", "0.5", "--format", "json"]) == 0
    config = Run.from_json(capsys.readouterr().out).config
    assert (config["max_tokens"], config["temperature"]) == (2, 0.5)
    with pytest.raises(tempo_mlx.TempoError, match="n is not a setting"):
        resolve({"n": 2})


def test_a_prompt_is_shown_before_its_text_and_a_template_is_not(model: str) -> None:
    loaded = tempo_mlx.load(model)
    for chat in (False, True):
        file = io.StringIO()
        out = Console(file=file, force_terminal=True, width=80, height=20, _environ={"TERM": "xterm"})
        err = Console(file=io.StringIO())
        decode(loaded, PROMPT, resolve({"chat": chat, "max_tokens": 3}), OutputConfig(), out, err)
        assert (PROMPT in file.getvalue()) == (not chat)
        assert "<|" not in file.getvalue()


def test_what_a_list_of_texts_means_is_said_to_people_once(model: str) -> None:
    said = []
    for settings in ({"branches": 2}, {"branches": 1}, {}):
        out = Console(
            file=io.StringIO(), force_terminal=True, width=80, height=20, _environ={"TERM": "xterm"}
        )
        err = Console(file=io.StringIO(), width=80)
        config = resolve({"max_tokens": 3, "threshold": 0.01, **settings})
        decode(tempo_mlx.load(model), PROMPT, config, OutputConfig(), out, err)
        said.append(err.file.getvalue().count(LISTED))
    assert said == [1, 0, 0]


@pytest.mark.parametrize("signal", ["posterior", "attention"])
def test_steps_have_a_column_for_what_was_measured(
    model: str, signal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pruning = ("--use-retroactive-pruning", "--pruning-signal", signal)
    assert generate(model, "--threshold", "0.02", *pruning, "--json-output-file", "run.json") == 0
    capsys.readouterr()
    assert main(["show", "run.json", "--steps"]) == 0
    header = capsys.readouterr().out.splitlines()[0].split()
    assert "posterior" in header and ("attention" in header) == (signal == "attention")


ERASE = "\x1b[2J"


def as_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stdout and stderr say that they are one."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        ({"tree": {ERASE: ERASE, "steps": []}}, ["--tree"]),
        ({"early_exit": {"accepted": ERASE}}, []),
        ({"steps": "rejected"}, ["--steps"]),
    ],
)
@pytest.mark.parametrize("columns", ["70", "220"])
def test_what_a_file_says_does_not_drive_the_terminal(
    change: dict[str, Any], arguments: list[str], columns: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", columns)
    run = json.loads(make_run(sky_steps()).to_json())
    if "steps" in change:
        rejected = [{"id": 1, "text": "a", "probability": 0.1, "why": ERASE}]
        change = {"steps": [{**step, "rejected": rejected} for step in run["steps"]]}
    Path("run.json").write_text(json.dumps({**run, **change}))
    as_terminal(monkeypatch)
    assert main(["show", "run.json", *arguments]) == 0
    assert ERASE not in "".join(capsys.readouterr())


def test_verify_says_what_a_file_says_and_no_more(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model, "--json-output-file", "run.json") == 0
    run = json.loads(Path("run.json").read_text())
    run["model"]["dtype"] = ERASE
    Path("run.json").write_text(json.dumps(run))
    as_terminal(monkeypatch)
    assert main(["verify", "run.json"]) == 0
    assert ERASE not in "".join(capsys.readouterr())


def test_a_token_that_looks_like_markup_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    worst = SimpleNamespace(
        quantity="probability", size=1e-6, step=0, token="[a]" + ERASE, recorded=0.5, recomputed=0.5
    )
    table = SimpleNamespace(worst=[worst])
    _table(table, make_consoles()[0])  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert "[a]" in out and "\\[a]" not in out and ERASE not in out


@pytest.mark.parametrize(
    "section", [{"exits": [1]}, {"exits": None}, {"exits": [{}]}, {"exits": [{"left": []}]}]
)
def test_an_audit_that_is_none_is_no_traceback(
    section: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = json.loads(make_run(sky_steps()).to_json())
    Path("run.json").write_text(json.dumps({**run, "early_exit": section}))
    assert main(["show", "run.json"]) == 0
    assert "nothing left early" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", ["show run.json", "show run.json --steps", "generate x --bad", "models"]
)
def test_a_terminal_of_no_columns_is_one_of_80(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some programs say that start others."""
    make_run(sky_steps()).save("run.json")
    monkeypatch.setenv("COLUMNS", "0")
    as_terminal(monkeypatch)
    assert main(arguments.split()) in (0, 2)
    assert make_consoles()[0].width == 80
