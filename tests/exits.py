"""Calibrations of twins, made by hand, so that a test knows which passes leave where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tempo_mlx
from tempo_mlx.exits import calibration, early_exit
from tempo_mlx.exits.ahead import Lookup
from tempo_mlx.exits.calibration import Calibration, Exit, key_of, place_of
from tests import twin_table, twins

ALWAYS = -1.0  # a margin that every choice has


def curve(margin: float, agreement: float = 0.999) -> np.ndarray:
    """A curve that promises so much at one margin."""
    return np.array([[margin, agreement, 10_000]])


def loaded_with_exits(
    name: str,
    margins: Mapping[int, float],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    shortlist: range = range(twin_table.VOCABULARY),
    **load: Any,
) -> Any:
    """A twin with exits, by layer the margin at which a pass leaves; its calibration lies in `folder`. The last exit
    drafts.
    """
    monkeypatch.setattr(calibration, "cache_directory", lambda: folder)
    loaded = tempo_mlx.load(str(twins.twin(name)), **load)
    key = key_of(loaded.model.info)
    tokens = np.array(shortlist, np.int32)
    exits = tuple(
        Exit(
            layer,
            len(tokens),
            curve(margin),
            pays=dict.fromkeys(calibration.TARGETS, margin),
            drafts=dict.fromkeys(calibration.TARGETS, margin) if layer == max(margins) else {},
        )
        for layer, margin in margins.items()
    )
    Calibration(key, exits, tokens, {"translators": False}).save(place_of(key))
    return loaded


def foresee(monkeypatch: pytest.MonkeyPatch, model: Any, of: int = 1) -> None:
    """Let one of `of` guesses be the three tokens that the model chooses, one of them wrong every other time."""

    class Foreseen(Lookup):
        def guess(self) -> list[int]:
            if len(self._tokens) % of:
                return []
            ahead: list[int] = []
            for _ in range(3):
                text = [*self._tokens, *ahead]
                found = model.forward(text, range(len(text)), None, model.new_cache(), logits="last")
                ahead.append(int(found.logits[-1].argmax()))
            if len(self._tokens) % (2 * of):
                ahead[len(self._tokens) // of % 3] += 1
            return ahead

    monkeypatch.setattr(early_exit, "Lookup", Foreseen)
