"""Small JSON files that come with a model, read with a bound on their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tempo_mlx.errors import ModelError
from tempo_mlx.files import fault_of_json, reason_of
from tempo_mlx.weights.damage import damaged


def read_json(path: Path, most: int = 8 << 20) -> Any:
    """Parse a JSON file of at most `most` bytes. Raises: ModelError naming the file."""
    try:
        if path.stat().st_size > most:
            raise ModelError(f"{path} is larger than {most >> 20} MiB; it cannot be what its name says.")
        text = path.read_bytes()
        value = json.loads(text)
        if b"\\ud" in text.lower():  # escaped surrogates: half a pair is no text that a library would take
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except RecursionError:
        raise damaged(path, "is nested too deeply to be read") from None
    except OSError as error:
        raise damaged(path, f"cannot be read ({reason_of(error)})") from None
    except ValueError as error:
        raise damaged(path, f"cannot be read ({fault_of_json(error)})") from None
