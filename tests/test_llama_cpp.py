"""A share of what benchmarks/llama_cpp.py counts: the same tokens as llama.cpp, which shares no code with us."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("xllamacpp")

from benchmarks.llama_cpp import (
    NEAR_TIE,
    NEAR_TIE_AS_IS,
    other_ids,
    rivals,
    strings,
    vocabulary_file,
    widened,
)
from tempo_mlx import load
from tempo_mlx.bench import peers
from tempo_mlx.bench.contenders import line_up
from tempo_mlx.bench.llama import LlamaCpp, llama_cpp
from tempo_mlx.bench.steps import Effort
from tempo_mlx.bench.suites import measure
from tempo_mlx.errors import BackendError, ModelError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.weights import open_checkpoint
from tempo_mlx.weights.convert import convert
from tempo_mlx.weights.registry import PACKAGED
from tests.converted import CONVERTED, converted_twin
from tests.ggufs import modern_twin
from tests.twins import twin

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


def test_packed_weights_multiply_as_mlx_does(tmp_path: Path) -> None:
    """Whose own products take too long on a CPU."""
    pytest.importorskip("torch")
    checkpoint = open_checkpoint(str(convert(str(twin("qwen2")), tmp_path / "packed", bits=4, group_size=32)))
    logits = []
    for model in (
        build(checkpoint, "cpu", "float16", packed=True),
        widened(build(checkpoint, "cpu", "float16", packed=True)),
    ):
        out = model.forward(range(60, 66), range(6), None, model.new_cache()).logits
        logits.append(out.astype(np.float64))
    off = (logits[1] - logits[0]).std(axis=1) / logits[0].std(axis=1)
    assert 0.0 < np.median(off) < 0.02  # by other roundings


def test_timed_beside_it() -> None:
    """Each suite has a row of every contender, after both were seen to do the same."""
    pytest.importorskip("torch")
    few = Effort(True, 1e10, 100.0)
    with line_up(LoadConfig(model=str(modern_twin("gguf-glm4"))), ["tempo-mlx"], print) as field:
        names = ["tempo-mlx", peers.LLAMA_CPP, peers.AS_STORED]
        result = peers.texts(field, few)
        assert [(row.case, row.contender) for row in result.rows] == [
            (case, name) for case in ("1 text", "8 texts") for name in names
        ]
        assert all(row.value > 0 for row in result.rows) and not result.notes
        result = peers.llama_cpp(field, few)
        cases = ["1 row", "5 texts", "128 tokens", "start", "memory"]
        assert {(row.case, row.contender) for row in result.rows} == {
            (case, name) for case in cases for name in names
        }
        assert all(20 < row.value < 4000 for row in result.rows if row.unit == "MB")
        for goal in result.goals:
            case = goal.what.split(",")[0]
            ours, theirs = (result.value(case, name) for name in names[:2])
            assert ours is not None and theirs is not None and goal.value == pytest.approx(ours / theirs)
        assert [goal.bound for goal in result.goals] == [1.3, 1.0, 1.0]


def test_further_models_are_timed_too() -> None:
    with line_up(LoadConfig(model=str(twin("llama"))), ["tempo-mlx"], print) as field:
        other = str(modern_twin("gguf-glm4"))
        (result,) = measure(field, ["models"], quick=True, also=[other, str(twin("llama"))])
    cases = list(dict.fromkeys(row.case for row in result.rows))
    name = cases[0].split(":")[0]
    rest = ["1 row", "5 texts", "128 tokens", "start", "memory"]
    assert cases == [
        f"{name}: a pass of one row",
        *(f"{name}: {case}" for case in rest),
        "llama: a pass of one row",
    ]
    assert [goal.what for goal in result.goals] == [f"{name}: {case}, times llama.cpp's" for case in rest[:3]]
    assert result.notes == ["llama.cpp is left out: it reads .gguf files."]


def test_other_work_is_not_timed_beside_it() -> None:
    with (
        line_up(LoadConfig(model=str(modern_twin("gguf-qwen3_moe"))), ["tempo-mlx"], print) as field,
        peers.Process(modern_twin("gguf-glm4"), 1) as other,
        pytest.raises(ModelError, match=r"llama\.cpp goes on with token \d+, which is .* of a logit behind"),
    ):
        peers.check_equal(field, other)


def test_it_is_left_out_with_a_reason() -> None:
    with line_up(LoadConfig(model=str(twin("llama"))), ["tempo-mlx"], print) as field:
        result = peers.llama_cpp(field, Effort(True, 1e10, 100.0))
    assert result.rows == [] and result.notes == ["llama.cpp is left out: it reads .gguf files."]
    with pytest.raises(BackendError, match=r"llama\.cpp does not start on .*config\.json"):
        peers.Process(twin("llama") / "config.json", 1)
