"""One rank's part of a model: tensor parallelism (Megatron-LM, arXiv:1909.08053), for every family and format.

Each rank reads only its attention heads, its columns of MLPs and of every expert, and its rows of the vocabulary. Ranks
sum their outputs after attention, MLP and experts, and gather the logits. Block and Transformer are those of one
process, with fewer heads and the linears below. What is small or cannot be divided (norms, routers, layers with a
state, MLPs that look at a whole row) every rank has whole.

mlx.nn's AllToShardedLinear and ShardedToAllLinear do not fit: they start from a random weight, need dimensions that
divide evenly, and cannot hold part of a head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tempo_mlx.architecture.architecture import Architecture, Attention, Experts, Layer, Mlp
from tempo_mlx.errors import ConfigError
from tempo_mlx.mlx import mx
from tempo_mlx.model.experts import ExpertLinear, Mixture, QuantizedExpertLinear
from tempo_mlx.model.linear import Embedding, LayerNorm, Linear, Norm, RMSNorm
from tempo_mlx.model.reader import Reader
from tempo_mlx.weights import Checkpoint, Tensor
from tempo_mlx.weights.tensor import DenseTensor, PackedTensor, Packing, kept_layout

Groups = Callable[
    [int], tuple[int, int]
]  # of a layer: columns of its MLP, and of experts, that must stay together


@dataclass(frozen=True)
class Part:
    """What one rank holds of a layer: query heads, key/value heads, and columns of its MLP and of every expert.

    `copies`: number of ranks that hold the same key/value head.
    """

    queries: range
    keys: range
    copies: int
    columns: range
    experts: range


@dataclass(frozen=True)
class Shard:
    """What one rank holds: of every layer, and its rows of the vocabulary."""

    layers: tuple[Part, ...]
    vocabulary: range


def plan_shards(a: Architecture, ranks: int, groups: Groups = lambda layer: (1, 1)) -> list[Shard]:
    """The shard of every rank. Raises ConfigError with more ranks than a layer has query heads."""
    parts = [plan_layer(layer, ranks, *groups(index)) for index, layer in enumerate(a.layers)]
    return [
        Shard(tuple(layer[rank] for layer in parts), _rows(a.vocab_size, ranks, rank))
        for rank in range(ranks)
    ]


def plan_layer(layer: Layer, ranks: int, group: int = 1, expert_group: int = 1) -> list[Part]:
    """Every rank's part. `group`, `expert_group`: columns that are quantised together and must stay together.

    Key/value heads go to ranks whole, with the query heads that use them; with more ranks than such heads, ranks
    share one and split its queries. Where that is uneven (SmolLM2's 3 on 2 ranks), a rank with fewer heads gets
    more MLP columns, so that weights are balanced.
    """
    part, mlp = layer.attention, layer.mlp
    heads = [(range(0), range(0), 1)] * ranks if part is None else _heads(part, ranks)
    columns = [range(0)] * ranks
    if mlp is not None:
        attention = [0 if part is None else 2 * (len(q) + len(k)) * part.head_dim for q, k, _ in heads]
        columns = _columns(mlp, attention, ranks, group)
    experts = [range(0)] * ranks
    if layer.experts is not None:
        size = layer.experts.intermediate_size
        unit = expert_group if size >= ranks * expert_group else 1
        blocks = _even(-(-size // unit), ranks)
        experts = [range(each.start * unit, min(each.stop * unit, size)) for each in blocks]
    return [Part(*each, *rest) for each, *rest in zip(heads, columns, experts, strict=True)]


def _columns(mlp: Mlp, attention: list[int], ranks: int, group: int) -> list[range]:
    """Of the MLP, by what each rank holds of attention, in rows of E."""
    size = mlp.intermediate_size
    if _is_whole(mlp):
        return [range(size)] * ranks
    group = 1 if size < ranks * group else group
    blocks = size / group
    fair = (sum(attention) + 3 * size) / ranks
    wanted = [max(0.0, (fair - held) / 3 / group - 1) for held in attention]
    scale = (blocks - ranks) / (sum(wanted) or 1.0)
    ends, done = [], 0.0
    for each in wanted:
        done += 1 + each * scale
        ends.append(min(math.floor(done + 0.5) * group, size))
    ends[-1] = size
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _is_whole(mlp: Mlp) -> bool:
    """Whether every rank has all of an MLP: Gemma 3n's sparse ones need the mean of a row's gates."""
    return mlp.sparsity > 0


def _rows(size: int, ranks: int, rank: int) -> range:
    """Of a table with so many: all ranks have equally many, the last perhaps fewer."""
    count = math.ceil(size / ranks)
    return range(size)[rank * count : (rank + 1) * count]


def _heads(part: Attention, ranks: int) -> list[tuple[range, range, int]]:
    """(query heads, key/value heads, ranks that share the latter) of every rank."""
    queries = part.num_attention_heads
    if ranks > queries:
        raise ConfigError(
            f"The model's {queries} attention heads cannot be spread over {ranks} ranks; start at most {queries}."
        )
    if part.latent is not None:  # whose one key all heads share
        return [(each, each, 1) for each in _even(queries, ranks)]
    keys = part.num_key_value_heads
    per = queries // keys
    if ranks <= keys:
        return [(range(each.start * per, each.stop * per), each, 1) for each in _even(keys, ranks)]
    heads = []
    for key, sharing in enumerate(_even(ranks, keys)):
        for own in _even(per, len(sharing)):
            first = key * per
            heads.append((range(first + own.start, first + own.stop), range(key, key + 1), len(sharing)))
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


class SummedMixture(Mixture):
    """Experts of which this rank has some columns: what they make of a row is summed."""

    def __init__(self, mixture: Mixture, group: mx.distributed.Group) -> None:
        super().__init__(mixture.part, mixture.router, mixture.gate, mixture.up, mixture.down)
        self.group = group

    def __call__(self, x: mx.array, seen: mx.array) -> mx.array:
        return mx.distributed.all_sum(super().__call__(x, seen), group=self.group)


class ShardReader(Reader):
    """Reads this rank's part of every weight that is divided, and the others whole.

    Packed weights are cut between their groups; `o_proj` of a model whose groups reach over the heads of two ranks
    is dequantised.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: mx.Dtype, packed: Packing, group: mx.distributed.Group
    ) -> None:
        super().__init__(checkpoint, dtype, packed)
        self.group, self.whole = group, checkpoint.architecture
        self.shard = plan_shards(self.whole, group.size(), self._together)[group.rank()]
        layers = zip(self.whole.layers, self.shard.layers, strict=True)
        self.architecture = replace(self.whole, layers=tuple(_narrowed(*each) for each in layers))

    def _together(self, index: int) -> tuple[int, int]:
        """Columns of a layer's MLP, and of its experts, that are quantised together."""
        layer, prefix = self.whole.layers[index], f"model.layers.{index}"
        mlp = 1 if layer.mlp is None else self.checkpoint.tensor(f"{prefix}.mlp.down_proj.weight").group
        if layer.experts is None:
            return mlp, 1
        return mlp, self.checkpoint.tensor(f"{prefix}.experts.down_proj.weight").group

    def linear(self, name: str, bias: bool = False) -> Linear:
        tensor = self.checkpoint.tensor(f"{name}.weight")
        offset = self.checkpoint.tensor(f"{name}.bias") if bias else None
        part = self.part_of(name, tensor.shape[0])
        if part is None:
            return super().linear(name, bias)
        if name.endswith(("o_proj", "down_proj")):
            linear = self.make_linear(tensor.cut(part.start, part.stop), None)
            return Summed(linear, None if offset is None else self.array(offset), self.group)
        rows = slice(part.start, part.stop)
        return self.make_linear(tensor.rows(rows), None if offset is None else offset.rows(rows))

    def part_of(self, name: str, rows: int) -> range | None:
        """This rank's rows of a weight with so many (columns, of those that are summed); None: it has all."""
        place = name.split(".")
        kind = place[-1]
        if kind in ("embed_tokens", "embed_tokens_per_layer", "lm_head"):
            return _rows(rows, self.group.size(), self.group.rank())
        if place[-2] not in ("self_attn", "mlp"):
            return None
        index = int(place[2])
        layer, part = self.whole.layers[index], self.shard.layers[index]
        if place[-2] == "mlp":
            divided = kind in ("gate_proj", "up_proj", "down_proj") and layer.mlp and not _is_whole(layer.mlp)
            return part.columns if divided else None
        widths = _head_widths(layer.attention) if layer.attention is not None else {}
        if kind not in widths:
            return None
        heads = part.keys if kind in ("k_proj", "v_proj") else part.queries
        return range(heads.start * widths[kind], heads.stop * widths[kind])

    def named(self, name: str) -> mx.array:
        """The part of a latent that is made keys and values is of heads, too."""
        if not name.endswith("kv_b_proj.weight"):
            return super().named(name)
        tensor = self.checkpoint.tensor(name)
        part = self.part_of(name.removesuffix(".weight"), tensor.shape[0])
        assert part is not None
        return self.array(tensor.rows(slice(part.start, part.stop)))

    def wide(self, name: str) -> mx.array:
        whole = super().wide(name)
        if not name.endswith(".sinks"):
            return whole
        own = self.shard.layers[int(name.split(".")[2])].queries
        return whole[own.start : own.stop]

    def expert_linear(self, name: str, bias: bool) -> ExpertLinear:
        tensor = self.checkpoint.tensor(f"{name}.weight")
        offset = self.named(f"{name}.bias") if bias else None
        part = self.shard.layers[int(name.split(".")[2])].experts
        own = slice(part.start, part.stop)
        if name.endswith("down_proj"):
            mine = _stack(tensor, self.packed).cut(part.start, part.stop)
            if offset is not None and self.group.rank():
                offset = mx.zeros_like(offset)  # added once
        else:
            mine = _middle(_stack(tensor, self.packed), own)
            offset = None if offset is None else offset[:, own]
        if mine.kind == "mlx_quantized":
            return QuantizedExpertLinear(*self.packed_parts(mine), offset)
        return ExpertLinear(self.array(mine), offset)

    def experts(self, part: Experts, prefix: str) -> Mixture:
        return SummedMixture(super().experts(part, prefix), self.group)

    def head_norm(self, name: str, part: Attention) -> Norm:
        if part.qk_norm not in ("projection", "heads"):
            return super().head_norm(name, part)
        kind, weight = name.rpartition(".")[2], self.norm_weight(name)
        own = self.shard.layers[int(name.split(".")[2])]
        heads = own.queries if kind == "q_norm" else own.keys
        eps = self.whole.norm_eps
        if part.qk_norm == "heads":
            mine = weight[heads.start : heads.stop]
            return LayerNorm(mine, None, eps) if self.whole.norm == "layer" else RMSNorm(mine, eps)
        width = part.head_dim
        copies = 1 if kind == "q_norm" else own.copies
        mine = weight[heads.start * width : heads.stop * width]
        return SummedNorm(mine, eps, weight.shape[0], copies, self.group)

    def vocabulary(self) -> tuple[Embedding, Linear]:
        embedding, head = super().vocabulary()
        return embedding, Gathered(head, self.whole.vocab_size, self.group)

    def embedding(self, linear: Linear, tokens: int) -> Embedding:
        rows = _rows(tokens, self.group.size(), self.group.rank())
        return SummedEmbedding(super().embedding(linear, tokens), rows, self.group)


def _narrowed(layer: Layer, part: Part) -> Layer:
    """The layer as this rank computes it."""
    attention, mlp, experts = layer.attention, layer.mlp, layer.experts
    if attention is not None:
        queries, keys = len(part.queries), len(part.keys)
        attention = replace(attention, num_attention_heads=queries, num_key_value_heads=keys)
    if mlp is not None:
        mlp = replace(mlp, intermediate_size=len(part.columns))
    if experts is not None:
        experts = replace(experts, intermediate_size=len(part.experts))
    return replace(layer, attention=attention, mlp=mlp, experts=experts)


def _head_widths(part: Attention) -> dict[str, int]:
    """How many rows (of `o_proj`, columns) of each projection are of one head."""
    sizes, width = part.latent, part.head_dim
    if sizes is None:
        return {"q_proj": (1 + part.gated) * width, "k_proj": width, "v_proj": width, "o_proj": width}
    query = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
    both = sizes.qk_nope_head_dim + sizes.v_head_dim
    return {"q_proj": query, "q_b_proj": query, "kv_b_proj": both, "o_proj": sizes.v_head_dim}


def _stack(tensor: Tensor, packed: Packing) -> DenseTensor | PackedTensor:
    """The experts' weights (n, out, in) in one tensor."""
    if tensor.layout is not None:
        keeps = kept_layout(tensor, packed) is not None
        return PackedTensor(*tensor.quantized()) if keeps else DenseTensor(tensor.numpy())
    return DenseTensor(tensor.raw())


def _middle(tensor: DenseTensor | PackedTensor, rows: slice) -> DenseTensor | PackedTensor:
    """These rows of every expert's weight."""
    if isinstance(tensor, DenseTensor):
        return DenseTensor(tensor.data[:, rows])
    biases = None if tensor.biases is None else tensor.biases[:, rows]
    return replace(tensor, packed=tensor.packed[:, rows], scales=tensor.scales[:, rows], biases=biases)
