"""What early exit knows of a model: where rows may leave it, and how sure they must be. Made by `calibrate`.

An exit is a layer with a translator (affine, from what the layer gives to what the last layer would have given: the
tuned lens, arXiv 2303.08112), and a curve: how often the choice made there was the whole model's, by how large the
margin of the choice was. One safetensors file holds them all, with a shortlist of the vocabulary, under the name of
the weights that they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from tempo_mlx.arrays import Floats
from tempo_mlx.errors import ConfigError, ModelError
from tempo_mlx.files import replacing
from tempo_mlx.weights.registry import cache_directory

TARGETS = (0.90, 0.95, 0.98, 0.99)  # the agreements for which exits are chosen
SHIPPED = Path(__file__).parent / "shipped"
ALLOWED = 20  # errors, by the target, among the choices that are tested first
NAME_LENGTH = 24  # of the key, in a file name

Translator = tuple[NDArray[np.float16], NDArray[np.float16]]  # weight (E, E) and offset (E,)


class _About(BaseModel):
    """What the file says beside its arrays. exits: layer, width, and the margins by target of `pays` and `drafts`."""

    format: Literal["tempo-mlx/exits"]
    version: Literal[2]
    key: str
    made: dict[str, Any]
    exits: list[tuple[int, int, list[tuple[float, float]], list[tuple[float, float]]]]


@dataclass(frozen=True)
class Exit:
    """One layer (zero-based) that rows may leave after, choosing among the first `width` tokens of the shortlist.

    curve (n, 3), margins falling: a margin, the lower bound of the agreement of choices with at least so much, and
    how many those were; the last row counts all. pays: for which targets leaving here saves time beside the other
    exits of that target, and from which margin on they keep it together. drafts: for which targets, and from which
    margin on, it is the one to draft with for lossless decoding, where that saves time. weight (E, E) and offset
    (E,), float16: of the translator; None: there is none, and what the layer gives is read as it is.
    """

    layer: int
    width: int
    curve: Floats
    pays: Mapping[float, float] = field(default_factory=dict)
    drafts: Mapping[float, float] = field(default_factory=dict)
    weight: NDArray[np.float16] | None = None
    offset: NDArray[np.float16] | None = None

    def margin(self, target: float) -> float | None:
        """The least margin at which choices agree at least so often; None: none was found to."""
        point = self._point(target)
        return None if point is None else float(self.curve[point, 0])

    def share(self, target: float) -> float:
        """Of the choices, how many have that margin."""
        point = self._point(target)
        return 0.0 if point is None else float(self.curve[point, 2] / self.curve[-1, 2])

    def _point(self, target: float) -> int | None:
        """From so many choices on that the target allows ALLOWED errors, the bound holds up to here (fixed-sequence
        testing, Learn then Test, arXiv 2110.01052).
        """
        start = int(np.searchsorted(self.curve[:, 2], ALLOWED / (1 - target)))
        fails = np.flatnonzero(self.curve[start:, 1] < target)
        stop = start + int(fails[0]) if len(fails) else len(self.curve)
        return stop - 1 if stop > start else None


@dataclass(frozen=True)
class Calibration:
    """All exits of a model, by layer and width, and the tokens (n,) that choices are made from, the likeliest first."""

    key: str
    exits: tuple[Exit, ...]
    shortlist: NDArray[np.int32]
    made: Mapping[str, Any] = field(default_factory=dict)  # from how many prompts and tokens, with what

    def save(self, path: Path) -> None:
        """Write the file. Raises OutputError."""
        from safetensors.numpy import save_file

        arrays: dict[str, Any] = {"shortlist": self.shortlist}
        for item in self.exits:
            arrays[f"{item.layer}.{item.width}.curve"] = item.curve.astype(np.float32)
            if item.weight is not None and item.offset is not None:
                arrays[f"{item.layer}.weight"], arrays[f"{item.layer}.offset"] = item.weight, item.offset
        exits = [
            (item.layer, item.width, list(item.pays.items()), list(item.drafts.items()))
            for item in self.exits
        ]
        about = _About(format="tempo-mlx/exits", version=2, key=self.key, made=dict(self.made), exits=exits)
        with replacing(path, make_folder=True) as draft:
            save_file(arrays, draft, metadata={"tempo-mlx": about.model_dump_json()})


def candidates(layers: int, chosen: Sequence[int] | None = None) -> list[int]:
    """The layers (zero-based) that may become exits, the last among them: every fourth one unless told.

    Raises ConfigError for a model too shallow, or a layer it does not have.
    """
    if layers < 3:
        raise ConfigError(f"The model has {layers} layers, and early exit needs at least 3; use it without.")
    for layer in chosen or ():
        if not 0 <= layer < layers:
            raise ConfigError(
                f"Exit layer {layer} is not one of the model's layers, which are 0 to {layers - 1}."
            )
    return sorted({*(chosen if chosen is not None else range(3, layers - 1, 4)), layers - 1})


def key_of(info: Mapping[str, Any]) -> str:
    """What names a model's weights, quantisation included: their hash, or the hub's revision."""
    key = info.get("sha256") or info.get("revision")
    if not isinstance(key, str):
        raise ModelError("The model has neither hash nor revision, so no calibration can be kept for it.")
    return key


def place_of(key: str) -> Path:
    """Where the calibration of a model is kept: beside the models."""
    return cache_directory() / "exits" / f"{key[:NAME_LENGTH]}.safetensors"


def find_calibration(info: Mapping[str, Any]) -> Calibration:
    """The calibration of the loaded model `info` is of: the user's own, or the one that comes with the package.

    Raises ModelError: there is none, it is of another model, or damaged.
    """
    key = key_of(info)
    for path in (place_of(key), SHIPPED / place_of(key).name):
        if path.exists():
            return read_calibration(path, key)
    raise ModelError(
        f"{info.get('id', 'The model')} has no calibration for early exit, without which nothing may leave early; "
        f"make one with `tempo-mlx calibrate {info.get('id', 'MODEL')}`, which takes minutes."
    )


def read_calibration(path: Path, key: str) -> Calibration:
    """The calibration in a file, which must be of the model with this key. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            about = _About.model_validate_json((file.metadata() or {}).get("tempo-mlx", ""))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValidationError) as error:
        raise ModelError(
            f"{path} is no calibration that this version reads; make it anew with `tempo-mlx calibrate`."
        ) from error
    if about.key != key:
        raise ModelError(
            f"The calibration in {path} is of other weights ({about.key[:12]}, not {key[:12]}); make one for this "
            "model with `tempo-mlx calibrate`."
        )
    exits = []
    for layer, width, pays, drafts in about.exits:
        curve = arrays[f"{layer}.{width}.curve"].astype(np.float64)
        weight, offset = (
            arrays.get(f"{layer}.{part}") if pays or drafts else None for part in ("weight", "offset")
        )
        exits.append(Exit(layer, width, curve, dict(pays), dict(drafts), weight, offset))
    return Calibration(key, tuple(exits), arrays["shortlist"], about.made)
