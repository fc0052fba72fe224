"""One task in a process of its own: `python -m tempo_mlx.bench.child load|memory CONTENDER MODEL DTYPE`.

Its last line is {"seconds": loading time, "peak": peak memory in bytes}.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def open_model(contender: str, model: str, dtype: str) -> tuple[Any, float]:
    """The contender, loaded by its own loader, and the seconds that took, without imports."""
    from tempo_mlx.bench.contenders import MlxLm, Ours, Transformers

    if contender == "mlx_lm":
        importlib.import_module("mlx_lm.models.llama")
        load: Callable[[], Any] = partial(MlxLm, Path(model))
    elif contender == "transformers":
        importlib.import_module("transformers.models.llama.modeling_llama")
        load = partial(Transformers, Path(model), dtype)
    else:
        from tempo_mlx.api import load as load_ours
        from tempo_mlx.model import mlx_backend  # noqa: F401 (load would import it)

        def load() -> Ours:
            return Ours("tempo-mlx", load_ours(model).model)

    start = time.perf_counter()
    return load(), time.perf_counter() - start


def peak_bytes() -> int:
    """Peak memory of this process; Linux's ru_maxrss would include the parent's at the fork."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def main(task: str, contender: str, model: str, dtype: str) -> None:
    opened, seconds = open_model(contender, model, dtype)
    if task == "memory":
        state = opened.start([5 + i % 200 for i in range(512)])[0]
        for _ in range(32):
            opened.rows(state, [7])
    sys.stdout.write(json.dumps({"seconds": seconds, "peak": peak_bytes()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
