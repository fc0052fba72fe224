"""A request that is over holds no memory: its cache goes at once, not when Python next looks for circles.

Which it does so seldom that under load dozens of caches were kept by requests that nobody waited for any more.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from typing import Any, cast

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

import tempo_mlx
from tempo_mlx.loading import LoadedModel
from tempo_mlx.model.cache import Cache
from tempo_mlx.resolution import resolve
from tempo_mlx.server.jobs import Jobs
from tempo_mlx.server.protocol import Cancel, Event, FromWorker, Kind, Problem, Submit
from tempo_mlx.server.settings import ServerConfig
from tempo_mlx.server.wanted import NOTHING_MORE
from tempo_mlx.server.worker import Worker
from tests.exits import ALWAYS, loaded_with_exits

SETTINGS: list[dict[str, Any]] = [
    {},
    {"decoder": "plain", "stop": ("never said",)},
    {"threshold": 0.03, "use_retroactive_pruning": True, "posterior_threshold": 0.3},
    {"threshold": 0.03, "paths": 2},
    {"early_exit": True},
    {"early_exit": True, "lossless": True, "decoder": "plain"},
    {"decoder": "beam", "stop": ("never said",)},
    {"decoder": "mcts", "mcts_simulations": 4, "mcts_depth": 2},
]


class Wire:
    """The worker's end of the pipe, on which nothing arrives."""

    def __init__(self) -> None:
        self.sent: list[FromWorker] = []

    def poll(self, patience: float) -> bool:
        return False

    def send(self, message: FromWorker) -> None:
        self.sent.append(message)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("exits")
        loaded = loaded_with_exits("llama", {1: ALWAYS, 3: ALWAYS}, folder, patch)
        gc.collect()
        gc.freeze()  # what there is by now is not looked through for caches
        yield loaded
        gc.unfreeze()


@pytest.fixture
def worker(loaded: LoadedModel) -> Worker:
    return Worker(cast(Any, Wire()), Jobs(loaded, ServerConfig()))


@pytest.fixture(autouse=True)
def circles_stay(loaded: LoadedModel) -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def caches() -> int:
    return sum(type(thing) is Cache for thing in gc.get_objects())


def begin(worker: Worker, kind: Kind, **payload: Any) -> None:
    """Until the request has made its first step, or is over."""
    worker.handle(Submit("it", kind, {**(NOTHING_MORE if kind == "completion" else {}), **payload}))
    while "it" in worker.jobs and not worker.jobs["it"].started:
        worker.round()


def finish(worker: Worker) -> Event | Problem:
    while "it" in worker.jobs:
        worker.round()
    last = cast(Any, worker.connection).sent[-1]
    assert isinstance(last, Event | Problem)
    return last


@pytest.mark.parametrize("kind", ["generate", "completion"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_of_a_finished_request_nothing_is_kept(worker: Worker, settings: dict[str, Any], kind: Kind) -> None:
    before = caches()
    logprobs = None if settings.get("early_exit") or settings.get("decoder") == "mcts" else 2
    config = resolve({"max_tokens": 4, "min_steps": 4, **settings})
    begin(worker, kind, prompt="Once upon a time", config=config, n=1, logprobs=logprobs)
    assert caches() > before
    assert worker.work.cache_slots() > 0
    assert isinstance(last := finish(worker), Event), last
    assert caches() == before
    assert worker.work.cache_slots() == 0


def test_nor_of_a_cancelled_one(worker: Worker) -> None:
    before = caches()
    begin(
        worker, "generate", prompt="Once upon a time", config=resolve({"max_tokens": 100, "min_steps": 100})
    )
    assert caches() > before
    worker.handle(Cancel("it", "cancelled"))
    assert isinstance(finish(worker), Event)
    assert caches() == before


def test_nor_of_one_that_failed(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "tempo_mlx.worker")  # or pytest keeps the traceback, and so the cache
    before = caches()
    begin(worker, "generate", prompt="Once upon a time", config=resolve({"max_tokens": 100}))
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "reserve", lambda self, positions: 1 / 0)
        assert isinstance(finish(worker), Problem)
    assert caches() == before


def test_a_session_holds_one_cache_until_it_is_deleted(worker: Worker) -> None:
    before, mine = caches(), {"session": "s", "owner": None}
    config = resolve({"max_tokens": 4})
    begin(worker, "session", action="create", prompt="Once", config=config, run=None, steps=3, **mine)
    finish(worker)
    begin(worker, "session", action="continue", steps=2, **mine)
    finish(worker)
    assert caches() == before + 1
    begin(worker, "session", action="delete", **mine)
    finish(worker)
    assert caches() == before


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_run_of_the_python_api_is_let_go_with_its_stream(
    loaded: LoadedModel, settings: dict[str, Any]
) -> None:
    before = caches()
    decoding = tempo_mlx.stream(loaded, "Once upon a time", max_tokens=4, min_steps=4, **settings)
    for _ in decoding:
        pass
    decoding.run()
    assert caches() > before
    del decoding
    assert caches() == before
