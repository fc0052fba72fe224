"""MLX, imported after the BLAS it computes with: the only place that imports it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tempo_mlx import blas

blas.ensure()
# Float32 is asked for where numbers shall be exact; CUDA and Apple's newest GPUs multiply it in 10 bits unless told.
os.environ.setdefault("MLX_ENABLE_TF32", "0")


@contextmanager
def _ctrl_c_put_off() -> Iterator[None]:
    """Ctrl-C waits: an exception while MLX makes its types would abort the process."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield  # no Python is run in this thread for it
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


with _ctrl_c_put_off():
    import mlx.core as mx
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optimizers  # noqa: E402

__all__ = ["begin", "mx", "nn", "optimizers"]


def begin(*arrays: mx.array) -> None:
    """Have what was described computed, without waiting for it."""
    mx.async_eval(*arrays)  # type: ignore[no-untyped-call]  # MLX's stubs leave it out
