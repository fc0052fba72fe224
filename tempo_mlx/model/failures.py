"""What goes wrong on a device, as errors of ours: MLX and torch raise RuntimeError, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tempo_mlx.errors import DeviceError

# Words of MLX's and torch's messages where memory ran out.
_MEMORY = ("alloc", "memory", "maximum allowed buffer size")


@contextmanager
def told_failures() -> Iterator[None]:
    """Raises DeviceError in place of what a tensor library raises. As a decorator, around a whole function."""
    try:
        yield
    except (NotImplementedError, RecursionError):  # RuntimeErrors, too, but of a program's own faults
        raise
    except (MemoryError, RuntimeError) as error:
        said = str(error).strip().splitlines()[:1]
        reason = said[0].rstrip(".")[:200] if said else type(error).__name__
        if isinstance(error, MemoryError) or any(word in reason.lower() for word in _MEMORY):
            raise DeviceError(
                f"The device has no memory left for this ({reason}); use a smaller or quantised model, --kv-bits 8, a "
                "shorter prompt, or --max-cache-tokens."
            ) from error
        raise DeviceError(
            f"The device failed to compute this ({reason}); `tempo-mlx doctor` checks it, and --device cpu does "
            "without a GPU."
        ) from error
