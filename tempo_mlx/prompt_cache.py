"""What a model computed of a prompt, kept so that no other prompt that begins alike computes it anew: in memory, or in
a file (safetensors) that says of which model it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tempo_mlx.errors import ModelError
from tempo_mlx.files import replacing
from tempo_mlx.model.forward import Model
from tempo_mlx.model.rope import follows_length

if TYPE_CHECKING:
    from tempo_mlx.model.cache import Cache

FORMAT, VERSION = "tempo-mlx/prompt-cache", 1
# What a cache depends on; on another device the same numbers come out a little otherwise, within the run's tolerance.
MODEL = ("sha256", "revision", "adapter", "dtype", "quantization", "kv_bits", "backend")


@dataclass(frozen=True)
class PromptCache:
    """`cache` begins with the rows of as many of `token_ids` as were run."""

    token_ids: Sequence[int]
    cache: Any

    def prefix(self, model: Model, ids: Sequence[int]) -> Any:
        """A cache of the model's with what is known of these ids, at most all but the last, whose row has the first
        logits.
        """
        length = max(len(ids), len(self.token_ids))
        if any(follows_length(rope, length) for rope in model.architecture.ropes):
            return model.new_cache()
        pairs = zip(self.token_ids, ids, strict=False)
        shorter = min(len(self.token_ids), len(ids))
        equal = next((n for n, (old, new) in enumerate(pairs) if old != new), shorter)
        cache = self.cache.copy()
        cache.truncate(max(0, min(equal, len(ids) - 1)))
        return cache

    def save(self, path: str | os.PathLike[str], model: Model) -> None:
        """Write what there is of the prompt, whole or not at all. Raises OutputError, ModelError."""
        from safetensors.numpy import save_file

        cache = of_slots(self.cache)
        length = min(len(cache), len(self.token_ids))
        arrays = {name: array[:, :length] for name, array in cache.stored().items()}
        arrays["token_ids"] = np.array(self.token_ids[:length], np.int64)
        arrays["positions"] = cache.positions[:length]
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        about = {"format": FORMAT, "version": VERSION, "model": _identity(model), "sha256": _digest(arrays)}
        with replacing(path) as draft:
            save_file(arrays, draft, metadata={"tempo-mlx": json.dumps(about)})


def read_prompt_cache(path: str | os.PathLike[str], model: Model) -> PromptCache:
    """Raises ModelError for what is no such file, is damaged, or is another model's."""
    from tempo_mlx.weights.safetensors_file import read_safetensors

    cache, file = of_slots(model.new_cache()), read_safetensors(Path(path))
    about = _about(Path(path))
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise ModelError(
            f"{path} is no prompt cache of version {VERSION}; name one that --prompt-cache wrote."
        )
    if about.get("model") != _identity(model):
        raise ModelError(
            f"The prompt cache {path} was made with another model, dtype or adapter; load that, or name another file."
        )
    arrays = {name: file.array(name) for name in file.arrays}
    damaged = ModelError(f"The prompt cache {path} is damaged; delete it, and it is made anew.")
    if about.get("sha256") != _digest(arrays):
        raise damaged
    ids, positions = (np.array(arrays.pop(name, ()), np.int64) for name in ("token_ids", "positions"))
    vocabulary = model.architecture.vocab_size
    if (
        not len(ids)
        or positions.tolist() != list(range(len(ids)))
        or not (0 <= ids.min() <= ids.max() < vocabulary)
    ):
        raise damaged
    try:
        cache.fill(arrays, positions)
    except ValueError:
        raise damaged from None
    return PromptCache(tuple(ids.tolist()), cache)


def of_slots(cache: Any) -> Cache:
    """Raises ModelError for a cache that cannot be kept in a file."""
    from tempo_mlx.model.cache import Cache

    if not isinstance(cache, Cache) or cache.states is not None:
        raise ModelError(
            "A prompt's cache can be kept of models whose layers all keep slots, on the MLX backend in one process; "
            "leave out the prompt cache."
        )
    return cache


def _identity(model: Model) -> dict[str, Any]:
    return {name: model.info.get(name) for name in MODEL}


def _about(path: Path) -> Mapping[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get("tempo-mlx", "{}")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _digest(arrays: Mapping[str, Any]) -> str:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        sha.update(np.ascontiguousarray(arrays[name]).data)
    return sha.hexdigest()
