"""Files that were broken, or lost, on their way here: the one fault that a fresh copy mends."""

from __future__ import annotations

from pathlib import Path

from tempo_mlx.errors import ModelError


def damaged(path: Path, reason: str) -> ModelError:
    """The error that `path` is not what was published. Of the hub's cache it must be removed first: what lies there is
    not fetched twice."""
    cached = next((part for part in path.parts if part.startswith("models--")), None)
    remedy = "fetch it again"
    if cached is not None:
        repo = cached.removeprefix("models--").replace("--", "/")
        remedy = f"run `tempo-mlx models remove {repo}` and try again"
    return ModelError(f"{path} {reason}; {remedy}.")
