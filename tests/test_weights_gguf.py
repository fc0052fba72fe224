"""GGUF: what is in a file is read exactly, and a file that lies ends in one clear error."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tempo_mlx.architecture.gguf import ROWS
from tempo_mlx.errors import ModelError
from tempo_mlx.weights import open_checkpoint
from tempo_mlx.weights.gguf_file import TYPES, read_gguf
from tempo_mlx.weights.gguf_tensor import GGUFTensor
from tests.converted import CONVERTED
from tests.ggufs import (
    ARCHITECTURES,
    ARRAY,
    BOOL,
    F32,
    MODERN,
    STRING,
    U8,
    U32,
    U64,
    entry,
    file_bytes,
    gguf_twin,
    info,
    modern_twin,
    small_file,
    text,
)  # fmt: skip
from tests.twins import twin

HUGE = 2**63
ONE = [info("x", (4, 2))]
DATA = bytes(32)


def test_metadata_and_tensors_are_read_exactly(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(small_file())
    file = read_gguf(path)
    assert {key: value for key, value in file.metadata.items() if key not in ("a.names", "a.numbers")} == {
        "general.architecture": "llama", "a.u8": 1, "a.i8": -1, "a.u16": 1, "a.i16": 1, "a.u32": 1, "a.i32": 1,
        "a.f32": 0.5, "a.bool": True, "a.u64": 7, "a.i64": -7, "a.f64": 2.5,
    }  # fmt: skip
    assert list(file.metadata["a.names"]) == ["one", "", "drei"]
    assert file.metadata["a.numbers"].tolist() == [4, -5]
    np.testing.assert_array_equal(file.tensors["x"].numpy(), np.arange(8, dtype=np.float32).reshape(2, 4))
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["y"]
    np.testing.assert_array_equal(file.tensors["y"].numpy(), gguf.dequantize(theirs.data, theirs.tensor_type))


# The malformed files of llama.cpp's tests/test-gguf.cpp, and of the bugs that were found in parsers since.
MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"G",
    "bad magic": file_bytes(infos=ONE, data=DATA, magic=b"FUGG"),
    "version 0": file_bytes(infos=ONE, data=DATA, version=0),
    "version 1": file_bytes(infos=ONE, data=DATA, version=1),
    "version 4": file_bytes(infos=ONE, data=DATA, version=4),
    "big-endian": file_bytes(infos=ONE, data=DATA, version=3 << 24),
    "negative tensor count": file_bytes(tensors=-1),
    "huge tensor count": file_bytes(tensors=HUGE),
    "tensor count beyond the file": file_bytes(tensors=1000),
    "negative key count": file_bytes(keys=-1),
    "huge key count": file_bytes(keys=HUGE),
    "key count beyond the file": file_bytes(keys=1000),
    "one key too many": file_bytes([entry("a", U8, b"\0")], ONE, DATA, keys=2),
    "ends after the magic": b"GGUF",
    "ends in the counts": file_bytes()[:20],
    "huge key length": file_bytes([struct.pack("<Q", HUGE) + b"key" * 20], ONE, DATA),
    "negative key length": file_bytes([struct.pack("<q", -1) + b"key" * 20], ONE, DATA),
    "empty key": file_bytes([entry("", U8, b"\0" * 9)], ONE, DATA),
    "key of 100 kB": file_bytes([entry("k" * 100_000, U8, b"\0")], ONE, DATA),
    "key that is not UTF-8": file_bytes([entry(b"\xff\xfe", U8, b"\0" * 9)], ONE, DATA),
    "unknown value type": file_bytes([entry("key", 13, b"\0" * 9)], ONE, DATA),
    "huge value type": file_bytes([entry("key", 2**32 - 1, b"\0" * 9)], ONE, DATA),
    "duplicate keys": file_bytes([entry("key", U8, b"\0"), entry("key", U8, b"\1")], ONE, DATA),
    "string beyond the file": file_bytes([entry("key", STRING, struct.pack("<Q", 10_000))], ONE, DATA),
    "huge string": file_bytes([entry("key", STRING, struct.pack("<Q", HUGE - 1))], ONE, DATA),
    "array of unknown type": file_bytes(
        [entry("key", ARRAY, struct.pack("<IQ", 77, 1) + b"\0" * 8)], ONE, DATA
    ),
    "array of arrays": file_bytes(
        [entry("key", ARRAY, struct.pack("<IQ", ARRAY, 1) + b"\0" * 24)], ONE, DATA
    ),
    "array longer than the file": file_bytes([entry("key", ARRAY, struct.pack("<IQ", U64, 1000))], ONE, DATA),
    "array whose bytes overflow": file_bytes(
        [entry("key", ARRAY, struct.pack("<IQ", U64, 2**61 + 1))], ONE, DATA
    ),
    "strings beyond the file": file_bytes([entry("key", ARRAY, struct.pack("<IQ", STRING, 5))], ONE, DATA),
    "huge count of strings": file_bytes([entry("key", ARRAY, struct.pack("<IQ", STRING, HUGE))], ONE, DATA),
    "string in an array beyond the file": file_bytes(
        [entry("key", ARRAY, struct.pack("<IQQ", STRING, 1, HUGE))], ONE, DATA
    ),
    "alignment 0": file_bytes([entry("general.alignment", U32, struct.pack("<I", 0))], ONE, DATA),
    "alignment not a power of two": file_bytes(
        [entry("general.alignment", U32, struct.pack("<I", 37))], ONE, DATA
    ),
    "alignment huge": file_bytes([entry("general.alignment", U32, struct.pack("<I", 2**31))], ONE, DATA),
    "alignment a string": file_bytes([entry("general.alignment", STRING, text("32"))], ONE, DATA),
    "alignment true": file_bytes([entry("general.alignment", BOOL, b"\1")], ONE, DATA),
    "alignment a fraction": file_bytes([entry("general.alignment", F32, struct.pack("<f", 32))], ONE, DATA),
    "no dimensions": file_bytes(infos=[info("x", ())], data=DATA),
    "five dimensions": file_bytes(infos=[info("x", (2, 2, 2, 2, 2))], data=bytes(128)),
    "huge number of dimensions": file_bytes(infos=[text("x") + struct.pack("<I", 2**32 - 1) + bytes(64)]),
    "a dimension of 0": file_bytes(infos=[info("x", (4, 0))], data=DATA),
    "a huge dimension": file_bytes(infos=[info("x", (HUGE, 1))], data=DATA),
    "a negative dimension": file_bytes(infos=[info("x", (2**64 - 4, 2))], data=DATA),
    "dimensions that multiply past 64 bits": file_bytes(infos=[info("x", (2**32, 2**32))], data=DATA),
    "dimensions that wrap to 8": file_bytes(infos=[info("x", (2**33, 2**31 + 1, 2, 4))], data=DATA),
    "unknown tensor type": file_bytes(infos=[info("x", (4, 2), 99)], data=DATA),
    "a removed tensor type": file_bytes(infos=[info("x", (32, 1), 4)], data=DATA),
    "rows that do not fill blocks": file_bytes(infos=[info("x", (31, 1), 2)], data=DATA),
    "K-quant rows that do not fill blocks": file_bytes(infos=[info("x", (32, 8), 12)], data=bytes(160)),
    "offset not aligned": file_bytes(infos=[info("x", (4, 2), 0, 8)], data=bytes(64)),
    "offset beyond the file": file_bytes(infos=[info("x", (4, 2), 0, 3200)], data=DATA),
    "huge offset": file_bytes(infos=[info("x", (4, 2), 0, 2**64 - 32)], data=DATA),
    "data cut off": file_bytes(infos=ONE, data=bytes(31)),
    "no data": file_bytes(infos=ONE),
    "duplicate tensors": file_bytes(infos=[info("x", (4, 2)), info("x", (4, 2), 0, 32)], data=bytes(64)),
    "overlapping tensors": file_bytes(infos=[info("x", (4, 4)), info("y", (4, 2), 0, 32)], data=bytes(64)),
    "two tensors in one place": file_bytes(infos=[info("x", (4, 2)), info("y", (4, 2))], data=DATA),
    "nameless tensor": file_bytes(infos=[info("", (4, 2))], data=DATA),
    "tensor name of 100 kB": file_bytes(infos=[info("x" * 100_000, (4, 2))], data=DATA),
    "tensor name that is not UTF-8": file_bytes(infos=[info(b"\xc3\x28", (4, 2))], data=DATA),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_ends_in_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(MALFORMED[name])
    with pytest.raises(ModelError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 1000 or "100" in name
    with pytest.raises(ModelError):
        open_checkpoint(str(path))


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="Cannot read"):
        read_gguf(tmp_path)


def test_every_truncation_of_a_file_is_noticed(tmp_path: Path) -> None:
    whole = small_file()
    path = tmp_path / "cut.gguf"
    for size in range(len(whole) - 10):  # the last 10 bytes are padding
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            read_gguf(path)


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for number, (name, block, size) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name
        assert gguf.GGML_QUANT_SIZES[kind] == (block, size)


@pytest.mark.parametrize("kind", [number for number in TYPES if number > 1 and TYPES[number][1] > 1])
def test_every_quantisation_dequantises_as_in_the_gguf_package(kind: int) -> None:
    name, block, size = TYPES[kind]
    blocks = np.random.default_rng(kind).integers(256, size=(6, 512 // block * size), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random bytes hold NaNs and infinities too
        theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind))
        ours = GGUFTensor(blocks, name, 512).numpy()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_twin_comes_back_from_gguf(name: str) -> None:
    """Names, permutations, offsets and every setting, for each architecture as llama.cpp's converter writes it."""
    ours, theirs = open_checkpoint(str(gguf_twin(name))), open_checkpoint(str(twin(name)))
    assert ours.names() == theirs.names()
    for tensor in ours.names():
        tolerance = 2e-7 if "gemma" in name else 0.0  # Gemma's norms went through 1 + w
        np.testing.assert_allclose(
            ours.tensor(tensor).numpy(), theirs.tensor(tensor).numpy(), rtol=0, atol=tolerance
        )
    differences = _differences(ours.architecture, theirs.architecture)
    windowed = {"layers"} if name in ("qwen2", "smollm3") else set()  # GGUF has no word for their windows
    scaled = {"layers"} if name.startswith("gemma") else set()  # nor for Gemma's scalar
    rounded = {"ropes"} if name == "llama3" else set()
    assert differences == windowed | scaled | rounded
    if rounded:
        ours_rope, theirs_rope = ours.architecture.ropes[0], theirs.architecture.ropes[0]
        np.testing.assert_allclose(ours_rope.inverse_frequencies, theirs_rope.inverse_frequencies, rtol=1e-6)
        assert ours_rope.attention_factor == 1.0
        assert ours_rope.long_inverse_frequencies is None


@pytest.mark.parametrize("name", MODERN)
def test_a_modern_twin_comes_back_from_gguf(name: str) -> None:
    """Files as llama.cpp reads them (test_llama_cpp.py): experts, routers, sinks, short convolutions."""
    ours, theirs = open_checkpoint(str(modern_twin(name))), open_checkpoint(str(twin(name)))
    assert sorted(ours.names()) == sorted(theirs.names())
    for tensor in ours.names():
        tolerance = 2e-7 if name in ("gguf-gemma", "gguf-nemotron") else 0.0  # norms that went through 1 + w
        np.testing.assert_allclose(
            ours.tensor(tensor).numpy(), theirs.tensor(tensor).numpy(), rtol=0, atol=tolerance
        )
    assert _differences(ours.architecture, theirs.architecture) == set()


def test_every_architecture_has_a_twin() -> None:
    named = {name.partition("/")[0] for name in ROWS}
    assert {*ARCHITECTURES.values(), *MODERN.values(), *CONVERTED.values(), "mistral"} == named


def _differences(ours: Any, theirs: Any) -> set[str]:
    return {
        field
        for field in vars(theirs)
        if repr(getattr(ours, field)) != repr(getattr(theirs, field))
        and not (
            isinstance(getattr(ours, field), float)
            and abs(getattr(ours, field) - getattr(theirs, field)) < 1e-6
        )
    }


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("general.architecture", "mamba", "mamba"),
        ("general.architecture", "a\nb" * 100, "architecture"),
        ("llama.expert_count", 8, "experts"),
        ("split.count", 3, "NAME-00001-of-00003.gguf"),
        ("llama.attention.head_count", 0, "head count"),
        ("llama.attention.head_count_kv", 3, "heads"),
        ("llama.attention.value_length", 3, "value"),
        ("llama.block_count", 10**6, "num_hidden_layers"),
        ("llama.context_length", 0, "max_position_embeddings"),
        ("llama.rope.scaling.type", "wobbly", "wobbly"),
        ("llama.rope.dimension_count", 8, "partial_rotary_factor"),
        ("llama.embedding_length", 128, "shape"),
        ("llama.feed_forward_length", 100, "shape"),
        ("llama.block_count", 5, "lacks"),
        ("llama.block_count", 3, "does not have"),
    ],
)
def test_metadata_that_does_not_fit_is_named(key: str, value: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    source = read_gguf(gguf_twin("llama"))
    metadata = {each: source.metadata[each] for each in source.metadata if not each.startswith("tokenizer")}
    metadata[key] = value
    entries = []
    for name, each in metadata.items():
        if isinstance(each, str):
            entries.append(entry(name, STRING, text(each)))
        elif isinstance(each, float):
            entries.append(entry(name, F32, struct.pack("<f", each)))
        else:
            entries.append(entry(name, U32, struct.pack("<I", each)))
    infos, data = [], b""
    for name, tensor in source.tensors.items():
        infos.append(info(name, tensor.shape[::-1], 0, len(data)))
        data += source.tensors[name].numpy().tobytes()
        data += b"\0" * (-len(data) % 32)
    path.write_bytes(file_bytes(entries, infos, data))
    with pytest.raises(ModelError, match=named) as caught:
        open_checkpoint(str(path))
    assert len(str(caught.value)) < 500


def test_a_tensor_that_has_no_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "more.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    source = read_gguf(gguf_twin("llama"))
    for key, value in source.metadata.items():
        if key.startswith("llama."):
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name in source.tensors:
        writer.add_tensor(name, np.array(source.tensors[name].numpy()))
    writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32))
    from tests.ggufs import write

    write(writer)
    with pytest.raises(ModelError, match="attn_sinks"):
        open_checkpoint(str(path))


def test_the_config_of_a_twin_says_what_it_is() -> None:
    config = open_checkpoint(str(gguf_twin("llama-tied"))).config
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-6  # float32 in the file, and not 9.99999997e-07
    assert config["attention_bias"] is True
