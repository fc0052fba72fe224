"""A model's calibration: where rows may exit, and at which confidence. Made by `calibrate`.

An exit is a layer with a translator (affine, from what the layer gives to what the last layer would have given: the
tuned lens, arXiv 2303.08112), and a curve: how often the choice made there was the whole model's, by the margin of
that choice. One safetensors file, named after the weights it belongs to, holds them all, with a shortlist of the
vocabulary.
"""

from __future__ import annotations

import hashlib
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
ALLOWED = 20  # errors that the target allows among the choices tested first
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

    curve (n, 3), by falling margin: the margin, the lower bound of the agreement of choices with at least that margin,
    and their number; the last row counts all. pays: the targets for which leaving here saves time together with
    that target's other exits, and the least margin at which they meet it together. drafts: the targets for which
    this is the exit to draft with in lossless decoding, if that saves time, and the least margin. weight (E, E) and
    offset (E,), float16: the translator; None: the layer's output is read as it is.
    """

    layer: int
    width: int
    curve: Floats
    pays: Mapping[float, float] = field(default_factory=dict)
    drafts: Mapping[float, float] = field(default_factory=dict)
    weight: NDArray[np.float16] | None = None
    offset: NDArray[np.float16] | None = None

    def margin(self, target: float) -> float | None:
        """The least margin at which choices reach the target agreement; None: no margin does."""
        point = self._point(target)
        return None if point is None else float(self.curve[point, 0])

    def share(self, target: float) -> float:
        """The share of choices with at least that margin."""
        point = self._point(target)
        return 0.0 if point is None else float(self.curve[point, 2] / self.curve[-1, 2])

    def _point(self, target: float) -> int | None:
        """The last point up to which the bound holds, starting where the target allows ALLOWED errors (fixed-sequence
        testing, Learn then Test, arXiv 2110.01052).
        """
        start = int(np.searchsorted(self.curve[:, 2], ALLOWED / (1 - target)))
        fails = np.flatnonzero(self.curve[start:, 1] < target)
        stop = start + int(fails[0]) if len(fails) else len(self.curve)
        return stop - 1 if stop > start else None


@dataclass(frozen=True)
class Calibration:
    """All exits of a model, by layer and width, and their shortlist (n,) of tokens, most likely first."""

    key: str
    exits: tuple[Exit, ...]
    shortlist: NDArray[np.int32]
    made: Mapping[str, Any] = field(default_factory=dict)  # how many prompts and tokens, and which version

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
    """The layers (zero-based) that may become exits, always including the last; by default every fourth.

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
    """What identifies a model's weights, quantisation included: their hash, or the hub's revision; an adapter's hash,
    where there is one, besides.
    """
    key = info.get("sha256") or info.get("revision")
    if isinstance(key, str) and (adapter := info.get("adapter")):
        return hashlib.sha256(f"{key} {adapter}".encode()).hexdigest()
    if not isinstance(key, str):
        raise ModelError("The model has neither hash nor revision, so no calibration can be kept for it.")
    return key


def place_of(key: str) -> Path:
    """Where a model's calibration is kept: in the model cache."""
    return cache_directory() / "exits" / f"{key[:NAME_LENGTH]}.safetensors"


def find_calibration(info: Mapping[str, Any]) -> Calibration:
    """The calibration of the loaded model that `info` describes: the user's own, or the one shipped with the package.

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
