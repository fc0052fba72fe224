"""Every remedy that a message about files names, tried: it mends what the message is about."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tempo_mlx.errors import ModelError
from tempo_mlx.weights import manage, open_checkpoint
from tests.ggufs import gguf_twin
from tests.twins import twin


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(twin("llama"), tmp_path / "model", ignore=shutil.ignore_patterns("*.gguf")))


def message(path: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(str(path)).tokenizer()
    return str(caught.value)


def works(path: Path | str) -> bool:
    return bool(open_checkpoint(str(path)).tokenizer().encode("a"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def page(path: Path) -> None:
    """What a proxy answers instead of the file."""
    path.write_bytes(b"<html>502</html>")


DAMAGES = [
    (name, how) for name in ("model.safetensors", "config.json", "tokenizer.json") for how in (cut, page)
]


@pytest.mark.parametrize(("name", "damage"), [*DAMAGES, ("config.json", Path.unlink)])
def test_a_fresh_copy_mends_a_damaged_file(name: str, damage: Callable[[Path], None], model: Path) -> None:
    damage(model / name)
    said = message(model)
    assert said.startswith(str(model / name)) and said.endswith("; fetch it again.")
    shutil.copy(twin("llama") / name, model)
    assert works(model)


@pytest.mark.parametrize("damage", [cut, page])
def test_a_fresh_copy_mends_a_gguf(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = Path(shutil.copy(gguf_twin("llama"), tmp_path))
    damage(path)
    assert message(path).endswith("; fetch it again.")
    shutil.copy(gguf_twin("llama"), path)
    assert works(path)


def test_what_is_damaged_in_the_hub_s_cache_is_removed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's library does not fetch what lies in its cache, whatever it holds."""
    hub = pytest.importorskip("huggingface_hub")
    home = tmp_path / "hub" / "models--owner--name"
    snapshot = home / "snapshots" / ("a" * 40)
    for name in ("platformdirs.user_cache_dir", "tempo_mlx.weights.registry.platformdirs.user_cache_dir"):
        monkeypatch.setattr(name, lambda each: str(tmp_path / "cache" / each))

    def snapshot_download(repo: str, **named: object) -> str:
        for file in twin("llama").iterdir():
            blob = home / "blobs" / file.name
            if not blob.exists() and file.suffix != ".gguf":
                for folder in (blob.parent, snapshot, home / "refs"):
                    folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, blob)
                (snapshot / file.name).symlink_to(blob)
        (home / "refs" / "main").write_text("a" * 40)
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(manage, "_hub_cache", lambda: hub.scan_cache_dir(tmp_path / "hub"))
    assert works("owner/name")
    cut(home / "blobs" / "model.safetensors")
    said = message("owner/name")
    assert message("owner/name") == said  # trying again alone does not help
    command = re.search(r"run `tempo-mlx models remove (\S+)` and try again", said)
    assert command is not None
    manage.remove(command[1])
    assert works("owner/name")


def test_a_tokenizer_s_files_may_come_from_the_model_it_was_made_from(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert message(model).endswith("put those of the model it was made from beside it.")
    shutil.copy(twin("qwen2") / "tokenizer.json", model)
    assert works(model)


def test_an_index_without_a_table_is_removed(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index.write_text("{}")
    assert "remove it, and the weight files beside it are read" in message(model)
    index.unlink()
    assert works(model)


def test_all_weight_files_are_needed(model: Path) -> None:
    arrays = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    first, second = (dict(list(arrays.items())[place::2]) for place in (0, 1))
    save_file(first, model / "model-00001-of-00002.safetensors")
    assert message(model).endswith("see that all its weight files are there.")
    save_file(second, model / "model-00002-of-00002.safetensors")
    assert works(model)


def test_two_weight_files_of_the_same_tensors(model: Path) -> None:
    shutil.move(model / "model.safetensors", model / "weights.safetensors")
    shutil.copy(model / "weights.safetensors", model / "old.safetensors")
    assert "take away the one that is not the model's" in message(model)
    (model / "old.safetensors").unlink()
    assert works(model)


def test_no_other_message_tells_to_fetch_again(model: Path) -> None:
    """What its maker did wrong comes back with every copy."""
    config = json.loads((model / "config.json").read_text())
    for changes in ({"hidden_size": 128}, {"model_type": "unheard-of"}, {"quantization": {"bits": 4}}):
        (model / "config.json").write_text(json.dumps({**config, **changes}))
        assert "fetch" not in message(model)
