"""A short form of benchmarks/server_load.py: many clients, a third of them leaving, a worker killed in the middle."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

from benchmarks.server_load import load
from tests.patience import patient
from tests.twins import twin


@pytest.fixture(scope="module")
def calm() -> dict[str, object]:
    return load(str(twin("llama")), clients=50, seconds=8, longest=40, kill=False, warm=6)


def test_no_answer_changes_and_no_place_is_lost(calm: dict[str, object]) -> None:
    outcomes = calm["outcomes"]
    assert isinstance(outcomes, dict)
    assert set(outcomes) <= {"ok", "left", "queue_full", "context_length_exceeded"}, outcomes
    assert outcomes["ok"] > 20 and outcomes["left"] > 20 and outcomes["queue_full"] > 0
    assert calm["answers_differing"] == []
    assert calm["places_free_after_seconds"] < patient(2)  # type: ignore[operator]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_returns(calm: dict[str, object]) -> None:
    memory: Any = calm["memory_mb"]
    assert memory["growth"] < 0.05, memory


def test_health_answers_while_decoding(calm: dict[str, object]) -> None:
    assert calm["health_ms"]["p99"] < patient(1000)  # type: ignore[index]  # 200 is for a machine that does nothing else


def test_a_worker_killed_under_load_is_replaced() -> None:
    result = load(str(twin("llama")), clients=20, seconds=8, longest=40, kill=True, warm=1)
    assert set(result["outcomes"]) <= {
        "ok",
        "left",
        "queue_full",
        "context_length_exceeded",
        "worker_died",
        "loading",
    }
    assert result["outcomes"]["worker_died"] + result["outcomes"]["loading"] > 0
    assert result["answers_differing"] == []
    assert result["recovery_seconds"] < patient(10)
