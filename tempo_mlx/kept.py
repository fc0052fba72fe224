"""What was measured on this machine and is kept in the user's cache directory, so that it need not be again."""

from __future__ import annotations

import json
import logging
from typing import Any

import platformdirs

from tempo_mlx.errors import OutputError
from tempo_mlx.files import write_atomic

log = logging.getLogger(__name__)


def kept(name: str) -> dict[str, Any]:
    """What the file `name` holds, by key; nothing where it is not there, or is damaged."""
    try:
        found = json.loads((platformdirs.user_cache_path("tempo-mlx") / name).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(name: str, key: str, value: Any) -> None:
    """Best effort: without a writable cache it is measured again."""
    text = json.dumps({**kept(name), key: value})
    try:
        write_atomic(platformdirs.user_cache_path("tempo-mlx") / name, text, make_folder=True)
    except OutputError as error:
        log.info("could not keep a measurement: %s", error)
