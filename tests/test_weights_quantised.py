"""MLX's quantised layouts: every mode, mixed within one model, of single weights and of stacked experts."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tempo_mlx.errors import ModelError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.loading import load_model
from tempo_mlx.mlx import mx
from tempo_mlx.model import reader
from tempo_mlx.model.linear import QuantizedLinear, fuse
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.weights import open_checkpoint
from tempo_mlx.weights.tensor import MODES, DenseTensor, Layout, PackedTensor, packed_bits, unpack_bits
from tests.twins import twin

LAYOUTS = [Layout(bits, size, mode) for mode, (sizes, _) in MODES.items() for bits, size in sorted(sizes)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of a twin that a test may spoil."""
    return Path(shutil.copytree(twin("llama"), tmp_path / "model", ignore=shutil.ignore_patterns("*.gguf")))


def packed_by_mlx(weight: Any, layout: Layout) -> tuple[list[mx.array], PackedTensor]:
    arrays = mx.quantize(mx.array(weight), **asdict(layout))
    packed, scales, *biases = (np.array(each) for each in arrays)
    return arrays, PackedTensor(packed, scales, biases[0] if biases else None, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_reads_as_mlx_reads_it(layout: Layout) -> None:
    weight = np.random.default_rng(layout.bits).normal(size=(3, 16, 256)).astype(np.float32)
    arrays, experts = packed_by_mlx(weight, layout)
    theirs = np.array(mx.dequantize(*arrays, **asdict(layout), dtype=mx.float32))
    assert experts.shape == (3, 16, 256) and experts.nbytes == sum(each.nbytes for each in arrays)
    np.testing.assert_allclose(experts.numpy(), theirs, rtol=0, atol=1e-6)
    one = PackedTensor(*(None if each is None else each[1] for each in experts.quantized()[:3]), layout)  # type: ignore[arg-type]
    np.testing.assert_array_equal(one.numpy(), experts.numpy()[1])
    for tensor in (one, experts):
        whole = tensor.numpy()
        np.testing.assert_array_equal(tensor.rows(slice(1, 9)).numpy(), whole[1:9])
        np.testing.assert_array_equal(tensor.rows(np.array([2, 1])).numpy(), whole[[2, 1]])
        np.testing.assert_array_equal(tensor.cut(128, 256).numpy(), whole[..., 128:])
        assert tensor.cut(128, 256).kind == "mlx_quantized" and tensor.cut(1, 9).kind == "float32"
        np.testing.assert_array_equal(tensor.cut(1, 9).numpy(), whole[..., 1:9])


@pytest.mark.parametrize("layout", LAYOUTS[::5], ids=str)
def test_a_product_with_a_packed_weight_is_that_with_the_dense_one(layout: Layout) -> None:
    random = np.random.default_rng(1)
    x = mx.array(random.normal(size=(3, 128)).astype(np.float32))
    linears, dense = [], []
    for _ in range(2):
        arrays, tensor = packed_by_mlx(random.normal(size=(32, 128)).astype(np.float32), layout)
        linears.append(QuantizedLinear(*arrays[:2], arrays[2] if len(arrays) > 2 else None, layout))
        dense.append(tensor.numpy())
    for linear, weight in ((linears[0], dense[0]), (fuse([*linears]), np.concatenate(dense))):
        np.testing.assert_allclose(np.array(linear(x)), np.array(x) @ weight.T, atol=2e-3)
    rows = linears[1].rows(mx.array([4, 2])).astype(mx.float32)
    np.testing.assert_allclose(np.array(rows), dense[1][[4, 2]], rtol=8e-3, atol=1e-6)
    few = linears[1].choose(mx.array([7, 3]))
    np.testing.assert_allclose(np.array(few(x)), np.array(x) @ dense[1][[7, 3]].T, atol=2e-3)


def quantised(
    directory: Path,
    layouts: Mapping[str, Layout | None],
    default: Layout,
    *,
    stated: Mapping[str, Any] | None = None,
) -> None:
    """Quantise the twin's matrices as mlx_lm.convert does; `layouts`: exceptions by name, None: left alone.
    stated: what config.json says instead of all that a layout has."""
    arrays = load_file(directory / "model.safetensors")
    table: dict[str, Any] = asdict(default) if stated is None else dict(stated)
    for name in list(arrays):
        stem = name.removesuffix(".weight")
        layout = layouts.get(stem, default)
        if stem in layouts:
            table[stem] = False if layout is None else asdict(layout)
        if arrays[name].ndim == 2 and layout is not None:
            parts = [np.array(each) for each in mx.quantize(mx.array(arrays[name]), **asdict(layout))]
            arrays |= dict(zip((name, f"{stem}.scales", f"{stem}.biases"), parts, strict=False))
    save_file(arrays, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization"] = config["quantization_config"] = table
    (directory / "config.json").write_text(json.dumps(config))


def test_layers_may_be_quantised_each_in_its_own_way(directory: Path) -> None:
    plain = load_file(directory / "model.safetensors")
    layouts = {
        "model.embed_tokens": Layout(8, 64), "model.layers.1.mlp.down_proj": Layout(6, 32),
        "model.layers.2.self_attn.q_proj": None, "model.layers.0.self_attn.k_proj": Layout(4, 32, "mxfp4"),
        "model.layers.3.mlp.up_proj": Layout(4, 16, "nvfp4"), "lm_head": Layout(8, 32, "mxfp8"),
    }  # fmt: skip
    quantised(directory, layouts, Layout(4, 32))
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.identity["quantization"] == "mlx 4-bit, group 32"
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        layout = layouts.get(name.removesuffix(".weight"), Layout(4, 32))
        if tensor.kind != "mlx_quantized":
            assert layout is None or plain[name].ndim == 1
            np.testing.assert_array_equal(tensor.numpy(), plain[name])
            continue
        assert layout == tensor.quantized()[3]
        step = np.abs(plain[name]).max() / 4 if layout.mode != "affine" else 2 * np.abs(plain[name]).max() / (
            2**layout.bits - 1
        )  # fmt: skip
        np.testing.assert_allclose(tensor.numpy(), plain[name], rtol=0, atol=step)
    assert checkpoint.parameters == open_checkpoint(str(twin("llama"))).parameters


def test_experts_of_a_layer_may_be_quantised_each_in_its_own_way(tmp_path: Path) -> None:
    """They are one tensor to us, which is dense where they differ."""
    path = Path(shutil.copytree(twin("gguf-qwen3_moe"), tmp_path / "model"))
    plain = load_file(path / "model.safetensors")
    own = "model.layers.0.mlp.experts.3.up_proj"
    quantised(path, {own: Layout(8, 32), "lm_head": None}, Layout(4, 32))
    checkpoint = open_checkpoint(str(path))
    mixed, alike = (checkpoint.tensor(f"model.layers.{layer}.experts.up_proj.weight") for layer in (0, 1))
    assert (mixed.kind, alike.kind) == ("float32", "mlx_quantized")
    errors = [
        np.abs(mixed.numpy()[at] - plain[f"model.layers.0.mlp.experts.{at}.up_proj.weight"]).max()
        for at in (3, 4)
    ]
    assert errors[0] < errors[1] / 8
    models = [build(checkpoint, "cpu", "float32", packed=packed) for packed in (False, True)]
    logits = [
        np.array(each.forward([5, 80, 200], range(3), None, each.new_cache()).logits) for each in models
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-2)


@pytest.mark.parametrize("scales", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_scales_are_what_the_file_says_in_whatever_they_are_stored(scales: mx.Dtype, directory: Path) -> None:
    """Bfloat16 as in most quantised checkpoints, of which numpy knows the bits alone."""
    arrays = {
        name: mx.array(each).astype(scales)
        for name, each in load_file(directory / "model.safetensors").items()
    }
    for name in [name for name, each in arrays.items() if each.ndim == 2]:
        stem = name.removesuffix("weight")
        parts = mx.quantize(arrays[name], group_size=32, bits=8)
        arrays |= dict(zip((name, f"{stem}scales", f"{stem}biases"), parts, strict=True))
    mx.save_safetensors(str(directory / "model.safetensors"), arrays)
    config = json.loads((directory / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 8}
    (directory / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(directory))
    models = [build(checkpoint, "cpu", "float32", packed=packed) for packed in (False, True)]
    logits = [
        np.array(each.forward([5, 80, 200], range(3), None, each.new_cache()).logits) for each in models
    ]
    assert models[1].info["quantization"]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.mode != "affine"], ids=str)
def test_a_model_of_small_floats_runs_packed_and_dense(layout: Layout, directory: Path) -> None:
    quantised(directory, {}, layout, stated={"mode": layout.mode, "bits": layout.bits, "group_size": None})
    pytest.importorskip("torch")
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.quantization == f"mlx {layout.mode} {layout.bits}-bit, group {layout.group_size}"
    models = [build(checkpoint, "cpu", "float32", packed=packed) for packed in (False, True)]
    models.append(load_model(LoadConfig(model=str(directory), backend="torch", device="cpu")).model)
    tokens, positions = np.array([5, 80, 200, 31]), np.arange(4)
    logits = [np.array(each.forward(tokens, positions, None, each.new_cache()).logits) for each in models]
    np.testing.assert_allclose(logits[0], logits[2], atol=1e-4)
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-2)


def test_what_an_entry_leaves_out_is_mlx_s_default(directory: Path) -> None:
    stems = {name.removesuffix(".weight") for name in load_file(directory / "model.safetensors")}
    narrow = {stem for stem in stems if "down_proj" in stem}
    quantised(directory, dict.fromkeys(narrow, Layout(4, 32)), Layout(4, 64))
    config = json.loads((directory / "config.json").read_text())
    entries = {stem: {"group_size": 32} if stem in narrow else {"bits": 4} for stem in stems}
    config["quantization"] = {"mode": "mxfp4", "bits": 4, "group_size": 32, **entries}
    (directory / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(directory))
    for name, size in (("model.embed_tokens.weight", 64), ("model.layers.0.mlp.down_proj.weight", 32)):
        assert checkpoint.tensor(name).quantized()[3] == Layout(4, size)


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ("awq", "awq"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "scales"),
        ({"bits": 4, "group_size": 64, "mode": "mxfp4"}, "groups of 64"),
        ({"bits": 4, "group_size": 32, "mode": "wobbly"}, "wobbly"),
        ({"bits": 4, "group_size": 32, "mode": ["affine"]}, "affine"),
        ({"bits": 7, "group_size": 32}, "7"),
        ({"bits": 4, "group_size": 0}, "0"),
        ({"bits": 10**30, "group_size": 32}, "bits"),
        ({"bits": [4], "group_size": 32}, "bits"),
        ({"bits": 8, "group_size": 32}, "shape|missing|implies"),
        (None, "quantization"),
    ],
)
def test_quantisations_that_are_not_mlx_own_are_named(directory: Path, table: Any, named: str) -> None:
    quantised(directory, {}, Layout(4, 32))
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization")
    config["quantization_config"] = table
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=named):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_quantised_weights_need_their_scales(directory: Path, part: str) -> None:
    quantised(directory, {}, Layout(4, 32))
    arrays = load_file(directory / "model.safetensors")
    del arrays[f"model.layers.0.mlp.up_proj.{part}"]
    save_file(arrays, directory / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_are_packed_one_number_after_the_other(bits: int) -> None:
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (3, 64)).astype(np.uint8)
    packed = packed_bits(numbers, bits)
    for row, words in zip(numbers.tolist(), packed, strict=True):
        whole = sum(number << bits * place for place, number in enumerate(row))
        assert int.from_bytes(words.tobytes(), "little") == whole
    assert np.array_equal(unpack_bits(packed, bits), numbers)
    if (bits, 32) in MODES["affine"][0]:  # and it is how MLX does it
        own = mx.quantize(mx.random.normal((4, 64)), group_size=32, bits=bits)[0]
        back = mx.dequantize(own, mx.ones((4, 2)), mx.zeros((4, 2)), 32, bits)
        assert np.array_equal(unpack_bits(np.array(own), bits), np.array(back))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", [(64, 256), (8, 6, 256)])
def test_a_weight_is_read_by_pieces_in_several_threads(
    shape: tuple[int, ...], packed: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = mx.random.normal(shape, key=mx.random.key(1))
    tensor = PackedTensor(*map(np.array, mx.quantize(values, 32, 4)), Layout(4, 32))

    def read(chunk: int) -> list[np.ndarray[Any, Any]]:
        monkeypatch.setattr(reader, "PIECE", chunk)
        own = reader.Reader(open_checkpoint(str(twin("llama"))), getattr(mx, dtype), packed)
        found = own.packed_parts(tensor)[:3] if packed else (own.array(tensor),)
        assert all(each.dtype in (mx.uint32, own.dtype) for each in found if each is not None)
        return [np.array(each.astype(mx.float32)) for each in found if each is not None]

    right = [tensor.packed, tensor.scales, tensor.biases] if packed else [tensor.numpy()]
    for at, (numbers, whole, pieces) in enumerate(zip(right, read(1 << 30), read(3000), strict=True)):
        kept = mx.uint32 if packed and at == 0 else getattr(mx, dtype)
        expected = np.array(mx.array(numbers).astype(kept).astype(mx.float32))
        assert np.array_equal(expected, whole) and np.array_equal(expected, pieces)


def test_a_device_that_keeps_its_arrays_elsewhere_gets_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """There numpy's view is of other memory than MLX computes with."""
    monkeypatch.setattr(reader, "PIECE", 8 * 4)
    monkeypatch.setattr(reader.np, "asarray", np.array)
    numbers = np.random.default_rng(0).random((64, 4), np.float32)
    (found,) = reader.in_pieces(DenseTensor(numbers), lambda piece: [piece.numpy()])
    assert np.array_equal(np.array(found), numbers)


def test_what_is_wrong_with_a_piece_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(piece: Any) -> list[np.ndarray[Any, Any]]:
        if len(starts := piece.numpy()) and starts[0, 0] >= 40:
            raise ModelError("no such numbers")
        return [starts]

    monkeypatch.setattr(reader, "PIECE", 8 * 4)
    tensor = DenseTensor(np.arange(64.0, dtype=np.float32)[:, None].repeat(4, 1))
    with pytest.raises(ModelError, match="no such numbers"):
        reader.in_pieces(tensor, read)


@pytest.mark.parametrize("mode", MODES)
def test_mlx_has_the_layouts_of_the_table(mode: str) -> None:
    """And what more it has that we do not know is read as it reads it."""
    found = set()
    weight = mx.random.normal((4, 256))
    for bits, size in itertools.product(range(1, 9), (8, 16, 32, 64, 128, 256)):
        try:
            parts = mx.quantize(weight, group_size=size, bits=bits, mode=mode)
        except ValueError:
            continue
        found.add((bits, size))
        theirs = mx.dequantize(*parts, group_size=size, bits=bits, mode=mode, dtype=mx.float32)
        packed, scales, *biases = map(np.array, parts)
        ours = PackedTensor(packed, scales, biases[0] if biases else None, Layout(bits, size, mode)).numpy()
        np.testing.assert_allclose(ours, np.array(theirs), rtol=1e-6)
    assert found >= MODES[mode][0]
