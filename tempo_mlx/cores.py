"""How many threads our own work on a CPU takes."""

from __future__ import annotations

import os


def threads() -> int:
    """As many as this process has cores, or as OpenBLAS is told to take."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        if (told := os.environ.get(name, "")).isdecimal() and int(told) > 0:
            return int(told)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS keeps no process off a core
