"""Run files from anywhere: whatever they hold, verify, show and import end in a sentence, and no process dies.

`pytest tests/test_run_fuzz.py --hypothesis-profile=thorough` tries 20,000 of them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import tempo_mlx
from tempo_mlx.cli.main import main
from tempo_mlx.errors import TempoError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify
from tempo_mlx.sessions.editable import EditableRun
from tempo_mlx.sessions.imports import read_run
from tempo_mlx.task import Task
from tests.twin_table import VOCABULARY
from tests.twins import twin

RUNS: tuple[dict[str, Any], ...] = (
    {"threshold": 0.02, "pruning_signal": "posterior", "posterior_threshold": 0.3, "paths": 2},
    {"threshold": 0.02, "attend": "all", "pruning_signal": "attention", "complete_removal_mode": "remove_position"},
    {"threshold": 0.02, "custom_rope": False, "stop": ["e"]},
    {"decoder": "plain"},
    {"branches": 3, "threshold": 0.02},
    {"decoder": "beam", "beam_width": 2},
    {"decoder": "diverse-beam", "beam_width": 2},
    {"decoder": "sample", "beam_width": 2},
    {"decoder": "mcts", "mcts_simulations": 6, "mcts_depth": 2, "threshold": 0.02},
)  # fmt: skip
SHOWN = ((), ("--steps",), ("--schedule",), ("--tree",), ("--show-probabilities",), ("--format", "html"))
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, VOCABULARY - 1, VOCABULARY, 10**6, 2**31, 2**63, 10**30, 0.0, -0.0, 0.5, -1.0, 1e-320,
    1e30, 1e308, -1e308, "", "x", "\u2028", "\ud83d", "\x1b[2J", "[red]", "superposed", "tree", "mcts", "plain", "stop",
    "inf", [], {}, [[]], [0], [None], {"": None}, {"steps": []}, [[0, 1.0, 0.5]],
)  # fmt: skip


@cache
def model() -> LoadedModel:
    return tempo_mlx.load(str(twin("llama")))


@cache
def written(number: int) -> str:
    run = tempo_mlx.generate(model(), [3, 14, 15, 92], max_tokens=4, min_steps=3, seed=number, **RUNS[number])
    return run.to_json()


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in [(*above, key), *places(item, (*above, key))]]


def change(value: Any, place: tuple[Any, ...], how: str, odd: Any, other: Any) -> None:
    """One mutation in place. odd: a value from outside; other: one from elsewhere in the file."""
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    key, held = place[-1], holder[place[-1]]
    if how == "replace":
        holder[key] = odd
    elif how == "move":
        holder[key] = copy.deepcopy(other)
    elif how == "delete":
        del holder[key]
    elif how == "add":
        (holder.insert(key, copy.deepcopy(held)) if isinstance(holder, list) else holder.update(extra=odd))
    elif how == "nudge" and isinstance(held, (int, float)):
        holder[key] = held + 1 if isinstance(held, int) else -held * 1.5
    elif how == "reverse" and isinstance(held, list):
        held.reverse()
    elif how == "cut" and isinstance(held, list):
        del held[len(held) // 2 :]


@st.composite
def broken(draw: Any) -> str:
    """A run file with some of it changed."""
    value = json.loads(written(draw(st.integers(0, len(RUNS) - 1))))
    for _ in range(draw(st.integers(1, 3))):
        there = places(value)
        # Half of all changes go to the few top-level fields and their neighbours, which many tokens would drown.
        few = [place for place in there if len(place) <= 2 or place[0] != "steps"]
        place, elsewhere = (
            draw(st.sampled_from(draw(st.sampled_from((there, few))))),
            draw(st.sampled_from(there)),
        )
        other = value
        for key in elsewhere:
            other = other[key]
        how = draw(
            st.sampled_from(("replace", "replace", "nudge", "move", "delete", "add", "reverse", "cut"))
        )
        # A copy, since a further change may reach into it.
        change(value, place, how, copy.deepcopy(draw(st.sampled_from(ODD))), other)
    return json.dumps(value)


def imported(value: Any) -> None:
    config, prompt, steps = read_run(value, model().model)
    run = EditableRun(Task(model(), prompt, config), 500, lambda: None)
    for _ in run.take_over(steps, lambda: None):
        pass
    run.describe()


@given(text=broken(), how=st.sampled_from(SHOWN))
@settings(max_examples=max(200, settings().max_examples), phases=[Phase.generate], database=None)
def test_whatever_a_run_file_holds_it_ends_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, text: str, how: tuple[str, ...]
) -> None:
    file = Path(tmp_path_factory.getbasetemp()) / "fuzzed.json"
    file.write_text(text)
    said, failed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        code = main(["show", str(file), *how])
        assert code == 0 or failed.getvalue().startswith("Error: "), failed.getvalue()
        with contextlib.suppress(TempoError):
            imported(json.loads(text))
        try:
            run = Run.from_json(text)
        except TempoError as error:
            assert len(str(error)) < 1000 and "\n" not in str(error)
            return
        run._repr_html_()
        assert Run.from_json(run.to_json()) == run
        with contextlib.suppress(TempoError):
            verify(run, model())


@given(data=st.binary(max_size=60) | st.text(max_size=60))
def test_what_is_no_run_file_ends_in_a_sentence(data: bytes | str) -> None:
    with pytest.raises(TempoError):
        Run.from_json(data)
