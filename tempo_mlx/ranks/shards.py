"""One rank's part of a model: tensor parallelism (Megatron-LM, arXiv:1909.08053), for every family and format.

Each rank reads only its attention heads, MLP columns and rows of the vocabulary. Ranks sum their outputs after
attention and after the MLP, and gather the logits. Block and Transformer are those of one process, with fewer heads
and the linears below.

mlx.nn's AllToShardedLinear and ShardedToAllLinear do not fit: they start from a random weight, need dimensions that
divide evenly, and cannot hold part of a head.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from tempo_mlx.architecture.architecture import Architecture, Attention, Layer
from tempo_mlx.errors import ConfigError
from tempo_mlx.mlx import mx
from tempo_mlx.model.linear import Embedding, Linear, Norm, RMSNorm
from tempo_mlx.model.reader import Reader
from tempo_mlx.weights import Checkpoint


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a layer: query heads, key/value heads, MLP columns; and its rows of the vocabulary.

    `copies`: number of ranks that hold the same key/value head.
    """

    queries: range
    keys: range
    copies: int
    columns: range
    vocabulary: range


def plan_shards(a: Architecture, ranks: int, group: int = 1) -> list[Shard]:
    """The shard of every rank. `group`: MLP columns that are quantised together and must stay together.

    Key/value heads go to ranks whole, with the query heads that use them; with more ranks than such heads, ranks
    share one and split its queries. Where that is uneven (SmolLM2's 3 on 2 ranks), a rank with fewer heads gets
    more MLP columns, so that weights are balanced. Raises ConfigError with more ranks than query heads, and for a model
    with parts that are not spread.
    """
    check_spread(a)
    heads = _heads(a, ranks)
    if a.intermediate_size < ranks * group:
        group = 1
    blocks = a.intermediate_size / group
    attention = [2 * (len(queries) + len(keys)) * a.head_dim for queries, keys, _ in heads]  # in rows of E
    fair = (sum(attention) + 3 * a.intermediate_size) / ranks
    wanted = [max(0.0, (fair - held) / 3 / group - 1) for held in attention]
    scale = (blocks - ranks) / (sum(wanted) or 1.0)
    ends, done = [], 0.0
    for each in wanted:
        done += 1 + each * scale
        ends.append(min(math.floor(done + 0.5) * group, a.intermediate_size))
    ends[-1] = a.intermediate_size
    rows = math.ceil(a.vocab_size / ranks)
    return [
        Shard(queries, keys, copies, range(start, end), range(a.vocab_size)[rank * rows : (rank + 1) * rows])
        for rank, ((queries, keys, copies), start, end) in enumerate(
            zip(heads, [0, *ends], ends, strict=False)
        )
    ]


def check_spread(a: Architecture) -> None:
    """Raises ConfigError naming what keeps a model on one machine."""
    if (missing := not_spread(a)) is not None:
        raise ConfigError(
            f"A {a.family} model cannot be spread over ranks yet, since it has {missing}; start it without mlx.launch."
        )


def not_spread(a: Architecture) -> str | None:
    """What of a model this module does not divide, in words; None: it divides all of it."""
    if a.recurrent:
        return "layers that keep states"
    if any(layer.experts is not None for layer in a.layers):
        return "experts"
    if a.per_layer_input or a.altup is not None:
        return "an embedding of the token for each layer"
    parts = [(layer.attention, layer.mlp) for layer in a.layers]
    shapes = {
        (part.num_attention_heads, part.num_key_value_heads, part.head_dim, mlp.intermediate_size)
        for part, mlp in parts
        if part is not None and mlp is not None
    }
    if len(shapes) != 1:
        return "layers of different sizes"
    attention = [part for part, _ in parts if part is not None]
    if any(part.latent is not None for part in attention):
        return "latent attention"
    if any(
        part.sinks or part.gated or part.kv_from is not None or part.keys_are_values for part in attention
    ):
        return "attention with sinks, gates or shared keys"
    if any(part.qk_norm == "heads" for part in attention):
        return "a norm of its own for each head"
    return "a head with a bias" if a.head_bias else None


def _heads(a: Architecture, ranks: int) -> list[tuple[range, range, int]]:
    """(query heads, key/value heads, ranks that share the latter) of every rank."""
    queries, keys = a.num_attention_heads, a.num_key_value_heads
    per = queries // keys
    if ranks > queries:
        raise ConfigError(
            f"The model's {queries} attention heads cannot be spread over {ranks} ranks; start at most {queries}."
        )
    if ranks <= keys:
        return [(range(each.start * per, each.stop * per), each, 1) for each in _even(keys, ranks)]
    heads = []
    for key, sharing in enumerate(_even(ranks, keys)):
        for part in _even(per, len(sharing)):
            first = key * per
            heads.append((range(first + part.start, first + part.stop), range(key, key + 1), len(sharing)))
    return heads


def _even(count: int, parts: int) -> list[range]:
    """range(count) in contiguous parts whose sizes differ by at most one, the larger ones first."""
    size, rest = divmod(count, parts)
    starts = [part * size + min(part, rest) for part in range(parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


class Summed(Linear):
    """A linear of which this rank has some input columns: partial products are summed, then the bias is added once."""

    def __init__(self, linear: Linear, bias: mx.array | None, group: mx.distributed.Group) -> None:
        self.linear, self.bias, self.group = linear, bias, group

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.distributed.all_sum(self.linear(x), group=self.group)
        return y if self.bias is None else y + self.bias

    def arrays(self) -> list[mx.array]:
        return self.linear.arrays() + ([] if self.bias is None else [self.bias])


class SummedNorm(RMSNorm):
    """RMSNorm over the heads of all ranks (OLMo 2's): `size` numbers, of which `copies` ranks hold each."""

    def __init__(
        self, weight: mx.array, eps: float, size: int, copies: int, group: mx.distributed.Group
    ) -> None:
        super().__init__(weight, eps)
        self.parts, self.group = size * copies, group

    def __call__(self, x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        mean = mx.distributed.all_sum(mx.square(wide).sum(-1, keepdims=True) / self.parts, group=self.group)
        return (wide * mx.rsqrt(mean + self.eps)).astype(x.dtype) * self.weight


class SummedEmbedding(Embedding):
    """Token ids (L,) -> (L, E): each rank looks up the tokens it has, and zeros for the others are added."""

    def __init__(self, embedding: Embedding, rows: range, group: mx.distributed.Group) -> None:
        self.embedding, self.first, self.count, self.group = embedding, rows.start, len(rows), group

    def __call__(self, tokens: mx.array) -> mx.array:
        index = tokens - self.first
        mine = (index >= 0) & (index < self.count)
        found = self.embedding(mx.where(mine, index, 0))
        return mx.distributed.all_sum(mx.where(mine[:, None], found, 0), group=self.group)


class Gathered(Linear):
    """The head: x (L, E) -> (L, V), of which this rank computes its rows of the vocabulary."""

    def __init__(self, linear: Linear, vocabulary: int, group: mx.distributed.Group) -> None:
        self.linear, self.vocabulary, self.group = linear, vocabulary, group

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        width = math.ceil(self.vocabulary / self.group.size())  # the last rank may have fewer rows
        y = mx.pad(y, [(0, 0), (0, width - y.shape[1])])
        parts = mx.distributed.all_gather(y[None], group=self.group)  # (ranks, L, width)
        return parts.transpose(1, 0, 2).reshape(x.shape[0], -1)[:, : self.vocabulary]

    def arrays(self) -> list[mx.array]:
        return self.linear.arrays()

    def choose(self, index: mx.array) -> Linear:
        """Some of the vocabulary, ascending: added up, since ranks have unequal parts of it."""
        width = math.ceil(self.vocabulary / self.group.size())
        first = self.group.rank() * width
        tokens = np.array(index)
        start, stop = np.searchsorted(tokens, [first, first + width]).tolist()
        part = self.linear.choose(mx.array(tokens[start:stop] - first))
        return Summed(Padded(part, start, len(tokens) - stop), None, self.group)


class Padded(Linear):
    """A linear whose outputs stand between zeros."""

    def __init__(self, linear: Linear, before: int, after: int) -> None:
        self.linear, self.before, self.after = linear, before, after

    def __call__(self, x: mx.array) -> mx.array:
        return mx.pad(self.linear(x), [(0, 0), (self.before, self.after)])

    def arrays(self) -> list[mx.array]:
        return self.linear.arrays()


class ShardReader(Reader):
    """Reads this rank's part of every weight. Small ones (norms, biases after a sum) every rank has whole.

    Packed weights are cut between their groups; `o_proj` of a model whose groups reach over the heads of two ranks
    is dequantised.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: mx.Dtype, packed: bool, group: mx.distributed.Group
    ) -> None:
        super().__init__(checkpoint, dtype, packed)
        whole = checkpoint.architecture
        together = checkpoint.tensor("model.layers.0.mlp.down_proj.weight").group
        self.group, self.whole = group, whole
        self.shard = plan_shards(whole, group.size(), together)[group.rank()]
        self.architecture = replace(whole, layers=tuple(self._part(layer) for layer in whole.layers))
        self.parts = {
            **{name: self._dims(self.shard.queries) for name in ("q_proj", "o_proj", "q_norm")},
            **{name: self._dims(self.shard.keys) for name in ("k_proj", "v_proj", "k_norm")},
            **{name: _slice(self.shard.columns) for name in ("gate_proj", "up_proj", "down_proj")},
            **{name: _slice(self.shard.vocabulary) for name in ("embed_tokens", "lm_head")},
        }

    def linear(self, name: str, bias: bool = False) -> Linear:
        kind = name.rpartition(".")[2]
        part = self.parts[kind]
        tensor = self.checkpoint.tensor(f"{name}.weight")
        offset = self.checkpoint.tensor(f"{name}.bias") if bias else None
        if kind in ("o_proj", "down_proj"):
            linear = self.make_linear(tensor.cut(part.start, part.stop), None)
            return Summed(linear, None if offset is None else self.array(offset), self.group)
        return self.make_linear(tensor.rows(part), None if offset is None else offset.rows(part))

    def head_norm(self, name: str, part: Attention) -> Norm:
        if part.qk_norm != "projection":
            return super().head_norm(name, part)
        kind, weight = name.rpartition(".")[2], self.norm_weight(name)
        copies = 1 if kind == "q_norm" else self.shard.copies
        return SummedNorm(weight[self.parts[kind]], self.whole.norm_eps, weight.shape[0], copies, self.group)

    def _part(self, layer: Layer) -> Layer:
        assert layer.attention is not None and layer.mlp is not None
        queries, keys = len(self.shard.queries), len(self.shard.keys)
        return replace(
            layer,
            attention=replace(layer.attention, num_attention_heads=queries, num_key_value_heads=keys),
            mlp=replace(layer.mlp, intermediate_size=len(self.shard.columns)),
        )

    def vocabulary(self) -> tuple[Embedding, Linear]:
        embed = self.linear("model.embed_tokens")
        head = embed if self.whole.tie_word_embeddings else self.linear("lm_head")
        embedding = SummedEmbedding(Embedding(embed, self.dtype), self.shard.vocabulary, self.group)
        return embedding, Gathered(head, self.whole.vocab_size, self.group)

    def _dims(self, heads: range) -> slice:
        return slice(heads.start * self.whole.head_dim, heads.stop * self.whole.head_dim)


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)
