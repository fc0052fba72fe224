"""GGUF's blocks in MLX's layouts: exact where the table says so, and elsewhere no further off than was measured.

Errors are the rms of the difference over that of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import gguf
import numpy as np
import pytest

from tempo_mlx.mlx import mx
from tempo_mlx.model.linear import Concatenated, Linear, QuantizedLinear, fuse
from tempo_mlx.weights.gguf_file import TYPES, read_gguf
from tempo_mlx.weights.gguf_layouts import PACKINGS, packing_of
from tempo_mlx.weights.gguf_tensor import GGUFTensor
from tempo_mlx.weights.registry import PACKAGED
from tempo_mlx.weights.tensor import PackedTensor

DEFAULT = PACKAGED["smollm2-135m"].path
MODELS = sorted({DEFAULT, *DEFAULT.parent.glob("*.gguf")})  # the default one, and what else was fetched
QUANTISED = {name: (block, size) for name, block, size in TYPES.values() if block > 1}
# Of the scales in float32, float16, bfloat16; nothing where it is exact.
WHOLE, PRODUCTS = (0.0, 0.0, 4.5e-3), (0.0, 7.5e-4, 5.75e-3)
BOUNDS = {
    "Q4_0": WHOLE, "Q4_1": WHOLE, "Q5_0": WHOLE, "Q5_1": WHOLE, "Q8_0": WHOLE, "IQ4_NL": WHOLE,
    "MXFP4": (0.0, 0.0, 0.0), "TQ1_0": WHOLE, "TQ2_0": WHOLE, "IQ3_S": PRODUCTS, "Q4_K": PRODUCTS,
    "Q5_K": PRODUCTS, "IQ4_XS": PRODUCTS, "IQ3_XXS": PRODUCTS, "Q6_K": (5e-3, 5e-3, 7e-3),
}  # fmt: skip
OTHERS = (2e-2, 2e-2, 2e-2)
# Where the float16 numbers of a block stand: its scale, and its minimum.
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def blocks_of(
    name: str, rows: int = 24, columns: int = 1024
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Quantised by the gguf package where it can, otherwise of random numbers and reasonable scales."""
    random = np.random.default_rng(sum(map(ord, name)))
    weight = (random.normal(size=(rows, columns)) * 0.02).astype(np.float32)
    try:
        return gguf.quantize(weight, gguf.GGMLQuantizationType[name])
    except NotImplementedError:
        block, size = QUANTISED[name]
        blocks = random.integers(256, size=(rows * columns // block, size), dtype=np.uint8)
        if name == "IQ1_M":  # its scale is in four pieces
            blocks[:, 49:56:2] = (blocks[:, 49:56:2] & 15) | np.array([0, 0, 0, 16], np.uint8)
        for place in () if name == "IQ1_M" else HALVES.get(name, (0,)):
            halves = random.uniform(1e-4, 1e-3, size=(len(blocks), 1)).astype(np.float16)
            blocks[:, place : place + 2] = halves.view(np.uint8)
        return blocks.reshape(rows, -1)


def squares(tensor: GGUFTensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Of the differences of MLX's dequantisation with scales in float32, float16 and bfloat16; and of the weights."""
    reference = gguf.dequantize(tensor.blocks, gguf.GGMLQuantizationType[tensor.type_name])
    packed, scales, biases, layout = tensor.quantized()
    found = [reference]
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        if biases is None:
            parts = [mx.array(scales)]
        else:
            parts = [mx.array(each).astype(dtype).astype(mx.float32) for each in (scales, biases)]
        ours = mx.dequantize(mx.array(packed), *parts, **asdict(layout), dtype=mx.float32)
        found.append(np.array(ours) - reference)
    return np.array([np.square(each, dtype=np.float64).sum() for each in found])


@pytest.mark.parametrize("name", QUANTISED)
def test_every_type_in_mlx_s_layout(name: str) -> None:
    tensor = GGUFTensor(blocks_of(name), name, 1024)
    size, *errors = squares(tensor)
    for error, bound in zip((errors / size) ** 0.5, BOUNDS.get(name, OTHERS), strict=True):
        assert error <= 1.3 * bound  # of a normal distribution; real weights are nearer, below
    assert (BOUNDS.get(name, OTHERS)[0] == 0.0) == (tensor.kind == "mlx_quantized") == packing_of(name).exact
    packed, scales, biases, layout = tensor.quantized()
    assert tensor.nbytes == sum(
        each.size * (4 if each is packed else 2 if biases is not None else 1)
        for each in (packed, scales, biases)
        if each is not None
    )
    whole = PackedTensor(packed, scales, biases, layout).numpy()
    for part, ours in (
        (tensor.rows(slice(3, 9)), whole[3:9]),
        (tensor.rows(np.array([5, 0, 5])), whole[[5, 0, 5]]),
        (tensor.cut(256, 768), whole[:, 256:768]),
        (GGUFTensor(tensor.blocks.reshape(2, 12, -1), name, 1024), whole.reshape(2, 12, 1024)),
    ):
        np.testing.assert_array_equal(PackedTensor(*part.quantized()).numpy(), ours)


def real() -> Iterator[tuple[Path, str]]:
    for path in (path for path in MODELS if path.exists()):
        tensors = read_gguf(path).tensors.values()
        kinds = {each.type_name for each in tensors if isinstance(each, GGUFTensor)}
        yield from ((path, kind) for kind in sorted(kinds))


@pytest.mark.parametrize(
    ("path", "kind"), [pytest.param(*each, id=f"{each[0].stem}-{each[1]}") for each in real()]
)
def test_real_weights_in_mlx_s_layout(path: Path, kind: str) -> None:
    tensors = [each for each in read_gguf(path).tensors.values() if isinstance(each, GGUFTensor)]
    tensors = [each for each in tensors if each.type_name == kind]
    total = np.zeros(4)
    for tensor in tensors[:: max(1, len(tensors) // 8)]:
        total += squares(tensor.rows(slice(None, None, max(1, tensor.shape[0] // 40))))
    size, *errors = total
    for error, bound in zip((errors / size) ** 0.5, BOUNDS[kind], strict=True):
        assert error <= bound


def test_a_scale_that_would_overflow_stays_exact() -> None:
    blocks = np.zeros((1, 34), np.uint8)
    blocks[0, :2] = np.frombuffer(np.float16(60000).tobytes(), np.uint8)
    blocks[0, 2:] = 255
    tensor = GGUFTensor(blocks, "Q8_0", 32)
    np.testing.assert_array_equal(PackedTensor(*tensor.quantized()).numpy(), tensor.numpy())


@pytest.mark.parametrize("name", ["Q6_K", "Q2_K", "Q4_K", "IQ3_S"])
def test_blocks_of_zeros_are_zeros(name: str) -> None:
    block, size = QUANTISED[name]
    tensor = GGUFTensor(np.zeros((2, size), np.uint8), name, block)
    assert not PackedTensor(*tensor.quantized()).numpy().any()


def test_the_table_has_no_type_that_files_do_not() -> None:
    assert set(PACKINGS) <= set(QUANTISED) == set(BOUNDS) | (set(QUANTISED) - set(PACKINGS))


def test_projections_of_several_types_are_few_products() -> None:
    """As in Q4_K_M: queries and keys in Q4_K, values in Q6_K."""
    tensors = [
        GGUFTensor(blocks_of(kind, rows), kind, 1024)
        for kind, rows in (("Q4_K", 24), ("Q4_K", 8), ("Q6_K", 8))
    ]
    linears: list[Linear] = []
    for tensor in tensors:
        packed, scales, biases, layout = tensor.quantized()
        linears.append(QuantizedLinear(mx.array(packed), mx.array(scales), mx.array(biases), layout))
    linears.append(Linear(mx.ones((4, 1024))))
    x = mx.array(np.random.default_rng(1).normal(size=(3, 1024)).astype(np.float32))
    fused = fuse(linears)
    assert isinstance(fused, Concatenated)
    assert [type(part) for part in fused.parts] == [QuantizedLinear, QuantizedLinear, Linear]
    weights = np.concatenate([PackedTensor(*tensor.quantized()).numpy() for tensor in tensors])
    expected = np.concatenate(
        [np.array(x) @ weights.T, np.array(x).sum(axis=1, keepdims=True).repeat(4, axis=1)], axis=1
    )
    np.testing.assert_allclose(np.array(fused(x)), expected, atol=1e-4)
    assert isinstance(fuse(linears[:2]), QuantizedLinear)
