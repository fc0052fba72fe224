"""The OpenAPI document is true, and no request it can generate, valid or not, ends in an error of the server."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")
pytest.importorskip("schemathesis")

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tempo_mlx.load_config import LoadConfig
from tempo_mlx.server.app import create_app
from tempo_mlx.server.schemas import SETTINGS
from tempo_mlx.server.settings import ServerConfig
from tests.serving import Served, serving
from tests.twins import twin

CASES = int(
    os.environ.get("FUZZ_CASES", "40")
)  # valid, and as many invalid ones, of each of some 25 operations
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    flags = ["--max-tokens-limit", "8", "--request-timeout", "5", "--concurrency", "4"]
    with serving(twin("llama"), "--model-alias", "twin", *flags) as served:
        yield served


SCHEMA = schemathesis.openapi.from_dict(create_app([LoadConfig()], ServerConfig()).openapi())
PROMPTED = ("/generate", "/generate/stream", "/sessions")
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_request_ends_in_an_error_of_the_server(name: str, mode: object, server: Served) -> None:
    operation = OPERATIONS[name]
    session = requests.Session()

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "twin"  # or nearly every case would end there
            if mode == schemathesis.GenerationMode.POSITIVE:
                case.body.pop("keep_alive", None)  # or the model would be unloaded again and again
        if (
            mode == schemathesis.GenerationMode.POSITIVE
            and case.path in PROMPTED
            and isinstance(case.body, dict)
        ):
            chosen = [name for name in case.body if name in SETTINGS][:2]  # more hardly ever go together
            case.body = {"prompt": "Hello", **{name: case.body[name] for name in chosen}}
        if case.path.startswith("/sessions/{id}"):
            case.path_parameters["id"] = kept_session(server, case.method == "DELETE")
        case.call_and_validate(base_url=server.url, session=session, checks=CHECKS, timeout=30)

    try:
        check()
    except Unsatisfiable:
        pytest.skip("there is no invalid request to this route")


def kept_session(server: Served, fresh: bool) -> str:
    """The id of a session with a few steps: one for all, or a new one."""
    kept = [] if fresh else server.get("/sessions").json()["sessions"]
    if kept:
        return str(kept[0]["id"])
    body = {"prompt": "Hello", "steps": 4, "threshold": 0.04}
    return str(server.post("/sessions", body).json()["id"])


def test_the_worker_survived(server: Served) -> None:
    health = server.wait_until(lambda health: health["running"] == health["waiting"] == 0)
    assert health["status"] == "ok"
    assert server.metric("tempo_http_responses_total") > len(OPERATIONS) * CASES
    assert server.metric("tempo_steps_total") > CASES, "valid requests were among them"
    assert health["worker"]["restarts"] == 0
    assert "Traceback" not in server.log, server.log[server.log.index("Traceback") - 300 :][:2500]
