"""Every family against transformers, on tiny random twins: full pass, cached decoding, superposed step."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from transformers import AutoConfig  # noqa: E402

from tempo_mlx.architecture import names  # noqa: E402
from tempo_mlx.architecture.architecture import Mamba2  # noqa: E402
from tempo_mlx.architecture.families import FAMILIES, architecture_from_config  # noqa: E402
from tempo_mlx.errors import ModelError  # noqa: E402
from tempo_mlx.model import device  # noqa: E402
from tempo_mlx.model.mlx_backend import build  # noqa: E402
from tempo_mlx.model.torch_backend import TorchTransformer  # noqa: E402
from tempo_mlx.weights import open_checkpoint  # noqa: E402
from tests.twin_table import TWINS  # noqa: E402
from tests.twins import reference, twin  # noqa: E402

BASE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
BY_LENGTH = ("phi4", "llama-dynamic")  # keys keep the frequencies they were cached with, as in transformers
RECURRENT = [name for name, (family, _) in TWINS.items() if family.startswith(
    ("Qwen3Next", "Qwen3_5", "Lfm2", "GraniteMoeHybrid", "NemotronH", "FalconH1", "Bamba", "Mamba2"))]  # fmt: skip


@pytest.fixture(scope="module", params=list(TWINS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["mlx", "torch", "torch, fused"])
def model(request: pytest.FixtureRequest, name: str) -> Any:
    checkpoint = open_checkpoint(str(twin(name)))
    if request.param == "mlx":
        return build(checkpoint, "auto", "float32")
    model = TorchTransformer(checkpoint, "cpu", "float32")
    model.fused = request.param == "torch, fused"  # as on CUDA
    return model


@cache
def theirs(name: str, tokens: tuple[int, ...]) -> np.ndarray:
    """What transformers makes of a text, (N, V)."""
    with torch.inference_mode():
        logits: np.ndarray = reference(name)(torch.tensor(tokens)[None], use_cache=False).logits[0].numpy()
    return logits


def tokens_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=count)


def masks(name: str, positions: np.ndarray, bias: np.ndarray) -> Any:
    """The bias as transformers takes it: additive (1, 1, N, N); where layers differ, one for each kind."""
    lowest = np.finfo(np.float32).min

    def as_mask(dense: np.ndarray) -> Any:
        return torch.from_numpy(np.maximum(dense, lowest))[None, None]

    config = reference(name).config
    kinds = {"full_attention": as_mask(bias)}
    if (window := getattr(config, "sliding_window", None)) is not None:
        near = positions[None, :] > positions[:, None] - window
        kinds["sliding_attention"] = as_mask(np.where(near, bias, -np.inf).astype(np.float32))
    if (chunk := getattr(config, "attention_chunk_size", None)) is not None:
        together = positions[None, :] // chunk == positions[:, None] // chunk
        kinds["chunked_attention"] = as_mask(np.where(together, bias, -np.inf).astype(np.float32))
    if getattr(config, "layer_types", None) is None:
        return kinds.get("sliding_attention", kinds["full_attention"])
    return kinds


def causal(count: int) -> np.ndarray:
    return np.where(np.tri(count, dtype=bool), 0.0, -np.inf).astype(np.float32)


def test_a_full_pass_agrees_beyond_the_original_context(name: str, model: Any) -> None:
    tokens = tokens_of(70, seed=1)  # rope scalings start at 16 and 32, windows at 10, chunks of a scan at 64
    got = model.forward(tokens, np.arange(70), None, model.new_cache()).logits
    np.testing.assert_allclose(got, theirs(name, tuple(tokens)), atol=tolerance(name))


def tolerance(name: str) -> float:
    """Recurrences: transformers' own two ways, in chunks and step by step, differ by up to 1e-4. Gemma 3n: some of
    an MLP's gates lie within rounding of being cut to 0."""
    return 3e-4 if name in (*RECURRENT, "gemma3n") else 1e-4


def test_cached_decoding_agrees_across_the_window(name: str, model: Any) -> None:
    """The prompt ends before windows (10 to 20) and original contexts (32) do, decoding goes past both."""
    tokens = tokens_of(44, seed=1)
    their_cache, ours = None, model.new_cache()
    wanted = None if name in BY_LENGTH else theirs(name, tuple(tokens))
    for start, stop in [(0, 8), (8, 30), *((at, at + 1) for at in range(30, 36)), (36, 44)]:
        if wanted is None:
            with torch.inference_mode():
                part = torch.from_numpy(tokens[start:stop])[None]
                out = reference(name)(part, past_key_values=their_cache, use_cache=True)
            their_cache, expected = out.past_key_values, out.logits[0].numpy()
        else:
            expected = wanted[start:stop]
        got = model.forward(tokens[start:stop], np.arange(start, stop), None, ours).logits
        np.testing.assert_allclose(got, expected, atol=tolerance(name))


def test_branches_are_each_as_if_alone(name: str, model: Any) -> None:
    """Three texts go on from one prompt, a row of each in every pass; then the second ends, and is dropped."""
    if name in BY_LENGTH:
        pytest.skip("positions depend on the length of the text")
    prompt, width, depth = 12, 3, 3
    tokens, tails = tokens_of(prompt, seed=4), tokens_of(width * depth, seed=5).reshape(depth, width)
    cache = model.new_cache()
    model.forward(tokens, np.arange(prompt), None, cache, logits="none")
    alive = [[] for _ in range(width)]  # cache columns of each text after the prompt
    for step in range(depth):
        if step == 2:  # drop the second text
            kept = [slot for slot in range(len(cache)) if slot not in alive[1]]
            cache.keep(np.array(kept))
            place = {slot: at for at, slot in enumerate(kept)}
            alive = [[place[slot] for slot in own] for own in (alive[0], alive[2])]
            tails = tails[:, [0, 2]]
        rows, before = len(alive), len(cache)
        bias = np.full((rows, before + rows), -np.inf, np.float32)
        parents = np.zeros((rows, before + rows), np.float32)
        bias[:, :prompt] = 0
        for row, own in enumerate(alive):
            bias[row, [*own, before + row]] = 0
            parents[row, own[-1] if own else prompt - 1] = 1
            own.append(before + row)
        where = np.full(rows, prompt + step)
        got = model.forward(tails[step], where, bias, cache, parents=parents).logits
        for row in range(rows):
            alone = theirs(name, (*tokens.tolist(), *tails[: step + 1, row].tolist()))
            np.testing.assert_allclose(got[row], alone[-1], atol=tolerance(name))


def test_a_superposed_step_agrees(name: str, model: Any) -> None:
    """Three members share a position, two follow at the next; the bias says who sees whom, and how much."""
    if name in RECURRENT:
        pytest.skip("transformers has no such step; see test_recurrent.py")
    prompt, steps = 14, 19
    positions = np.array([*range(prompt), 14, 14, 14, 15, 15])
    bias = causal(steps)
    bias[prompt : prompt + 3, prompt : prompt + 3] = np.where(np.eye(3, dtype=bool), 0.0, -np.inf)
    bias[17, 14:17] = np.log([0.5, 0.3, 0.2])
    bias[18, 14:18] = [-0.1, -np.inf, -2.0, -np.inf]
    tokens = tokens_of(steps, seed=3)
    with torch.inference_mode():
        out = reference(name)(
            torch.from_numpy(tokens)[None],
            position_ids=torch.from_numpy(positions)[None],
            attention_mask=masks(name, positions, bias),
            use_cache=False,
        )
    cache = model.new_cache()
    model.forward(tokens[:prompt], positions[:prompt], None, cache, logits="none")
    first = model.forward(tokens[14:17], positions[14:17], bias[14:17, :17], cache).logits
    second = model.forward(tokens[17:], positions[17:], bias[17:], cache).logits
    wanted = out.logits[0, 14:].numpy()
    if name == "llama4":  # its temperature goes by the place in the cache, ours by the position
        first, second, wanted = first[:1], second[:0], wanted[:1]
    np.testing.assert_allclose(np.concatenate([first, second]), wanted, atol=1e-4)


def test_frequencies_are_transformers_to_the_bit(name: str) -> None:
    ropes = open_checkpoint(str(twin(name))).architecture.ropes
    buffers = [b for n, b in reference(name).named_buffers() if n.endswith("original_inv_freq")]
    if not buffers or not ropes:
        pytest.skip("no rotary embedding")
    sign = -1 if name == "nanochat" else 1  # turns the other way
    ours = {tuple(sign * np.array(rope.inverse_frequencies, np.float32)) for rope in ropes}
    assert ours <= {tuple(buffer.numpy()) for buffer in buffers}


def test_every_number_of_the_files_is_a_number_of_the_model(name: str) -> None:
    checkpoint = open_checkpoint(str(twin(name)))
    stored = {
        key: t.shape
        for key, t in checkpoint.contents.tensors.items()
        if "act_fn." not in key or "alpha" in key
    }
    if checkpoint.architecture.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    shared = [key for key in stored if names.own_name(key, checkpoint.architecture) is None]
    assert all("self_attn" in key for key in shared)  # layers that use another's keys and values
    assert checkpoint.parameters == sum(int(np.prod(stored[key])) for key in stored if key not in shared)


def test_old_and_new_spellings_of_rope_mean_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 32}
    old = {**BASE, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **scaling}}
    new = {**BASE, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **scaling}}
    assert architecture_from_config(old) == architecture_from_config(new)
    plain = architecture_from_config({**BASE, "rope_theta": 500000.0})
    assert architecture_from_config(old).ropes != plain.ropes
    legacy = {**BASE, "rope_scaling": {"type": "linear", "factor": 2.0}}
    halved = architecture_from_config(legacy).ropes[0].inverse_frequencies
    assert halved == tuple(each / 2 for each in architecture_from_config(BASE).ropes[0].inverse_frequencies)


def test_the_text_part_of_a_gemma3_vision_config() -> None:
    text = {**BASE, "model_type": "gemma3_text", "head_dim": 16, "num_key_value_heads": 1}
    nested = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 9}}
    assert architecture_from_config(nested) == architecture_from_config({**text, "tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": None}, "None"),
        ({"model_type": ["llama"]}, "llama"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),  # Gemma's, not Llama's
        ({"num_experts": 8}, "num_experts"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "wobbly"}}, "wobbly"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 3}}, "twist"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_size": 2**70}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"head_dim": 7}, "7"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"hidden_act": "relu6"}, "hidden_act"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["odd", "odd"]}, "layer_types"),
        ({"is_causal": False}, "is_causal"),
        ({"alibi": True}, "alibi"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm"),
        ({"model_type": "granite", "attention_multiplier": 0.0}, "attention_multiplier"),
        ({"model_type": "gpt_neox", "rotary_pct": 0.1}, "rotate"),
        ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_act"),
        ({"model_type": "qwen3_next", "hidden_act": "gelu"}, "hidden_act"),  # of its convolutions too
        ({"model_type": "granitemoehybrid", "hidden_act": "gelu"}, "hidden_act"),
        (
            {"model_type": "nemotron_h", "layers_block_type": ["mamba"], "mamba_hidden_act": "gelu"},
            "mamba_hidden_act",
        ),
        ({"model_type": "phi", "tie_word_embeddings": True}, "tied embeddings"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        architecture_from_config({**BASE, **changes})


def test_time_steps_of_nemotron_go_by_their_limit() -> None:
    """As in NVIDIA's own code. transformers 5 raises them to time_step_min, which training drew their beginnings from:
    a published 30B model's outputs are 0.03 away from NVIDIA's by that (mean KL)."""
    stated = {**BASE, "model_type": "nemotron_h", "layers_block_type": ["mamba"], "time_step_min": 0.001}
    for limit, meant in (
        (None, (0.0, math.inf)),
        ([0.0, math.inf], (0.0, math.inf)),
        ([0.1, 0.5], (0.1, 0.5)),
    ):
        part = architecture_from_config({**stated, "time_step_limit": limit}).layers[0].recurrent
        assert isinstance(part, Mamba2) and part.time_step_limit == meant


def test_half_precision_on_a_cpu_is_near_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts' products too, of one row and of many, which MLX has in float32 only."""
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    checkpoint, tokens, found = open_checkpoint(str(twin(name))), tokens_of(40), []
    for dtype in ("float32", "float16"):
        model = build(checkpoint, "cpu", dtype)
        cache = model.new_cache()
        model.forward(tokens[:8], range(8), None, cache)
        one = [model.forward(tokens[i : i + 1], [i], None, cache).logits for i in range(8, 16)]
        many = model.forward(tokens[16:], range(16, 40), None, cache).logits
        found.append(np.concatenate([*one, many]).astype(np.float64))
    off = (found[1] - found[0]).std(axis=1) / found[0].std(axis=1)
    for rows in (off[:8], off[8:]):  # most of them: a rounding may choose another expert
        assert np.median(rows) < 0.05, rows


@pytest.mark.parametrize("config", [None, [], "llama", 3, {}])
def test_a_config_that_is_none(config: Any) -> None:
    with pytest.raises(ModelError):
        architecture_from_config(config)


def test_settings_that_change_nothing_are_let_through() -> None:
    harmless = {
        "_name_or_path": "x", "torch_dtype": "bfloat16", "use_cache": True, "rope_interleaved": False,
        "is_llama_config": True, "pretraining_tp": 2, "transformers.js_config": {"dtype": "q4"},
        "rope_scaling": None, "head_dim": None, "clip_qkv": None, "is_causal": True, "num_experts": 0,
        "num_beam_groups": 1, "diversity_penalty": 0.0, "neftune_noise_alpha": 5, "gradient_checkpointing": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    }  # fmt: skip
    assert architecture_from_config({**BASE, **harmless}) == architecture_from_config(BASE)


# GLM-4.5's own defaults give heads of 42 and two thirds.
@pytest.mark.parametrize("model_type", [each for each in FAMILIES if each != "glm4_moe"])
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """A config.json leaves out what equals its class's default, so an empty one must mean the same to us."""
    theirs = AutoConfig.for_model(model_type).to_dict()
    family = FAMILIES[model_type]
    aliased = {family.aliases.get(key, key): value for key, value in theirs.items()}
    stated = {key: value for key, value in aliased.items() if key in family.defaults}
    stated |= {key: theirs[key] for key in ("rope_parameters",) if key in theirs}
    for key in ("num_experts_per_tok", "num_local_experts"):  # DeepSeek-V2's class has none
        if stated.get(key, 0) is None:
            stated[key] = family.defaults[key]
    assert architecture_from_config({**stated, "model_type": model_type}) == architecture_from_config(
        {"model_type": model_type, **{k: stated[k] for k in STATED.get(model_type, ())}}
    )


# What no config of these leaves out: their classes make it of something else.
STATED = {"nemotron_h": ("layers_block_type",)}
