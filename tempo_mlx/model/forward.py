"""The contract both backends keep: `forward(tokens, positions, bias, cache, ...) -> Forward`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.arrays import Float32s, Floats, Ints

Logits = Literal["all", "last", "none"]
Attention = Literal[False, True, "rows"]


@dataclass(frozen=True)
class Forward:
    """logits (rows asked for, V) float32, or None; attention_mass float32 where it was asked for: (layers, S),
    or (layers, L, S) for "rows"; exit_layer (L,): the layer each row left after, None where none left early."""

    logits: Float32s | None
    attention_mass: Float32s | None = None
    exit_layer: Ints | None = None

    @property
    def left_at(self) -> int | None:
        """The layer after which the last of the rows left, if they left early."""
        return None if self.exit_layer is None else int(self.exit_layer.max())


@dataclass(frozen=True)
class Choice:
    """What is wanted of k rows, of which weights (k,) make one distribution: the `count` best tokens, or the one at
    `place`, 0..1, of its cumulated mass; none of `excluded`. scale: of logits, before all else."""

    weights: Floats
    scale: float
    count: int
    excluded: tuple[int, ...] = ()
    place: float | None = None


@dataclass(frozen=True)
class Best:
    """tokens (W,), ascending: at least those wanted. log_probs (k, W) float32: each row's of them, at the choice's
    scale. normal (k,): finite where the row's logits were. attention_mass: as of `Forward`."""

    tokens: Ints
    log_probs: Float32s
    normal: Float32s
    attention_mass: Float32s | None = None


@dataclass(frozen=True)
class Ask:
    """What `Model.forward` is given where the logits of all rows are wanted, and no more (see together.py)."""

    tokens: Sequence[int] | Ints
    positions: Ints
    bias: Float32s | None
    cache: Any


class Cache(Protocol):
    """Keys and values of the alive slots, in slot order. `positions` (len,) are logical, never inferred."""

    positions: Ints

    def __len__(self) -> int: ...
    def keep(self, indices: Ints) -> None: ...
    def truncate(self, length: int) -> None: ...
    def settle(self, length: int) -> None: ...
    def copy(self) -> Cache: ...
    @property
    def nbytes(self) -> int: ...


class Model(Protocol):
    """A decoder-only transformer on one backend.

    tokens, positions: (L,). bias: (L, S) additive, 0 full, -inf not seen, S = len(cache) + L; None is plain causal.
    parents: (L, S), for layers that keep a state: with which weights, summing to 1, a row continues earlier rows; None
    is a chain. Models without such layers make nothing of it.
    attention: also return the attention each slot received per layer, mean over heads and new rows ("rows": heads).
    """

    architecture: Architecture
    info: dict[str, Any]

    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: Any,
        *,
        parents: Float32s | None = None,
        logits: Logits = "all",
        attention: Attention = False,
    ) -> Forward: ...

    def new_cache(self) -> Any: ...

    def embeddings(self, tokens: Sequence[int]) -> Float32s: ...


class Around:
    """A model around another, whose caches and embeddings are its own; what it forwards is said by what derives."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.architecture, self.info = model.architecture, model.info

    def new_cache(self) -> Any:
        return self.model.new_cache()

    def embeddings(self, tokens: Sequence[int]) -> Float32s:
        return self.model.embeddings(tokens)


class Pass(Protocol):
    """A forward pass under way."""

    def read(self) -> Best: ...


class Chooser(Protocol):
    """A model that begins passes, and chooses where it computes. As `Model.forward`, but what comes back is the best of
    the rows' distribution, once it is read.

    tokens: may be those of a pass that has not been read, of the one that it chooses. cache: holds the rows at once.
    """

    def begin(
        self,
        tokens: Sequence[int] | Pass,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: Any,
        choice: Choice,
        *,
        parents: Float32s | None = None,
        attention: Attention = False,
    ) -> Pass: ...
