"""Which files of a directory, or of a repo, are the model; what lies beside them is nobody's business here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from tempo_mlx.errors import ModelError
from tempo_mlx.weights.json_file import read_json

_INDEX = "model.safetensors.index.json"
# Adapters, a second copy in the maker's own names, a vision tower's or an importance matrix's GGUF, and what
# macOS leaves on foreign disks (`._model.safetensors`).
FOREIGN = re.compile(r"\..*|adapter.*|consolidated.*|mmproj.*|.*imatrix.*", re.IGNORECASE)
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def safetensors_of(path: Path) -> list[Path]:
    """The weight files of a directory, as transformers and mlx-lm choose them; none if there are none.

    Raises: ModelError for an index without the files it names.
    """
    whole, index = path / "model.safetensors", path / _INDEX
    if whole.is_file():  # an index beside it is of shards that are gone
        return [whole]
    names = sorted(each.name for each in path.glob("*.safetensors") if not FOREIGN.fullmatch(each.name))
    return _indexed(index) if index.exists() else [path / name for name in names]


def _indexed(index: Path) -> list[Path]:
    table = read_json(index, 64 << 20)
    places = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(n, str) for n in places.values()):
        raise ModelError(
            f"{index} has no table of weights (weight_map); remove it, and the weight files beside it are read."
        )
    files = sorted(set(places.values()))
    if any(Path(name).name != name or not name.endswith(".safetensors") for name in files):
        raise ModelError(f"{index} names weight files outside its own directory; the model is refused.")
    return [index.parent / name for name in files]


def gguf_among(names: Iterable[str], where: str) -> str | None:
    """The only GGUF model among file names (of a split one the first part), or None.

    Raises: ModelError that lists them, as `where`/name, if there are several.
    """
    models = []
    for name in sorted(names):
        part = _PART.fullmatch(name)
        if name.endswith(".gguf") and not FOREIGN.fullmatch(PurePosixPath(name).name) and (
            part is None or int(part[2]) == 1
        ):  # fmt: skip
            models.append(name)
    if len(models) > 1:
        raise ModelError(
            f"{where} holds {len(models)} GGUF models; give one of them as the model: "
            f"{', '.join(f'{where}/{name}' for name in models[:20])}."
        )
    return models[0] if models else None


def parts_of(name: str) -> list[str]:
    """The names of all parts of a split GGUF file, in order; of any other name, that name."""
    part = _PART.fullmatch(name)
    if part is None:
        return [name]
    return [f"{part[1]}-{index + 1:05}-of-{part[3]}.gguf" for index in range(int(part[3]))]


def model_in(path: Path) -> Path:
    """What to open of a path: the .gguf file itself, the directory, or the only .gguf file that is in it."""
    if path.is_file() or safetensors_of(path):
        return path
    found = gguf_among((each.name for each in path.iterdir()), str(path))
    return path if found is None else path / found
