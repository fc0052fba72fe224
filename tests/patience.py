"""How long a test waits for what must happen soon: longer where other processes want the same cores."""

from __future__ import annotations

import os


def patient(seconds: float) -> float:
    """So many seconds on a machine that does nothing else; twice that for each process that waits for a core."""
    return seconds * max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))
