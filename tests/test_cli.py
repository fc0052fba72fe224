"""The command line, run in this process on a tiny twin, except where the process itself is the point."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tempo_mlx
from tempo_mlx.__main__ import main as started
from tempo_mlx.cli.console import make_consoles
from tempo_mlx.cli.conversation import TerminalConversation
from tempo_mlx.cli.doctor import _write as doctor_write
from tempo_mlx.cli.main import main
from tempo_mlx.cli.options import EVERYDAY
from tempo_mlx.cli.output import RunPrinter
from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import OutputError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.output_config import OutputConfig
from tempo_mlx.prompt_cache import PromptCache
from tempo_mlx.report.run import Run
from tempo_mlx.resolution import REFUSED, Shortcuts, resolve
from tempo_mlx.settings import settings_of
from tests.runs import make_run, sky_steps
from tests.twins import twin

PROMPT = "Hello there, world"
HEAVY = ("numpy", "mlx.core", "torch", "transformers", "tokenizers", "huggingface_hub")


@pytest.fixture
def model() -> str:
    return str(twin("llama"))


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")


def generate(model: str, *arguments: str) -> int:
    return main(["generate", PROMPT, "--model", model, "--max-tokens", "6", *arguments])


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys\nfrom tempo_mlx.cli.main import main\nassert main({arguments!r}) == 0\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.stderr.strip() == "[]"


def test_help_names_every_setting_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help-all"]) == 0
    text = capsys.readouterr().out
    for config in (LoadConfig, GenerateConfig, Shortcuts, OutputConfig):
        for setting in settings_of(config).values():
            assert re.search(rf"{setting.flag}[ ,/]", text), setting.flag
            assert f"\n{setting.row.group}:\n" in text
    assert not any(re.search(rf"{flag}[ ,/]", text) for flag in REFUSED)
    panels = [
        text.index(f"\n{group}:\n") for group in ("Input", "Search", "Early exit", "Output", "Schedule")
    ]
    assert panels == sorted(panels), "what everyone uses comes first"
    assert text.index("--threshold") < text.index("--attend ") < text.index("--combine ")


@pytest.mark.parametrize("command", ["generate", "ask", "chat"])
def test_help_shows_a_dozen_everyday_options_and_no_other(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", capsys.readouterr().out, re.M)
    own = {"--help", "--help-all", "--config", "--resume"}
    if command == "ask":
        own |= {"--choices", "--leaves", "--answer-regex", "--answer-number", "--vote", "--verify-with"}
    others = set(shown) - own
    assert others <= {"--" + name.replace("_", "-") for name in EVERYDAY}
    assert 10 <= len(others) <= 14


@pytest.mark.parametrize(
    ("command", "flag", "default"),
    [("generate", "--max-tokens", "100"), ("ask", "--max-tokens", "512"), ("chat", "--max-tokens", "512"),
     ("ask", "--leaves", "16"), ("ask", "--threshold", "0.001; 0.1 under other decoders"),
     ("ask", "--coverage", "0.95"), ("verify", "--model", "the run's own")],
)  # fmt: skip
def test_help_names_the_defaults_of_its_command(
    command: str, flag: str, default: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help" if command == "verify" else "--help-all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.findall(rf" {flag}(?:, --[\w-]+)* (?:INTEGER|TEXT|0\.\.1) [^\[]*\[default: (.*?)\]", shown) == [
        default
    ]


@pytest.mark.parametrize("columns", [40, 80, 120])
@pytest.mark.parametrize(
    "command", [[], ["generate", "--help-all"], ["serve", "--help"], ["models", "--help"]]
)
def test_help_fits_and_cuts_nothing(
    command: list[str], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\u2026" not in out
    long = [line for line in out.splitlines() if len(line) > columns and len(line.split()) > 4]
    assert columns == 40 or not long, long


def test_text_goes_to_stdout_and_all_else_to_stderr(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model) == 0
    out, err = capsys.readouterr()
    run = tempo_mlx.generate(tempo_mlx.load(model), PROMPT, max_tokens=6)
    assert out == run.final_text + "\n"
    assert "6 steps" in err
    assert generate(model, "--quiet", "--no-stream") == 0
    assert capsys.readouterr() == (run.final_text + "\n", "")
    assert generate(model, "--quiet", "--view", "sets") == 0
    assert capsys.readouterr() == (run.text + "\n", "")


def test_json_on_stdout_is_the_run(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--format", "json"], ["--output-json"]):
        assert generate(model, *arguments, "--threshold", "0.02") == 0
        run = Run.from_json(capsys.readouterr().out)
        assert run.config["threshold"] == 0.02
        assert len(run.steps) == 6


def test_jsonl_is_a_line_a_step_and_the_run(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--format", "jsonl") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["step"] * 6 + ["run"]
    assert [line["data"]["step"] for line in lines[:-1]] == list(range(6))
    assert Run.from_json(json.dumps(lines[-1]["data"])).finish_reason == "length"


def test_ids_and_probabilities_beside_the_tokens(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--no-stream"]):
        assert generate(model, "--show-token-ids", "--show-probabilities", *more) == 0
        assert re.search(r"\(\d+, 0\.\d\d\)", capsys.readouterr().out)


def test_runs_are_saved_where_asked(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--output-json", "--json-output-file", "run.json", "--output-dir", "out") == 0
    run = Run.load(tmp_path / "run.json")
    assert capsys.readouterr().out == run.final_text + "\n"  # the JSON went to the file
    (saved,) = (tmp_path / "out").iterdir()
    assert Run.load(saved) == run


def test_settings_come_from_file_environment_and_dotenv(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.toml").write_text('max_tokens = 2\nseed = 1\nformat = "json"\n')
    (tmp_path / ".env").write_text("TEMPO_SEED=2\n")
    monkeypatch.setenv("MODEL_PATH", model)
    assert main(["generate", PROMPT, "--config", "settings.toml", "--max-tokens", "3"]) == 0
    run = Run.from_json(capsys.readouterr().out)
    assert (len(run.steps), run.config["seed"]) == (3, 2)


@pytest.mark.parametrize(
    "given", [["-"], ["--prompt", "-"], ["--prompt", "Hi"], ["Hi"], ["--prompt-file", "p.txt"]]
)
def test_ways_to_give_the_prompt(
    model: str,
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "p.txt").write_text("Hi\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    assert main(["generate", *given, "--model", model, "--max-tokens", "2", "--format", "json"]) == 0
    assert Run.from_json(capsys.readouterr().out).prompt.text == "Hi"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "no prompt"),
        (["a", "--prompt", "b"], 2, "Several prompts"),
        ([""], 2, "empty"),
        (["--prompt-file", "missing.txt"], 2, "missing.txt"),
        (["--prompt-file", "latin.txt"], 2, "UTF-8"),
        (["a", "--threshold", "1.5"], 2, "--threshold is 1.5; choose a number from 0 to 1"),
        (["a", "--threshold", "high"], 2, "'high'"),
        (["a", "--treshold", "1"], 2, "--treshold"),
        (["a", "--decoder", "magic"], 2, "superposed, tree"),
        (["a", "--config", "missing.toml"], 2, "missing.toml"),
        (["a", "--default-mode", "--threshold", "0.3"], 2, "leave it out"),
        (["a", "--early-exit", "--exit-layers", "3,7", "--confidence-thresholds", "0.7"], 2, "2 exit_layers and 1"),
        (["a", "--model", "no-such-model"], 1, "no-such-model"),
        (["a", "--model", "empty.gguf"], 1, "empty.gguf"),
        (["a", "--json-output-file", "no/such/run.json"], 1, "no/such"),
        (["a", "--json-output-file", "."], 1, "directory"),
        (["a", "--output-dir", "empty.gguf/x"], 1, "empty.gguf/x"),
        (["a", "--profile-output", "no/such/profile.json"], 1, "no/such"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_an_exit_code(
    arguments: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    assert main(["generate", *arguments]) == code
    assert words in only_error(capsys)


def test_a_prompt_longer_than_the_context(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "word " * 400, "--model", model]) == 2
    assert "context" in only_error(capsys)


@pytest.mark.parametrize("flag", REFUSED)
def test_flags_of_the_original_that_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", flag]) == 2
    assert flag in only_error(capsys)


def test_flags_of_the_original_that_still_work(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    original = ["--selection-threshold", "0.2", "--use-retroactive-removal", "--attention-threshold", "0.02",
                "--use-relative-attention", "--use-multi-scale-attention", "--use-sigmoid-threshold",
                "--use-custom-rope", "--no-lci-dynamic-threshold", "--no-preserve-isolated-tokens", "--isolate",
                "--num-layers-to-use", "2", "--format", "json"]  # fmt: skip
    assert generate(model, *original) == 0
    config = Run.from_json(capsys.readouterr().out).config
    assert config["threshold"] == 0.2
    assert config["pruning_signal"] == "attention" and config["relative_threshold"] == 0.5


def test_profile(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--profile", "--profile-output", "profile.json") == 0
    assert re.search(r"prefill +[\d.]+ s\n", capsys.readouterr().err)
    seconds = json.loads((tmp_path / "profile.json").read_text())
    assert seconds["decode_seconds"] <= seconds["total_seconds"]


def test_verbose_and_debug_say_more(
    model: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert generate(model) == 0
    assert not caplog.records
    assert generate(model, "--verbose") == 0
    said = len(caplog.records)
    assert said
    assert generate(model, "--debug-mode") == 0
    assert len(caplog.records) >= 2 * said + 6  # every step


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Ctrl-C when step number `step` is printed."""
    add: Callable[[RunPrinter, Any], None] = RunPrinter.add

    def add_and_interrupt(printer: RunPrinter, added: Any) -> None:
        add(printer, added)
        if added.step == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunPrinter, "add", add_and_interrupt)


def test_ctrl_c_in_decoding_keeps_what_was_generated(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, 2)
    before = signal.getsignal(signal.SIGINT)
    assert generate(model, "--json-output-file", "run.json") == 130
    assert signal.getsignal(signal.SIGINT) is before
    run = Run.load(tmp_path / "run.json")
    assert (run.finish_reason, len(run.steps)) == ("cancelled", 3)
    out, err = capsys.readouterr()
    assert out == run.final_text + "\n"
    assert "stopped early" in err


def test_a_text_that_grows_waits_for_no_full_garbage_collection(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would go through all that the run is made of."""
    add: Callable[[RunPrinter, Any], None] = RunPrinter.add
    made, collected, before = [], [], gc.get_threshold()

    def add_and_make(printer: RunPrinter, added: Any) -> None:
        add(printer, added)
        if added.step == 0:
            gc.callbacks.append(note)
        made.extend([] for _ in range(50_000))
        if added.step == 5:
            gc.callbacks.remove(note)

    def note(phase: str, about: dict[str, int]) -> None:
        collected.append(about["generation"])

    monkeypatch.setattr(RunPrinter, "add", add_and_make)
    assert generate(model) == 0
    assert {*collected} == {0, 1}
    assert gc.get_threshold() == before


def test_ctrl_c_in_prefill(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare: Callable[..., None] = RunPrinter.__init__

    def prepare_and_interrupt(*arguments: Any, **options: Any) -> None:
        prepare(*arguments, **options)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunPrinter, "__init__", prepare_and_interrupt)
    assert generate(model, "--json-output-file", "run.json") == 130
    run = Run.load(tmp_path / "run.json")
    assert (run.finish_reason, run.steps) == ("cancelled", ())


def test_a_second_ctrl_c_ends_at_once(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, 2, times=2)
    assert generate(model, "--json-output-file", "run.json") == 130
    assert capsys.readouterr().err.endswith("Error: Interrupted.\n")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_half_written(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "run.json").write_text("the run before")
    monkeypatch.setattr(os, "fsync", full)
    assert generate(model, "--json-output-file", "run.json") == 1
    out, err = capsys.readouterr()
    assert (
        out == tempo_mlx.generate(tempo_mlx.load(model), PROMPT, max_tokens=6).final_text + "\n"
    )  # nothing is lost
    assert "No space left" in err.splitlines()[-1]
    assert generate(model, "--json-output-file", "run.json", "--format", "json") == 1
    assert Run.from_json(capsys.readouterr().out).final_text + "\n" == out
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "the run before"


def test_a_closed_pipe_is_quiet_and_the_run_is_saved(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tempo_mlx", "generate", PROMPT, "--model", model, "--format", "jsonl",
               "--json-output-file", str(tmp_path / "run.json"), "--max-tokens", "100"]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0
    assert "Traceback" not in err and "Error" not in err
    assert Run.load(tmp_path / "run.json").finish_reason in ("cancelled", "length")


def test_a_terminal_that_cannot_show_a_character(model: str) -> None:
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "MODEL_PATH": model}
    wide = ["--max-tokens", "8", "--max-parallel-tokens", "64", "--threshold", "0"]
    command = [sys.executable, "-m", "tempo_mlx", "generate", "é", *wide]
    done = subprocess.run(command, capture_output=True, env=environ, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_show_and_verify(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        generate(model, "--json-output-file", "run.json", "--threshold", "0.02", "--use-retroactive-pruning")
        == 0
    )
    run = Run.load(tmp_path / "run.json")
    capsys.readouterr()
    assert main(["show", "run.json"]) == 0
    assert capsys.readouterr().out == run.final_text + "\n"
    assert main(["show", "run.json", "--steps"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + sum(len(step.tokens) + len(step.rejected) for step in run.steps)
    removed = [t for step in run.steps for t in step.tokens if t.removed_why is not None]
    assert removed and sum("removed after step" in row for row in rows) == len(removed)
    assert main(["show", "run.json", "--schedule"]) == 0
    assert "threshold" in capsys.readouterr().out
    assert main(["show", "run.json", "--html", "run.html"]) == 0
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")
    capsys.readouterr()
    assert main(["show", "run.json", "--format", "json"]) == 0
    assert Run.from_json(capsys.readouterr().out) == run
    assert main(["verify", "run.json"]) == 0
    assert "Exact" in capsys.readouterr().out
    assert main(["verify", "run.json", "--rerun"]) == 0
    assert "The same" in capsys.readouterr().out


def test_verify_finds_a_changed_probability(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model, "--json-output-file", "run.json", "--threshold", "1") == 0
    data = json.loads((tmp_path / "run.json").read_text())
    token = data["steps"][3]["tokens"][0]
    token["probability"] -= 1e-3
    data["steps"][3]["residual_probability"] += 1e-3
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert main(["verify", "run.json"]) == 1
    assert "NOT exact" in capsys.readouterr().out
    assert main(["verify", "run.json", "--rerun"]) == 1
    assert "NOT the same" in capsys.readouterr().out


def test_verify_refuses_another_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--json-output-file", "run.json") == 0
    capsys.readouterr()
    assert main(["verify", "run.json", "--model", str(twin("llama3"))]) == 1
    assert "other weights" in only_error(capsys)


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_run_file_that_is_none(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert main([command, "run.json"]) == 1
    assert "run.json" in only_error(capsys)
    assert main([command, "missing.json"]) == 2
    assert "missing.json" in only_error(capsys)


def test_score(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more.txt").write_text(" there\n")
    assert main(["score", PROMPT, " you", "--file", "more.txt", "--model", model, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in rows] == [" you", " there"]
    assert rows[0]["log_prob"] == pytest.approx(sum(rows[0]["log_probs"]))
    assert main(["score", PROMPT, " you", "--model", model]) == 0
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(rows[0]["log_prob"], abs=1e-4)
    assert main(["score", PROMPT, "--model", model]) == 2
    assert "continuation" in only_error(capsys)


def test_chat_keeps_the_conversation(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAnd you?\n/reset\nHello\n/exit\nnever read\n"))
    assert main(["chat", "--model", model, "--max-tokens", "4", "--default-mode", "--temperature", "0"]) == 0
    first, second, again = capsys.readouterr().out.splitlines()
    assert first == again != second


def test_chat_runs_only_what_is_new(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second prompt begins with the first; the answer is that of a run without any cache."""
    loaded = tempo_mlx.load(model)
    settings = resolve({"chat": True, "max_tokens": 4, "threshold": 0.02})
    conversation = TerminalConversation(tempo_mlx.Session(loaded), settings)
    out, err = make_consoles()
    first = conversation.show("Hello", OutputConfig(), out, err)
    rows: list[int] = []
    forward = loaded.model.forward

    def count(tokens: Any, *arguments: Any, **options: Any) -> Any:
        rows.append(len(tokens))
        return forward(tokens, *arguments, **options)

    monkeypatch.setattr(loaded.model, "forward", count)
    second = conversation.show("And you?", OutputConfig(), out, err)
    assert second.prompt.token_ids[: first.prompt_length] == first.prompt.token_ids
    assert rows[0] == second.prompt_length - first.prompt_length
    alone = tempo_mlx.generate(loaded, second.prompt.token_ids, chat=True, max_tokens=4, threshold=0.02)
    for one, other in zip(second.steps, alone.steps, strict=True):
        assert [token.id for token in one.tokens] == [token.id for token in other.tokens]
        expected = [token.probability for token in other.tokens]
        assert [token.probability for token in one.tokens] == pytest.approx(expected, abs=1e-5)


def test_models(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["models", "list"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out
    assert main(["models", "info", model]) == 0
    text = capsys.readouterr().out
    assert re.search(r"family +llama\n", text) and re.search(r"context +256 tokens\n", text)
    assert main(["models", "pull", model]) == 0
    assert capsys.readouterr().out.strip() == model
    assert main(["models", "remove", model]) == 1
    assert "your own" in only_error(capsys)
    assert Path(model).exists()


def test_doctor(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", model]) == 0
    text = capsys.readouterr().out
    assert re.search(r"measured +[\d.]+ GFLOP/s", text)
    assert "kernel" in text and "mlx" in text
    assert re.search(r"1 row [\d.]+ ms; times that: 2 rows [\d.]+,", text)
    assert re.search(r"--max-parallel-tokens auto +\d+$", text, re.M)


def test_doctor_reports_and_fails_where_the_kernel_is_wrong(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has Metal, as told here: every head dim is checked, and the model's own heads."""
    from tempo_mlx.mlx import mx
    from tempo_mlx.model import kernel_check, kernels

    asked: list[tuple[int, int, int]] = []

    def check(shape: tuple[int, int, int], dtype: object) -> kernel_check.SelfCheck:
        asked.append(shape)
        return kernel_check.SelfCheck(shape[2] != 96, 0.0, f"checked {shape[2]}")

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda *_: {"device_name": "M1", "memory_size": 8e9})
    monkeypatch.setattr(kernel_check, "fresh_check", check)
    report = tmp_path / "report.json"
    assert main(["doctor", "--model", model, "--report", str(report)]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "head dim 96" in err and "--report" in err
    assert {dim for _, _, dim in asked} == set(kernels.HEAD_DIMS)
    told = json.loads(report.read_text())
    assert told["format"] == "tempo-mlx/doctor" and set(told) >= {
        "versions",
        "devices",
        "rows",
        "one row",
        "kernel",
    }
    assert (
        re.fullmatch(r"[\d.]+ ms", told["one row"]["tempo-mlx"])
        and str(Path.home()) not in report.read_text()
    )
    assert told["kernel"]["8 heads on 2, head dim 96, bfloat16"] == "checked 96" and "checked 96" in out


def test_a_system_file_of_the_environment_is_a_default(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("brief.txt").write_text("Be brief.")
    Path("settings.toml").write_text('chat = true\nsystem = "Be long."')
    monkeypatch.setenv("TEMPO_SYSTEM_FILE", "brief.txt")
    for more, system in (
        ([], None),
        (["--chat"], "Be brief."),
        (["--config", "settings.toml"], "Be brief."),
        (["--chat", "--system", "Be kind."], "Be kind."),
    ):
        assert generate(model, "--json-output-file", "run.json", *more) == 0, capsys.readouterr()
        assert Run.load("run.json").config["system"] == system


@pytest.mark.parametrize("command", ["generate", "ask"])
def test_a_prompt_cache_that_cannot_be_written_is_told_before_the_run(
    command: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, PROMPT, "-m", model, "-n", "4", "--prompt-cache", "no/such/cache"]) == 1
    assert "no/such" in only_error(capsys)


def test_a_prompt_cache_that_fails_takes_no_run_with_it(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OutputError("Cannot write cache: No space left on device.")

    monkeypatch.setattr(PromptCache, "save", full)
    for command in ("generate", "ask"):
        more = ["-n", "4", "--prompt-cache", "cache", "--json-output-file", f"{command}.json"]
        assert main([command, PROMPT, "-m", model, *more]) == 1
        assert capsys.readouterr().out
        assert Run.load(f"{command}.json").steps


def test_data_is_utf_8_whatever_the_locale_says(tmp_path: Path) -> None:
    run = replace(make_run(sky_steps()), final_text="\u00e9\u20ac\u4f60")
    run.save("run.json")
    environ = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(Path(__file__).parents[1])}
    for form in ("json", "jsonl", "html"):
        command = [sys.executable, "-m", "tempo_mlx", "show", "run.json", "--format", form]
        done = subprocess.run(command, capture_output=True, env=environ)
        assert run.final_text.encode() in done.stdout


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_pipe_is_no_terminal_whatever_the_environment_says(
    name: str, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "1")
    assert generate(model, "--threshold", "0.02", "--json-output-file", "run.json") == 0
    out, err = capsys.readouterr()
    assert out == Run.load("run.json").final_text + "\n" and "\x1b" not in err


def test_shown_lines_are_those_of_a_run_under_way(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--format", "jsonl", "--json-output-file", "run.json") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main(["show", "run.json", "--format", "jsonl"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in shown] == [line["event"] for line in printed]
    assert shown[-1] == printed[-1]
    assert [line["data"]["step"] for line in shown[:-1]] == [line["data"]["step"] for line in printed[:-1]]


def test_a_run_goes_to_a_pipe(model: str) -> None:
    """Such as the shell's own, for `>(command)`."""
    reader, writer = os.pipe()
    assert generate(model, "--json-output-file", f"/dev/fd/{writer}") == 0
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as file:
        assert Run.from_json(file.read()).steps


def test_an_ignored_ctrl_c_stays_ignored(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a program in a script's background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt_at(monkeypatch, 2)
        assert generate(model, "--json-output-file", "run.json") == 0
        monkeypatch.setattr(
            "tempo_mlx.cli.main.main", lambda: int(signal.getsignal(signal.SIGINT) != signal.SIG_IGN)
        )
        assert started() == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(Run.load("run.json").steps) == 6


def test_score_heeds_a_settings_file(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("settings.toml").write_text("top_k = 1\nthreshold = 0.3\n")
    said = []
    for more in ([], ["--top-k", "1"], ["--config", "settings.toml"]):
        assert main(["score", PROMPT, "a", "b", "-m", model, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1] == said[2]


def test_a_byte_order_mark_is_no_part_of_a_prompt(model: str) -> None:
    Path("p.txt").write_bytes(b"\xef\xbb\xbfHello\r\n")
    assert (
        main(["generate", "--prompt-file", "p.txt", "-m", model, "-n", "2", "--json-output-file", "run.json"])
        == 0
    )
    assert Run.load("run.json").prompt.text == "Hello"


def test_a_report_hides_the_home_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for home, text, written in (
        ("/", "12 GFLOP/s in /work", "12 GFLOP/s in /work"),
        ("/home/ann", "/home/anna/x and /home/ann/x", "/home/anna/x and ~/x"),
        ("/home/ann", "/home/ann", "~"),
    ):
        monkeypatch.setenv("HOME", home)
        doctor_write(tmp_path / "report.json", {"models": {"cache": text}})
        assert json.loads((tmp_path / "report.json").read_text())["models"]["cache"] == written


def test_models_are_listed_where_ollama_names_the_home_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", "~nobody-of-that-name/models")
    assert main(["models"]) == 0


def test_an_adapter_in_the_home_of_nobody(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--adapter", "~nobody-of-that-name/a") == 1
    assert "is missing" in only_error(capsys)
