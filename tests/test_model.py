"""Both backends against transformers, and against each other: rows at any position, under any bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tempo_mlx.mlx import mx
from tempo_mlx.model.mlx_backend import BUFFER_CACHE_BYTES, build
from tempo_mlx.model.rotation import FEW, Rotation
from tempo_mlx.weights import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tempo_mlx.model.torch_backend import TorchTransformer  # noqa: E402

VOCABULARY = 64
PROMPT = [3, 14, 15, 9, 26, 5]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    where = tmp_path_factory.mktemp("llama")
    model.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def reference(path: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=["mlx", "torch", "torch, fused"])
def model(request: pytest.FixtureRequest, path: Path) -> Any:
    checkpoint = open_checkpoint(str(path))
    if request.param == "mlx":
        return build(checkpoint, "auto", "float32")
    model = TorchTransformer(checkpoint, "cpu", "float32")
    model.fused = request.param == "torch, fused"  # as on CUDA
    return model


def expected(reference: Any, tokens: Any, positions: Any, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, V) and attention (layers, N, N), mean over heads, of one dense pass through transformers."""
    with torch.inference_mode():
        out = reference(
            torch.tensor([list(tokens)]),
            position_ids=torch.tensor([list(positions)]),
            attention_mask=torch.from_numpy(np.maximum(bias, np.finfo(np.float32).min))[None, None],
            output_attentions=True,
        )
    return out.logits[0].numpy(), torch.stack(out.attentions)[:, 0].mean(dim=1).numpy()


def causal(count: int) -> np.ndarray:
    return np.where(np.tri(count, dtype=bool), 0.0, -np.inf).astype(np.float32)


def test_a_plain_sequence_in_chunks(model: Any, reference: Any) -> None:
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=300)
    logits, attention = expected(reference, tokens, range(300), causal(300))
    cache, parts, masses = model.new_cache(), [], []
    for start, stop in ((0, 7), (7, 8), (8, 270), (270, 300)):  # the cache grows past its first 256 slots
        out = model.forward(tokens[start:stop], range(start, stop), None, cache, attention=True)
        parts.append(out.logits)
        masses.append((stop, out.attention_mass, attention[:, start:stop, :stop].mean(axis=1)))
    np.testing.assert_allclose(np.concatenate(parts), logits, atol=1e-4)
    for stop, mass, wanted in masses:
        assert mass.shape == (3, stop)
        np.testing.assert_allclose(mass, wanted, atol=1e-5)
        np.testing.assert_allclose(mass.sum(axis=1), 1.0, atol=1e-5)


def test_sets_at_shared_positions_under_a_weighted_bias(model: Any, reference: Any) -> None:
    tokens = [*PROMPT, 1, 2, 7, 8]  # two sets of two
    positions = [*range(6), 6, 6, 7, 7]
    bias = causal(10)
    bias[7, 6] = bias[9, 8] = -np.inf  # siblings do not see each other
    bias[8, 6:8], bias[9, 6:8] = np.log([0.9, 0.1]), np.log([0.2, 0.8])
    logits, attention = expected(reference, tokens, positions, bias)
    cache = model.new_cache()
    model.forward(PROMPT, range(6), None, cache, logits="none")
    first = model.forward([1, 2], [6, 6], bias[6:8, :8], cache)
    second = model.forward([7, 8], [7, 7], bias[8:10], cache, attention="rows")
    np.testing.assert_allclose(np.concatenate([first.logits, second.logits]), logits[6:], atol=1e-4)
    np.testing.assert_allclose(second.attention_mass, attention[:, 8:10], atol=1e-5)
    assert cache.positions.tolist() == positions


def test_members_of_a_set_share_their_angles(model: Any) -> None:
    """The same token at the same position has the same row, whichever slot it got; another position, another row."""

    def row(slot: int, position: int) -> np.ndarray:
        cache = model.new_cache()
        model.forward(PROMPT, range(6), None, cache, logits="none")
        tokens = [9, 9, 9]
        tokens[slot] = 11
        bias = np.zeros((3, 9), np.float32)
        bias[:, 6:] = np.where(np.eye(3), 0, -np.inf)
        return model.forward(tokens, [position] * 3, bias, cache).logits[slot]

    np.testing.assert_allclose(row(0, 6), row(2, 6), atol=1e-5)
    assert abs(row(0, 6) - row(0, 8)).max() > 1e-3


def test_changing_one_member_changes_what_follows(model: Any) -> None:
    def after(member: int) -> np.ndarray:
        cache = model.new_cache()
        model.forward(PROMPT, range(6), None, cache, logits="none")
        model.forward([1, member], [6, 6], np.zeros((2, 8), np.float32), cache, logits="none")
        return model.forward([4], [7], np.zeros((1, 9), np.float32), cache).logits

    assert abs(after(2) - after(3)).max() > 1e-3


@pytest.mark.parametrize("removed", [[6], [7, 9], [6, 7, 8, 9]])
def test_dropping_a_slot_is_masking_it(model: Any, removed: list[int]) -> None:
    caches = [model.new_cache(), model.new_cache()]
    for cache in caches:
        model.forward([*PROMPT, 1, 2, 7, 8], [*range(6), 6, 6, 7, 7], None, cache, logits="none")
    kept = np.setdiff1d(np.arange(10), removed)
    caches[0].keep(kept)
    assert len(caches[0]) == len(kept) and caches[0].positions.tolist() == caches[1].positions[kept].tolist()
    mask = np.zeros((2, 12), np.float32)
    mask[:, removed] = -np.inf
    dropped = model.forward([5, 6], [8, 8], np.zeros((2, len(kept) + 2), np.float32), caches[0])
    masked = model.forward([5, 6], [8, 8], mask, caches[1])
    np.testing.assert_allclose(dropped.logits, masked.logits, atol=1e-5)
    again = [model.forward([3], [9], None if c is caches[0] else np.where(
        np.isin(np.arange(13), removed), -np.inf, 0).astype(np.float32)[None], c).logits for c in caches]  # fmt: skip
    np.testing.assert_allclose(again[0], again[1], atol=1e-5)


def test_a_copy_is_independent_and_truncating_forgets(model: Any) -> None:
    cache = model.new_cache()
    model.forward(PROMPT, range(6), None, cache, logits="none")
    before = cache.copy()
    one = model.forward([1], [6], None, cache).logits
    model.forward([2], [6], None, before)
    assert len(cache) == len(before) == 7
    whole = model.forward([*PROMPT, 1, 5], range(8), None, model.new_cache(), logits="last").logits
    np.testing.assert_allclose(model.forward([5], [7], None, cache).logits, whole, atol=1e-5)
    cache.truncate(6)
    assert len(cache) == 6 and cache.positions.tolist() == list(range(6))
    np.testing.assert_allclose(model.forward([1], [6], None, cache).logits, one, atol=1e-6)
    assert cache.nbytes > 0


def test_only_the_logits_asked_for(model: Any) -> None:
    every = model.forward(PROMPT, range(6), None, model.new_cache())
    last = model.forward(PROMPT, range(6), None, model.new_cache(), logits="last")
    none = model.forward(PROMPT, range(6), None, model.new_cache(), logits="none")
    assert every.logits.shape == (6, VOCABULARY) and every.attention_mass is None and none.logits is None
    np.testing.assert_allclose(last.logits, every.logits[-1:], atol=1e-5)


def test_embeddings_are_the_models(model: Any, reference: Any) -> None:
    wanted = reference.get_input_embeddings().weight[[3, 5]].detach().numpy()
    np.testing.assert_allclose(model.embeddings([3, 5]), wanted, atol=1e-6)


def test_freed_buffers_are_bounded(path: Path) -> None:
    mx.set_cache_limit(2**40)
    build(open_checkpoint(str(path)), "auto", "float32")
    assert mx.set_cache_limit(BUFFER_CACHE_BYTES) == BUFFER_CACHE_BYTES


@pytest.mark.parametrize("half", [8, 4, 0])  # whole heads, partial rotary, none
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])  # as matrices, and element by element
def test_rotation_turns_each_pair_by_its_angle(rows: int, half: int) -> None:
    random = np.random.default_rng(rows)
    x, angle = random.standard_normal((rows, 3, 16)), random.uniform(0, 7, (rows, half))
    expected = x.copy()
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angle)[:, None]
    expected[..., :half], expected[..., half : 2 * half] = pairs.real, pairs.imag
    rotation = Rotation(np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32), 16)
    found = rotation(mx.array(x.astype(np.float32)))
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)
