"""The KV cache in its forms: plain, and quantised to 8 and to 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tempo_mlx
from tempo_mlx.cli.main import main
from tempo_mlx.errors import ConfigError, ModelError
from tempo_mlx.mlx import mx
from tempo_mlx.model.cache import STEP, Cache, group_size
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import KV_TOLERANCES, verify
from tests import twin_table, twins

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FORMS = [None, 8, 4]
LAYERS, GROUPS, DIM = 2, 3, 64
SHAPES = dict.fromkeys(range(LAYERS), (GROUPS, DIM, DIM))
ROUNDING = {None: 0.0, 8: 0.035, 4: 0.6}  # a step of 256 or of 16 over the range of 64 normal numbers


def filled(bits: int | None, slots: int) -> tuple[Cache, np.ndarray]:
    """A cache of random rows, appended in two passes, and the rows (layers, 2, K, S, D)."""
    cache = Cache(SHAPES, mx.float32, bits)
    rows = np.random.default_rng(0).standard_normal((LAYERS, 2, GROUPS, slots, DIM)).astype(np.float32)
    for start, stop in ((0, slots - 3), (slots - 3, slots)):
        write(cache, rows[:, :, :, start:stop], np.arange(start, stop))
    return cache, rows


def write(cache: Cache, rows: np.ndarray, positions: np.ndarray) -> list[tuple[Any, Any]]:
    cache.reserve(positions)
    views = [cache.append(i, mx.array(keys), mx.array(values)) for i, (keys, values) in enumerate(rows)]
    cache.commit()
    return views


def contents(cache: Cache) -> np.ndarray:
    """What the next pass would read, (layers, 2, K, S, D): a row is appended for it, and forgotten."""
    before = len(cache)
    one = np.zeros((LAYERS, 2, GROUPS, 1, DIM), np.float32)
    views = write(cache, one, np.array([before]))
    read = np.array([[np.array(a)[:, :-1] for a in pair] for pair in views])
    cache.truncate(before)
    return read


@pytest.mark.parametrize("bits", FORMS)
def test_slots_stay_what_they_were(bits: int | None) -> None:
    """Growing past the first buffer, dropping, cutting and copying move slots and change no number of theirs."""
    cache, rows = filled(bits, STEP + 20)
    first = contents(cache)
    assert abs(first - rows).max() <= ROUNDING[bits]
    kept = np.setdiff1d(np.arange(STEP + 20), [3, 100, 101, STEP + 7])
    other = cache.copy()
    cache.keep(kept)
    assert len(cache) == len(kept) and cache.positions.tolist() == kept.tolist()
    np.testing.assert_array_equal(contents(cache), first[:, :, :, kept])
    cache.truncate(50)
    write(cache, rows[:, :, :, :1], np.array([50]))
    np.testing.assert_array_equal(contents(cache)[:, :, :, :50], first[:, :, :, kept[:50]])
    np.testing.assert_array_equal(contents(other), first)


@pytest.mark.parametrize("bits", FORMS)
def test_a_slot_is_stored_for_itself(bits: int | None) -> None:
    """What a slot holds does not depend on what was appended with it."""
    cache, rows = filled(bits, 40)
    single = Cache(SHAPES, mx.float32, bits)
    for i in range(40):
        write(single, rows[:, :, :, i : i + 1], np.array([i]))
    np.testing.assert_array_equal(contents(single), contents(cache))


@pytest.mark.parametrize(("dtype", "plain"), [(mx.float32, 32), (mx.bfloat16, 16)])
def test_memory_shrinks_to_the_bits_and_the_scales(dtype: Any, plain: int) -> None:
    sizes = {}
    for bits in FORMS:
        cache = Cache(SHAPES, dtype, bits)
        views = write(cache, np.ones((LAYERS, 2, GROUPS, 10, DIM), np.float32), np.arange(10))
        assert bits is None or {a.dtype for pair in views for a in pair} == {dtype}
        sizes[bits] = cache.nbytes
    assert sizes[None] == LAYERS * 2 * GROUPS * STEP * DIM * plain / 8
    for bits in (8, 4):
        assert sizes[bits] / sizes[None] == pytest.approx((bits + 2 * plain / 64) / plain)


@pytest.mark.parametrize("bits", FORMS)
def test_memory_is_given_back_when_much_is_removed(bits: int | None) -> None:
    cache, _ = filled(bits, 6 * STEP)
    full, first = cache.nbytes, contents(cache)
    kept = np.arange(0, 6 * STEP, 3)
    cache.keep(kept)
    assert cache.nbytes == full // 3
    cache.keep(np.arange(len(kept) - 10))
    np.testing.assert_array_equal(contents(cache), first[:, :, :, kept[:-10]])


def test_head_dims_that_have_no_groups_are_refused() -> None:
    assert [group_size(dim) for dim in (32, 64, 96, 128, 256)] == [32, 64, 32, 64, 64]
    with pytest.raises(ModelError, match=r"multiple of 32, and the model's is 80; leave out --kv-bits"):
        group_size(80)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a head dim of 32, and distributions wide enough for sets."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=twin_table.VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    where = tmp_path_factory.mktemp("llama")
    model.save_pretrained(where)
    twins.write_tokenizer(where)
    return where


SETTINGS: dict[str, Any] = {"max_tokens": 16, "min_steps": 16, "threshold": 0.05}


@pytest.mark.parametrize("bits", [8, 4])
def test_runs_are_close_to_those_of_the_plain_cache(path: Path, bits: int) -> None:
    """And not the same: the option changes the computation."""
    ids = np.random.default_rng(1).integers(250, size=300)
    logits = []
    for model in (tempo_mlx.load(str(path)).model, tempo_mlx.load(str(path), kv_bits=bits).model):
        cache = model.new_cache()
        model.forward(ids, range(300), None, cache, logits="none")
        logits.append(model.forward([5, 6], [300, 300], np.zeros((2, 302), np.float32), cache).logits)
    difference = (logits[0] - logits[1]).std() / logits[0].std()
    assert 1e-4 < difference < {8: 0.05, 4: 0.5}[bits]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("prune", [False, True])
def test_verify_repeats_a_run_with_a_quantised_cache(path: Path, bits: int, prune: bool) -> None:
    loaded = tempo_mlx.load(str(path), kv_bits=bits)
    run = tempo_mlx.generate(loaded, "the sand", use_retroactive_pruning=prune, **SETTINGS)
    run = Run.from_json(run.to_json())
    assert run.model["kv_bits"] == bits and max(len(step.tokens) for step in run.steps) > 1
    result = verify(run, loaded)
    assert result.ok and result.tolerance == KV_TOLERANCES[bits]
    if not prune:
        assert result.max_difference < 1e-5  # set by set the rows see the same rounded numbers
    with pytest.raises(ModelError, match=f"kv_bits {bits}, and this model was loaded with off"):
        verify(run, tempo_mlx.load(str(path)))


def test_the_command_line_verifies_with_the_cache_it_is_told(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file may say what it was made with, but not how far its numbers may be off."""
    file = tmp_path / "run.json"
    options = ["--model", str(path), "--max-tokens", "8", "--quiet", "--kv-bits", "8"]
    assert main(["generate", "the sand", *options, "--json-output-file", str(file)]) == 0
    assert main(["verify", str(file), "--kv-bits", "8"]) == 0
    assert main(["verify", str(file), "--kv-bits", "8", "--rerun"]) == 0
    for backend in ("mlx", "torch"):
        capsys.readouterr()
        assert main(["verify", str(file), "--backend", backend]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "made with kv_bits 8" in said and "with --kv-bits 8" in said


def test_the_torch_backend_says_that_it_has_no_such_cache(path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_bits 4 has no effect with the torch backend"):
        tempo_mlx.load(str(path), backend="torch", kv_bits=4)
