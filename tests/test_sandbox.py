"""A program that nobody has read is kept within its limits, and from the network."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tempo_mlx.errors import ConfigError
from tempo_mlx.sandbox import Limits, Outcome, own_processes, run


def python(code: str, **limits: float) -> Outcome:
    return run([sys.executable, "-c", code], limits=Limits(**{"seconds": 20.0, **limits}))  # type: ignore[arg-type]


@pytest.fixture(autouse=True, scope="module")
def able() -> None:
    try:
        python("")
    except ConfigError as error:
        pytest.skip(str(error))


def test_what_a_program_says_and_how_it_ends() -> None:
    assert python("print('right')") == Outcome(0, "right\n")
    assert python("raise SystemExit(3)") == Outcome(3, "")
    assert run([sys.executable, "-c", "print(input()[::-1])"], "abc\n").output == "cba\n"
    assert run(["sh", "-c", "echo right | cat"]) == Outcome(0, "right\n")  # processes of its own
    for code in (1, 121, 122):
        assert python(f"print('network: x'); raise SystemExit({code})") == Outcome(code, "network: x\n")
    for command, words in (
        ("no-such-program", "no-such-program: No such file"),
        ("/", "/: Permission denied"),
    ):
        with pytest.raises(ConfigError, match=f"Cannot run {words}"):
            run([command])


def test_time_is_up() -> None:
    begun = time.perf_counter()
    assert python("while True: pass", seconds=1.0).code is None
    assert python("import time; time.sleep(60)", seconds=1.0).code is None
    assert time.perf_counter() - begun < 20


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="by a namespace of processes"))])  # fmt: skip
def test_what_it_started_ends_with_it(apart: bool, tmp_path: Path) -> None:
    file = tmp_path / "alive"
    child = f"import time\nwhile True: open({str(file)!r}, 'a').write('x'); time.sleep(0.05)"
    begin = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}], "
        f"start_new_session={apart}); time.sleep(2)"
    )
    assert python(begin).ok
    size = file.stat().st_size
    time.sleep(0.5)
    assert file.stat().st_size == size > 0


def test_memory_and_files_are_limited() -> None:
    if sys.platform.startswith("linux"):
        assert not python("x = bytearray(1 << 29)", memory_bytes=1 << 28).ok
    assert not python("open('big', 'wb').write(bytes(1 << 22))", output_bytes=1 << 20).ok
    assert len(python("print('x' * 900_000)", output_bytes=1000).output) <= 1000


def test_there_is_no_network() -> None:
    tried = "import socket; socket.create_connection(('127.0.0.1', PORT), 2)"
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), 2):
            assert not python(tried.replace("PORT", str(port))).ok


def test_it_works_in_a_directory_of_its_own_with_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hidden")
    said = python(
        "import os; print(os.listdir('.'), 'SECRET_KEY' in os.environ, os.environ['HOME'] == os.getcwd())"
    )
    assert said.output == "[] False True\n"


@pytest.mark.skipif(shutil.which("ps") is None, reason="by ps, which every Mac has")
def test_the_processes_of_a_user_are_counted() -> None:
    sleeping = [subprocess.Popen(["sleep", "60"]) for _ in range(40)]
    try:
        assert own_processes() >= 40
    finally:
        for each in sleeping:
            each.kill()
            each.wait()
