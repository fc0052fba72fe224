"""What the tests by a GPU's rules leave out is there to be left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_policy import LEFT_OUT, NAMES, left_out

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", sorted(NAMES))
def test_it_exists(name: str) -> None:
    file, _, test = name.partition("::")
    path = HERE / f"test_{file}.py"
    assert path.exists()
    assert not test or f"\ndef {test}(" in path.read_text("utf-8")


def test_for_one_reason_and_alone() -> None:
    assert len(NAMES) == sum(len(names.split()) for names in LEFT_OUT.values())
    assert left_out("precision", "test_the_rule") and not left_out("cold", "test_the_rule")
    assert left_out("weights_gemma_gguf", "test_logits_agree")
    assert not left_out("weights_gemma_gguf", "test_something_else")
    for file in ("model", "families", "tempo", "tree", "verify", "cold", "weights_gguf", "recurrent"):
        assert not any(name.split("::")[0] == file for name in NAMES)
