"""What a measurement depends on besides the code: versions, device, memory bandwidth."""

from __future__ import annotations

import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from tempo_mlx import blas
from tempo_mlx._version import __version__
from tempo_mlx.mlx import mx

PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "xllamacpp", "numpy")
BUFFER = 1 << 29  # bytes; larger than any cache
QUIET = 0.7  # load average above which timings on two cores mean little


def environment(info: dict[str, Any]) -> dict[str, Any]:
    """Flat and short, as it goes into every line of the results. info: of the measured model."""
    return {
        "date": date.today().isoformat(),
        "tempo_mlx": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "blas": blas.ensure().name,
        "model": Path(str(info.get("id"))).name,
        **{name: info.get(name) for name in ("dtype", "quantization", "kv_bits", "device")},
    }


def processor() -> str:
    facts = Path("/proc/cpuinfo")
    if mx.metal.is_available():
        return str(mx.device_info().get("device_name", platform.processor()))
    if facts.exists():
        names = [
            line.split(":", 1)[1].strip() for line in facts.read_text().splitlines() if "model name" in line
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def load_average() -> float | None:
    """Runnable processes over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if sys.platform != "win32" else None


def read_bandwidth(rounds: int = 8) -> float:
    """Bytes per second that the computing device can read, by the fastest of several ways."""
    if mx.default_device().type == mx.gpu:
        array = mx.zeros((BUFFER // 4,), mx.float32)
        mx.eval(array)
        return BUFFER / min(_seconds(lambda: mx.eval(array.max())) for _ in range(rounds))
    data = np.ones(BUFFER // 8, np.int64)  # numpy's maximum of whole numbers is a vector load and little else
    best = float("inf")
    for threads in {1, 2, os.cpu_count() or 1}:
        parts = np.array_split(data, threads)
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(rounds):
                best = min(best, _seconds(lambda pool=pool, parts=parts: list(pool.map(np.max, parts))))
    return BUFFER / best


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
