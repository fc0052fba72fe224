"""Models that other programs keep on this disk: Hugging Face's cache, LM Studio's folders, Ollama's manifests.

Each is named as it is there, after the program: `hf:Qwen/Qwen3-0.6B`, `lmstudio:publisher/repo`, `ollama:llama3.2`. The
program's name can be left out where one model alone is meant. Nothing here is written to, and what another program
left half done or in a form of its own is passed over.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempo_mlx.errors import ModelError
from tempo_mlx.files import at_home
from tempo_mlx.weights.files import FOREIGN, gguf_among, parts_of, safetensors_of

PROGRAMS = {"hf": "the Hugging Face cache", "lmstudio": "LM Studio", "ollama": "Ollama"}
LISTED = 20  # names in a message
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_OLLAMA = "application/vnd.ollama.image."
_REGISTRY, _LIBRARY = "registry.ollama.ai", "library"  # what Ollama leaves out of a name


@dataclass(frozen=True)
class LocalModel:
    """A model on this disk. program: of PROGRAMS; name: as used there; path: a .gguf file or a directory."""

    program: str
    name: str
    path: Path
    nbytes: int

    @property
    def full_name(self) -> str:
        return f"{self.program}:{self.name}"

    @property
    def names(self) -> set[str]:
        """What it is called without the program, in lower case: also without owner, `latest`, or `-GGUF`."""
        name = self.name.lower()
        if self.program == "ollama":
            return {name, name.removesuffix(":latest")}
        last = name.rsplit("/", 1)[-1]
        return {name, last, last.removesuffix("-gguf"), last.removesuffix(".gguf")}


def local_models() -> list[LocalModel]:
    """All of them, by program and name."""
    return [*_hub_models(), *_lm_studio_models(), *_ollama_models()]


def find_local(model: str) -> LocalModel | None:
    """The model that is called so; None where none is, and the name does not say that one must be.

    Raises: ModelError for a name that several have, and for a program's name before a model it does not have.
    """
    program, _, name = model.partition(":")
    named = program in PROGRAMS
    name = name if named else model
    models = [each for each in local_models() if not named or each.program == program]
    found = [each for each in models if each.name == name][:1]  # of a repo id, the hub's is first
    found = found or [each for each in models if name.lower() in each.names]
    if len(found) > 1:
        names = ", ".join(each.full_name for each in found[:LISTED])
        raise ModelError(f"{model} can be {len(found)} models on this disk; give one of them: {names}.")
    if named and not found:
        has = ", ".join(each.full_name for each in models[:LISTED])
        raise ModelError(
            f"{PROGRAMS[program][:1].upper()}{PROGRAMS[program][1:]} has no model {name!r} on this disk"
            + (f"; it has {has}." if has else ", and no other that can be read; fetch it there first.")
        )
    return found[0] if found else None


def _hub_models() -> Iterator[LocalModel]:
    """Repos with weights; the newest snapshot of each."""
    from huggingface_hub import constants

    for folder in _entries(Path(constants.HF_HUB_CACHE)):
        kind, _, name = folder.name.partition("--")
        snapshots = [each for each in _entries(folder / "snapshots") if each.is_dir()]
        if kind != "models" or not snapshots:
            continue
        newest = max(snapshots, key=lambda each: each.stat().st_mtime)
        if nbytes := sum(
            _size(each) for pattern in ("*.safetensors", "*.gguf") for each in newest.rglob(pattern)
        ):
            yield LocalModel("hf", name.replace("--", "/", 1), newest, nbytes)


def _lm_studio_models() -> Iterator[LocalModel]:
    """publisher/repo with one model; each .gguf file by its own name where there are several."""
    for home in _lm_studio_homes():
        for folder in [repo for publisher in _entries(home) for repo in _entries(publisher)]:
            if not folder.is_dir():
                continue
            name = f"{folder.parent.name}/{folder.name}"
            try:
                if weights := safetensors_of(folder):
                    yield LocalModel("lmstudio", name, folder, sum(map(_size, weights)))
                    continue
            except ModelError:  # half fetched
                continue
            firsts = [file for file in _entries(folder) if _is_model(file)]
            for file in firsts:
                nbytes = sum(_size(folder / part) for part in parts_of(file.name))
                yield LocalModel(
                    "lmstudio", name if len(firsts) == 1 else f"{name}/{file.name}", file, nbytes
                )


def _is_model(file: Path) -> bool:
    """Whether it is a .gguf file to open: no projector, and of a split model the first part."""
    return not FOREIGN.fullmatch(file.name) and gguf_among([file.name], "") is not None


def _lm_studio_homes() -> list[Path]:
    """Where LM Studio keeps models: where it says so, today's place, and the one before."""
    home = Path.home()
    places = [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"]
    pointer = home / ".lmstudio-home-pointer"
    with suppress(OSError, ValueError):
        places.insert(0, Path(pointer.read_text("utf-8").strip()) / "models")
    return list(dict.fromkeys(places))


def _ollama_models() -> Iterator[LocalModel]:
    """Those whose manifest names one GGUF file; not such as need an adapter beside it."""
    for home in _ollama_homes():
        root = home / "manifests"
        for manifest in sorted(path for path in _below(root) if path.is_file()):
            parts = manifest.relative_to(root).parts
            layers = _layers(manifest)
            if len(parts) < 3 or len(layers.get("model", ())) != 1 or "adapter" in layers:
                continue
            blob = home / "blobs" / f"sha256-{layers['model'][0]}"
            if not blob.is_file():
                continue
            *owner, name, tag = parts[1:] if parts[0] == _REGISTRY else parts
            name = "/".join([*(owner if owner != [_LIBRARY] else []), name])
            yield LocalModel("ollama", f"{name}:{tag}", blob, _size(blob))


def _ollama_homes() -> list[Path]:
    """Where Ollama keeps models: where it was told to; else the user's and, on Linux, the service's own."""
    if told := os.environ.get("OLLAMA_MODELS"):
        return [at_home(told)]
    return [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def _layers(manifest: Path) -> dict[str, list[str]]:
    """The digests that a manifest names, by kind: model, adapter, template ...; {} of what is no manifest."""
    try:
        content: Any = json.loads(manifest.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    layers = content.get("layers") if isinstance(content, dict) else None
    found: dict[str, list[str]] = {}
    for layer in layers if isinstance(layers, list) else []:
        kind, digest = (
            (layer.get(key) for key in ("mediaType", "digest")) if isinstance(layer, dict) else ("", "")
        )
        sum256 = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
        if isinstance(kind, str) and kind.startswith(_OLLAMA) and sum256:
            found.setdefault(kind.removeprefix(_OLLAMA), []).append(sum256[1])
    return found


def _below(root: Path) -> Iterator[Path]:
    """The files under a directory; folders that cannot be read have none."""
    for folder, _, names in os.walk(root):
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, in order; nothing of one that is not there or cannot be read."""
    try:
        return sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    except OSError:
        return []


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
