"""What a model is like, memory limits, removal, and the command lines over them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tempo_mlx.cli.main import main
from tempo_mlx.errors import MemoryLimitError, ModelError, OutputError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.loading import load_model
from tempo_mlx.weights import manage, open_checkpoint
from tempo_mlx.weights.memory import estimate_memory
from tempo_mlx.weights.registry import PACKAGED
from tests.ggufs import gguf_twin
from tests.twins import twin


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    monkeypatch.setattr(manage, "_hub_cache", lambda: None)
    path = PACKAGED["smollm2-135m"].path
    path.parent.mkdir(parents=True)
    return path


def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A Hugging Face cache with one model and one data set; returns what is deleted from it."""
    deleted: list[tuple[str, ...]] = []

    def repo(name: str, kind: str) -> Any:
        revision = SimpleNamespace(commit_hash="c" * 40)
        return SimpleNamespace(repo_id=name, repo_type=kind, size_on_disk=7, revisions=[revision])

    def delete_revisions(*revisions: str) -> Any:
        return SimpleNamespace(expected_freed_size=7, execute=lambda: deleted.append(revisions))

    repos = [repo("owner/model", "model"), repo("owner/data", "dataset")]
    found = SimpleNamespace(repos=repos, delete_revisions=delete_revisions)
    monkeypatch.setattr(manage, "_hub_cache", lambda: found)
    return deleted


def test_a_packaged_model_is_removed_once(cache: Path) -> None:
    cache.write_bytes(b"x" * 10)
    assert manage.remove("smollm2-135m") == (str(cache), 10)
    assert not cache.exists()
    with pytest.raises(ModelError, match="nothing to remove"):
        manage.remove("smollm2-135m")


def test_a_model_of_the_hub_is_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted = hub(monkeypatch)
    assert manage.remove("owner/model") == ("owner/model", 7)
    assert deleted == [("c" * 40,)]


def test_files_of_ones_own_are_not_removed(cache: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"x")
    with pytest.raises(ModelError, match="delete it yourself"):
        manage.remove(str(mine))
    with pytest.raises(ModelError, match="models list"):
        manage.remove("owner/none")
    assert mine.exists()


def test_what_cannot_be_deleted_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_bytes(b"x")

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        manage.remove("smollm2-135m")


def test_a_description_counts_parameters_and_memory(tmp_path: Path) -> None:
    from tests.twins import reference

    checkpoint = open_checkpoint(str(twin("llama")))
    about = manage.describe(checkpoint, 10**6, cpu_packs=True)
    numbers = sum(each.numel() for each in reference("llama").parameters())
    assert checkpoint.parameters == numbers
    assert about.slots == 256  # the model's context
    (on_cpu, wide), (on_gpu, half) = about.computed["cpu"], about.computed["gpu"]
    assert (on_cpu.dtype, on_gpu.dtype) == ("float32", "bfloat16")
    assert wide.weights == 4 * numbers == 2 * half.weights
    assert wide.cache == 2 * 4 * 2 * 16 * 256 * 4
    assert wide.total > wide.weights + wide.cache
    assert (about.requantised, about.loss) == (0, 0.0)
    assert about.licence is None
    own = Path(shutil.copytree(twin("llama"), tmp_path / "own"))
    (own / "LICENSE").write_text("free")
    assert open_checkpoint(str(own)).licence == "see LICENSE"
    (own / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n")
    assert open_checkpoint(str(own)).licence == "mit"


def test_memory_grows_with_what_uses_it() -> None:
    checkpoint = open_checkpoint(str(gguf_twin("llama")))
    base = estimate_memory(checkpoint, dtype="float32", slots=128, width=1)
    assert estimate_memory(checkpoint, dtype="float32", slots=512, width=1).cache > base.cache
    assert estimate_memory(checkpoint, dtype="float32", slots=128, width=8).rows == 8 * base.rows
    assert estimate_memory(checkpoint, dtype="float16", slots=128, width=1).weights * 2 == base.weights
    assert estimate_memory(checkpoint, dtype="float32", slots=128, width=1, kv_bits=4).cache < base.cache / 4


def test_a_limit_is_held_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(twin("llama")))
    need = estimate_memory(checkpoint, dtype="float32").total / 1e9
    config = LoadConfig(model=str(twin("llama")), dtype="float32", max_memory_gb=need * 1.01)
    assert load_model(config).model.architecture.vocab_size == 320
    for backend in ("mlx", "torch"):
        config = LoadConfig(
            model=str(twin("llama")), backend=backend, dtype="float32", max_memory_gb=need * 0.99
        )
        with monkeypatch.context() as patch:
            patch.setattr(
                "tempo_mlx.weights.checkpoint.Checkpoint.tokenizer", lambda self: pytest.fail("loaded")
            )
            with pytest.raises(MemoryLimitError):
                load_model(config)


def test_the_command_lines(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "out")
    assert main(["convert", str(twin("llama")), target, "--quantize", "4", "--group-size", "32"]) == 0
    assert capsys.readouterr().out.strip() == target
    assert main(["models", "info", target]) == 0
    shown = capsys.readouterr().out
    for fact in ("llama", "mlx 4-bit, group 32", "256 tokens", "on a GPU", "licence"):
        assert fact in shown
    assert main(["convert", str(twin("llama")), target]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(twin("llama")), target + "2", "--quantize", "7"]) == 2
    assert "7 bits" in capsys.readouterr().err
    cache.write_bytes(b"x")
    assert main(["models", "remove", "smollm2-135m"]) == 0
    assert main(["models", "remove", "smollm2-135m"]) == 1
    assert main(["models"]) == 0  # alone it lists, and says what else there is
    said = capsys.readouterr().err
    assert all(f"tempo-mlx models {name} " in said for name in ("list", "pull", "info", "remove"))
