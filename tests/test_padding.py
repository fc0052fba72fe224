"""Rows run beside a set's where more cost less, by a planted table of costs: the same runs, and none of them stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest

from tempo_mlx import generate, load
from tempo_mlx.api import Stream
from tempo_mlx.cli.main import main
from tempo_mlx.decode import width
from tempo_mlx.decode.padding import Padded, paying, with_padding
from tempo_mlx.model import device
from tempo_mlx.model.transformer import Transformer
from tempo_mlx.report.records import RunPrompt
from tempo_mlx.report.verify import verify
from tempo_mlx.resolution import resolve
from tempo_mlx.task import Task
from tests import twins
from tests.test_ahead import PROMPT, RUNS, assert_same

# As an M1 may do it: a row at a time up to 5, a tile of 8 from 6 on.
TILED = {rows: 1.0 + 0.4 * rows if rows < 6 else (2.2 if rows <= 8 else 4.4) for rows in width.ROWS}


@pytest.fixture(scope="module")
def llama() -> Any:
    return load(str(twins.twin("llama")))


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each pass had, by the GPU's rules; measurements are kept elsewhere."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda _: tmp_path)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    seen: list[int] = []
    described = Transformer.described

    def watched(self: Transformer, tokens: Any, positions: Any, *rest: Any, **more: Any) -> Any:
        seen.append(len(positions))
        return described(self, tokens, positions, *rest, **more)

    monkeypatch.setattr(Transformer, "described", watched)
    return seen


def plant(model: Any, costs: Mapping[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(width, "measure", lambda _: dict(costs))
    width.row_costs(model, again=True)


def test_more_rows_are_run_only_where_they_cost_clearly_less() -> None:
    assert paying(TILED) == {4: 6, 5: 6}
    assert paying({rows: float(rows) for rows in width.ROWS}) == {}
    assert paying({1: 9.0, 2: 1.0, 3: 1.0}) == {}  # a row alone stays so
    assert paying({1: 1.0, 2: 1.0, 3: 0.91}) == {}  # nor for what measurements differ by
    assert with_padding(TILED)[5] == 2.2
    assert width.affordable(TILED) == 4 and width.affordable(TILED, pads=True) == 8


DECODINGS: dict[str, dict[str, Any]] = {
    **{name: RUNS[name] for name in ("threshold", "attention", "weighted")},
    "screened": {"threshold": 0.02, "pruning_strategy": "coherence", "coherence_threshold": 0.5},
    "tree": {"decoder": "tree", "branches": 4, "threshold": 0.02},
    "beam": {"decoder": "beam", "beam_width": 5},
    "sample": {"decoder": "sample", "beam_width": 4, "seed": 1},
    "enumerate": {"decoder": "enumerate", "leaves": 5, "threshold": 0.02, "max_tokens": 6},
}


@pytest.mark.parametrize("name", DECODINGS)
def test_runs_are_the_same(llama: Any, name: str, ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_tokens": 12, **DECODINGS[name]}
    if "decoder" not in settings:
        settings["max_parallel_tokens"] = 5
    alone = generate(llama, PROMPT, **settings)
    assert {4, 5} & set(ran)
    ran.clear()
    plant(llama.model, TILED, monkeypatch)
    padded = generate(llama, PROMPT, **settings)
    assert not {4, 5} & set(ran) and 6 in ran
    assert_same(padded, alone)
    assert verify(padded, llama).ok


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_windows_and_sinks_are_as_they_were(
    family: str, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(twins.twin(family)))
    settings = {"max_tokens": 12, "max_parallel_tokens": 5, "threshold": 0.02, "attention_threshold": 0.02}
    alone = generate(model, PROMPT, **settings)
    plant(model.model, TILED, monkeypatch)
    assert_same(generate(model, PROMPT, **settings), alone)
    assert 6 in ran


def test_no_row_of_them_stays(llama: Any) -> None:
    """Their logits and attention are cut off, and the cache forgets them; a prompt's rows are run as they are."""
    model = Padded(llama.model, {3: 6})
    cache, expected = model.new_cache(), llama.model.new_cache()
    for each, kept in ((model, cache), (llama.model, expected)):
        each.forward([5, 6, 7], [0, 1, 2], None, kept, logits="none")
    bias = np.where(np.eye(3, 6, 3) + np.eye(3, 6, 0) > 0, 0, -np.inf).astype(np.float32)
    for attention in (False, True, "rows"):
        found = model.forward([8, 9, 10], [3, 3, 3], bias, cache, attention=attention)
        alone = llama.model.forward([8, 9, 10], [3, 3, 3], bias, expected, attention=attention)
        assert len(cache) == len(expected) == 6
        np.testing.assert_allclose(found.logits, alone.logits, atol=1e-5)
        if attention:
            np.testing.assert_allclose(found.attention_mass, alone.attention_mass, atol=1e-6)
        cache.truncate(3)
        expected.truncate(3)


def started(loaded: Any) -> Any:
    """What a decoding's rows are run by."""
    task = Task(loaded, RunPrompt(PROMPT, tuple(loaded.tokenizer.encode(PROMPT))), resolve({"max_tokens": 2}))
    stream = Stream(task)
    next(stream)
    assert stream.decoder is not None
    return stream.decoder.model


def test_on_a_cpu_and_where_layers_keep_states_rows_are_run_as_they_are(
    llama: Any, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid = load(str(twins.twin("qwen3_next")))
    for loaded in (llama, hybrid):
        plant(loaded.model, TILED, monkeypatch)
    assert isinstance(started(llama), Padded) and started(hybrid) is hybrid.model
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    assert started(llama) is llama.model


def test_auto_counts_on_it(llama: Any, ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(llama.model, TILED, monkeypatch)
    run = generate(llama, PROMPT, max_tokens=1, max_parallel_tokens="auto")
    assert run.config["max_parallel_tokens"] == 8
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    assert (
        generate(llama, PROMPT, max_tokens=1, max_parallel_tokens="auto").config["max_parallel_tokens"] == 4
    )


def test_doctor_says_so(
    ran: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(width, "measure", lambda _: dict(TILED))
    main(["doctor", "--model", str(twins.twin("llama"))])
    assert "4 as 6, 5 as 6" in capsys.readouterr().out
