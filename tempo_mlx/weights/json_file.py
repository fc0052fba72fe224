"""Small JSON files that come with a model, read with a bound on their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tempo_mlx.errors import ModelError


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
        raise ModelError(f"The model has no {path.name} in {path.parent}; fetch it again.") from None
    except RecursionError:
        raise ModelError(f"Cannot read {path}: it is nested too deeply; fetch the model again.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {path} ({error}); fetch the model again.") from None
