"""Names that mean models: those worth running, those other programs keep on this disk, and Ollama's commands."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import tempo_mlx
from tempo_mlx.architecture.families import FAMILIES
from tempo_mlx.cli.main import main
from tempo_mlx.cli.ollama import in_our_words
from tempo_mlx.errors import DownloadError, ModelError
from tempo_mlx.mlx import mx
from tempo_mlx.weights import manage
from tempo_mlx.weights.download import locate
from tempo_mlx.weights.local import find_local, local_models
from tempo_mlx.weights.registry import KNOWN, PACKAGED
from tests.ggufs import gguf_twin
from tests.twins import twin

COMMIT = "c" * 40


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, in which no program keeps anything yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hub_repo(home: Path, name: str = "owner/tiny") -> Path:
    """A repo as the hub's library caches it."""
    repo = home / "hub" / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return Path(
        shutil.copytree(twin("llama"), repo / "snapshots" / COMMIT, ignore=shutil.ignore_patterns("*.gguf"))
    )


def ollama(
    models: Path, name: str, *kinds: str, host: str = "registry.ollama.ai", blob: bytes | None = None
) -> Path:
    """A model as Ollama keeps it: a manifest whose first layer is the GGUF file; `kinds` of further layers."""
    content = gguf_twin("llama").read_bytes() if blob is None else blob
    digest = hashlib.sha256(content).hexdigest()
    layers = [{"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}", "size": 1}
              for kind in ("model", "template", *kinds)]  # fmt: skip
    manifest = models / "manifests" / host / name.replace(":", "/")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "config": {"digest": "sha256:00"}, "layers": layers}))
    (models / "blobs").mkdir(exist_ok=True)
    (models / "blobs" / f"sha256-{digest}").write_bytes(content)
    return manifest


def lm_studio(home: Path, name: str, *files: str, under: str = ".lmstudio/models") -> Path:
    """A folder as LM Studio keeps it, with these .gguf files; without, the twin's safetensors."""
    folder = home / under / name
    if not files:
        return Path(shutil.copytree(twin("llama"), folder, ignore=shutil.ignore_patterns("*.gguf")))
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(gguf_twin("llama"), folder / file)
    return folder


def text_of(model: str | Path) -> str:
    return tempo_mlx.generate(tempo_mlx.load(model, device="cpu"), "Once", max_tokens=4, threshold=0.02).text


# Finding and running


@pytest.mark.parametrize(
    "name", ["ollama:llama3.2", "ollama:llama3.2:latest", "llama3.2", "llama3.2:latest", "LLaMA3.2"]
)
def test_a_model_of_ollama_runs_by_its_name_there(home: Path, name: str) -> None:
    ollama(home / ".ollama" / "models", "library/llama3.2:latest")
    assert text_of(name) == text_of(gguf_twin("llama"))


def test_names_of_ollama_are_as_it_writes_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = home / "elsewhere"
    monkeypatch.setenv("OLLAMA_MODELS", str(models))
    ollama(models, "library/llama3.2:latest")
    ollama(models, "library/llama3.2:1b")
    ollama(models, "someone/mine:v1")
    ollama(models, "owner/repo-GGUF:Q4_K_M", host="hf.co")
    ollama(home / ".ollama" / "models", "library/not-there:latest")  # it was told to look elsewhere
    assert {each.name for each in local_models()} == {
        "llama3.2:latest", "llama3.2:1b", "someone/mine:v1", "hf.co/owner/repo-GGUF:Q4_K_M"
    }  # fmt: skip
    for name in ("llama3.2:1b", "someone/mine:v1", "ollama:hf.co/owner/repo-GGUF:Q4_K_M"):
        found = find_local(name)
        assert found is not None and found.full_name.endswith(name.removeprefix("ollama:"))
    assert find_local("mine") is None


def test_what_ollama_keeps_that_cannot_be_read_is_passed_over(home: Path) -> None:
    models = home / ".ollama" / "models"
    ollama(models, "library/good:latest")
    ollama(models, "library/adapted:latest", "adapter")
    ollama(models, "library/double:latest", "model")
    manifest = ollama(models, "library/lost:latest", blob=b"other")
    (models / "blobs" / f"sha256-{hashlib.sha256(b'other').hexdigest()}").unlink()
    for name, content in {
        "json": "{", "list": "[]", "layers": '{"layers": 5}', "none": '{"layers": [null, {}, {"digest": 3}]}',
        "deep": "[" * 100_000,
        "away": json.dumps({"layers": [
            {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../etc/passwd"}]}),
    }.items():  # fmt: skip
        (manifest.parent.parent / name).mkdir()
        (manifest.parent.parent / name / "latest").write_text(content)
    (models / "manifests" / "stray").write_text("{}")
    assert [each.full_name for each in local_models()] == ["ollama:good:latest"]


@pytest.mark.parametrize(
    "name", ["lmstudio:maker/Tiny-GGUF", "maker/Tiny-GGUF", "tiny-gguf", "Tiny", "lmstudio:tiny"]
)
def test_a_model_of_lm_studio_runs_by_its_name_there(home: Path, name: str) -> None:
    lm_studio(home, "maker/Tiny-GGUF", "Tiny-Q4_K_M.gguf", "mmproj-Tiny.gguf")
    assert text_of(name) == text_of(gguf_twin("llama"))


def test_folders_of_lm_studio_with_one_model_and_with_several(home: Path) -> None:
    lm_studio(home, "maker/whole", under=".cache/lm-studio/models")
    lm_studio(home, "maker/Many-GGUF", "many-Q4.gguf", "many-Q8.gguf")
    lm_studio(home, "maker/split", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf")
    half = lm_studio(home, "maker/half", under="pointed/models")
    (half / "model.safetensors").unlink()
    (half / "model.safetensors.index.json").write_text("{}")
    (home / ".lmstudio-home-pointer").write_text(f"{home / 'pointed'}\n")
    lm_studio(home, "maker/pointed", "one.gguf", under="pointed/models")
    found = {each.name: each for each in local_models()}
    assert set(found) == {
        "maker/whole", "maker/Many-GGUF/many-Q4.gguf", "maker/Many-GGUF/many-Q8.gguf", "maker/split", "maker/pointed"
    }  # fmt: skip
    assert found["maker/split"].nbytes == 2 * gguf_twin("llama").stat().st_size
    assert locate("whole") == (home / ".cache" / "lm-studio" / "models" / "maker" / "whole", None)
    assert locate("many-q8")[0].name == "many-Q8.gguf"
    assert text_of("whole") == text_of(twin("llama"))


@pytest.mark.parametrize("name", ["hf:owner/tiny", "owner/tiny", "tiny"])
def test_a_model_in_the_hub_cache_runs_by_its_repo_and_by_its_bare_name(home: Path, name: str) -> None:
    snapshot = hub_repo(home)
    assert locate(name) == (snapshot, COMMIT)
    loaded = tempo_mlx.load(name, device="cpu")
    assert loaded.model.info["revision"] == COMMIT
    assert text_of(name) == text_of(twin("llama"))


def test_a_bare_name_that_several_have_is_refused_with_all_of_them(home: Path) -> None:
    hub_repo(home, "owner/tiny")
    lm_studio(home, "maker/tiny", "tiny.gguf")
    ollama(home / ".ollama" / "models", "library/tiny:latest")
    with pytest.raises(ModelError, match="tiny can be 3 models on this disk; give one of them: hf:owner/tiny, "
                       "lmstudio:maker/tiny, ollama:tiny:latest"):  # fmt: skip
        locate("tiny")
    for name in ("hf:owner/tiny", "lmstudio:maker/tiny", "ollama:tiny"):
        assert locate(name)[0].exists()
    lm_studio(home, "owner/tiny", "tiny.gguf")
    assert locate("owner/tiny")[1] == COMMIT  # a repo id is the hub's


def test_a_program_is_told_apart_from_a_model_it_does_not_have(home: Path) -> None:
    with pytest.raises(
        ModelError, match=r"Ollama has no model 'a' on this disk, and no other that can be read"
    ):
        locate("ollama:a")
    ollama(home / ".ollama" / "models", "library/b:latest")
    with pytest.raises(ModelError, match=r"Ollama has no model 'a' on this disk; it has ollama:b:latest\."):
        locate("ollama:a")
    with pytest.raises(ModelError, match=r"The Hugging Face cache has no model 'b'"):
        locate("hf:b")


def test_a_file_of_that_name_comes_first(home: Path) -> None:
    ollama(home / ".ollama" / "models", "library/tiny:latest")
    Path(shutil.copytree(twin("llama"), home / "tiny", ignore=shutil.ignore_patterns("*.gguf")))
    assert locate("tiny")[0] == Path("tiny")


# Models worth running


def test_a_dozen_models_have_friendly_names() -> None:
    assert len(KNOWN) >= 12 and not set(KNOWN) & set(PACKAGED)
    for name, model in KNOWN.items():
        assert name == model.name and name == name.lower() and "/" not in name
        assert model.family in FAMILIES and model.licence
        assert 0.3e9 < model.parameters < 9e9
        assert 0.5 < model.nbytes / model.parameters < 3  # bytes a number: 4 bits with scales, or 16 bits
    assert {model.repo.split("/")[0] for model in KNOWN.values()} >= {
        "Qwen",
        "HuggingFaceTB",
        "mlx-community",
    }


def test_a_friendly_name_is_its_repo(home: Path) -> None:
    with pytest.raises(DownloadError, match=r"Cannot fetch Qwen/Qwen3-0\.6B from the Hugging"):
        locate("qwen3-0.6b")
    hub_repo(home, "Qwen/Qwen3-0.6B")
    assert locate("qwen3-0.6b")[1] == COMMIT
    assert text_of("qwen3-0.6b") == text_of(twin("llama"))


def test_the_list_says_what_is_here_and_whose_it_is(home: Path) -> None:
    before = {each.name: each for each in manage.list_models()}
    assert set(before) == {*PACKAGED, *KNOWN} and not any(each.present for each in before.values())
    hub_repo(home, "Qwen/Qwen3-0.6B")
    hub_repo(home, "owner/tiny")
    ollama(home / ".ollama" / "models", "library/llama3.2:latest")
    after = {each.name: each for each in manage.list_models()}
    assert set(after) - set(before) == {"owner/tiny", "ollama:llama3.2:latest"}
    assert after["qwen3-0.6b"].present and not after["qwen3-8b"].present
    assert after["qwen3-0.6b"].nbytes == (twin("llama") / "model.safetensors").stat().st_size
    assert after["ollama:llama3.2:latest"].nbytes == gguf_twin("llama").stat().st_size
    assert "Ollama" in after["ollama:llama3.2:latest"].description


def test_what_another_program_keeps_is_not_removed(home: Path) -> None:
    ollama(home / ".ollama" / "models", "library/llama3.2:latest")
    with pytest.raises(ModelError, match=r"ollama:llama3.2:latest belongs to Ollama; remove it there"):
        manage.remove("llama3.2")
    snapshot = hub_repo(home, "Qwen/Qwen3-0.6B")
    assert manage.remove("qwen3-0.6b")[0] == "qwen3-0.6b"
    assert not snapshot.exists()


def test_memory_is_that_of_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from tempo_mlx.cli.models import weights_in_memory

    monkeypatch.setattr("tempo_mlx.model.mlx_backend.choose_device", lambda name: mx.cpu)
    monkeypatch.setattr("tempo_mlx.model.device.cpu_packs", lambda: False)
    assert weights_in_memory(1e9, 0.6e9) == 4e9  # float32
    monkeypatch.setattr("tempo_mlx.model.device.cpu_packs", lambda: True)
    assert weights_in_memory(1e9, 0.6e9) == pytest.approx(0.69e9)  # packed, its scales in float32
    assert weights_in_memory(1e9, 2e9) == 4e9  # nothing to pack
    monkeypatch.setattr("tempo_mlx.model.mlx_backend.choose_device", lambda name: mx.gpu)
    assert weights_in_memory(0.2e9, 0.1e9) == 0.4e9  # 16 bits
    assert weights_in_memory(4e9, 2.3e9) == 2.3e9  # as it is stored


# The command line


@pytest.mark.parametrize("command", [["models"], ["models", "list"], ["list"], ["ls"]])
def test_models_lists(home: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ollama(home / ".ollama" / "models", "library/llama3.2:latest")
    assert main(command) == 0
    said = capsys.readouterr().out
    for words in ("smollm2-135m", "qwen3-0.6b", "ollama:llama3.2:latest", "apache-2.0", "memory"):
        assert words in said, words
    line = next(line for line in said.splitlines() if line.startswith("qwen3-0.6b"))
    assert line.split()[1:3] == ["1.5", "GB"] and " no " in line


def test_run_and_pull_are_understood(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ollama(home / ".ollama" / "models", "library/llama3.2:latest")
    lm_studio(home, "maker/whole")
    settings = ["--max-tokens", "3", "--device", "cpu", "--quiet"]
    assert main(["run", "whole", "Hello", *settings]) == 0
    said = capsys.readouterr().out
    assert main(["ask", "Hello", "--model", str(twin("llama")), *settings]) == 0
    assert said == capsys.readouterr().out
    assert main(["pull", "llama3.2"]) == 0
    assert "sha256-" in capsys.readouterr().out
    assert main(["help", "models"]) == 0
    assert "pull" in capsys.readouterr().out


WORDS: dict[str, list[str]] = {
    "run": ["chat"],
    "run qwen3-4b": ["chat", "--model", "qwen3-4b"],
    "run qwen3-4b hi --seed 3": ["ask", "hi", "--model", "qwen3-4b", "--seed", "3"],
    "run qwen3-4b --seed 3": ["chat", "--model", "qwen3-4b", "--seed", "3"],
    "run --help": ["chat", "--help"],
    "pull qwen3-4b": ["models", "pull", "qwen3-4b"],
    "list": ["models", "list"],
    "rm qwen3-4b": ["models", "remove", "qwen3-4b"],
    "help": ["--help"],
    "help models pull": ["models", "pull", "--help"],
    "generate run": ["generate", "run"],
    "--version": ["--version"],
    "": [],
}


@pytest.mark.parametrize("typed", WORDS)
def test_the_words_of_ollama_in_ours(typed: str) -> None:
    arguments: Any = typed.split()
    assert in_our_words(arguments) == WORDS[typed]
