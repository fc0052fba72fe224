"""The server as a client sees it: answers, streams, fairness, cancellation, death and restart of the worker."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

import tempo_mlx
from tempo_mlx.config import GenerateConfig
from tempo_mlx.report.run import Run
from tempo_mlx.resolution import SWITCHES, Shortcuts
from tempo_mlx.settings import by_audience, settings_of
from tests.patience import patient
from tests.serving import ROOT, Served, events, named, serving, stream, with_context
from tests.twins import twin

LONG = {"prompt": "Once upon a time", "max_tokens": 4000, "threshold": 0.05, "min_steps": 4000}
HUGE_PROMPT = "All work and no play. " * 1500  # about 31,000 tokens: dozens of chunks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_context(twin("llama"), 65536, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    with serving(model, concurrency=2, queue_size=2, pace={"heartbeat": 0.2}) as served:
        yield served


@pytest.fixture(autouse=True)
def idle(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did, its places are free again within a second of its end."""
    yield
    if "server" in request.fixturenames:
        served: Served = request.getfixturevalue("server")
        served.wait_until(lambda health: health["running"] == health["waiting"] == 0)


class Background:
    """A streamed request in a thread; `events` grows, `close` disconnects."""

    def __init__(
        self, served: Served, body: dict[str, Any], path: str = "/generate/stream", id: str | None = None
    ) -> None:
        self.events: list[tuple[str, Any, float]] = []
        self.status = 0
        self.client = served.client()
        headers = {"X-Request-ID": id} if id else {}
        self.stopping = False
        self.thread = threading.Thread(target=self._run, args=(path, body, headers), daemon=True)
        self.thread.start()

    def _run(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        try:
            with self.client.stream("POST", path, json=body, headers=headers) as response:
                self.status = response.status_code
                if response.status_code != 200:
                    self.events.append(("refused", json.loads(response.read()), time.monotonic()))
                    return
                for name, data in events(response.iter_lines()):
                    self.events.append((name, data, time.monotonic()))
                    if self.stopping:
                        return
        except httpx.TransportError as error:
            self.events.append(("broken", str(error), time.monotonic()))

    def wait_for(self, name: str, count: int = 1, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while sum(event[0] == name for event in self.events) < count:
            assert time.monotonic() < end, [event[0] for event in self.events][-5:]
            time.sleep(0.005)

    def close(self) -> None:
        self.stopping = True
        self.thread.join(30)

    def last(self) -> tuple[str, Any]:
        self.thread.join(60)
        return self.events[-1][:2]


def test_the_defaults_of_a_question_give_way_to_the_server_and_its_environment(model: Path) -> None:
    env = {"TEMPO_COVERAGE": "0.5", "TEMPO_LEAVES": "3", "TEMPO_DECODER": "sample"}
    with serving(model, "--max-tokens-limit", "6", env=env) as served:
        plain = served.post("/ask", {"prompt": "Hello"})
        assert plain.status_code == 200
        config = plain.json()["run"]["config"]
        found = [config[name] for name in ("decoder", "max_tokens", "coverage", "leaves")]
        assert found == ["enumerate", 6, 0.5, 3]
        given = served.post("/ask", {"prompt": "Hello", "coverage": 0.1, "leaves": 2, "max_tokens": 3}).json()
        assert [given["run"]["config"][name] for name in ("max_tokens", "coverage", "leaves")] == [3, 0.1, 2]
        assert served.post("/ask", {"prompt": "Hello", "max_tokens": 7}).status_code == 422
        shown = served.get("/settings").json()  # what the page fills its form with
        assert shown["ask"] == {"decoder": "enumerate", "threshold": 0.001, "max_tokens": 6}
        assert shown["answer_tokens"] == shown["defaults"]["max_tokens"] == 6


def test_generate_is_the_python_api(server: Served, model: Path) -> None:
    settings = {
        "max_tokens": 12,
        "threshold": 0.04,
        "use_retroactive_pruning": True,
        "posterior_threshold": 0.2,
    }
    response = server.post("/generate", {"prompt": "Hello there", **settings})
    assert response.status_code == 200
    ours = tempo_mlx.generate(tempo_mlx.load(str(model)), "Hello there", **settings).to_dict()
    theirs = Run.from_json(response.text).to_dict()
    for run in (ours, theirs):
        del run["timing"], run["model"]
    assert theirs == ours
    assert any(len(step["tokens"]) > 1 for step in theirs["steps"])


def test_answers_are_streamed_as_they_are_found(server: Served) -> None:
    body = {"prompt": "Hello there", "leaves": 6, "max_tokens": 4, "coverage": None, "threshold": 0.02}
    found = stream(server, "/ask/stream", body)
    assert found[-1][0] == "answers" and {name for name, _ in found[:-1]} == {"step", "found"}
    assert found[-1][1]["answers"] == server.post("/ask", body).json()["answers"]
    unseen = [data["not_looked_at"] for data in named(found, "found")]
    assert len(unseen) > 1 and unseen == sorted(unseen, reverse=True) and unseen[-1] < unseen[0]
    assert all(data["run"] is None for data in named(found, "found"))


def test_a_stream_is_its_run_in_pieces(server: Served) -> None:
    body = {"prompt": "Hello there", "max_tokens": 20, "threshold": 0.03, "use_retroactive_pruning": True,
            "posterior_threshold": 0.3}  # fmt: skip
    found = stream(server, "/generate/stream", body)
    assert [name for name, _ in found] == ["start"] + ["step"] * 20 + ["phrases", "run"]
    start, run = found[0][1], found[-1][1]
    assert start["prompt"]["token_ids"] == run["prompt"]["token_ids"]
    assert "".join(start["prompt"]["tokens"]) == "Hello there"
    assert start["config"] == run["config"]
    removed = {}
    for index, step in enumerate(named(found, "step")):
        final = run["steps"][index]
        assert step["step"] == index
        assert [(t["id"], t["slot"], t["probability"], t["parents"]) for t in step["tokens"]] == [
            (t["id"], t["slot"], t["probability"], t["parents"]) for t in final["tokens"]
        ]
        assert step["stats"]["width"] == len(final["tokens"])
        removed.update({item["slot"]: item["removed_after"] for item in step["removed"]})
    expected = {
        t["slot"]: t["removed_after"] for s in run["steps"] for t in s["tokens"] if t["removed_after"]
    }
    assert removed == expected != {}


def test_messages_are_a_chat(server: Served, model: Path) -> None:
    run = server.post("/generate", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}).json()
    assert run["prompt"]["text"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    same = tempo_mlx.generate(tempo_mlx.load(str(model)), "Hi", chat=True, max_tokens=2)
    assert run["prompt"]["token_ids"] == list(same.prompt.token_ids)


def test_a_grammar_and_penalties_are_settings_like_others(server: Served) -> None:
    pytest.importorskip("llguidance")
    asked = {
        "prompt": "Hello",
        "json_schema": {"enum": ["yes", "no"]},
        "logit_bias": {"7": -3},
        "max_tokens": 30,
    }
    run = server.post("/generate", {**asked, "repetition_penalty": 1.2}).json()
    assert json.loads(run["final_text"]) in ("yes", "no") and run["decoder"] == "plain"
    assert run["config"]["logit_bias"] == ["7=-3"] and run["steps"][0]["masked"]
    answer = server.post("/generate", {"prompt": "Hello", "grammar": "begin: x"})
    assert answer.status_code == 422 and "grammar is no grammar" in answer.text


def test_settings_and_docs_show_the_whole_table(server: Served) -> None:
    table = {**settings_of(GenerateConfig), **settings_of(Shortcuts)}
    shown = server.get("/settings").json()
    assert [s["name"] for s in shown["settings"]] == [
        s.name for s in by_audience(settings_of(GenerateConfig).values())
    ]
    assert shown["groups"][0] == "Input" and shown["shortcuts"].keys() == SWITCHES.keys()
    for entry in shown["settings"]:
        setting = table[entry["name"]]
        assert entry["default"] == (
            list(setting.default) if isinstance(setting.default, tuple) else setting.default
        )
        assert (entry["minimum"], entry["maximum"]) == (setting.row.minimum, setting.row.maximum)
        assert entry["audience"] == setting.row.audience
    fields = server.get("/openapi.json").json()["components"]["schemas"]["GenerateBody"]["properties"]
    page = server.get("/docs").text
    for name, setting in table.items():
        assert setting.row.help in fields[name]["description"]
        assert f"<code>{name}</code>" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page  # works offline


def test_every_setting_of_a_request_is_checked_like_the_command_lines(server: Served) -> None:
    for body, param in (
        ({"threshold": 1.5}, "threshold"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"branches": 200}, "branches"),
        ({"branches": 2, "best_of": 200}, "best_of"),
        ({"decoder": "nope"}, "decoder"),
        ({"threshold": "0.1"}, "threshold"),
        ({"typo": 1}, "typo"),
        ({"beam_width": 3, "decoder": "plain"}, "beam_width"),
        ({"stop": [""]}, "stop"),
    ):
        response = server.post("/generate", {"prompt": "a", **body})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (422, "invalid_value", param), body
        assert error["request_id"] == response.headers["x-request-id"]
    assert server.post("/generate", {"prompt": "a", "selection_threshold": 0.2, "max_tokens": 1}).json()["config"][
        "threshold"
    ] == 0.2  # fmt: skip


def test_the_second_of_two_requests_starts_before_the_first_ends(server: Served) -> None:
    first = Background(server, {**LONG, "max_tokens": 600, "min_steps": 600})
    first.wait_for("step", 5)
    second = Background(server, {"prompt": "Short", "max_tokens": 100, "min_steps": 100})
    assert second.last()[0] == "run"
    first.close()
    done = next(at for name, _, at in second.events if name == "run")
    assert not [at for name, _, at in first.events if name == "run" and at < done]
    between = [at for name, _, at in first.events if name == "step" and second.events[0][2] < at < done]
    assert len(between) >= 3, "the first request took its turns too"


def test_a_short_prompt_overtakes_a_long_one(server: Served) -> None:
    slow = Background(server, {"prompt": HUGE_PROMPT, "max_tokens": 1})
    slow.wait_for("start")
    run = server.post("/generate", {"prompt": "Short", "max_tokens": 3})
    assert run.status_code == 200
    assert not [event for event in slow.events if event[0] == "step"], "the long prompt is still being run"
    slow.close()


def test_delete_ends_a_request_between_steps_and_keeps_what_it_has(server: Served) -> None:
    request = Background(server, LONG, id="request-to-cancel")
    request.wait_for("step", 3)
    before = len(request.events)
    assert httpx.delete(server.url + "/requests/request-to-cancel").json() == {
        "id": "request-to-cancel",
        "cancelled": True,
    }
    name, run = request.last()
    assert name == "run"
    assert run["finish_reason"] == "cancelled"
    assert before - 2 <= len(run["steps"]) < 4000
    assert httpx.delete(server.url + "/requests/request-to-cancel").status_code == 404


def test_delete_ends_a_prefill_between_chunks(server: Served) -> None:
    request = Background(server, {"prompt": HUGE_PROMPT, "max_tokens": 5}, id="request-in-prefill")
    request.wait_for("start")
    time.sleep(0.2)
    begun = time.monotonic()
    assert httpx.delete(server.url + "/requests/request-in-prefill").status_code == 200
    name, run = request.last()
    assert (name, run["finish_reason"], run["steps"]) == ("run", "cancelled", [])
    assert time.monotonic() - begun < patient(3)


@pytest.mark.parametrize("path", ["/generate", "/generate/stream", "/v1/completions", "/sessions"])
@pytest.mark.parametrize("prompt", ["Once", HUGE_PROMPT], ids=["decode", "prefill"])
def test_a_client_that_leaves_frees_its_place(server: Served, path: str, prompt: str) -> None:
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 4000}
    if path == "/v1/completions":
        body["model"] = server.health()["model"]
    if path == "/sessions":
        body["steps"] = 4000
    with (
        pytest.raises(httpx.ReadTimeout),
        server.client(timeout=httpx.Timeout(60, read=0.6)) as client,
        client.stream("POST", path, json=body) as response,
    ):
        for _ in response.iter_raw():
            raise httpx.ReadTimeout("left while it was streaming")
    begun = time.monotonic()
    server.wait_until(lambda health: health["running"] == 0)
    assert time.monotonic() - begun < patient(3)


def test_a_full_queue_is_refused_and_a_waiting_request_is_told_its_place(server: Served) -> None:
    running = [Background(server, LONG) for _ in range(2)]
    for request in running:
        request.wait_for("step")
    waiting = [Background(server, {"prompt": "a", "max_tokens": 2}, id=f"waiting-{i}") for i in range(2)]
    for request in waiting:
        request.wait_for("queued")
    refused = server.post("/generate", {"prompt": "a"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) > 0
    waiting[0].wait_for("heartbeat")
    assert httpx.delete(server.url + "/requests/waiting-0").status_code == 200
    assert waiting[0].last()[0] == "error"
    running[0].close()
    assert waiting[1].last()[0] == "run"
    running[1].close()
    assert server.metric("tempo_requests_refused_total") >= 1


def test_heartbeats_fill_the_silence_of_a_prefill(server: Served) -> None:
    request = Background(server, {"prompt": HUGE_PROMPT, "max_tokens": 1})
    request.wait_for("heartbeat", 2)
    request.close()
    beat = next(data for name, data, _ in request.events if name == "heartbeat")
    assert beat["state"] == "running"


def test_an_id_is_in_flight_once(server: Served) -> None:
    first = Background(server, LONG, id="the-same-id")
    first.wait_for("step")
    second = server.post("/generate", {"prompt": "a"}, headers={"X-Request-ID": "the-same-id"})
    assert second.status_code == 409
    first.close()


def test_health_and_metrics_know_what_goes_on(server: Served) -> None:
    steps = server.metric("tempo_steps_total")
    server.post("/generate", {"prompt": "Hello", "max_tokens": 7, "min_steps": 7})
    assert server.metric("tempo_steps_total") == steps + 7
    health = server.wait_until(lambda health: (health["worker"]["last_forward_age_seconds"] or 99) < 30)
    assert health["status"] == "ok"
    assert health["worker"]["heartbeat_age_seconds"] < patient(2)
    assert 1e6 < server.metric("tempo_worker_memory_bytes") < 1e11
    assert server.metric("tempo_prefill_seconds_count") >= 1
    assert server.metric("tempo_set_width_count") == server.metric("tempo_step_requests_count") == steps + 7


def test_prompts_are_not_logged(server: Served) -> None:
    server.post("/generate", {"prompt": "a very private matter", "max_tokens": 1})
    server.post("/generate", {"prompt": "a very private matter", "max_tokens": "x"})
    assert "private matter" not in server.log
    assert re.search(r'request_id="\S+" method="POST" path="/generate" status=422', server.log)


def test_a_killed_worker_is_replaced_and_everyone_is_told(model: Path) -> None:
    with serving(model, "--concurrency", "2") as served:
        session = served.post("/sessions", {"prompt": "Hello"}).json()["id"]
        requests = [Background(served, LONG), Background(served, {"prompt": HUGE_PROMPT})]
        requests[0].wait_for("step", 3)
        waiting = Background(served, {"prompt": "a", "max_tokens": 2})
        waiting.wait_for("queued")
        os.kill(served.health()["worker"]["pid"], signal.SIGKILL)
        killed = time.monotonic()
        for request in requests:
            name, data = request.last()
            assert name in ("error", "refused")  # the latter where the answer had not begun
            assert data["error"]["code"] == "worker_died"
            assert (data["status"] if name == "error" else request.status) == 503
        assert waiting.last()[0] == "run", "a request that had not begun is served by the new worker"
        assert time.monotonic() - killed < patient(10)
        health = served.wait_until(lambda health: health["status"] == "ok")
        assert health["worker"]["restarts"] == 1
        lost = served.get(f"/sessions/{session}")
        assert (lost.status_code, lost.json()["error"]["code"]) == (410, "session_lost")
        assert served.metric("tempo_worker_restarts_total") == 1


def test_a_worker_that_gives_no_sign_of_life_is_replaced(model: Path) -> None:
    with serving(model, pace={"worker_timeout": 3, "probe_after": 0.2}) as served:
        pid = served.health()["worker"]["pid"]
        os.kill(pid, signal.SIGSTOP)  # it lives, and does nothing
        stalled = served.wait_until(lambda health: health["status"] != "ok")
        assert stalled["status"] in ("stalled", "dead", "loading")
        health = served.wait_until(lambda health: health["status"] == "ok")
        assert health["worker"]["pid"] != pid


def test_time_limits(model: Path) -> None:
    with serving(model, "--request-timeout", "3", "--concurrency", "1") as served:
        first = Background(served, LONG)
        first.wait_for("step")
        run = served.post("/generate", {"prompt": "a", "max_tokens": 4000, "min_steps": 4000})
        assert first.last()[1]["finish_reason"] == "timeout"
        assert run.status_code in (200, 504)  # its own seconds ran while it waited
        if run.status_code == 504:
            assert run.json()["error"]["code"] == "timeout"


def test_shutdown_lets_requests_finish_and_cancels_those_that_do_not(model: Path) -> None:
    with serving(model, "--shutdown-timeout", "4") as served:
        quick, slow = (
            Background(served, {"prompt": "a", "max_tokens": 60, "min_steps": 60}),
            Background(served, LONG),
        )
        quick.wait_for("step", 30)
        slow.wait_for("step")
        begun = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert quick.last()[1]["finish_reason"] == "length"
        name, run = slow.last()
        assert (name, run["finish_reason"]) == ("run", "cancelled")
        served.process.wait(120)
        assert time.monotonic() - begun < patient(12)


def test_the_worker_leaves_with_its_server(model: Path) -> None:
    with serving(model) as served:
        pid = served.health()["worker"]["pid"]
        served.process.kill()
        end = time.monotonic() + patient(10)
        while is_running(pid):
            assert time.monotonic() < end
            time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than an entry that nobody has collected."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], text=True, capture_output=True
    ).stdout.strip()
    return bool(state) and not state.startswith("Z")


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--model", "/nonexistent/model"], 2, "/nonexistent/model"),
        (["--rate-limit", "often"], 2, "rate_limit is 'often'"),
        (["--port", "99999999"], 2, "--port"),
        (["--cors-origins", "example.com"], 2, "cors_origins"),
        (["--api-key-file", "/nonexistent/keys"], 2, "/nonexistent/keys"),
        (["--host", "203.0.113.7"], 1, "Cannot listen on 203.0.113.7"),
    ],
)
def test_a_bad_start_is_one_sentence(flags: list[str], code: int, sentence: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tempo_mlx", "serve", "--port", "0", *flags]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, timeout=180)  # fmt: skip
    assert done.returncode == code
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_environment_names_of_the_original_and_ours_that_beat_them(model: Path, tmp_path: Path) -> None:
    env = {"TEMPO_LOG_PROMPTS": "yes",
           "MODEL_PATH": "/nonexistent", "TEMPO_MODEL_ALIAS": "mine", "DEVICE": "cpu", "LOG_LEVEL": "error",
           "TEMPO_LOG_LEVEL": "debug", "API_PORT": "1", "TEMPO_THRESHOLD": "0.25"}  # fmt: skip
    with serving(model, env=env) as served:  # --model and --port beat the environment
        assert served.health()["model"] == "mine"
        settings = served.get("/settings").json()
        assert settings["defaults"]["threshold"] == 0.25
        assert (
            served.post("/generate", {"prompt": "a", "max_tokens": 1}).json()["config"]["threshold"] == 0.25
        )
        assert " info " in served.log
        served.post("/generate", {"prompt": "for the log", "max_tokens": 1})
        assert "for the log" in served.log
