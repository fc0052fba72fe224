"""The text of a token stream: never taken back, and in the end the run's final text."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import tempo_mlx
from tempo_mlx.decode.paths import is_read
from tempo_mlx.decode.settled import SettledReading, removal_window
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.stops import TextStream
from tests.twins import twin

CASES: list[dict[str, Any]] = [
    {"threshold": 0.03},
    {"threshold": 0.02, "combine": "mean", "attend": "all"},
    {"threshold": 0.03, "use_retroactive_pruning": True, "posterior_threshold": 0.3, "pruning_window": 3},
    {"threshold": 0.03, "use_retroactive_pruning": True, "posterior_threshold": 0.4, "pruning_window": 1,
     "complete_removal_mode": "remove_position"},
    {"threshold": 0.03, "use_retroactive_pruning": True, "posterior_threshold": 0.4, "relative_posterior": True,
     "complete_removal_mode": "keep_unattended"},
    {"threshold": 0.03, "use_retroactive_pruning": True, "pruning_signal": "random", "posterior_threshold": 0.6},
    {"decoder": "plain"},
]  # fmt: skip


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tempo_mlx.load(str(twin("llama")))


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("prompt", ["Once upon a time", "Hello", "z"])
def test_what_is_sent_stays_true(loaded: LoadedModel, settings: dict[str, Any], prompt: str) -> None:
    decoding = tempo_mlx.stream(loaded, prompt, max_tokens=40, min_steps=40, **settings)
    reading, text = SettledReading(removal_window(decoding.config)), TextStream(loaded.tokenizer, ())
    early, chosen, sent = 0, [], ""
    for step in decoding:
        settled = reading.add(step)
        chosen += settled
        sent += text.add(c.member.id for c in settled if is_read(c.member))
        early += bool(settled) and step.step < 39
    run = decoding.run()
    assert run.final_text.startswith(sent)
    path = run.best_path()
    assert [c.member.id for c in chosen] == [token.id for token in path[: len(chosen)]]
    for c, token in zip(chosen, path, strict=False):
        assert c.member.slot == token.slot
    assert early > 3, "text comes while it grows"


def test_a_stop_string_is_held_back_until_it_cannot_be_one(loaded: LoadedModel) -> None:
    decoding = tempo_mlx.stream(loaded, "Hello", decoder="plain", temperature=0, max_tokens=30, min_steps=30)
    steps = list(decoding)
    whole = decoding.run().final_text
    for length in (1, 2, 5):
        for start in range(3, len(whole) - length):
            stop = whole[start : start + length]
            expected = whole[: whole.index(stop)]
            text, sent = TextStream(loaded.tokenizer, (stop,)), ""
            for step in steps:
                sent += text.add([step.tokens[0].id])
                assert expected.startswith(sent)
            assert sent == expected
