"""The file that a batch writes: a line an item, one writer at a time, and gone on with where the last one stopped."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tempo_mlx.errors import OutputError
from tempo_mlx.files import explained, reason_of, replacing

BEGINNING = b'{"format": "tempo-mlx/'  # of every line


class BatchFile:
    """`path`, open to append lines. `kept`: how many whole lines it held, which `check` has seen one by one."""

    def __init__(self, path: Path, file: BinaryIO, check: Callable[[int, bytes], None]) -> None:
        self.path, self._file = path, file
        self.kept = 0
        if not path.is_file():  # a pipe or device: nothing to go on with
            return
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n") and is_half(line):
                file.truncate(file.tell() - len(line))
                break
            check(self.kept, line)
            self.kept += 1
            if not line.endswith(b"\n"):
                file.write(b"\n")

    def append(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def replace(self, lines: Mapping[int, str]) -> None:
        """Put others in the place of some of the kept lines; the file is the old or the new one, never between."""
        with replacing(self.path) as draft, draft.open("wb") as new:
            self._file.seek(0)
            for number, line in enumerate(self._file):
                new.write(lines[number].encode() + b"\n" if number in lines else line)
        self._file.close()
        self._file = _locked(self.path)

    def close(self) -> None:
        with suppress(OSError):  # of a full disk, which the write before has told
            self._file.close()


def is_half(line: bytes) -> bool:
    """Whether this is what a kill leaves of a line; the end of a file of another kind is not."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith(BEGINNING[: len(line)])
    return False


@contextmanager
def batch_file(path: Path, check: Callable[[int, bytes], None]) -> Iterator[BatchFile]:
    """`path`, made where it is not there. check(number, line): raises what it has against a line that is.

    Raises OutputError where it cannot be written, and where another process writes it.
    """
    try:
        file = _locked(path)
        try:
            opened = BatchFile(path, file, check)
        except BaseException:
            file.close()
            raise
        try:
            yield opened
        finally:
            opened.close()
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {reason_of(error)}; the lines before are whole, run it again to go on."
        ) from error


def _locked(path: Path) -> BinaryIO:
    """Open to append, and to read unless it is a pipe or device."""
    with explained(path):
        file: BinaryIO = path.open("wb" if path.exists() and not path.is_file() else "a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise OutputError(
            f"{path} is being written by another process; wait until it has ended, or name another file."
        ) from None
    except OSError:
        pass  # a file system, or a device, without locks
    return file
