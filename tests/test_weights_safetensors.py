"""Safetensors directories: dense, sharded and MLX-quantised, and headers that lie."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tempo_mlx.errors import ModelError
from tempo_mlx.weights import open_checkpoint
from tempo_mlx.weights.safetensors_file import read_safetensors
from tempo_mlx.weights.tensor import (
    DenseTensor,
    bfloat16_to_float32,
    float32_to_bfloat16,
)  # fmt: skip
from tests.twins import twin


def header_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "7 bytes": b"\0" * 7,
    "header longer than the file": struct.pack("<Q", 100) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "not JSON": header_bytes(b"{nope"),
    "not UTF-8": header_bytes(b'{"\xff": 1}'),
    "a list": header_bytes([1]),
    "null": header_bytes(None),
    "nested": header_bytes(b"[" * 50_000 + b"]" * 50_000),
    "a header of empty lists": header_bytes(b'{"a":[' + b"[]," * 100_000 + b"1]}"),
    "a header of numbers": header_bytes(b'{"a":[' + b"9," * 100_000 + b"1]}"),
    "entry not a table": header_bytes({"x": 3}),
    "no dtype": header_bytes({"x": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "unknown dtype": header_bytes(one(dtype="F128"), bytes(16)),
    "dtype a number": header_bytes(one(dtype=7), bytes(16)),
    "dtype a list": header_bytes(one(dtype=["F32"]), bytes(16)),
    "shape a string": header_bytes(one(shape="22"), bytes(16)),
    "negative size": header_bytes(one(shape=[-2, -2]), bytes(16)),
    "size a fraction": header_bytes(one(shape=[2.0, 2]), bytes(16)),
    "size infinite": header_bytes(
        b'{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,16]}}', bytes(16)
    ),
    "size NaN": header_bytes(b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', bytes(16)),
    "size true": header_bytes(one(shape=[True, 4]), bytes(16)),
    "sizes that overflow": header_bytes(one(shape=[2**33, 2**33]), bytes(16)),
    "sizes that wrap": header_bytes(one(shape=[2**62 + 4]), bytes(16)),
    "too many dimensions": header_bytes(one(shape=[1] * 9 + [4]), bytes(16)),
    "size of 5000 digits": header_bytes(
        b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}'
    ),
    "shape and offsets disagree": header_bytes(one(shape=[2, 3]), bytes(16)),
    "offsets backwards": header_bytes(one(data_offsets=[16, 0]), bytes(16)),
    "offsets beyond the file": header_bytes(one(data_offsets=[16, 32]), bytes(16)),
    "offsets negative": header_bytes(one(data_offsets=[-16, 0]), bytes(16)),
    "one offset": header_bytes(one(data_offsets=[16]), bytes(16)),
    "offsets text": header_bytes(one(data_offsets=["0", "16"]), bytes(16)),
    "data cut off": header_bytes(one(), bytes(15)),
    "bytes left over": header_bytes(one(), bytes(17)),
    "overlap": header_bytes({**one(), "y": one(data_offsets=[8, 24])["x"]}, bytes(24)),
    "the same place": header_bytes({**one(), "y": one()["x"]}, bytes(16)),
    "a gap": header_bytes({**one(), "y": one(data_offsets=[20, 36])["x"]}, bytes(36)),
    "duplicate names": header_bytes(
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        bytes(2),
    ),
    "duplicate fields": header_bytes(
        b'{"x":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}', bytes(1)
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_ends_in_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(MALFORMED[name])
    with pytest.raises(ModelError) as caught:
        read_safetensors(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message and len(message) < 400
    shutil.copy(twin("llama") / "config.json", tmp_path)
    with pytest.raises(ModelError):
        open_checkpoint(str(tmp_path))


def test_arrays_are_what_the_safetensors_package_wrote(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "a": random.normal(size=(3, 5)).astype(np.float32), "b": random.normal(size=7).astype(np.float16),
        "d": random.integers(99, size=(4, 1), dtype=np.uint32), "e": np.zeros((0, 3), np.float32),
        "f": np.array(2.5, np.float32),
    }  # fmt: skip
    save_file(arrays, tmp_path / "x.safetensors", {"format": "np"})
    file = read_safetensors(tmp_path / "x.safetensors")
    assert set(file.arrays) == set(arrays)
    for name, array in arrays.items():
        got = file.array(name)
        assert got.shape == array.shape
        np.testing.assert_array_equal(got, array)
        assert not got.flags.writeable


def test_bfloat16_is_what_torch_makes_of_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    values = np.random.default_rng(1).normal(size=5000).astype(np.float32)
    values = np.concatenate([values, np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38], np.float32)])
    theirs = torch.from_numpy(values).to(torch.bfloat16)
    np.testing.assert_array_equal(bfloat16_to_float32(float32_to_bfloat16(values)), theirs.float().numpy())
    save_torch({"x": theirs}, tmp_path / "x.safetensors")
    stored = DenseTensor(read_safetensors(tmp_path / "x.safetensors").array("x"))
    assert stored.kind == "bfloat16"
    np.testing.assert_array_equal(stored.numpy(), theirs.float().numpy())


def test_kinds_of_dense_tensors() -> None:
    half, brain = np.ones((2, 3), np.float16), float32_to_bfloat16(np.full((2, 3), 1.5, np.float32))
    assert (DenseTensor(half).kind, DenseTensor(brain).kind) == ("float16", "bfloat16")
    np.testing.assert_array_equal(DenseTensor(brain).numpy(), 1.5)
    np.testing.assert_array_equal(DenseTensor(half, subtract=1.0).raw(), np.zeros((2, 3), np.float16))
    assert DenseTensor(brain, subtract=1.0).raw().dtype == np.uint16
    with pytest.raises(ModelError):
        DenseTensor(half).quantized()


# ---- directories


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of a twin that a test may spoil."""
    return Path(shutil.copytree(twin("llama"), tmp_path / "model", ignore=shutil.ignore_patterns("*.gguf")))


def test_shards_make_one_model(directory: Path) -> None:
    arrays = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {name: f"model-0000{index % 3 + 1}-of-00003.safetensors" for index, name in enumerate(arrays)}
    for file in set(places.values()):
        save_file({name: arrays[name] for name in arrays if places[name] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    checkpoint = open_checkpoint(str(directory))
    for name in checkpoint.names():
        np.testing.assert_array_equal(checkpoint.tensor(name).numpy(), arrays[name])
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match="00002"):
        open_checkpoint(str(directory))
    for odd in ({}, {"weight_map": 3}, {"weight_map": {}}, {"weight_map": {"x": 3}}, [], {"weight_map": {"x": "../y"}},
                {"weight_map": {"x": "/etc/passwd"}}, {"weight_map": {"x": "model.bin"}}):  # fmt: skip
        index.write_text(json.dumps(odd))
        with pytest.raises(ModelError):
            open_checkpoint(str(directory))


def test_a_model_of_a_vision_checkpoint(directory: Path) -> None:
    arrays = load_file(directory / "model.safetensors")
    renamed = {f"language_model.{name}": array for name, array in arrays.items()}
    renamed["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
    save_file(renamed, directory / "model.safetensors")
    checkpoint = open_checkpoint(str(directory))
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(checkpoint.tensor(name).numpy(), arrays[name])


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda arrays: arrays.pop("model.norm.weight"), r"model\.norm"),
        (lambda arrays: arrays.update({"model.layers.0.self_attn.sinks": np.ones(4, np.float32)}), "sinks"),
        (lambda arrays: arrays.update({"model.norm.weight": np.ones(63, np.float32)}), "63"),
        (lambda arrays: arrays.update({"model.norm.weight": np.ones(64, np.int32)}), "I32"),
        (lambda arrays: arrays.update({"lm_head.weight": np.ones((64, 320), np.float32)}), "lm_head"),
    ],
)
def test_tensors_must_be_those_of_the_config(directory: Path, spoil: Any, named: str) -> None:
    arrays = load_file(directory / "model.safetensors")
    spoil(arrays)
    save_file(arrays, directory / "model.safetensors")
    with pytest.raises(ModelError, match=named):
        open_checkpoint(str(directory))


def test_nothing_is_read_but_safetensors(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no pickled files"):
        open_checkpoint(str(directory))


def test_a_config_that_is_missing_broken_or_huge(directory: Path) -> None:
    config = directory / "config.json"
    for text in ("", "{", "[1]", "null", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", " " * (9 << 20)):
        config.write_text(text)
        with pytest.raises(ModelError):
            open_checkpoint(str(directory))
    config.unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        open_checkpoint(str(directory))


def test_the_identity_changes_with_any_weight(directory: Path) -> None:
    before = open_checkpoint(str(directory)).identity
    assert before == {**before, "family": "llama", "quantization": "float32", "id": str(directory)}
    assert open_checkpoint(str(directory)).identity == before
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (directory / "model.safetensors").write_bytes(data)
    assert open_checkpoint(str(directory)).identity["sha256"] != before["sha256"]


# ---- MLX-quantised


# ---- config.json


def test_null_is_absent_where_rope_parameters_say_it(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    (directory / "config.json").write_text(json.dumps(config))
    frequencies = open_checkpoint(str(directory)).architecture.ropes[0].inverse_frequencies
    assert frequencies[1] == pytest.approx(500.0 ** (-2 / 16))


@pytest.mark.parametrize(("stated", "context"), [(64, 256), (512, 512)])
def test_yarn_multiplies_the_context(stated: int, context: int, directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config.pop("rope_parameters", None)
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config |= {"rope_scaling": scaling, "rope_theta": 10000.0, "max_position_embeddings": stated}
    (directory / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(str(directory)).architecture.max_position_embeddings == context
