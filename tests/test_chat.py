"""The chat: what it is told besides messages, what it keeps, and how it feels on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tempo_mlx.cli.line import PipeReader, TerminalReader, is_open, message_of, typed_lines
from tempo_mlx.cli.main import main
from tempo_mlx.sessions.session import Session
from tests.twins import twin

pyte = pytest.importorskip("pyte")

Talk = Callable[..., tuple[str, str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Give a chat these lines; returns what it said on stdout and on stderr."""

    def run(*lines: str, flags: tuple[str, ...] = (), code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        settings = ["-m", str(twin("llama")), "-n", "4", "-t", "0", *flags]
        assert main(["chat", *settings]) == code
        return capsys.readouterr()

    return run


def test_only_answers_are_printed(talk: Talk) -> None:
    out, _ = talk("Hello", "And you?")
    assert len(out.splitlines()) == 2
    assert "Hello" not in out and "<|" not in out


def test_undo_forgets_the_last_turn(talk: Talk) -> None:
    first, second = talk("Hello", "And you?")[0].splitlines()
    out, err = talk("Hello", "Something else", "/undo", "And you?")
    assert out.splitlines()[-1] == second and out.splitlines()[0] == first
    assert "Forgotten: Something else" in err
    assert "nothing to undo" in talk("/undo")[1]


def test_again_answers_anew_and_the_conversation_has_one_answer(talk: Talk, home: Path) -> None:
    flags = ("--decoder", "sample", "--beam-width", "1", "-t", "5", "--threshold", "0")
    out, _ = talk("Hello", "/again", "/again", "/save here.json", flags=flags)
    assert len(set(out.splitlines())) > 1, "other seeds"
    said = json.loads((home / "here.json").read_text())
    assert [message["role"] for message in said["messages"]] == ["user", "assistant"]
    assert said["messages"][1]["content"] == out.splitlines()[-1]
    assert "nothing to answer" in talk("/again")[1]


def test_what_is_saved_can_be_taken_up(talk: Talk, home: Path) -> None:
    whole = talk("/system Be brief.", "Hello", "/save talk", "And you?")[0].splitlines()
    assert (home / "state" / "tempo-mlx" / "conversations" / "talk.json").exists()
    out, err = talk("/load talk", "And you?", "/system")
    assert out.splitlines() == whole[1:]
    assert "Going on after 1 message and its answer." in err and "System message: Be brief." in err


def test_settings_can_be_changed_and_shown(talk: Talk) -> None:
    out, err = talk(
        "/set max_tokens 2", "Hello", "/set max-tokens", "/set", "/set seed x", "/set treshold 1", "/set n 3"
    )
    assert "max_tokens is 2." in err and "max_tokens is 2; A text's length" in err and "temperature 0" in err
    assert "seed is 'x'; choose" in err and "did you mean threshold?" in err and "n is not a setting" in err
    assert len(talk("Hello")[0]) > len(out)


def test_a_grammar_can_be_set_and_taken_away(talk: Talk, home: Path) -> None:
    pytest.importorskip("llguidance")
    (home / "schema.json").write_text('{"enum": ["yes", "no"]}')
    out, err = talk(
        "/set max_tokens 20",
        "/set json_schema schema.json",
        "Hello",
        "/set json_schema none",
        "/set repetition_penalty 1.5",
        "Hello",
    )
    assert json.loads(out.splitlines()[0]) in ("yes", "no")
    assert len(out.splitlines()[1]) > 5 and "repetition_penalty is 1.5" in err
    assert "Cannot read json_schema in nowhere.json" in talk("/set json_schema nowhere.json")[1]


def test_a_setting_that_cannot_be_changes_nothing(talk: Talk) -> None:
    out, err = talk("Hello", "/set beam_width 3", "/reset", "Hello")
    assert "beam_width has no effect with the superposed decoder" in err
    assert out.splitlines()[0] == out.splitlines()[1]


def test_the_model_can_be_changed(talk: Talk) -> None:
    other = str(twin("llama3"))
    _, err = talk("Hello", f"/model {other}", "/model", "/model no-such-model", "Hello")
    assert err.count(f"Model: {other}") == 2 and "no-such-model" in err


def test_why_and_branches_look_at_the_last_answer(talk: Talk) -> None:
    out, err = talk("Hello", "/why", "/branches 2", flags=("-t", "1", "--threshold", "0.02"))
    assert "instead" in err or "Nothing else was probable" in err
    assert [line[:2] for line in out.splitlines()[1:]] == ["1.", "2."]
    _, err = talk("/why", "/branches")
    assert "no answer to look at" in err and "nothing to answer" in err


def test_another_answer_can_be_picked_and_gone_on_with(talk: Talk, home: Path) -> None:
    flags = ("-t", "1", "--threshold", "0.02")
    out, err = talk(
        "Hello", "/branches 3", "/pick 4", "/pick 2", "/save a.json", "And you?", "/pick 1", flags=flags
    )
    first, *listed = out.splitlines()[:4]
    assert "/pick is '4'; choose a whole number from 1 to 3." in err and "number 2 now" in err
    said = json.loads((home / "a.json").read_text())["messages"]
    assert [message["role"] for message in said] == ["user", "assistant"]
    assert said[1]["content"].strip() == listed[1].removeprefix("2.").strip() != first.strip()
    assert err.count("nothing to pick from") == 1, "a new answer has others"
    again, _ = talk("/load a.json", "And you?", flags=flags)
    assert again.splitlines()[-1] == out.splitlines()[4], "what follows goes on from the picked one"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/pick 1", "There is nothing to pick from; /branches lists other answers."),
        ("/undoo", "There is no command /undoo; did you mean /undo?"),
        ("/nonsense", "There is no command /nonsense; /help lists them."),
        ("/save", "Say where: /save NAME"),
        ("/load", "Say which: /load NAME"),
        ("/load missing", "Cannot read"),
        ("/branches many", "/branches is 'many'; choose a whole number"),
    ],
)
def test_a_command_that_is_wrong_is_told_so(talk: Talk, typed: str, said: str) -> None:
    out, err = talk(typed, "/exit", "never read")
    assert out == "" and said in err


def test_help_names_every_command(talk: Talk) -> None:
    from tempo_mlx.cli.commands import ALSO, COMMANDS

    _, err = talk("/help")
    assert all(f"/{name}" in err for name in COMMANDS)
    assert set(ALSO.values()) <= set(COMMANDS)
    wanted = "help system model set undo again save load branches why exit".split()  # noqa: SIM905
    assert set(wanted) <= set(COMMANDS)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "other", "version": 1, "messages": [], "settings": {}}',
        '{"format": "tempo-mlx/conversation", "version": 1, "messages": 1, "settings": {}}',
    ],
)
def test_a_file_that_holds_no_conversation(talk: Talk, home: Path, content: str) -> None:
    (home / "x.json").write_text(content)
    assert "x.json holds no conversation" in talk("/load x.json")[1]


def test_nothing_to_resume(talk: Talk) -> None:
    assert "Cannot read" in talk("Hello", flags=("--resume",), code=2)[1]


def test_messages_of_several_lines_from_a_pipe() -> None:
    reader = PipeReader(io.StringIO('one\n"""two\nthree"""\n\n"""four'))
    assert [reader.read() for _ in range(5)] == ["one", "two\nthree", "", "four", None]
    assert is_open('"""a') and is_open('"""') and not is_open('"""a"""') and not is_open("a")
    assert message_of(' """ a """ ') == "a"


def test_what_was_typed_blind() -> None:
    assert typed_lines("") == [""]
    assert typed_lines("next q") == ["next q"]
    assert typed_lines("one\rtwo\nthr") == ["one", "two", "thr"]
    assert typed_lines("ax\x7fb\x08c\x01") == ["ac"]
    assert typed_lines("up\x1b[A") == ["up"]
    assert typed_lines("one\r\x04two") == ["one", "\x04"] and typed_lines("a\x04") == ["a"], "Ctrl-D"


class Terminal:
    """A chat in a process of its own, on a terminal."""

    def __init__(self, home: Path, *flags: str) -> None:
        self.screen = pyte.Screen(80, 24)
        self.stream = pyte.ByteStream(self.screen)
        self.master, slave = pty.openpty()
        environ = {
            **os.environ,
            "TERM": "xterm",
            "COLUMNS": "80",
            "LINES": "24",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        command = [
            sys.executable,
            "-m",
            "tempo_mlx",
            "chat",
            "-m",
            str(twin("llama")),
            "-n",
            "6",
            "-t",
            "0",
            *flags,
        ]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environ, cwd=Path(__file__).parents[1],
            start_new_session=True, preexec_fn=self._take_terminal(slave),
        )  # fmt: skip
        os.close(slave)

    @staticmethod
    def _take_terminal(slave: int) -> Callable[[], None]:
        def take() -> None:
            import fcntl
            import termios

            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        return take

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 90.0) -> str:
        """The screen, once it shows the pattern."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:
                    break
                if b"\x1b[6n" in data:  # asks where the cursor is
                    os.write(self.master, b"\x1b[1;1R")
                self.stream.feed(data)
            if re.search(pattern, self.text(), re.M):
                return self.text()
        if re.search(pattern, self.text(), re.M):
            return self.text()
        raise AssertionError(f"{pattern} is not on the screen:\n{self.text()}")

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def end(self) -> int:
        self.type("\x04")
        return self.process.wait(timeout=60)


@pytest.fixture
def terminal(home: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*flags: str) -> Terminal:
        opened.append(Terminal(home, *flags))
        return opened[-1]

    yield start
    for one in opened:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        os.close(one.master)


def test_a_conversation_on_a_terminal(terminal: Callable[..., Terminal], home: Path) -> None:
    """History, a status line, what is typed ahead, Ctrl-C that stops an answer only, and --resume."""
    chat = terminal()
    chat.wait_for(r"tokens of context")
    chat.type("Hello\r")
    chat.wait_for(r"steps/s \| \d+ of 256 tokens used \| 1\.0 tokens at once \| \w")
    chat.type("/set max_tokens 200\r/set min_steps 200\r")
    chat.wait_for(r"min_steps is 200")
    chat.type("Go on\r/set seed 7\r")  # read in one go with the line before
    chat.wait_for(r"^step \d+ \|")
    chat.type("/undo\rnext")
    chat.type("\x03")
    screen = chat.wait_for(r"Forgotten: Go on")
    screen = chat.wait_for(r"^> next$")
    assert "Error" not in screen
    assert chat.process.poll() is None
    chat.type("\x15")
    assert chat.end() == 0
    history = (home / "state" / "tempo-mlx" / "chat-history").read_text()
    assert re.findall(r"^\+(.*)$", history, re.M) == [
        "Hello", "/set max_tokens 200", "/set min_steps 200", "Go on", "/set seed 7", "/undo",
    ]  # fmt: skip
    again = terminal("--resume")
    again.wait_for(r"Going on after 1 message and its answer")
    again.wait_for(r"^> *$")
    again.type("\x1b[A")
    again.wait_for(r"^> /undo$")
    again.type("\x1b[A\x1b[A")
    again.wait_for(r"^> Go on$")
    again.type("\x03")
    assert again.end() == 0


@pytest.mark.parametrize(
    "command",
    ["/save ~nobody-of-that-name/x.json", "/load ~nobody-of-that-name/x.json", "/save p.txt/x.json",
     "/save /proc/none/x.json", "/save " + "x" * 300, "/save a\0b", "/load a\0b"],
)  # fmt: skip
def test_a_place_that_cannot_be_ends_no_chat(talk: Talk, home: Path, command: str) -> None:
    (home / "p.txt").touch()
    assert "seed is 3." in talk("Hello", command, "/set seed 3")[1]


def test_a_new_answer_that_fails_leaves_the_old_one(talk: Talk, home: Path) -> None:
    """Nothing is calibrated for the twin."""
    _, said = talk("Hello", "/set early_exit true", "/again", "/save x.json")
    assert "calibrate" in said
    assert [m["role"] for m in json.loads((home / "x.json").read_text())["messages"]] == ["user", "assistant"]


def test_other_answers_heed_the_settings_of_the_conversation(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []

    class Watched(Session):
        def stream(self, prompt: Any, config: Any, **more: Any) -> Any:
            wanted.append(config)
            return super().stream(prompt, config, **more)

    monkeypatch.setattr("tempo_mlx.sessions.session.Session", Watched)
    talk("Hello", "/set stop xyz", "/set repetition_penalty 1.5", "/set decoder plain", "/branches 2")
    assert (wanted[-1].decoder, wanted[-1].branches, wanted[-1].chat) == ("tree", 2, True)
    assert (wanted[-1].stop, wanted[-1].repetition_penalty) == (("xyz",), 1.5)


def test_ctrl_d_that_was_typed_ahead_ends_the_chat_after_what_came_before_it() -> None:
    reader = TerminalReader.__new__(TerminalReader)  # without a terminal
    reader._waiting, reader._begun = [], typed_lines("\x04")[-1]
    assert reader.read() is None


@pytest.mark.parametrize("encoding", ["utf-8:strict", "latin-1"])
def test_a_pipe_is_utf_8_text(home: Path, encoding: str) -> None:
    """What is none ends the chat in a sentence, after what came before it is answered."""
    environ = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [
        sys.executable,
        "-m",
        "tempo_mlx",
        "chat",
        "-m",
        str(twin("llama")),
        "-n",
        "2",
        "--min-steps",
        "2",
    ]
    done = subprocess.run(command, input=b"Hello\n\xff\n", capture_output=True, env=environ)
    assert (done.returncode, done.stderr.decode().splitlines()[-1]) == (
        2,
        "Error: What standard input holds is not UTF-8 text; convert it first.",
    )
    assert done.stdout


def test_a_chat_goes_on_where_nothing_can_be_kept(terminal: Callable[..., Terminal], home: Path) -> None:
    (home / "state").write_text("no directory")
    chat = terminal()
    chat.wait_for(r"tokens of context")
    chat.type("Hello\r")
    chat.wait_for(r"The conversation is not kept for --resume")
    chat.type("/set seed 3\r")
    chat.wait_for(r"seed is 3\.")
    chat.wait_for(r"^>$")
    assert chat.end() == 0
