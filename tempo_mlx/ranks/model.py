"""A model over several ranks (tensor parallelism): to decoders, a Model like any other.

Every rank holds its shard and its part of the caches. Rank 0 holds `DistributedModel`, whose calls run on all shards
at once; it returns rank 0's copy of the logits, which are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.errors import ModelError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.mlx import mx
from tempo_mlx.model.forward import Attention, Forward, Logits
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.ranks.processes import Leader, Local, Shared
from tempo_mlx.ranks.shards import ShardReader, plan_shards
from tempo_mlx.weights import Checkpoint, open_checkpoint


class DistributedModel(Shared):
    """See `model.forward.Model`; each rank holds a `ModelShard`. `info` is that of a single process: runs are the
    same."""

    def __init__(self, leader: Leader, architecture: Architecture, info: dict[str, Any]) -> None:
        super().__init__(leader)
        self.architecture, self.info = architecture, info

    def new_cache(self) -> DistributedCache:
        return self.give(DistributedCache(self.leader, np.empty(0, np.int64)), "model.new_cache")

    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: DistributedCache,
        *,
        parents: Float32s | None = None,
        logits: Logits = "all",
        attention: Attention = False,
    ) -> Forward:
        tokens, positions = np.asarray(tokens, np.int64), np.asarray(positions, np.int64)
        out: Forward = self.call("forward", tokens, positions, bias, cache, parents, logits, attention)
        cache.positions = np.concatenate([cache.positions, positions])
        return out

    def embeddings(self, tokens: Sequence[int]) -> Float32s:
        rows: Float32s = self.call("model.embeddings", list(tokens))
        return rows

    def memory(self) -> list[tuple[int, int]]:
        """Bytes that MLX holds on each rank: now, and at its peak."""
        return self.leader.run_all(_memory)


class DistributedCache(Shared):
    """The caches of all ranks, each of its own heads; rank 0 keeps only the positions."""

    def __init__(self, leader: Leader, positions: Ints) -> None:
        super().__init__(leader)
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        """On this rank."""
        return int(self.leader.run(cache_bytes, self.number))

    def keep(self, indices: Ints) -> None:
        indices = np.asarray(indices, np.int64)
        self.tell("keep", indices)
        self.positions = self.positions[indices]

    def truncate(self, length: int) -> None:
        """As `Cache.truncate`; every rank has the same states, and forgets as much."""
        self.positions = self.positions[: self.leader.run(_truncate, self.number, length)]

    def settle(self, length: int) -> None:
        self.tell("settle", length)

    def copy(self) -> DistributedCache:
        return self.give(DistributedCache(self.leader, self.positions.copy()), "copy")


def load_shards(leader: Leader, config: LoadConfig, checkpoint: Checkpoint) -> DistributedModel:
    """Let every rank read its shard. Raises ConfigError with too many ranks, ModelError where models differ."""
    plan_shards(checkpoint.architecture, leader.size)  # before anything is read
    model = DistributedModel(leader, checkpoint.architecture, {})
    infos = leader.run_all(_load, model.number, config)
    check_same(infos, config)
    model.info = infos[0]
    return model


def check_same(infos: Sequence[dict[str, Any]], config: LoadConfig) -> None:
    """Raises ModelError unless every rank has the same model and computes alike."""
    for rank, info in enumerate(infos):
        if info != infos[0]:
            raise ModelError(
                f"Rank {rank} has another model under the name {config.model!r}, or computes otherwise: {info}, where "
                f"rank 0 has {infos[0]}."
            )


# What every rank runs when rank 0 calls it


@dataclass(frozen=True)
class ModelShard:
    """What one rank runs: its part of the model, or early exit around that. shares (layers with attention,): its
    fraction of the heads of each, which weights its attention."""

    model: Any
    shares: Float32s
    group: mx.distributed.Group

    def forward(
        self,
        tokens: Ints,
        positions: Ints,
        bias: Float32s | None,
        cache: Any,
        parents: Float32s | None,
        logits: Logits,
        attention: Attention,
    ) -> Forward:
        out: Forward = self.model.forward(
            tokens, positions, bias, cache, parents=parents, logits=logits, attention=attention
        )
        if out.attention_mass is None:
            return out
        mine = out.attention_mass * self.shares.reshape(-1, *[1] * (out.attention_mass.ndim - 1))
        mass = mx.distributed.all_sum(mx.array(mine), group=self.group)
        return replace(out, attention_mass=np.array(mass))


def _load(local: Local, number: int, config: LoadConfig) -> dict[str, Any]:
    checkpoint = open_checkpoint(config.model, adapter=config.adapter)
    reader = partial(ShardReader, group=local.group)
    transformer = build(
        checkpoint,
        config.device,
        config.dtype,
        dequantize=config.dequantize,
        kv_bits=config.kv_bits,
        make_reader=reader,
    )
    own, whole = (
        np.array([layer.attention.num_attention_heads for layer in a.layers if layer.attention], np.float32)
        for a in (transformer.architecture, checkpoint.architecture)
    )
    local.objects[number] = ModelShard(transformer, own / whole, local.group)
    return transformer.info


def cache_bytes(local: Local, number: int) -> int:
    """Of the cache with this number, on this rank."""
    return int(local.objects[number].nbytes)


def _truncate(local: Local, number: int, length: int) -> int:
    local.objects[number].truncate(length)
    return len(local.objects[number])


def _memory(local: Local) -> tuple[int, int]:
    return mx.get_active_memory(), mx.get_peak_memory()
