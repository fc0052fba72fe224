"""Writing results so that a reader finds the whole file or none of it."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from tempo_mlx.errors import OutputError


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write text (UTF-8) to a temporary file beside `path`, flush it to the disk, and rename it into place.

    A symbolic link is followed; a device or pipe is written to directly, there is nothing to rename. Raises
    OutputError where the file cannot be written; what was there before is then unchanged.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_text(text, encoding="utf-8")
            return
        if target.is_dir():
            raise OutputError(f"Cannot write {path}: it is a directory; name a file in it.")
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        try:
            with temporary.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                temporary.chmod(mode)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"Cannot write {path}: {reason}; choose a place that exists, has room and can be written."
        ) from error
