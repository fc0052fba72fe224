"""How much memory a model will take, known from its header before a weight is read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from tempo_mlx.architecture.states import bytes_of_states
from tempo_mlx.errors import MemoryLimitError
from tempo_mlx.weights.checkpoint import Checkpoint

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_CACHE_STEP = 256  # the cache grows by so many slots
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
    slots: int = 2048,
    width: int = 8,
    kv_bits: int | None = None,
) -> Memory:
    """What the model takes with `slots` in its cache and `width` rows in a pass.

    dtype: of the weights once loaded; None: as stored (then activations are 2 bytes).
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
    weights = checkpoint.nbytes if dtype is None else checkpoint.parameters * number
    return Memory(weights, int(cache), width * row, bytes_of_states(a, held, width))


def require_memory(
    checkpoint: Checkpoint,
    max_memory_gb: float,
    *,
    dtype: str | None = None,
    slots: int = 2048,
    width: int = 8,
    kv_bits: int | None = None,
    ranks: int = 1,
) -> None:
    """Raises: MemoryLimitError if weights, cache and rows would take more than `max_memory_gb` (10^9 bytes).

    ranks: that share weights and cache evenly, but for layers with a state, which each has whole.
    """
    whole = estimate_memory(checkpoint, dtype=dtype, slots=slots, width=width, kv_bits=kv_bits)
    undivided = sum(
        math.prod(tensor.shape) for name, tensor in checkpoint.tensors.items() if _STATES.search(name)
    )
    kept = whole.weights * undivided // checkpoint.parameters
    need = replace(whole, weights=kept + (whole.weights - kept) // ranks, cache=whole.cache // ranks)
    if need.total > max_memory_gb * 1e9:
        raise MemoryLimitError(
            f"{checkpoint.id} needs about {need.total / 1e9:.2f} GB (weights {need.weights / 1e9:.2f}, cache "
            f"{(need.cache + need.states) / 1e9:.2f} at {slots} tokens, rows {need.rows / 1e9:.2f}), more than the "
            f"{max_memory_gb:g} GB allowed; raise --max-memory-gb, or use a smaller or quantised model."
        )
