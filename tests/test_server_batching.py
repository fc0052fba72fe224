"""Requests whose passes are made together answer as they do alone, whatever becomes of the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

import tempo_mlx
from tempo_mlx.errors import DeviceError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.model import device
from tempo_mlx.model.cache import Cache
from tempo_mlx.resolution import resolve
from tempo_mlx.server import seats, worker
from tempo_mlx.server.jobs import Jobs
from tempo_mlx.server.protocol import Cancel, Event, FromWorker, Kind, Problem, Submit
from tempo_mlx.server.settings import ServerConfig
from tempo_mlx.server.wanted import NOTHING_MORE
from tempo_mlx.server.worker import Worker
from tests.patience import patient
from tests.twins import twin

STEPS = {"max_tokens": 8, "min_steps": 8}
LONG = "the sand and the sea, and what the wind says of both "  # more tokens than are not worth sharing


@dataclass(frozen=True)
class Asked:
    kind: Kind
    prompt: str | list[int]
    settings: dict[str, Any]
    logprobs: int | None = None
    n: int = 1

    def submit(self, id: str) -> Submit:
        payload = {"prompt": self.prompt, "messages": None, "config": resolve({**STEPS, **self.settings})}
        wanted = {**NOTHING_MORE, "n": self.n, "logprobs": self.logprobs}
        return Submit(id, self.kind, {**(wanted if self.kind == "completion" else {}), **payload})


REQUESTS = {
    "greedy": Asked("generate", "Once upon a time", {"decoder": "plain", "temperature": 0.0}),
    "seeded": Asked("generate", "The capital", {"decoder": "plain", "seed": 7}),
    "branches": Asked("generate", "ab cd", {"decoder": "tree", "branches": 3}),
    "beams": Asked("generate", "ab cd ef", {"decoder": "beam", "beam_width": 3}),
    "samples": Asked("generate", "Hello", {"decoder": "sample", "beam_width": 2, "seed": 3}),
    "scored": Asked("completion", "I went to the", {"decoder": "plain", "seed": 1}, logprobs=3),
    "several": Asked("completion", "I went", {"decoder": "tree", "branches": 2, "threshold": 0.0}, 2, n=2),
    "ruled": Asked(
        "generate", "Is it", {"decoder": "plain", "choices": ("yes, it is", "no"), "min_steps": 0}
    ),
    "full": Asked("generate", "full", {"decoder": "plain", "max_cache_tokens": 7}),
    "searched": Asked("generate", "ab", {"decoder": "mcts", "mcts_simulations": 3, "mcts_depth": 2}),
    "superposed": Asked("generate", "Once upon", {"threshold": 0.02}),
}


@dataclass
class Wire:
    """The worker's end of a pipe."""

    sent: list[FromWorker] = field(default_factory=list)

    def poll(self, patience: float) -> bool:
        return False

    def send(self, message: FromWorker) -> None:
        self.sent.append(message)

    def of(self, id: str) -> list[Event | Problem]:
        return [message for message in self.sent if isinstance(message, Event | Problem) and message.id == id]


def served(
    loaded: LoadedModel, asked: dict[str, Asked], act: Callable[[Worker, int], None] | None = None
) -> Wire:
    """Run all of them to their ends; `act` is called before each round."""
    running = Worker(cast(Any, wire := Wire()), Jobs(loaded, ServerConfig()))
    for id, each in asked.items():
        running.handle(each.submit(id))
    count = 0
    while running.jobs or not count:
        if act is not None:
            act(running, count)
        running.round()
        count += 1
    return wire


def shared(wire: Wire, id: str) -> set[float]:
    """How many requests shared the pass of each of its steps."""
    return {
        message.stats["together"] for message in wire.of(id) if isinstance(message, Event) and message.stats
    }


def same(found: Any, wanted: Any) -> bool:
    """Equal but for times, and for numbers in their last digits."""
    if isinstance(wanted, dict):
        names = [name for name in wanted if name not in ("timing", "stats", "request_id")]
        return all(same(found[name], wanted[name]) for name in names)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(wanted, float):
        return bool(np.isclose(found, wanted, rtol=1e-4, atol=1e-5))
    return bool(found == wanted)


def answers(wire: Wire, id: str) -> list[Any]:
    return [json.loads(message.data) if isinstance(message, Event) else message for message in wire.of(id)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tempo_mlx.load(str(twin("llama")), device="cpu")


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel) -> dict[str, list[Any]]:
    return {id: answers(served(loaded, {id: each}), id) for id, each in REQUESTS.items()}


@pytest.fixture(scope="module")
def crowd(loaded: LoadedModel) -> Iterator[Wire]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "PROMPT_SECONDS", patient(10))  # so that all begin in one round
        yield served(loaded, REQUESTS)


@pytest.mark.parametrize("id", REQUESTS)
def test_a_request_among_many_answers_as_alone(crowd: Wire, alone: dict[str, list[Any]], id: str) -> None:
    assert same(answers(crowd, id), alone[id])
    assert max(shared(crowd, id)) == 1 if id == "superposed" else max(shared(crowd, id)) > 6


def test_stop_strings_and_lengths_end_only_their_own(
    loaded: LoadedModel, alone: dict[str, list[Any]]
) -> None:
    text = alone["greedy"][-1]["final_text"]
    stops = Asked(
        "generate", "Once upon a time", {**REQUESTS["greedy"].settings, "stop": (text[2:4],), "min_steps": 0}
    )
    short = Asked("generate", "Hello", {"decoder": "plain", "max_tokens": 2, "min_steps": 2})
    wire = served(loaded, {"stops": stops, "short": short, "greedy": REQUESTS["greedy"]})
    ended = answers(wire, "stops")[-1]
    assert ended["finish_reason"] == "stop" and ended["final_text"] == text[:2]
    assert len(answers(wire, "short")[-1]["steps"]) == 2
    assert same(answers(wire, "greedy"), alone["greedy"])


def test_requests_come_and_go_between_steps(loaded: LoadedModel, alone: dict[str, list[Any]]) -> None:
    def act(running: Worker, count: int) -> None:
        if count == 3:
            running.handle(REQUESTS["seeded"].submit("seeded"))
        if count == 6:
            running.handle(Cancel("beams", "cancelled"))

    wire = served(loaded, {id: REQUESTS[id] for id in ("greedy", "beams")}, act)
    assert all(same(answers(wire, id), alone[id]) for id in ("greedy", "seeded"))
    assert max(shared(wire, "seeded")) > 1
    cancelled = answers(wire, "beams")[-1]
    assert cancelled["finish_reason"] == "cancelled" and 0 < len(cancelled["steps"]) < STEPS["max_tokens"]


def test_on_a_gpu_the_first_has_its_passes_begun_ahead(
    loaded: LoadedModel, alone: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    ids = ("greedy", "seeded", "branches")
    wire = served(loaded, {id: REQUESTS[id] for id in ids})
    assert all(same(answers(wire, id), alone[id]) for id in ids)
    assert shared(wire, "greedy") == {1} and max(shared(wire, "seeded")) == 2


@pytest.mark.parametrize("family", ["phi4", "qwen3_next"])
def test_models_whose_rows_depend_on_more_than_the_slots_before_them(family: str) -> None:
    """A rope that follows the text's length, and states."""
    loaded = tempo_mlx.load(str(twin(family)), device="cpu")
    ids = loaded.tokenizer.encode(LONG)
    asked = {str(n): Asked("generate", ids[:n], {"decoder": "plain"}) for n in (seats.LEAST_SHARED, 45)}
    wire = served(loaded, asked)
    for id, each in asked.items():
        assert same(answers(wire, id), answers(served(loaded, {id: each}), id))


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model that has no numbers for one token."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("hollow") / "model"
    shutil.copytree(twin("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][99] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return tempo_mlx.load(str(folder), device="cpu")


def test_one_that_fails_fails_alone(hollow: LoadedModel, alone: dict[str, list[Any]]) -> None:
    fails = Asked("generate", "Hello", {"decoder": "plain", "logit_bias": ("99=100",)})
    wire = served(hollow, {"fails": fails, **{id: REQUESTS[id] for id in ("greedy", "branches")}})
    problem = answers(wire, "fails")[-1]
    assert isinstance(problem, Problem) and problem.status == 500
    for id in ("greedy", "branches"):
        assert max(shared(wire, id)) > 1
        for found, wanted in zip(answers(wire, id)[1:-1], alone[id][1:-1], strict=True):
            assert same(found, wanted)


def test_a_pass_that_fails_is_made_again_by_each(
    loaded: LoadedModel, alone: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*asked: object) -> None:
        raise DeviceError("The device has no memory left for this; use a smaller model.")

    monkeypatch.setattr(seats, "together", fails)
    ids = ("greedy", "seeded", "beams")
    wire = served(loaded, {id: REQUESTS[id] for id in ids})
    for id in ids:
        assert shared(wire, id) == {1.0}
        assert same(answers(wire, id), alone[id])


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many slots caches have taken over from others."""
    counts: list[int] = []
    take = Cache.take

    def counting(self: Cache, other: Cache, stop: int) -> None:
        counts.append(stop - len(self))
        take(self, other, stop)

    monkeypatch.setattr(Cache, "take", counting)
    yield counts


@pytest.mark.parametrize("settings", [{"decoder": "plain"}, {"threshold": 0.02}], ids=str)
def test_what_prompts_have_in_common_is_run_once(
    loaded: LoadedModel, copied: list[int], settings: dict[str, Any]
) -> None:
    asked = {end: Asked("generate", LONG + end, settings) for end in ("one", "other")}
    asked["short"] = Asked("generate", LONG[:9], settings)
    wire = served(loaded, asked)
    common = [len(loaded.tokenizer.encode(LONG + end)) for end in ("one", "other")]
    assert len(copied) == 1 and seats.LEAST_SHARED < copied[0] < min(common)
    for id, each in asked.items():
        assert same(answers(wire, id), answers(served(loaded, {id: each}), id))


def test_a_long_prompt_lets_others_go_on(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PROMPT_SECONDS", 0.0)
    going = Asked("generate", "Hello", {"decoder": "plain", "max_tokens": 40, "min_steps": 40})
    long = Asked("generate", "ab cd " * 40, {"decoder": "plain"})
    count = len(loaded.tokenizer.encode(long.prompt))
    wire = served(loaded, {"going": going, "long": long})
    names = [(m.id, m.name) for m in wire.sent if isinstance(m, Event)]
    begun, decoding = names.index(("long", "start")), names.index(("long", "step"))
    assert names[begun:decoding].count(("going", "step")) >= count // seats.PIECE
