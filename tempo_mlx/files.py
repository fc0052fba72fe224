"""Reading texts that a user names, and writing so that a reader finds the whole file or what was there before."""

from __future__ import annotations

import codecs
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tempo_mlx.errors import OutputError, PromptError, TempoError


def path_of(path: object, error: type[TempoError]) -> Path:
    """`path` where it can be one, of a file or a folder. Raises `error`."""
    name = b"\0"
    if isinstance(path, str | os.PathLike):
        with suppress(UnicodeEncodeError):
            name = os.fsencode(path)
    if b"\0" in name:
        raise error(f"{repr(path)[:80]} is no path; give the name of a file.")
    return Path(os.fsdecode(name))


def at_home(path: str) -> Path:
    """With the user's home for ~; as it stands where that names the home of nobody here."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def read_lines(path: str | os.PathLike[str], what: str) -> list[str]:
    """The lines of a text file (UTF-8): what stands between line feeds, and nothing else that Unicode breaks lines at.

    what: it is, for the message. Raises PromptError, which names the line that is no text.
    """
    lines = []
    for number, line in enumerate(read_bytes(path, what).removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        try:
            lines.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError:
            raise PromptError(f"{path}, line {number} is not UTF-8 text; convert the file first.") from None
    return lines if lines[-1] else lines[:-1]


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The text (UTF-8) of a file; `what` it is, for the message. Raises PromptError."""
    return "\n".join(read_lines(path, what))


def read_bytes(path: str | os.PathLike[str], what: str) -> bytes:
    """The content of a file; `what` it is, for the message. Raises PromptError."""
    place = path_of(path, PromptError)
    try:
        return place.read_bytes()
    except OSError as error:
        raise PromptError(f"Cannot read {what} in {path}: {reason_of(error)}.") from error


def fault_of_json(error: ValueError) -> str:
    """What is wrong with a text that json.loads could not read."""
    if isinstance(error, json.JSONDecodeError):
        if not error.doc.strip():
            return "it is empty"
        return f"it is not JSON from line {error.lineno}, column {error.colno} on"
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "a number in it is too long"


def reason_of(error: OSError) -> str:
    """What went wrong, in the system's words, without its number or the path."""
    return error.strerror or " ".join(str(error).split()) or "it could not be done"


def write_atomic(path: str | os.PathLike[str], text: str, *, make_folder: bool = False) -> None:
    """Write text (UTF-8) as `replacing` does; to a device or pipe directly, as there is nothing to rename."""
    target = path_of(path, OutputError)
    with explained(path):
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_text(text, encoding="utf-8")
            return
    with replacing(path, make_folder=make_folder) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def replacing(path: str | os.PathLike[str], *, make_folder: bool = False) -> Iterator[Path]:
    """A file beside `path` to write to, which is then flushed to the disk and renamed into place.

    A symbolic link is followed. Raises OutputError where the file cannot be written; what was there before is then
    unchanged.
    """
    target = Path(os.path.realpath(path_of(path, OutputError)))
    draft = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}{target.suffix}")
    with explained(path):
        if target.is_dir():
            raise OutputError(f"Cannot write {path}: it is a directory; name a file in it.")
        if make_folder:
            target.parent.mkdir(parents=True, exist_ok=True)
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        try:
            draft.touch(exist_ok=False)
            yield draft
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            if mode is not None:
                draft.chmod(mode)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system refuses is an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {reason_of(error)}; choose a place that exists, has room and can be written."
        ) from error
