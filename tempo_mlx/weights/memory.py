"""How much memory a model will take, known from its header before a weight is read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tempo_mlx.architecture.states import bytes_of_states
from tempo_mlx.errors import MemoryLimitError
from tempo_mlx.weights.checkpoint import Checkpoint
from tempo_mlx.weights.precision import Device, Precision
from tempo_mlx.weights.tensor import Packing, Tensor, kept_layout

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SLOTS = 2048  # unless told
_CACHE_STEP = 256  # the cache grows by so many slots
# Bits a weight, once loaded on a GPU, scales and what is kept in more bits included.
PACKED_BITS = {"an 8-bit quantisation": 9.0, "a 4-bit quantisation": 6.0, "an MLX 3-bit quantisation": 3.6}
_KV_GROUP = 64  # numbers of a quantised cache that share a scale and a bias, 2 bytes each
_STATES = re.compile(r"\.(linear_attn|mamba|conv)\.")


@dataclass(frozen=True)
class Memory:
    """Bytes. `states`: of the cache, what layers keep that have no slots; `rows`: what one forward pass works with,
    logits included."""

    weights: int
    cache: int
    rows: int
    states: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.states + self.rows


def estimate_memory(
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    packed: Packing = False,
    slots: int = SLOTS,
    width: int = 8,
    kv_bits: int | None = None,
) -> Memory:
    """What the model takes with `slots` in its cache and `width` rows in a pass.

    dtype: once loaded; None: as stored (then activations are 2 bytes). packed: which quantised weights stay so.
    """
    a = checkpoint.architecture
    number = _BYTES[dtype] if dtype is not None else 2
    held = min(-(-slots // _CACHE_STEP) * _CACHE_STEP, a.max_position_embeddings + _CACHE_STEP)
    bits = 8.0 * number if kv_bits is None else kv_bits + 32 / _KV_GROUP
    parts = [layer.attention for layer in a.layers if layer.attention is not None]
    slot = sum(part.cached[0] * sum(part.cached[1:]) for part in parts if part.kv_from is None)  # numbers
    cache = slot * held * bits / 8
    # a row: logits twice (float32 for the sampler), the MLP's two halves, and scores of every head
    row = a.vocab_size * (4 + number) + (2 * a.intermediate_size + 6 * a.hidden_size) * number
    row += a.num_attention_heads * held * 4
    weights = checkpoint.nbytes
    if dtype is not None:
        weights = sum(_loaded(each, number, packed) for each in checkpoint.tensors.values())
    return Memory(weights, int(cache), width * row, bytes_of_states(a, held, width))


def _loaded(tensor: Tensor, number: int, packed: Packing) -> int:
    count, layout = math.prod(tensor.shape), kept_layout(tensor, packed)
    return count * number if layout is None else layout.nbytes(count, number)


@dataclass(frozen=True)
class Limit:
    """Bytes that a model may take, and who says so, after "more than the 12.3 GB". packs: whether quantised weights
    would stay packed there. asked: by --max-memory-gb. free: what others hold is left out already.
    """

    nbytes: float
    words: str
    packs: bool = False
    asked: bool = False
    free: bool = False

    def beside(self, held: int) -> Limit:
        """What is left for one model where others of ours hold so many bytes."""
        if self.free or held == 0:
            return self
        words = f"{self.words}, less what the models already loaded take"
        return replace(self, nbytes=self.nbytes - held, words=words)


def require_memory(
    checkpoint: Checkpoint,
    limit: Limit,
    precision: Precision,
    *,
    slots: int | None = None,
    width: int = 8,
    kv_bits: int | None = None,
    ranks: int = 1,
) -> None:
    """Raises: MemoryLimitError, with what would fit, if weights, cache and rows would take more.

    slots: where whoever loads has a limit for them; else SLOTS. ranks: that share weights and cache
    evenly, but for layers with a state, which each has whole.
    """

    undivided = sum(
        math.prod(each.shape) for name, each in checkpoint.tensors.items() if _STATES.search(name)
    )

    def needed(slots: int, kv_bits: int | None, **changed: Any) -> Memory:
        options = {**asdict(precision), **changed}
        whole = estimate_memory(checkpoint, slots=slots, width=width, kv_bits=kv_bits, **options)
        kept = whole.weights * undivided // checkpoint.parameters
        return replace(whole, weights=kept + (whole.weights - kept) // ranks, cache=whole.cache // ranks)

    held = slots or SLOTS
    need = needed(held, kv_bits)
    if need.total <= limit.nbytes:
        return
    ways = {
        "--kv-bits 8": needed(held, kv_bits or 8),
        "--dtype bfloat16": needed(held, kv_bits, dtype="bfloat16"),
    }
    if slots is not None:
        ways[f"--max-cache-tokens {_CACHE_STEP}"] = needed(min(slots, _CACHE_STEP), kv_bits)
    fitting = [way for way, memory in ways.items() if memory.total <= limit.nbytes]
    left = (limit.nbytes - need.total + need.weights) * ranks
    bits = 8 * left / checkpoint.parameters
    now = 8 * need.weights * ranks / checkpoint.parameters
    if limit.packs:
        smaller = (name for name, size in PACKED_BITS.items() if size <= bits and size < now - 0.5)
        fitting += [f"{name} of it" for name in list(smaller)[:1]]
    if not fitting:
        fitting.append("a smaller model")
    fitting.append("a higher --max-memory-gb" if limit.asked else "--max-memory-gb, to try all the same")
    raise MemoryLimitError(
        f"{checkpoint.id} needs about {need.total / 1e9:.2f} GB (weights {need.weights / 1e9:.2f}, cache "
        f"{(need.cache + need.states) / 1e9:.2f} at {held} tokens, rows {need.rows / 1e9:.2f}), more than the "
        f"{limit.nbytes / 1e9:.4g} GB {limit.words}; what would do: {', or '.join(fitting)}."
    )


def device_limit(device: Device, info: Mapping[str, Any]) -> Limit | None:
    """info: MLX's, of the device. On Metal what is recommended; on CUDA, and on the CPU, what is free."""
    if device == "cpu":
        free = free_memory()
        return None if free is None else Limit(free, "of memory that are free", free=True)
    if (size := info.get("max_recommended_working_set_size")) is not None:
        return Limit(float(size), "that macOS recommends the GPU to use", packs=True)
    free = info.get("free_memory")
    return None if free is None else Limit(float(free), "that are free on the GPU", packs=True, free=True)


def free_memory(
    meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup/memory.max")
) -> int | None:
    """Bytes that programs can have without swapping: Linux's estimate, and what a container has left of what it is
    allowed; elsewhere all of the machine's, as what is cached there goes when it is needed. None: nobody knows."""
    try:
        kilobytes = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
        available = int(kilobytes[1]) * 1024 if kilobytes else None
        left = _left_to_group(group) if group.exists() else None
    except OSError:
        names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        return math.prod(map(os.sysconf, names)) if set(names) <= set(os.sysconf_names) else None
    return available if available is None or left is None else min(available, left)


def _left_to_group(allowed: Path) -> int | None:
    """What a control group (version 2) may still take: cached files count as taken there, and go when need be."""
    if not (most := allowed.read_text().strip()).isdigit():
        return None
    used, stat = allowed.with_name("memory.current"), allowed.with_name("memory.stat")
    if not (used.exists() and stat.exists()):
        return int(most)
    cached = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)$", stat.read_text(), re.MULTILINE)))
    return max(0, int(most) - max(0, int(used.read_text()) - cached))
