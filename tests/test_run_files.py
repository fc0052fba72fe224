"""Run files of earlier versions, kept as they were written: they read, are written again unchanged, and verify."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tempo_mlx.api import load
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify

FILES = sorted((Path(__file__).parent / "fixtures").glob("runs-*/*.json"))


@cache
def smollm2() -> LoadedModel:
    return load(device="cpu")


def test_there_is_a_file_of_every_decoder() -> None:
    decoders = {Run.load(path).decoder for path in FILES}
    assert decoders == {"superposed", "plain", "tree", "mcts", "beam", "diverse-beam", "sample"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_old_file_is_written_again_bit_by_bit(path: Path) -> None:
    run = Run.load(path)
    assert run.to_json() + "\n" == path.read_text("utf-8")
    assert Run.from_json(run.to_json()) == run


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_old_file_verifies(path: Path) -> None:
    result = verify(Run.load(path), smollm2().model)
    assert result.ok or (result.lossy and path.stem == "early-exit"), result
