"""A model over several ranks (tensor parallelism), for whoever decodes: a Model as any other.

Every rank holds its shard and its part of the caches. Rank 0 holds `ParallelModel`, whose calls run on all shards at
once; what comes back is rank 0's copy of the logits that all ranks have.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.config import LoadConfig
from tempo_mlx.errors import ModelError
from tempo_mlx.mlx import mx
from tempo_mlx.model.forward import Attention, Forward, Logits
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.ranks.processes import Leader, Local
from tempo_mlx.ranks.shards import ShardReader, plan
from tempo_mlx.weights import Checkpoint, open_checkpoint

Ints = NDArray[np.int64]


class ParallelModel:
    """See `model.forward.Model`. `info` is what one process would say of itself: the runs are the same."""

    def __init__(self, leader: Leader, number: int, architecture: Architecture, info: dict[str, Any]) -> None:
        self.leader, self.number = leader, number
        self.architecture, self.info = architecture, info

    def new_cache(self) -> RankedCache:
        cache = RankedCache(self.leader, np.empty(0, np.int64))
        self.leader.tell(_new_cache, self.number, cache.number)
        return cache

    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: NDArray[np.float32] | None,
        cache: RankedCache,
        *,
        logits: Logits = "all",
        attention: Attention = False,
    ) -> Forward:
        tokens, positions = np.asarray(tokens, np.int64), np.asarray(positions, np.int64)
        out: Forward = self.leader.run(
            _forward, self.number, cache.number, tokens, positions, bias, logits, attention
        )
        cache.positions = np.concatenate([cache.positions, positions])
        return out

    def embeddings(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self.leader.run(_embeddings, self.number, list(tokens))
        return rows

    def memory(self) -> list[tuple[int, int]]:
        """Bytes that MLX holds on each rank: now, and the most it ever did."""
        return self.leader.run_all(_memory)


class RankedCache:
    """The caches of all ranks, each of its own heads; here are only the positions."""

    def __init__(self, leader: Leader, positions: Ints) -> None:
        self.leader, self.positions = leader, positions
        self.number = leader.number()
        weakref.finalize(self, leader.forget, self.number).atexit = False

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        """On this rank."""
        return int(self.leader.run(_nbytes, self.number))

    def keep(self, indices: Ints) -> None:
        indices = np.asarray(indices, np.int64)
        self.leader.tell(_keep, self.number, indices)
        self.positions = self.positions[indices]

    def truncate(self, length: int) -> None:
        self.leader.tell(_truncate, self.number, length)
        self.positions = self.positions[:length]

    def copy(self) -> RankedCache:
        other = RankedCache(self.leader, self.positions.copy())
        self.leader.tell(_copy, self.number, other.number)
        return other


def load_shards(leader: Leader, config: LoadConfig, checkpoint: Checkpoint) -> ParallelModel:
    """Let every rank read its shard. Raises ConfigError with too many ranks, ModelError where models differ."""
    plan(checkpoint.architecture, leader.size)  # before anything is read
    number = leader.number()
    infos = leader.run_all(_load, number, config)
    check_same(infos, config)
    return ParallelModel(leader, number, checkpoint.architecture, infos[0])


# What every rank does when rank 0 says so


@dataclass(frozen=True)
class Part:
    """A rank's shard, or what runs it (early exit), and its share of the heads, which weighs what it says about
    attention."""

    transformer: Any
    share: float


def _load(local: Local, number: int, config: LoadConfig) -> dict[str, Any]:
    checkpoint = open_checkpoint(config.model)
    reader = partial(ShardReader, group=local.group)
    transformer = build(checkpoint, config.device, config.dtype, kv_bits=config.kv_bits, make_reader=reader)
    heads = transformer.architecture.num_attention_heads
    local.objects[number] = Part(transformer, heads / checkpoint.architecture.num_attention_heads)
    return transformer.info


def _forward(
    local: Local,
    model: int,
    cache: int,
    tokens: Ints,
    positions: Ints,
    bias: NDArray[np.float32] | None,
    logits: Logits,
    attention: Attention,
) -> Forward:
    part: Part = local.objects[model]
    out: Forward = part.transformer.forward(
        tokens, positions, bias, local.objects[cache], logits=logits, attention=attention
    )
    if out.attention_mass is None:
        return out
    mass = mx.distributed.all_sum(mx.array(out.attention_mass * part.share), group=local.group)
    return replace(out, attention_mass=np.array(mass))


def _embeddings(local: Local, model: int, tokens: list[int]) -> NDArray[np.float32]:
    part: Part = local.objects[model]
    rows: NDArray[np.float32] = part.transformer.embeddings(tokens)
    return rows


def _memory(local: Local) -> tuple[int, int]:
    return mx.get_active_memory(), mx.get_peak_memory()


def _new_cache(local: Local, model: int, number: int) -> None:
    local.objects[number] = local.objects[model].transformer.new_cache()


def _nbytes(local: Local, number: int) -> int:
    return int(local.objects[number].nbytes)


def _keep(local: Local, number: int, indices: Ints) -> None:
    local.objects[number].keep(indices)


def _truncate(local: Local, number: int, length: int) -> None:
    local.objects[number].truncate(length)


def _copy(local: Local, number: int, other: int) -> None:
    local.objects[other] = local.objects[number].copy()


def check_same(infos: Sequence[dict[str, Any]], config: LoadConfig) -> None:
    """Raises ModelError unless every rank has the same model, and computes alike."""
    for rank, info in enumerate(infos):
        if info != infos[0]:
            raise ModelError(
                f"Rank {rank} has another model under the name {config.model!r}, or computes otherwise: {info}, where "
                f"rank 0 has {infos[0]}."
            )
