"""A share of what benchmarks/llama_cpp.py counts: the same tokens as llama.cpp, which shares no code with us."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")

from benchmarks.llama_cpp import (
    NEAR_TIE,
    NEAR_TIE_AS_IS,
    LlamaCpp,
    llama_cpp,
    other_ids,
    rivals,
    strings,
    vocabulary_file,
)
from tempo_mlx import load
from tempo_mlx.weights import open_checkpoint
from tempo_mlx.weights.registry import PACKAGED
from tests.converted import CONVERTED, converted_twin
from tests.ggufs import modern_twin

MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def theirs() -> Iterator[LlamaCpp]:
    if not PACKAGED[MODEL].path.exists():
        pytest.skip(f"{MODEL} has not been fetched")
    with llama_cpp(PACKAGED[MODEL].path) as server:
        yield server


def test_token_ids(theirs: LlamaCpp) -> None:
    tokenizer = open_checkpoint(MODEL).tokenizer()
    assert (
        other_ids(tokenizer, theirs, [*strings(150), "<|im_start|>user\nhi<|im_end|>\n", "1234567890", ""])
        == []
    )


def test_the_most_probable_tokens(theirs: LlamaCpp) -> None:
    loaded = load(MODEL)
    prompt = "The capital of France is"
    ids = loaded.tokenizer.encode(prompt)
    assert ids == theirs.tokenize(prompt, add_special=True)
    answer = theirs.greedy(ids, 6)
    assert len(answer) == 6
    assert all(gap < NEAR_TIE_AS_IS for gap in rivals(loaded.model, ids, answer))
    assert rivals(loaded.model, ids, [ids[0], *answer[1:]])  # it does compare


@pytest.mark.parametrize("pre", ["default", "deepseek-llm", "qwen35"])
def test_cuts(pre: str, tmp_path: Path) -> None:
    path = vocabulary_file(tmp_path, pre)
    with llama_cpp(path) as server:
        assert other_ids(open_checkpoint(str(path)).tokenizer(), server, list(strings(100, seed=2))) == []


@pytest.mark.parametrize(
    "name",
    ["gguf-glm4", "gguf-qwen3_moe", "gguf-glm4_moe", "gguf-lfm2_moe", "gguf-granitemoe", "gguf-qwen3_next",
     "gguf-qwen3_5_moe", "gguf-granite4-h", "gguf-nemotron_h_moe", "gguf-deepseek_v3", "gguf-ministral3",
     "gguf-gemma4-e", "gguf-llama4", "gguf-falcon_h1", "gguf-gpt_neox"],
)  # fmt: skip
def test_architectures(name: str) -> None:
    """The others of MODERN and CONVERTED agree as well, but gpt-oss, Phi-3.5-MoE and Bamba (docs/models.md) and those
    that llama.cpp does not load at these sizes (Gemma 3n, DeepSeek-V2-Lite) or gives no window (EXAONE 4). These are
    the kinds there are, and a second each."""
    pytest.importorskip("torch")
    path = converted_twin(name) if name in CONVERTED else modern_twin(name)
    ids = list(range(60, 84))
    with llama_cpp(path) as server:
        answer = server.greedy(ids, 12)
    assert len(answer) > 3
    model = load(str(path), device="cpu").model
    assert all(gap < NEAR_TIE for gap in rivals(model, ids, answer))
