"""Running a program that nobody has read: so much time, memory and output, few processes, no network.

A launcher, started by itself so that no thread of ours is copied, sets the limits and becomes the program. On Linux a
network namespace of its own keeps it from the network, on macOS sandbox-exec; where neither can be had, it is not run.
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

REFUSED = 121  # what the launcher ends with where it cannot set a limit
LAUNCHER = """
import ctypes, os, resource, sys
seconds, memory, processes, size = map(int, sys.argv[1:5])
if sys.platform.startswith("linux"):
    libc, found = ctypes.CDLL(None, use_errno=True), -1
    for flags in (0x40000000, 0x50000000):  # of the network; of the network and users, for who is not root
        found = found and libc.unshare(flags)
    if found:
        print(os.strerror(ctypes.get_errno()), file=sys.stderr)
        sys.exit(121)
limits = [(resource.RLIMIT_CPU, seconds + 1), (resource.RLIMIT_FSIZE, size), (resource.RLIMIT_CORE, 0)]
limits.append((resource.RLIMIT_NPROC, processes))
if sys.platform.startswith("linux"):
    limits.append((resource.RLIMIT_AS, memory))
for which, value in limits:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))
try:
    os.execvp(sys.argv[5], sys.argv[5:])
except OSError as error:
    print(f"{sys.argv[5]}: {error.strerror}", file=sys.stderr)
    sys.exit(122)
"""
NOT_STARTED = 122
OFFLINE = "(version 1)(allow default)(deny network*)"


@dataclass(frozen=True)
class Limits:
    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 64
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """code: what the program ended with; None where time was up. output: both of its streams, the end of them."""

    code: int | None
    output: str

    @property
    def ok(self) -> bool:
        return self.code == 0


def run(
    command: Sequence[str], stdin: str = "", directory: Path | None = None, limits: Limits | None = None
) -> Outcome:
    """Run a command to its end, or to that of its time; nothing it started outlives it.

    directory: where it works; None: an empty one of its own, which is gone afterwards. Raises ConfigError where the
    command cannot be started, or not be kept from the network.
    """
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="tempo-mlx-") as own:
            return run(command, stdin, Path(own), limits)
    most = limits or Limits()
    numbers = (int(most.seconds), most.memory_bytes, most.processes, most.output_bytes)
    offline = ["sandbox-exec", "-p", OFFLINE] if sys.platform == "darwin" else []
    launcher = [*offline, sys.executable, "-I", "-S", "-c", LAUNCHER, *map(str, numbers), *command]
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    environment |= {"HOME": str(directory), "TMPDIR": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(
            launcher, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, cwd=directory,
            env=environment, start_new_session=True,
        ) as process:  # fmt: skip
            code: int | None = None
            try:
                process.communicate(stdin.encode("utf-8", "replace"), timeout=most.seconds)
                code = process.returncode
            except subprocess.TimeoutExpired:
                pass
            finally:
                end(process)
        size = output.seek(0, os.SEEK_END)
        output.seek(max(size - most.output_bytes, 0))
        said = output.read().decode("utf-8", "replace")
    if code == REFUSED:
        raise ConfigError(
            f"This system cannot keep a program from the network ({said.strip()}), so it is not run; try in a "
            "container that may use network namespaces."
        )
    if code == NOT_STARTED:
        raise ConfigError(f"Cannot run {said.strip()}; name a command that exists.")
    return Outcome(code, said)


def end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the program's session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
