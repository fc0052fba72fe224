"""Token ids from outside end in one sentence before any array is touched: backends read beside theirs otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

import tempo_mlx
from tempo_mlx.api import encode_prompt
from tempo_mlx.decode.decoder import Setup
from tempo_mlx.decode.tempo import plain
from tempo_mlx.errors import PromptError, RunFileError, TempoError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.records import RunPrompt
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify
from tempo_mlx.resolution import resolve
from tempo_mlx.sessions.imports import read_run
from tests.twin_table import VOCABULARY
from tests.twins import twin


@cache
def model() -> LoadedModel:
    return tempo_mlx.load(str(twin("llama")))


NO_IDS: dict[str, Any] = {
    "negative": [1, -1],
    "beyond": [1, VOCABULARY],
    "far beyond": [1, 999_999],
    "of more than 64 bits": [1, 10**30],
    "of more digits than Python writes": [1, 10**6000],
    "a boolean": [1, True],
    "numpy's boolean": np.array([True]),
    "a fraction": [1, 2.0],
    "text": [1, "2"],
    "nothing": [1, None],
    "a list in a list": [[1, 2]],
    "a table": np.array([[1, 2]]),
    "bytes": b"abc",
    "a number": 7,
    "None": None,
    "a run prompt": RunPrompt("x", (1, VOCABULARY)),
}
WAYS: dict[str, Callable[[Any], object]] = {
    "generate": lambda ids: tempo_mlx.generate(model(), ids, max_tokens=2),
    "stream": lambda ids: tempo_mlx.stream(model(), ids),  # before the first step
    "session": lambda ids: tempo_mlx.Session(model()).generate(ids, max_tokens=2),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("ids", NO_IDS.values(), ids=NO_IDS)
def test_a_prompt_of_no_ids_is_refused(ids: Any, way: Callable[[Any], object]) -> None:
    with pytest.raises(PromptError, match=r"token|must be text or token ids"):
        way(ids)


@pytest.mark.parametrize("ids", [value for value in NO_IDS.values() if not isinstance(value, RunPrompt)])
def test_what_cannot_be_scored_is_refused(ids: Any) -> None:
    with pytest.raises(PromptError):
        tempo_mlx.score(model(), ids, [[1]])
    with pytest.raises(PromptError):
        tempo_mlx.score(model(), [1], [ids])


def test_a_decoder_begun_by_itself_refuses_them_too() -> None:
    with pytest.raises(PromptError, match=r"goes? from 0 to|vocabulary"):
        plain(Setup(model().model, [1, VOCABULARY], resolve({"decoder": "plain"})))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16, np.uint8])
def test_whole_numbers_of_numpy_are_ids(kind: Any) -> None:
    expected = tempo_mlx.generate(model(), [3, 14, 15], max_tokens=2)
    for ids in ([kind(3), 14, kind(15)], np.array([3, 14, 15], kind), (3, 14, 15), range(0)):
        if len(ids):
            run = tempo_mlx.generate(model(), ids, max_tokens=2)
            assert run.prompt == expected.prompt and run.final_text == expected.final_text
            assert all(type(token) is int for token in run.prompt.token_ids)
    assert encode_prompt(model(), [VOCABULARY - 1, 0], resolve({})).token_ids == (VOCABULARY - 1, 0)


def token(value: Any) -> Any:
    return value["steps"][1]["tokens"][0]


PLACES: dict[str, Callable[[Any, int], object]] = {
    "prompt": lambda value, id: value["prompt"]["token_ids"].__setitem__(0, id),
    "a member": lambda value, id: token(value).update(id=id),
    "a member that is not run": lambda value, id: value["steps"][-1]["tokens"][0].update(id=id),
    "rejected": lambda value, id: value["steps"][1]["rejected"].append(
        {"id": id, "text": "", "probability": 0.1, "why": "x"}
    ),
    "a path": lambda value, id: value["paths"][0]["token_ids"].__setitem__(0, id),
}


@cache
def written() -> str:
    return tempo_mlx.generate(
        model(), [3, 14, 15], max_tokens=4, min_steps=4, threshold=0.02, paths=2
    ).to_json()


@pytest.mark.parametrize("change", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("id", [-1, VOCABULARY, 10**30, True])
def test_a_run_file_of_other_ids_is_refused(change: Callable[[Any, int], object], id: int) -> None:
    value = json.loads(written())
    verify(Run.from_json(json.dumps(value)), model())
    change(value, id)
    with pytest.raises(RunFileError):
        verify(Run.from_json(json.dumps(value)), model())
    with pytest.raises(RunFileError):
        read_run(value, model().model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value["steps"][1].update(position=10**30), "position"),
        (lambda value: token(value).update(position=10**9), "position"),
        (lambda value: token(value).update(slot=10**30), "slots"),
        (lambda value: token(value).update(weight=0.0), "weight 0"),
        (lambda value: token(value)["parents"][0].__setitem__(0, 10**30), "parents"),
        (lambda value: token(value).update(removed_after=10**30), "removed_after"),
    ],
)
def test_numbers_that_point_nowhere_are_refused(change: Callable[[Any], object], words: str) -> None:
    value = json.loads(written())
    change(value)
    with pytest.raises(RunFileError, match=words) as error:
        Run.from_json(json.dumps(value))
    assert isinstance(error.value, TempoError) and str(error.value).count("\n") == 0
