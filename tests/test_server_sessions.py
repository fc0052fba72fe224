"""Sessions: going back and deciding otherwise costs a set's rows, and what comes out is still exact."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

import tempo_mlx
from tempo_mlx.decode.decoder import Setup
from tempo_mlx.decode.tempo import superposed
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify
from tempo_mlx.server.observe import Rivals
from tempo_mlx.sessions.arena import Arena
from tests.serving import Served, named, serving, stream, with_context
from tests.twins import twin

SETTINGS: dict[str, Any] = {
    "threshold": 0.03, "use_retroactive_pruning": True, "posterior_threshold": 0.2, "min_steps": 50,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "lineage": {},
    "posterior": SETTINGS,
    "attention": {"attend": "all", "attention_threshold": 0.02, "threshold": 0.03},
    "weighted": {"attend": "weighted", "allow_intraset_token_visibility": True, "threshold": 0.04},
    "best": {"attend": "best", "threshold": 0.03},
    "own-positions": {"custom_rope": False, "threshold": 0.04},
    "screened": {
        "use_pruning": True,
        "pruning_strategy": "coherence",
        "coherence_threshold": 0.9,
        "threshold": 0.03,
    },
    "plain": {"decoder": "plain", "temperature": 0.7},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_context(twin("llama"), 2048, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return tempo_mlx.load(str(model))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    flags = [
        "--max-sessions",
        "3",
        "--session-ttl",
        "1000",
        "--session-slots",
        "400",
        "--model-alias",
        "twin",
    ]
    with serving(model, *flags) as served:
        yield served


class Session:
    """One session, by its calls; every state it shows is checked to be exact."""

    def __init__(self, server: Served, check: Callable[[dict[str, Any]], None], **body: Any) -> None:
        self.server, self.check = server, check
        self.state = self._state(server.post("/sessions", body), 201)
        self.id = self.state["id"]

    def _state(self, response: Any, status: int = 200) -> dict[str, Any]:
        assert response.status_code == status, response.text
        state: dict[str, Any] = response.json()
        self.check(state["run"])
        return state

    def do(self, action: str, **body: Any) -> dict[str, Any]:
        self.state = self._state(self.server.post(f"/sessions/{self.id}/{action}", body))
        return self.state

    def refused(self, action: str, **body: Any) -> str:
        response = self.server.post(f"/sessions/{self.id}/{action}", body)
        assert response.status_code == 409, response.text
        message: str = response.json()["error"]["message"]
        return message

    @property
    def steps(self) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = self.state["run"]["steps"]
        return steps

    def alive(self, step: int) -> list[int]:
        tokens = self.steps[step]["tokens"]
        return [t["slot"] for t in tokens if t["slot"] is not None and t["removed_after"] is None]

    def members(self, step: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.server.get(f"/sessions/{self.id}/steps/{step}").json()["tokens"]
        return found


@pytest.fixture
def session(server: Served, loaded: LoadedModel) -> Callable[..., Session]:
    def check(run: dict[str, Any]) -> None:
        if run["steps"]:
            result = verify(Run.from_json(json.dumps(run)), loaded)
            assert result.ok and result.max_difference < 1e-4, result.findings

    return lambda **body: Session(server, check, **body)


def ids(steps: list[dict[str, Any]]) -> list[list[int]]:
    return [[token["id"] for token in step["tokens"]] for step in steps]


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_session_continued_is_a_run(session: Any, loaded: LoadedModel, settings: dict[str, Any]) -> None:
    kept = session(prompt="Hello there", steps=3, **settings)
    kept.do("continue", steps=9)
    same = {**settings, "min_steps": min(settings.get("min_steps", 0), 12)}
    run = tempo_mlx.generate(loaded, "Hello there", max_tokens=12, **same).to_dict()
    assert ids(kept.steps) == ids(run["steps"])
    for ours, theirs in zip(kept.steps, run["steps"], strict=True):
        assert [t["removed_after"] for t in ours["tokens"]] == [t["removed_after"] for t in theirs["tokens"]]
        assert [t["probability"] for t in ours["tokens"]] == pytest.approx(
            [t["probability"] for t in theirs["tokens"]], abs=1e-6
        )


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_every_decision_leaves_an_exact_run(session: Any, settings: dict[str, Any]) -> None:
    """Each state on the way is verified against one dense forward pass (Session.check)."""
    kept = session(prompt="Once upon a time", steps=6, **settings)
    first = kept.state
    other = kept.members(3)[-1]["next"][7]["id"]
    kept.do("branch", step=4, token_id=other)
    assert ids(kept.steps)[4] == [other]
    assert ids(kept.steps)[:4] == ids(first["run"]["steps"])[:4]
    kept.do("continue", steps=4)
    wide = next((i for i in range(len(kept.steps) - 1) if len(kept.alive(i)) > 1), None)
    if wide is not None:
        slot = kept.alive(wide)[0]
        kept.do("remove", slot=slot)
        assert slot not in kept.alive(wide)
    if len(kept.alive(len(kept.steps) - 1)) > 1:
        last = kept.steps[-1]["tokens"][0]["id"]
        kept.do("remove", slot=kept.steps[-1]["tokens"][0]["slot"])
        assert last in [item["id"] for item in kept.steps[-1]["rejected"]]
    kept.do("continue", steps=3)
    changes = len(kept.state["undo"])
    final = kept.state
    for _ in range(changes - 1):
        kept.do("undo")
    assert kept.state["run"]["steps"] == first["run"]["steps"]
    for _ in range(changes - 1):
        kept.do("redo")
    assert kept.state["run"]["steps"] == final["run"]["steps"]
    assert (kept.state["undo"], kept.state["redo"]) == (final["undo"], [])


def test_a_branch_from_the_first_step_and_to_any_token(session: Any) -> None:
    kept = session(prompt="Hello", steps=3, **SETTINGS)
    kept.do("branch", step=0, token_id=7)
    assert ids(kept.steps) == [[7]]
    rejected = {item["id"] for item in kept.steps[0]["rejected"]}
    assert rejected and kept.steps[0]["rejected"][0]["why"] == "by hand"
    kept.do("continue", steps=2)
    assert len(kept.steps) == 3


def test_a_whole_reading_can_be_branched_to(session: Any) -> None:
    """A word that another has in place of it is of several tokens; taking it is one change, and undone as one."""
    kept = session(prompt="Hello", steps=6, threshold=0.02)
    before = ids(kept.steps)
    kept.do("branch", step=2, token_id=7, then=[9, 30])
    assert ids(kept.steps) == [*before[:2], [7], [9], [30]]
    kept.do("continue", steps=2)
    assert len(kept.steps) == 7
    kept.do("undo")
    kept.do("undo")
    assert ids(kept.steps) == before
    assert "only be the last" in kept.refused("branch", step=2, token_id=257, then=[7])
    assert ids(kept.steps) == before


@pytest.mark.parametrize("settings", [{"threshold": 0.02}, {"decoder": "plain", "min_steps": 90}])
def test_every_state_is_read_as_phrases(session: Any, server: Served, settings: dict[str, Any]) -> None:
    """In the state, in a stream as they settle, and of any run file: one rule for all."""
    kept = session(prompt="Once upon", steps=60 if "decoder" in settings else 3, **settings)
    found = stream(server, f"/sessions/{kept.id}/continue/stream", {"steps": 20})
    steps, state = named(found, "step"), found[-1][1]
    whole = json.loads(json.dumps([asdict(p) for p in Run.from_json(json.dumps(state["run"])).phrases]))
    assert state["phrases"] == whole
    assert server.post("/phrases", {"run": state["run"]}).json() == {"phrases": whole}
    settled = ""
    for step in steps:
        settled += "".join(phrase["text"] for phrase in step["phrases"])
        assert settled + step["tail"]
    assert bool(steps[0]["phrases"]) == ("decoder" in settings), "what had settled before is told at once"
    assert settled + steps[-1]["tail"] == state["run"]["final_text"]
    assert server.post("/phrases", {"run": {}}).status_code == 422


def test_an_ending_can_be_branched_to(session: Any) -> None:
    kept = session(prompt="Hello", steps=2)
    kept.do("branch", step=1, token_id=257)
    assert kept.state["finished"] == "stop"
    assert kept.steps[-1]["tokens"][0]["slot"] is None
    assert "finished" in kept.refused("continue", steps=1)
    kept.do("undo")
    kept.do("continue", steps=1)


def test_a_stop_string_ends_a_session(session: Any) -> None:
    text = session(prompt="Hello", steps=12, threshold=1.0, min_steps=50).state["run"]["final_text"]
    stop = next(text[i : i + 2] for i in range(3, len(text)) if "\0" not in text[i : i + 2])
    kept = session(prompt="Hello", steps=30, threshold=1.0, min_steps=50, stop=[stop])
    assert kept.state["finished"] == kept.state["run"]["finish_reason"] == "stop"
    assert kept.state["run"]["final_text"] == text[: text.index(stop)]
    assert "finished" in kept.refused("continue", steps=1)


def test_a_token_without_probability_cannot_be_branched_to(session: Any) -> None:
    kept = session(prompt="Hello", steps=2, temperature=1e-40)
    assert "no probability" in kept.refused("branch", step=1, token_id=7)
    kept.do("branch", step=1, token_id=kept.steps[1]["tokens"][0]["id"])
    kept.do("continue", steps=2)


def test_pinned_members_stay(session: Any) -> None:
    free = session(prompt="Once upon", steps=12, **SETTINGS)
    gone = next(t for s in free.steps for t in s["tokens"] if t["removed_after"] is not None)
    born = next(s["step"] for s in free.steps if gone in s["tokens"])
    kept = session(prompt="Once upon", steps=born + 1, **SETTINGS)
    assert gone["slot"] in kept.alive(born)
    kept.do("pin", slot=gone["slot"])
    assert kept.state["pinned"] == [gone["slot"]]
    kept.do("continue", steps=12 - born - 1)
    assert gone["slot"] in kept.alive(born)
    assert "pinned" in kept.refused("remove", slot=gone["slot"])
    kept.do("pin", slot=gone["slot"], pinned=False)
    kept.do("continue", steps=1)
    assert kept.state["pinned"] == []


def test_members_say_why_and_what_next(session: Any, loaded: LoadedModel) -> None:
    kept = session(prompt="Once upon", steps=12, **SETTINGS)
    statuses = set()
    for index in range(len(kept.steps)):
        for member in kept.members(index):
            statuses.add(member["status"])
            assert member["why"].endswith(".")
            assert len(member["next"]) == (0 if member["slot"] is None else 20)
            probabilities = [item["probability"] for item in member["next"]]
            assert probabilities == sorted(probabilities, reverse=True)
    assert {"kept", "removed"} <= statuses


@pytest.mark.parametrize("steps", [1, 4], ids=["to-be-run", "run"])
def test_what_comes_next_is_the_models(session: Any, loaded: LoadedModel, steps: int) -> None:
    """Where two of the five first members' rows were screened out again, too."""
    kept = session(prompt="Once upon a time", steps=steps, **CASES["screened"])
    members = [member for member in kept.members(0) if member["slot"] is not None]
    assert len(members) > 1 and any("coherence" in json.dumps(other) for other in kept.steps[0]["rejected"])
    for member in members:
        text = [*loaded.tokenizer.encode("Once upon a time"), member["id"]]
        out = loaded.model.forward(text, range(len(text)), None, loaded.model.new_cache(), logits="last")
        assert out.logits is not None
        assert [item["id"] for item in member["next"]] == np.argsort(-out.logits[0])[:20].tolist()


def test_export_and_import(session: Any, server: Served) -> None:
    kept = session(prompt="Once upon", steps=6, **SETTINGS)
    kept.do("branch", step=3, token_id=9)
    kept.do("continue", steps=4)
    slot = next(kept.alive(i)[0] for i in range(len(kept.steps) - 1) if len(kept.alive(i)) > 1)
    kept.do("remove", slot=slot)
    exported = server.get(f"/sessions/{kept.id}/run")
    assert "attachment" in exported.headers["content-disposition"]
    again = session(run=exported.json())
    assert again.steps == kept.steps
    again.do("continue", steps=4)
    kept.do("continue", steps=4)
    assert ids(again.steps) == ids(kept.steps)


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: run.update(config={**run["config"], "threshold": 7}),
        lambda run: run.update(config={**run["config"], "nope": 7}),
        lambda run: run["model"].update(sha256="0" * 64),
        lambda run: run["prompt"]["token_ids"].append(99_999),
        lambda run: run["steps"][1]["tokens"][0].update(id=2**40),
        lambda run: run["steps"][1]["tokens"][0]["parents"].clear(),
        lambda run: run["steps"][0]["tokens"][0].update(slot=5_000_000),
        lambda run: run["steps"][0]["tokens"][0].update(probability=float("nan")),
        lambda run: run["steps"][0]["tokens"][0].update(weight=-1),
        lambda run: run.pop("steps"),
        lambda run: run.update(decoder="tree", config={**run["config"], "decoder": "tree"}),
    ],
)
def test_a_damaged_run_is_refused(
    session: Any, server: Served, damage: Callable[[dict[str, Any]], None]
) -> None:
    run = session(prompt="Once upon", steps=3, **SETTINGS).state["run"]
    damage(run)
    body = json.dumps({"run": run})  # httpx would refuse NaN
    response = server.client().post("/sessions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422, response.text


def test_continuing_streams_steps_then_the_state(session: Any, server: Served) -> None:
    kept = session(prompt="Once upon", steps=2, **SETTINGS)
    found = stream(server, f"/sessions/{kept.id}/continue/stream", {"steps": 5})
    assert [step["step"] for step in named(found, "step")] == [2, 3, 4, 5, 6]
    assert found[-1][0] == "session"
    assert len(found[-1][1]["run"]["steps"]) == 7
    assert any(step["scores"] for step in named(found, "step")), "posteriors of earlier members move"


def test_what_cannot_be_done_is_a_conflict(session: Any) -> None:
    kept = session(prompt="Hello", steps=0, threshold=1.0)
    assert "undo" in kept.refused("undo")
    assert "redo" in kept.refused("redo")
    kept.do("continue", steps=2)
    assert "last member" in kept.refused("remove", slot=kept.alive(0)[0])
    for action, body, status in (
        ("branch", {"step": 9, "token_id": 1}, 404),
        ("branch", {"step": 0, "token_id": 100_000}, 422),
        ("pin", {"slot": 999}, 404),
        ("remove", {"slot": 0}, 404),
    ):
        response = kept.server.post(f"/sessions/{kept.id}/{action}", body)
        assert response.status_code == status, (action, response.text)


def test_the_least_recently_used_session_goes_first(server: Served) -> None:
    made = [server.post("/sessions", {"prompt": f"number {i}"}).json()["id"] for i in range(3)]
    assert server.get(f"/sessions/{made[0]}").status_code == 200
    server.post("/sessions", {"prompt": "one more"})
    gone = server.get(f"/sessions/{made[1]}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "session_expired")
    assert {item["id"] for item in server.get("/sessions").json()["sessions"]} > {made[0], made[2]}
    assert server.client().delete(f"/sessions/{made[0]}").status_code == 204
    assert server.get(f"/sessions/{made[0]}").status_code == 404


def test_a_full_session_says_so_and_keeps_what_it_has(session: Any, server: Served) -> None:
    kept = session(prompt="Hello", steps=1, threshold=0.02)
    response = server.post(f"/sessions/{kept.id}/continue", {"steps": 500})
    assert response.status_code == 409
    assert "400 cache rows" in response.json()["error"]["message"]
    state = server.get(f"/sessions/{kept.id}").json()
    assert len(state["run"]["steps"]) > 20
    kept.do("undo")
    assert len(kept.steps) == 1


def test_going_back_and_forth_does_not_fill_the_arena(session: Any) -> None:
    """Rows that nothing can come back to are dropped when room is needed."""
    kept = session(prompt="Hello", steps=4, threshold=0.02)
    for turn in range(12):
        kept.do("branch", step=1, token_id=10 + turn)
        kept.do("continue", steps=12)
    assert len(kept.steps) == 14


def test_an_unused_session_expires(model: Path) -> None:
    with serving(model, "--session-ttl", "2") as served:
        made = served.post("/sessions", {"prompt": "Hello"}).json()["id"]
        for _ in range(10):
            time.sleep(3)  # asking is using
            if (status := served.get(f"/sessions/{made}").status_code) == 410:
                break
        assert status == 410
        served.wait_until(lambda health: health["sessions"] == 0)


def test_an_arena_is_invisible_to_a_decoder(loaded: LoadedModel) -> None:
    """A state that was left and come back to continues with the very numbers of one that was never left."""
    config = tempo_mlx.GenerateConfig(threshold=0.03, pruning_signal="posterior", posterior_threshold=0.2)
    prompt = loaded.tokenizer.encode("Once upon a time")
    alone = superposed(Setup(loaded.model, prompt, config))
    arena = Arena(loaded.model, 10_000)
    shared = superposed(Setup(arena, prompt, config))
    for _ in range(10):
        stray = shared.copy()
        for _ in range(2):
            stray.advance()
        mine, theirs = alone.advance(), shared.advance()
        assert [m.id for m in mine.tokens] == [m.id for m in theirs.tokens]
        assert [m.probability for m in mine.tokens] == pytest.approx(
            [m.probability for m in theirs.tokens], abs=1e-6
        )
    assert len(arena.cache) > len(shared.cache)
    arena.compact([shared.cache])
    assert len(arena.cache) == len(shared.cache)
    assert [m.id for m in alone.advance().tokens] == [m.id for m in shared.advance().tokens]


def test_watching_changes_nothing(loaded: LoadedModel) -> None:
    prompt = loaded.tokenizer.encode("Once upon a time")
    config = tempo_mlx.GenerateConfig(threshold=0.03)
    rivals = Rivals(len(prompt) - 1, 3)
    one = superposed(Setup(loaded.model, prompt, config))
    two = superposed(Setup(loaded.model, prompt, config, observer=rivals))
    for _ in range(6):
        assert one.advance().tokens == two.advance().tokens
    slots = [m.slot for step in two.steps[:-1] for m in step.tokens]
    assert set(rivals.top) == {len(prompt) - 1, *slots}
