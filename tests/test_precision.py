"""In which numbers a model is computed: the one rule, over headers, and that loading follows it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tempo_mlx.weights.gguf_tensor import GGUFTensor
from tempo_mlx.weights.placing import Stacked
from tempo_mlx.weights.precision import UNPACKED_BELOW, Device, Precision, Stored, choose
from tempo_mlx.weights.tensor import DenseTensor, FloatType, Layout, PackedTensor, Tensor

MANY = 8_000_000_000
Q4_K_M = Stored({"float16": MANY, "float32": 10**6}, MANY, exact=MANY // 2)


@pytest.mark.parametrize(
    ("stored", "device", "asked", "expected"),
    [
        (Q4_K_M, "gpu", {}, ("float16", True)),
        (Q4_K_M, "cpu", {}, ("float32", "exact")),
        (Stored({"bfloat16": MANY}, MANY), "cpu", {}, ("float32", False)),  # MXFP4
        (Q4_K_M, "cpu", {"cpu_packs": False}, ("float32", False)),
        (Q4_K_M, "cpu", {"dequantize": True}, ("float32", False)),
        (Q4_K_M, "cpu", {"dtype": "float32"}, ("float32", "exact")),
        (Q4_K_M, "gpu", {"dtype": "bfloat16"}, ("bfloat16", True)),
        (Q4_K_M, "gpu", {"dtype": "float32"}, ("float32", True)),
        (Q4_K_M, "gpu", {"dequantize": True}, ("float16", False)),
        (Q4_K_M, "cpu", {"dtype": "float16"}, ("float16", False)),
        (Stored({"float16": MANY}, MANY, wide=True), "gpu", {}, ("bfloat16", True)),
        (Stored({"float16": MANY}, MANY, wide=True), "gpu", {"dtype": "float16"}, ("float16", True)),
        (Stored({"bfloat16": 19, "float16": 2}, 21), "gpu", {}, ("bfloat16", False)),  # small
        (Stored({"bfloat16": MANY}, MANY), "gpu", {}, ("bfloat16", True)),
        (Stored({"float16": MANY}), "gpu", {}, ("float16", False)),
        (Stored({"float32": MANY}), "gpu", {}, ("bfloat16", False)),
        (Stored({"float32": MANY}), "gpu", {"dtype": "float32"}, ("float32", False)),
        (Stored({"float32": MANY}), "cpu", {}, ("float32", False)),
        (Stored({"float16": UNPACKED_BELOW}, 5), "gpu", {}, ("float16", True)),
        (Stored({"float16": UNPACKED_BELOW - 1}, 5), "gpu", {}, ("float16", False)),
        # the embedding alone in another type, and larger than a layer, decides nothing
        (Stored({"bfloat16": MANY // 8, "float16": MANY - MANY // 8}, MANY), "gpu", {}, ("float16", True)),
    ],
)
def test_the_rule(stored: Stored, device: Device, asked: dict[str, Any], expected: tuple[Any, Any]) -> None:
    assert choose(device, stored, **{"cpu_packs": True, **asked}) == Precision(*expected)


def packed(kind: Any) -> PackedTensor:
    return PackedTensor(
        np.zeros((4, 8), np.uint32), np.zeros((4, 1), kind), np.zeros((4, 1), kind), Layout(4, 64)
    )


@pytest.mark.parametrize(
    ("tensor", "float_type", "quantised", "exact"),
    [
        (DenseTensor(np.zeros((4, 64), np.uint16)), "bfloat16", False, False),
        (DenseTensor(np.zeros((4, 64), np.float16)), "float16", False, False),
        (GGUFTensor(np.zeros((4, 36), np.uint8), "Q4_0", 64), "float16", True, True),
        (GGUFTensor(np.zeros((4, 210), np.uint8), "Q6_K", 256), "float16", True, False),
        (GGUFTensor(np.zeros((4, 34), np.uint8), "MXFP4", 64), "bfloat16", True, False),
        (packed(np.uint16), "bfloat16", True, True),
        (packed(np.float16), "float16", True, True),
        (Stacked((packed(np.float16), packed(np.float16))), "float16", True, False),
    ],
)  # fmt: skip
def test_what_a_file_stores(tensor: Tensor, float_type: FloatType, quantised: bool, exact: bool) -> None:
    from tempo_mlx.architecture.families import architecture_from_config

    count = math.prod(tensor.shape)
    llama, gemma = (architecture_from_config({"model_type": name}) for name in ("llama", "gemma2"))
    found = Stored.of([tensor, tensor], llama)
    assert found == Stored({float_type: 2 * count}, 2 * count * quantised, exact=2 * count * exact)
    assert Stored.of([tensor], gemma).wide


def test_experts_of_two_layouts_are_not_packed_as_one() -> None:
    both = Stacked(
        (
            GGUFTensor(np.zeros((4, 36), np.uint8), "Q4_0", 64),
            GGUFTensor(np.zeros((4, 68), np.uint8), "Q8_0", 64),
        )
    )
    assert (both.layout, both.kind) == (None, "float32")
    assert not both.numpy().any()
