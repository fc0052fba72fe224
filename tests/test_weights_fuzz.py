"""Thousands of damaged files: each opens or ends in a ModelError, without taking memory for what it only claims."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tempo_mlx.architecture.families import FAMILIES, architecture_from_config
from tempo_mlx.errors import ModelError, TempoError
from tempo_mlx.weights import open_checkpoint
from tempo_mlx.weights.gguf_file import read_gguf
from tempo_mlx.weights.safetensors_file import read_safetensors
from tempo_mlx.weights.tokenizer_files import from_directory
from tempo_mlx.weights.tokenizer_gguf import from_gguf
from tests.ggufs import add_sentencepiece_tokenizer, gguf_twin, small_file, write
from tests.twins import twin

FUZZ = settings(
    max_examples=600,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SLACK = 3 << 20  # what Python and the libraries take by themselves, first-time imports included

NUMBERS = [
    0,
    1,
    2,
    31,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**61 + 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
edits = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),  # where in the header
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from(NUMBERS).map(lambda number: struct.pack("<Q", number)),
            st.sampled_from(NUMBERS).map(lambda number: struct.pack("<I", number & 0xFFFFFFFF)),
        ),
        st.sampled_from(["overwrite", "insert", "cut"]),
    ),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, header: int, changes: list[tuple[float, bytes, str]]) -> bytes:
    for where, value, how in changes:
        at = int(where * header)
        after = at if how == "insert" else at + len(value)
        data = data[:at] + (b"" if how == "cut" else value) + data[after:]
    return data


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """No more memory than twice the file, and what Python itself takes."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * size + SLACK, f"{peak} bytes for a file of {size}"


def header_size(path: Path) -> int:
    return int(gguf.GGUFReader(path).data_offset)


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, int]]:
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "small.gguf").write_bytes(small_file())
    writer = gguf.GGUFWriter(directory / "spm.gguf", "llama")
    add_sentencepiece_tokenizer(writer, space_prefix=True)
    writer.add_tensor("x", np.zeros(8, np.float32))
    write(writer)
    paths = [gguf_twin("llama"), gguf_twin("phi4"), directory / "small.gguf", directory / "spm.gguf"]
    return [(path.read_bytes(), header_size(path)) for path in paths]


@settings(FUZZ, max_examples=1500)
@given(which=st.integers(0, 3), changes=edits, keep=st.one_of(st.none(), st.floats(0, 1)))
def test_gguf(
    which: int, changes: Any, keep: float | None, gguf_files: list[tuple[bytes, int]], tmp_path: Path
) -> None:
    data, header = gguf_files[which]
    data = damaged(data, header, changes)
    if keep is not None:
        data = data[: int(keep * len(data))]
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(data)
    with bounded(len(data)):
        try:
            open_checkpoint(str(path))
        except ModelError as error:
            assert "\n" not in str(error)
    try:
        file = read_gguf(path)
    except ModelError:
        return
    for name in file.tensors:
        with np.errstate(all="ignore"):
            assert file.tensors[name].numpy().size
    with bounded(len(data)), suppress(TempoError):
        from_gguf(file, 420).encode("the cat <|im_end|> 12")


@FUZZ
@given(changes=edits, text=st.booleans())
def test_safetensors(changes: Any, text: bool, tmp_path: Path) -> None:
    data = (twin("llama") / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    if text:  # stay within the JSON, so that its length is still right
        changes = [
            (max(where, 9 / header), bytes(b % 95 + 32 for b in value), "overwrite")
            for where, value, _ in changes
        ]
    data = damaged(data, header, changes)
    directory = tmp_path / "model"
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(data)
    shutil.copy(twin("llama") / "config.json", directory)
    with bounded(len(data)):
        try:
            open_checkpoint(str(directory))
        except ModelError as error:
            assert "\n" not in str(error)
    try:
        file = read_safetensors(directory / "model.safetensors")
    except ModelError:
        return
    for name in file.arrays:
        file.array(name)


odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 1e-9, 0.5, 10**6, 2**31, 10**12, 10**400, -(10**400), 1e308]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=5),
    st.sampled_from(
        ["sliding_attention", "silu", "yarn", "longrope", "llama3", "linear", "dynamic", *FAMILIES]
    ),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=8),
    st.dictionaries(
        st.sampled_from(["rope_type", "factor", "type", "full_attention"]), st.one_of(st.text(), st.floats())
    ),
)


@pytest.mark.slow
@settings(FUZZ, max_examples=1500)
@given(data=st.data(), family=st.sampled_from(list(FAMILIES)))
def test_config_values(data: st.DataObject, family: str) -> None:
    keys = sorted(
        {*FAMILIES[family].defaults, "rope_scaling", "rope_parameters", "model_type", "text_config"}
    )
    config: dict[str, Any] = {"model_type": family}
    config |= data.draw(st.dictionaries(st.sampled_from(keys), odd_values, min_size=1, max_size=6))
    if isinstance(config.get("rope_scaling"), dict):
        rope = st.dictionaries(
            st.sampled_from(["rope_type", "factor", "low_freq_factor", "high_freq_factor", "short_factor",
                             "long_factor", "beta_fast", "beta_slow", "attention_factor", "mscale",
                             "mscale_all_dim", "truncate",
                             "original_max_position_embeddings", "rope_theta", "partial_rotary_factor"]),
            odd_values,
        )  # fmt: skip
        config["rope_scaling"] |= data.draw(rope)
    with bounded(0):
        try:
            architecture = architecture_from_config(config)
        except ModelError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            return
    for rope_ in architecture.ropes:
        assert np.all(np.isfinite(rope_.inverse_frequencies))
        assert np.isfinite(rope_.attention_factor)


PIECES = [
    '"',
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "9" * 30,
    "-1",
    "null",
    "true",
    "1e999",
    "\\ud800",
    "\\u0000",
    "NaN",
]
PIECES += ["[" * 3000, '{"a":' * 300, "x", ""]


def text_edits(text: str, draw: Any) -> str:
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        after = at + draw(st.integers(0, 6))
        piece = draw(st.sampled_from(PIECES))
        text = text[:at] + piece + text[after:]
    return text


@settings(FUZZ, max_examples=300)
@given(
    data=st.data(), name=st.sampled_from(["config.json", "tokenizer_config.json", "generation_config.json"])
)
def test_json_files(data: st.DataObject, name: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    if not directory.exists():
        shutil.copytree(twin("llama"), directory, ignore=shutil.ignore_patterns("*.gguf"))
    original = (twin("llama") / name).read_text()
    (directory / name).write_text(text_edits(original, data.draw))
    try:
        with bounded((directory / "model.safetensors").stat().st_size):
            try:
                checkpoint = open_checkpoint(str(directory))
                checkpoint.tokenizer().chat([{"role": "user", "content": "the"}])
            except TempoError as error:
                assert "\n" not in str(error)
    finally:
        (directory / name).write_text(original)


@settings(FUZZ, max_examples=400)
@given(data=st.data())
def test_tokenizer_json(data: st.DataObject, tmp_path: Path) -> None:
    table = json.loads((twin("llama") / "tokenizer.json").read_text())
    table["model"]["vocab"] = dict(list(table["model"]["vocab"].items())[::20])
    table["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(text_edits(json.dumps(table), data.draw))
    try:
        tokenizer = from_directory(tmp_path, {}, 320)
        tokenizer.decode(tokenizer.encode("the cat <|im_end|> 12"))
    except TempoError as error:
        assert "\n" not in str(error)
