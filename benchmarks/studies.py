"""What the studies share: prompts, results that survive an interruption, bootstrap intervals over prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = Path(__file__).with_name("prompts.txt")  # the first 13 are the original project's


def prompts(count: int | None = None) -> list[str]:
    return PROMPTS.read_text().splitlines()[:count]


def shards(folder: Path, keys: Iterable[str], make: Callable[[str], Any]) -> list[Any]:
    """The results of all keys, each computed once and kept as folder/key.json."""
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for key in keys:
        path = folder / f"{key}.json"
        if not path.exists():
            draft = path.with_suffix(".part")
            draft.write_text(json.dumps(make(key)))
            draft.replace(path)
        results.append(json.loads(path.read_text()))
    return results


def bootstrap(
    statistic: Callable[[np.ndarray], Any], samples: int, rounds: int = 2000, seed: int = 0
) -> tuple[Any, Any, Any]:
    """The statistic of all samples, and its 95% interval when whole samples (prompts) are drawn again.

    statistic: of an index array into the samples; may return an array.
    """
    random = np.random.default_rng(seed)
    draws = [statistic(random.integers(0, samples, samples)) for _ in range(rounds)]
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    return statistic(np.arange(samples)), low, high


def versions(info: dict[str, Any]) -> dict[str, Any]:
    """What a result depends on besides the code."""
    import platform

    from tempo_mlx._version import __version__

    return {
        "tempo_mlx": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{key: info.get(key) for key in ("id", "dtype", "backend", "device", "quantization")},
    }
