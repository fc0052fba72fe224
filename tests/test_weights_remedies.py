"""Every remedy that a message about files names, tried: it mends what the message is about."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import tempo_mlx
from tempo_mlx.errors import ModelError, TempoError
from tempo_mlx.weights import manage, open_checkpoint
from tempo_mlx.weights.convert import convert
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


def test_of_a_gguf_that_nobody_can_read_there_is_another(tmp_path: Path) -> None:
    """A fresh copy of a file in a removed type, or of an old version, is the same file."""
    path, whole = tmp_path / "model.gguf", gguf_twin("llama").read_bytes()
    name = b"output_norm.weight"
    kind = whole.index(name) + len(name) + 4 + 8  # after the number of dimensions and the one there is
    path.write_bytes(whole[:kind] + (31).to_bytes(4, "little") + whole[kind + 4 :])
    said = message(path)
    assert "type 31 (Q4_0_4_4)" in said and "take another quantisation of the model" in said
    for version in (1, 3 << 24):
        path.write_bytes(whole[:4] + version.to_bytes(4, "little") + whole[8:])
        said = message(path)
        assert f"version {version}" in said and "take a newer conversion of the model" in said
    path.write_bytes(whole)
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


def test_a_key_that_does_not_matter_may_be_removed(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_experts": 8}))
    assert "num_experts = 8" in (said := message(model)) and "remove the key if it does not" in said
    (model / "config.json").write_text(json.dumps(config))
    assert works(model)


def test_a_directory_needs_weights_of_one_of_two_kinds(model: Path) -> None:
    shutil.move(model / "model.safetensors", model / "pytorch_model.bin")
    assert message(model).endswith("give a directory that has one of the two.")
    shutil.copy(gguf_twin("llama"), model)
    assert works(model)


def test_of_a_foreign_quantisation_there_may_be_one_in_mlx_s_or_as_gguf(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    foreign = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    (model / "config.json").write_text(json.dumps(foreign))
    assert "look for an mlx-community or GGUF version of it" in message(model)
    assert works(convert(str(twin("llama")), tmp_path / "mlx", bits=4, group_size=32))
    assert works(gguf_twin("llama"))


REMEDIES = [
    ({"backend": "torch", "kv_bits": 8}, "leave it out, or choose --backend mlx", [{"backend": "torch"}, {}]),
    ({"kv_bits": 8}, "leave out --kv-bits", [{}]),
    ({"device": "mps"}, "run with --device cpu or auto", [{"device": "cpu"}, {"device": "auto"}]),
    (
        {"backend": "torch", "device": "mps"},
        "choose another --device",
        [{"backend": "torch", "device": "cpu"}],
    ),
    (
        {"max_memory_gb": 0.0001},
        "what would do: a smaller model, or a higher --max-memory-gb",
        [{"max_memory_gb": 0.1}],
    ),
]


@pytest.mark.skipif(sys.platform == "darwin", reason="--device mps is there")
@pytest.mark.parametrize(("asked", "said", "remedies"), REMEDIES)
def test_what_a_load_was_told_otherwise_works(
    asked: dict[str, Any], said: str, remedies: list[dict[str, Any]]
) -> None:
    pytest.importorskip("torch")
    with pytest.raises(TempoError, match=re.escape(said)):
        tempo_mlx.load(str(twin("llama")), **asked)
    for remedy in remedies:
        assert tempo_mlx.load(str(twin("llama")), **remedy).model.info


def test_the_torch_extra_is_there() -> None:
    """BackendError names it where PyTorch is missing."""
    project = Path(tempo_mlx.__file__).parent.parent / "pyproject.toml"
    assert re.search(r'^torch = \["torch', project.read_text(), re.MULTILINE)


def test_without_a_template_there_is_the_text_as_it_is(model: Path) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    for template in (None, "{% for", "{{ 1 / 0 }}"):
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        loaded = tempo_mlx.load(str(model))
        with pytest.raises(TempoError, match="use --raw"):
            tempo_mlx.generate(loaded, "the", max_tokens=1, chat=True)
        assert tempo_mlx.generate(loaded, "the", max_tokens=1, chat=False).steps  # --raw


def test_rules_that_rewrite_text_are_read_from_what_transformers_converts(model: Path) -> None:
    pieces = pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    text = model.parent / "text.txt"
    text.write_text("the sand and the sea, the wind and the rain over the land\n" * 40)
    pieces.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(model / "tokenizer"), vocab_size=40, model_type="unigram",
        normalization_rule_name="nfkc", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    assert message(model).endswith("convert the tokenizer with transformers.")
    converted = transformers.AutoTokenizer.from_pretrained(model)
    converted.save_pretrained(model)
    assert works(model)
    ours = open_checkpoint(str(model)).tokenizer().encode("the sand and the sea")
    assert converted("the sand and the sea")["input_ids"] == ours
