"""The `tokenizers` library raises bare Exceptions, and panics of its Rust code pass even `except Exception`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tempo_mlx.errors import ModelError, TempoError
from tempo_mlx.weights.damage import damaged


@contextmanager
def tokenizer_errors(subject: str | Path) -> Iterator[None]:
    """Turn whatever the library raises into a ModelError about `subject`, a file that may be damaged or a name."""
    try:
        yield
    except TempoError:
        raise
    except BaseException as error:
        # A panic is a pyo3_runtime.PanicException, a class that no module exports.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = ((str(error) or type(error).__name__).splitlines() or [""])[0][:200].rstrip(".")
        if isinstance(subject, Path):
            empty = subject.is_file() and not subject.stat().st_size
            raise damaged(subject, "is empty" if empty else f"is malformed ({reason})") from None
        raise ModelError(f"{subject} is malformed ({reason}); the model is refused.") from None
