"""Run files of earlier versions, kept as they were written: they read, are written again unchanged, and verify."""

from __future__ import annotations

import copy
import json
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import tempo_mlx
from tempo_mlx.api import load
from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import RunFileError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import compare, tolerance_for, verify
from tempo_mlx.resolution import resolve, upgrade
from tempo_mlx.sessions.imports import read_run

ROOT = Path(__file__).parents[1]
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_settings_of_an_old_file_are_todays(path: Path) -> None:
    old = Run.load(path).config
    settings = GenerateConfig(**upgrade(old))
    assert resolve(upgrade(old)) == settings
    assert settings.pruning_signal == (old["pruning_signal"] if old["use_retroactive_pruning"] else None)
    assert settings.pruning_strategy == (old["pruning_strategy"] if old["use_pruning"] else None)
    assert settings.final_threshold is None and settings.sigmoid_steepness == 10.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["superposed", "superposed-attention", "positions"])
def test_an_old_file_is_decoded_again_and_gone_on_with(name: str) -> None:
    (path,) = (path for path in FILES if path.stem == name)
    run = Run.load(path)
    settings, _, steps = read_run(run.to_dict(), smollm2().model)
    again = tempo_mlx.generate(smollm2(), run.prompt.token_ids, config=settings)
    assert len(steps) == len(run.steps)
    loaded = smollm2()
    found = compare(run, again, tolerance_for(loaded.model, run, settings), loaded.tokenizer)
    assert found.ok, found.differences


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_old_file_verifies(path: Path) -> None:
    result = verify(Run.load(path), smollm2())
    assert result.ok, result.findings


def test_schema_page_and_types_are_what_the_description_says() -> None:
    for path, text in runpy.run_path(str(ROOT / "scripts" / "write_run_docs.py"))["files"]().items():
        assert path.read_text("utf-8") == text, "run: make docs"


def validator() -> Any:
    schema = json.loads((ROOT / "docs" / "run-file.schema.json").read_text("utf-8"))
    return pytest.importorskip("jsonschema_rs").validator_for(schema)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_are_valid_by_the_schema(path: Path) -> None:
    validator().validate(json.loads(path.read_text("utf-8")))


def test_what_the_reader_takes_for_another_type_is_not_valid_by_the_schema() -> None:
    check = validator()
    value = json.loads((FILES[-1]).read_text("utf-8"))
    places: list[tuple[list[Any], Any]] = [
        (["version"], True), (["format"], "x"), (["extra"], 1), (["tree"], []), (["text"], None),
        (["decoder"], "magic"), (["early_exit"], None), (["steps", 1, "tokens", 0, "id"], -1),
        (["steps", 1, "tokens", 0, "slot"], 1.5), (["steps", 1, "tokens", 0, "position"], None),
        (["steps", 1, "tokens", 0, "parents", 0], [3, 1.0]), (["steps", 1, "tokens", 0, "extra"], 1),
        (["steps", 1, "rejected"], None), (["prompt", "token_ids", 0], "1"),
    ]  # fmt: skip
    for place, odd in places:
        broken = copy.deepcopy(value)
        node = broken
        for part in place[:-1]:
            node = node[part]
        node[place[-1]] = odd
        assert not check.is_valid(broken), place
        with pytest.raises(RunFileError):
            Run.from_json(json.dumps(broken))
    for record, name in (
        (value, "paths"),
        (value["steps"][0], "exit_layer"),
        (value["steps"][0]["tokens"][0], "text"),
    ):
        held = record.pop(name)
        assert not check.is_valid(value), name
        with pytest.raises(RunFileError, match=f"lacks .*{name}"):
            Run.from_json(json.dumps(value))
        record[name] = held
