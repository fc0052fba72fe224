"""Which files are the model: shards and parts, and everything that may lie beside them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tempo_mlx.errors import DownloadError, ModelError
from tempo_mlx.weights import open_checkpoint
from tempo_mlx.weights.gguf_file import read_gguf
from tests.ggufs import gguf_twin, write
from tests.twins import twin

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(twin("llama"), tmp_path / "model", ignore=shutil.ignore_patterns("*.gguf")))


def parts(directory: Path, count: int = 3, **changes: Any) -> list[Path]:
    """The twin's GGUF file, split as llama.cpp's gguf-split does."""
    source = read_gguf(gguf_twin("llama"))
    names = list(source.tensors)
    paths = []
    for index in range(count):
        path = directory / f"llama-{index + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        split = {"split.no": index, "split.count": count, "split.tensors.count": len(names), **changes}
        for key, value in split.items():
            writer.add_uint16(key, value)
        if index == 0:
            copy_metadata(source.metadata, writer)
        for name in names[index::count]:
            writer.add_tensor(name, np.array(source.tensors[name].numpy()))
        write(writer)
        paths.append(path)
    return paths


def copy_metadata(metadata: Any, writer: gguf.GGUFWriter) -> None:
    for key, value in metadata.items():
        if key.startswith("llama."):
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
        elif key.startswith("tokenizer.") and not isinstance(value, (str, int)):
            writer.add_array(key, [each if isinstance(each, str) else int(each) for each in value])
        elif isinstance(value, str) and key != "general.architecture":
            writer.add_string(key, value)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 257)


def test_a_whole_file_wins_over_an_index_of_shards_that_are_gone(directory: Path) -> None:
    places = dict.fromkeys(load_file(directory / "model.safetensors"), "model-00001-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert open_checkpoint(str(directory)).tensor(NAME).shape == (96, 64)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors is missing"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("sharded", [False, True])
def test_what_lies_beside_the_weights_is_not_read(directory: Path, sharded: bool) -> None:
    arrays = load_file(directory / "model.safetensors")
    if sharded:  # and no index
        (directory / "model.safetensors").unlink()
        for index, names in enumerate((list(arrays)[::2], list(arrays)[1::2])):
            shard = directory / f"model-0000{index + 1}-of-00002.safetensors"
            save_file({name: arrays[name] for name in names}, shard)
    before = open_checkpoint(str(directory)).identity
    (directory / "._model.safetensors").write_bytes(b"\0\5\x16\7Mac OS X")
    (directory / "consolidated.safetensors").write_bytes(b"nonsense")
    for name in (
        "adapters.safetensors",
        "adapter_model.safetensors",
        "consolidated-00001-of-00002.safetensors",
    ):
        save_file({"tok_embeddings.weight": np.ones((2, 2), np.float32)}, directory / name)
    (directory / "model-Q8_0.gguf").write_bytes(b"GGUF nonsense")
    checkpoint = open_checkpoint(str(directory))
    np.testing.assert_array_equal(checkpoint.tensor(NAME).numpy(), arrays[NAME])
    assert checkpoint.identity == {**before, "sha256": checkpoint.identity["sha256"]}
    (directory / "consolidated.safetensors").write_bytes(b"other nonsense")
    assert open_checkpoint(str(directory)).identity == checkpoint.identity


def test_the_only_gguf_of_a_directory_is_the_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither \.safetensors weights nor a \.gguf file"):
        open_checkpoint(str(twin("llama").parent))
    shutil.copy(gguf_twin("llama"), tmp_path / "x.gguf")
    for name in ("mmproj-x-f16.gguf", "x.imatrix.gguf", "._x.gguf"):
        (tmp_path / name).write_bytes(b"nonsense")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.path == tmp_path / "x.gguf"
    assert checkpoint.identity["sha256"] == open_checkpoint(str(gguf_twin("llama"))).identity["sha256"]
    assert checkpoint.tokenizer().decode(checkpoint.tokenizer().encode("a cat")) == "a cat"


def test_of_several_the_message_names_each_as_it_can_be_given(tmp_path: Path) -> None:
    for name in ("x-Q4_0.gguf", "x-Q8_0.gguf"):
        shutil.copy(gguf_twin("llama"), tmp_path / name)
    with pytest.raises(ModelError, match="2 GGUF models") as caught:
        open_checkpoint(str(tmp_path))
    given = re.findall(r"\S+\.gguf", str(caught.value).partition("as the model:")[2])
    assert len(given) == 2
    for each in given:
        assert open_checkpoint(each).path.name in ("x-Q4_0.gguf", "x-Q8_0.gguf")


def test_any_part_of_a_split_file_opens_all(tmp_path: Path) -> None:
    whole = open_checkpoint(str(gguf_twin("llama")))
    paths = parts(tmp_path)
    for given in (*paths, tmp_path):
        checkpoint = open_checkpoint(str(given))
        assert checkpoint.names() == whole.names()
        for name in whole.names():
            np.testing.assert_array_equal(checkpoint.tensor(name).numpy(), whole.tensor(name).numpy())
        assert checkpoint.tokenizer().encode("the cat") == whole.tokenizer().encode("the cat")
    before = checkpoint.identity
    data = bytearray(paths[2].read_bytes())
    data[-1] ^= 1
    paths[2].write_bytes(data)
    assert open_checkpoint(str(paths[0])).identity != before


def test_a_part_that_is_missing_or_misnamed_is_told_how_to_mend(tmp_path: Path) -> None:
    paths = parts(tmp_path)
    paths[1].rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"llama-00002-of-00003\.gguf is missing; put it beside"):
        open_checkpoint(str(paths[0]))
    (tmp_path / "elsewhere").rename(paths[1])
    assert open_checkpoint(str(paths[0])).names()
    other = paths[0].rename(tmp_path / "first.gguf")
    with pytest.raises(ModelError, match=r"NAME-00001-of-00003\.gguf"):
        open_checkpoint(str(other))
    other.rename(paths[0])
    assert open_checkpoint(str(paths[0])).names()


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    for changes in ({"split.tensors.count": 99}, {}):
        paths = parts(tmp_path, **changes)
        shutil.copy(paths[1], paths[2])
        with pytest.raises(ModelError, match="not of one model"):
            open_checkpoint(str(paths[0]))


@pytest.mark.parametrize("count", [0, 1])
def test_a_joined_file_is_whole(count: int, tmp_path: Path) -> None:
    (path,) = parts(tmp_path, 1, **{"split.count": count})
    assert open_checkpoint(str(path.rename(tmp_path / "x-00001-of-00009.gguf"))).names()


class Hub:
    """What the hub's library would do with a repo whose files lie in `files`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: Path, snapshot: Path) -> None:
        hub = pytest.importorskip("huggingface_hub")
        self.files, self.snapshot, self.reachable = files, snapshot, True
        self.fetched: list[str] = []
        monkeypatch.setattr(hub, "snapshot_download", self.download)
        monkeypatch.setattr(hub, "list_repo_files", self.names)

    def names(self, repo: str) -> list[str]:
        if not self.reachable:
            raise ConnectionError("no route")
        return [each.relative_to(self.files).as_posix() for each in self.files.rglob("*") if each.is_file()]

    def download(self, repo: str, *, allow_patterns: Any, ignore_patterns: Any, tqdm_class: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.snapshot.mkdir(exist_ok=True)
        if self.reachable:
            chosen = filter_repo_objects(
                self.names(repo), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
            for name in chosen:
                self.fetched.append(name)
                (self.snapshot / name).parent.mkdir(exist_ok=True)
                shutil.copy(self.files / name, self.snapshot / name)
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "repo").mkdir()
    return Hub(monkeypatch, tmp_path / "repo", tmp_path / ("a" * 40))


def test_a_repo_of_one_gguf_is_fetched(hub: Hub) -> None:
    parts(hub.files)
    (hub.files / "README.md").write_text("license: mit")
    checkpoint = open_checkpoint("owner/name")
    assert checkpoint.identity["revision"] == "a" * 40
    assert sorted(hub.fetched) == ["README.md", *(f"llama-0000{n}-of-00003.gguf" for n in (1, 2, 3))]
    hub.reachable = False
    assert open_checkpoint("owner/name").names() == checkpoint.names()


def test_a_repo_of_several_gguf_lists_what_to_give(hub: Hub) -> None:
    (hub.files / "Q8_0").mkdir()
    parts(hub.files / "Q8_0", 2)
    shutil.copy(gguf_twin("llama"), hub.files / "small.gguf")
    with pytest.raises(ModelError, match="owner/name holds 2 GGUF models") as caught:
        open_checkpoint("owner/name")
    given = re.findall(r"owner/name/\S+?\.gguf", str(caught.value))
    assert given == ["owner/name/Q8_0/llama-00001-of-00002.gguf", "owner/name/small.gguf"]
    for each in given:
        assert open_checkpoint(each).names()
    with pytest.raises(DownloadError, match=r"it has no file other\.gguf"):
        open_checkpoint("owner/name/other.gguf")


def test_a_repo_with_weights_brings_neither_gguf_nor_foreign_files(hub: Hub) -> None:
    shutil.copytree(twin("llama"), hub.files, dirs_exist_ok=True)
    shutil.copy(gguf_twin("llama"), hub.files / "small.gguf")
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model.py", "pytorch_model.bin"):
        (hub.files / name).write_bytes(b"x")
    (hub.files / "merges.txt").write_text("#version: 0.2\n")
    open_checkpoint("owner/name")
    assert {"model.safetensors", "config.json", "merges.txt"} <= set(hub.fetched)
    foreign = {"small.gguf", "consolidated.safetensors", "adapter_model.safetensors", "model.py"}
    assert not set(hub.fetched) & {*foreign, "pytorch_model.bin"}
