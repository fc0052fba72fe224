"""Calibrations of twins, made by hand, so that a test knows which passes leave where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tempo_mlx
from tempo_mlx.model import calibration
from tempo_mlx.model.calibration import Calibration, Exit, key_of, place_of
from tests import twins

ALWAYS = -1.0  # a margin that every choice has


def curve(margin: float, agreement: float = 0.999) -> np.ndarray:
    """A curve that promises so much at one margin."""
    return np.array([[margin, agreement, 10_000]])


def loaded_with_exits(
    name: str,
    margins: Mapping[int, float],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    shortlist: range = range(twins.VOCABULARY),
    **load: Any,
) -> Any:
    """A twin with exits, by layer the margin at which a pass leaves; its calibration lies in `folder`."""
    monkeypatch.setattr(calibration, "cache_directory", lambda: folder)
    loaded = tempo_mlx.load(str(twins.twin(name)), **load)
    key = key_of(loaded.model.info)
    tokens = np.array(shortlist, np.int32)
    exits = tuple(
        Exit(layer, len(tokens), curve(margin), pays=dict.fromkeys(calibration.TARGETS, margin))
        for layer, margin in margins.items()
    )
    Calibration(key, exits, tokens, {"translators": False}).save(place_of(key))
    return loaded
