"""In which numbers a model is computed: one rule for all devices and files, known before a weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.weights.tensor import FloatType, Packing, Tensor, kept_layout

# Of numbers: so small a model is computed unpacked on a GPU. Products of packed weights take longer with every row
# (mlx issue 4265), 16-bit ones hardly, and 600 MB are read fast.
UNPACKED_BELOW = 300_000_000


Device = Literal["cpu", "gpu"]
Asked = Literal["auto", "float32", "float16", "bfloat16"]
DEVICES: tuple[Device, ...] = ("cpu", "gpu")


@dataclass(frozen=True)
class Stored:
    """What a file stores. numbers: how many in each float type, or quantised with scales in it; quantised: how many of
    all; exact: of those, how many a CPU multiplies as they are. wide: whether the model's activations go beyond
    float16.
    """

    numbers: Mapping[FloatType, int]
    quantised: int = 0
    wide: bool = False
    exact: int = 0

    @classmethod
    def of(cls, tensors: Iterable[Tensor], a: Architecture) -> Stored:
        numbers: Counter[FloatType] = Counter()
        quantised = exact = 0
        for tensor in tensors:
            count = math.prod(tensor.shape)
            numbers[tensor.float_type] += count
            quantised += 0 if tensor.layout is None else count
            exact += 0 if kept_layout(tensor, "exact") is None else count
        # Gemma's embeddings come times the root of their size, and what layers add to them passes 65504
        return cls(numbers, quantised, a.embedding_scale == math.sqrt(a.hidden_size), exact)


@dataclass(frozen=True)
class Precision:
    """dtype: of activations, plain weights and scales. packed: which quantised weights stay so."""

    dtype: FloatType
    packed: Packing


def choose(
    device: Device,
    stored: Stored,
    dtype: Asked = "auto",
    dequantize: bool = False,
    *,
    cpu_packs: bool,
) -> Precision:
    """What a model is computed in, by what most of its numbers are stored in. cpu_packs: whether this machine's CPU
    multiplies packed weights by few_rows.c.

    On the CPU float32: MLX's kernels for anything else are 2 to 20 times slower there. What is quantised stays packed
    if the CPU can, and no number changes by it. On a GPU 16 bits, and what is quantised stays packed: float16 where
    that is what the file has (as GGUF's scales, which bfloat16 rounds eight times as much) and the activations fit,
    else bfloat16.
    """
    total = sum(stored.numbers.values())
    if device == "cpu":
        chosen = "float32" if dtype == "auto" else dtype
        stays = cpu_packs and chosen == "float32" and stored.exact > 0 and not dequantize
        return Precision(chosen, "exact" if stays else False)
    packing = stored.quantised > 0 and not dequantize and total >= UNPACKED_BELOW
    if dtype != "auto":
        return Precision(dtype, packing)
    half = stored.numbers.get("float16", 0)
    return Precision("float16" if 2 * half > total and not stored.wide else "bfloat16", packing)
