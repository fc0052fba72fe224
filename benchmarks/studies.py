"""What the studies share: prompts, exact scores under the full model, results that survive an interruption,
and bootstrap intervals over prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tempo_mlx.decode.combine import log_probabilities
from tempo_mlx.decode.prefill import never, prefill
from tempo_mlx.model.forward import Model

ROWS = 256  # rows of one scoring pass
PROMPTS = Path(__file__).with_name("prompts.txt")  # the first 13 are the original project's


def prompts(count: int | None = None) -> list[str]:
    return PROMPTS.read_text().splitlines()[:count]


class Scorer:
    """Exact log-probabilities of continuations of one prefix, many at once.

    Each continuation is a chain of rows that see the prefix (or its first slots) and their own chain: one
    pass over one cache, as in tree decoding. `prefix`: token ids; all but the last are run once.
    """

    def __init__(self, model: Model, prefix: Sequence[int]) -> None:
        self.model = model
        self.prefix = list(prefix)
        self.cache = model.new_cache()
        if len(self.prefix) > 1:
            prefill(model, self.prefix[:-1], self.cache, never)

    def continuations(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """log P of each token of each sequence after the whole prefix."""
        start = len(self.prefix) - 1
        return self.chains([(start, [self.prefix[-1], *sequence]) for sequence in sequences])

    def chains(self, chains: Sequence[tuple[int, Sequence[int]]]) -> list[np.ndarray]:
        """For each chain (visible, tokens): log P of tokens 1.. after the first `visible` tokens of the
        prefix
        and the chain's earlier tokens."""
        results: list[np.ndarray] = []
        batch: list[tuple[int, Sequence[int]]] = []
        for chain in chains:
            if batch and sum(len(tokens) - 1 for _, tokens in [*batch, chain]) > ROWS:
                results += self._run(batch)
                batch = []
            batch.append(chain)
        return results + self._run(batch) if batch else results

    def _run(self, chains: Sequence[tuple[int, Sequence[int]]]) -> list[np.ndarray]:
        cached = len(self.cache)
        rows = sum(len(tokens) - 1 for _, tokens in chains)
        inputs, targets, positions = [], [], []
        bias = np.full((rows, cached + rows), -np.inf, np.float32)
        for visible, tokens in chains:
            start, length = len(inputs), len(tokens) - 1
            inputs += tokens[:-1]
            targets += tokens[1:]
            positions += range(visible, visible + length)
            bias[start : start + length, :visible] = 0.0
            own = bias[start : start + length, cached + start : cached + start + length]
            own[np.tril_indices(length)] = 0.0
        out = self.model.forward(inputs, positions, bias, self.cache)
        self.cache.truncate(cached)
        scores = log_probabilities(out.logits)[np.arange(rows), targets].astype(float)
        return np.split(scores, np.cumsum([len(tokens) - 1 for _, tokens in chains])[:-1])


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
