"""Whatever the system refuses, and whatever a file holds, the command line says in one sentence."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tempo_mlx.cli.main import main
from tempo_mlx.report.run import Run
from tests.patience import patient
from tests.twins import twin

JARGON = (
    "Traceback",
    "[Errno",
    "codec",
    "Extra data",
    "Expecting",
    "mmap",
    "EOF while",
    "Error: Error",
    "None",
)
MISSING = ["show nope", "verify nope", "batch nope --out o", "score a --file nope", "generate --prompt-file nope",
           "generate a --config nope.toml", "ask a --system-file nope", "calibrate twin --text nope"]  # fmt: skip
COMMAND = (sys.executable, "-m", "tempo_mlx")
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("twin").symlink_to(twin("llama"))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, which is a sentence without jargon."""
    error = capsys.readouterr().err
    assert not [word for word in JARGON if word in error], error
    *_, last = error.rstrip().splitlines()
    assert last.startswith("Error: ") and last.endswith("."), last
    return last


def with_model(command: str) -> list[str]:
    words = command.split()
    return words if "twin" in words or words[0] in ("show", "verify") else [*words, "--model", "twin"]


@pytest.mark.parametrize("command", MISSING)
def test_a_file_that_is_not_there_is_bad_usage_everywhere(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(with_model(command)) == 2
    assert "nope" in said(capsys)


@pytest.mark.parametrize("model", ["./nope", "nope.gguf", "/no/such/place"])
def test_a_model_that_is_not_there_is_bad_usage_too(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["generate", "a", "--model"], ["models", "info"]):
        assert main([*command, model]) == 2
        assert "nope" in said(capsys) or model == "/no/such/place"


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\xff", b'{"a": 1} x', b"{", b"[" * 10_000, b"1" * 5000, b"\0"]
)
@pytest.mark.parametrize(
    "command", ["show file", "verify file", "generate a --config file.json", "batch file --out o"]
)
def test_files_of_something_else(command: str, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("file", "file.json"):
        Path(name).write_bytes(content)
    assert main(with_model(command)) in (1, 2)
    assert "file" in said(capsys)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["empty", "a directory"])
def test_a_model_with_a_file_that_cannot_be_read(
    name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(twin("llama"), "broken")
    file = Path("broken", name)
    file.unlink()
    file.mkdir() if how == "a directory" else file.touch()
    assert main(["generate", "a", "--model", "broken"]) == 1
    assert name.partition(".")[0] in said(capsys)


def test_an_empty_gguf(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.gguf").touch()
    assert main(["generate", "a", "--model", "empty.gguf"]) == 1
    assert "empty.gguf is empty" in said(capsys)


def run(command: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *command.split()],
        text=True,
        **{"stderr": subprocess.PIPE, "timeout": patient(60), **streams},
    )


@full
@pytest.mark.parametrize(
    "command",
    ["generate hello --model twin --max-tokens 3", "score the cat --json --model twin", "--help", "models list",
     "generate hello --model twin --max-tokens 3 --format json"],
)  # fmt: skip
def test_a_full_disk_under_stdout(command: str) -> None:
    with Path("/dev/full").open("w") as out:
        done = run(command, stdout=out)
    assert done.returncode == 1
    assert "Cannot write to standard output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@full
def test_what_goes_to_a_file_is_saved_although_stdout_is_full() -> None:
    with Path("/dev/full").open("w") as out:
        assert (
            run("generate hello --model twin --max-tokens 3 --json-output-file o.json", stdout=out).returncode
            == 1
        )
    assert Run.load("o.json").steps


@pytest.mark.parametrize(
    ("number", "command", "code", "words"),
    [
        (1, "generate hello --model twin --max-tokens 3", 1, "Standard output is closed"),
        (0, "generate - --model twin", 2, "The prompt is empty"),
        (0, "generate hello --model twin --max-tokens 3", 0, ""),
        (2, "generate hello --model twin --max-tokens 3", 0, ""),
        (2, "show nope", 2, ""),
    ],
)
def test_closed_streams(number: int, command: str, code: int, words: str) -> None:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    done = run(command, **streams, preexec_fn=lambda: os.close(number))
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
    assert (number == 2) == (not done.stderr)


def test_ctrl_c_at_any_time_leaves_no_traceback() -> None:
    """While Python itself starts, the traceback is Python's."""
    for seconds in (0.15, 0.3, 0.5, 0.8, 1.2):
        command = [*COMMAND, "generate", "hello", "--model", "twin", "--max-tokens", "200"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=patient(60))
        assert process.returncode in (0, 130, -signal.SIGINT) or "init_sys_streams" in error, error
        assert "tempo_mlx" not in error or "Traceback" not in error, error


def test_ctrl_c_waits_while_mlx_makes_its_types() -> None:
    """An exception inside would abort the process; afterwards the import can be tried again."""
    program = """
import enum, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have it ignored
make = enum.EnumType.__call__
def interrupted(kind, *given, **named):
    if "DeviceType" in given:
        signal.raise_signal(signal.SIGINT)
    return make(kind, *given, **named)
enum.EnumType.__call__ = interrupted
try:
    import tempo_mlx.mlx
except KeyboardInterrupt:
    print("Ctrl-C")
from tempo_mlx.mlx import mx
print(mx.array(2).item(), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Ctrl-C\n2 True\n"), done.stderr


IMPORTED = """
class Interrupted:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "{}":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupted)
"""
SAYING = """
import tempo_mlx.cli.main
tempo_mlx.cli.main.say = lambda console, sentence: signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.parametrize(
    ("when", "model", "code", "said"),
    [
        (IMPORTED.format("tempo_mlx.cli.ask"), "twin", -signal.SIGINT, ""),  # before anything runs
        (IMPORTED.format("numpy"), "twin", 130, "Error: Interrupted.\n"),
        (SAYING, "none", 130, ""),
    ],
)
def test_ctrl_c_outside_a_run(when: str, model: str, code: int, said: str) -> None:
    """Also while modules are imported, and while an error is said."""
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
{when}
from tempo_mlx.__main__ import main
sys.argv[1:] = ["generate", "a", "--model", "{model}"]
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said), done.stderr


def test_no_home_is_no_fault(tmp_path: Path) -> None:
    for home in ("/dev/null", str(tmp_path / "none" / "such"), None):
        environ = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME")}
        done = run(
            "generate hello --model twin --max-tokens 3 --max-parallel-tokens auto",
            stdout=subprocess.PIPE, env=environ if home is None else {**environ, "HOME": home},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not [word for word in JARGON[:-1] if word in done.stderr], done.stderr
