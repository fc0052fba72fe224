"""SHA-256 of a model's files, remembered by size and modification time: hashing gigabytes takes seconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tempo_mlx.errors import OutputError
from tempo_mlx.files import write_atomic
from tempo_mlx.weights.registry import cache_directory

WORTH_REMEMBERING = 1 << 24  # bytes; smaller files are quick to hash


def of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, always computed."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def of_files(files: Sequence[Path]) -> str:
    """SHA-256 of the only file; of several, of the sorted list of their names and SHA-256."""
    if len(files) == 1:
        return _remembered(files[0])
    listing = "".join(f"{_remembered(each)}  {each.name}\n" for each in sorted(files))
    return hashlib.sha256(listing.encode()).hexdigest()


def remember(path: Path, sha256: str) -> None:
    """Note a sum that has just been computed. Best effort: without a writable cache it is computed again."""
    known = list({**_known(), _key(path): sha256}.items())[-1000:]
    with suppress(OutputError):
        write_atomic(_store(), json.dumps(dict(known)), make_folder=True)


def _remembered(path: Path) -> str:
    if path.stat().st_size < WORTH_REMEMBERING:
        return of_file(path)
    known = _known().get(_key(path))
    if known is not None:
        return known
    sha256 = of_file(path)
    remember(path, sha256)
    return sha256


def _store() -> Path:
    return cache_directory() / "sha256.json"


def _key(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _known() -> dict[str, str]:
    try:
        known = json.loads(_store().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, str)}
