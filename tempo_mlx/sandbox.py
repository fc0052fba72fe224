"""Running a program that nobody has read: so much time, memory and output, few processes, no network.

A launcher, started by itself so that no thread of ours is copied, sets the limits and becomes the program. On Linux a
network namespace keeps it from the network, and one of processes ends with it; on macOS sandbox-exec keeps it from the
network. Where neither can be had, it is not run.
The files of its user it can read and write: give it a directory of its own to work in.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tempo_mlx.errors import ConfigError

NETWORK = "network: "  # what the launcher says first where it cannot keep a program from it
LAUNCHER = """
import ctypes, os, resource, sys
def fail(why):
    os.write(told, why.encode("utf-8", "replace"))
    os._exit(1)
told, seconds, memory, processes, size = map(int, sys.argv[1:6])
linux = sys.platform.startswith("linux")
os.set_inheritable(told, False)  # the program does not get it
if linux:
    libc, found = ctypes.CDLL(None, use_errno=True), -1
    for flags in (0x60000000, 0x70000000):  # of network and processes; and of users, for who is not root
        found = found and libc.unshare(flags)
    if found:
        fail("network: " + os.strerror(ctypes.get_errno()))
for _ in range(2 * linux):  # the program is the second: all that it starts ends with the first, wherever it went
    child = ended = os.fork()
    while child:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
limits = [(resource.RLIMIT_CPU, seconds + 1), (resource.RLIMIT_FSIZE, size), (resource.RLIMIT_CORE, 0)]
limits.append((resource.RLIMIT_NPROC, processes))
if linux:
    limits.append((resource.RLIMIT_AS, memory))
for which, value in limits:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))
try:
    os.execvp(sys.argv[6], sys.argv[6:])
except OSError as error:
    fail(f"{sys.argv[6]}: {error.strerror}")
"""
OFFLINE = "(version 1)(allow default)(deny network*)"


@dataclass(frozen=True)
class Limits:
    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 64
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """code: what the program ended with, or 128 + the signal that ended it; None where time was up. output: the end of
    both of its streams.
    """

    code: int | None
    output: str

    @property
    def ok(self) -> bool:
        return self.code == 0


def own_processes() -> int:
    """How many this user has: macOS counts them all against the limit, Linux those of the namespace."""
    listed = subprocess.run(["ps", "-x", "-o", "pid="], capture_output=True, check=False).stdout
    return len(listed.split())


def run(
    command: Sequence[str], stdin: str = "", directory: Path | None = None, limits: Limits | None = None
) -> Outcome:
    """Run a command to its end, or to that of its time; nothing it started outlives it, on macOS in its session.

    directory: where it works; None: an empty one of its own, which is gone afterwards. Raises ConfigError where the
    command cannot be started, or not be kept from the network.
    """
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="tempo-mlx-") as own:
            return run(command, stdin, Path(own), limits)
    most = limits or Limits()
    processes = most.processes + (own_processes() if sys.platform == "darwin" else 0)
    numbers = (int(most.seconds), most.memory_bytes, processes, most.output_bytes)
    offline = ["sandbox-exec", "-p", OFFLINE] if sys.platform == "darwin" else []
    launcher = [*offline, sys.executable, "-I", "-S", "-c", LAUNCHER]
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    environment |= {"HOME": str(directory), "TMPDIR": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as told:
        with subprocess.Popen(
            [*launcher, *map(str, (told.fileno(), *numbers)), *command], stdin=subprocess.PIPE, stdout=output,
            stderr=subprocess.STDOUT, cwd=directory, env=environment, start_new_session=True,
            pass_fds=(told.fileno(),),
        ) as process:  # fmt: skip
            code: int | None = None
            try:
                process.communicate(stdin.encode("utf-8", "replace"), timeout=most.seconds)
                code = process.returncode if process.returncode >= 0 else 128 - process.returncode
            except subprocess.TimeoutExpired:
                pass
            finally:
                end(process)
        size = output.seek(0, os.SEEK_END)
        output.seek(max(size - most.output_bytes, 0))
        said = output.read().decode("utf-8", "replace")
        told.seek(0)
        why = told.read().decode("utf-8", "replace")
    if why.startswith(NETWORK):
        raise ConfigError(
            f"This system cannot keep a program from the network ({why.removeprefix(NETWORK)}), so it is not run; try "
            "in a container that may use network namespaces."
        )
    if why:
        raise ConfigError(f"Cannot run {why}; name a command that exists.")
    return Outcome(code, said)


def end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the program's session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
