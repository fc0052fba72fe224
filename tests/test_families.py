"""Every family against transformers, on tiny random twins: full pass, cached decoding, superposed step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tempo_mlx.architecture.families import FAMILIES, architecture_from_config  # noqa: E402
from tempo_mlx.errors import ModelError  # noqa: E402
from tempo_mlx.model.mlx_backend import build  # noqa: E402
from tempo_mlx.model.torch_backend import TorchTransformer  # noqa: E402
from tempo_mlx.weights import open_checkpoint  # noqa: E402
from tests.twins import TWINS, reference, twin  # noqa: E402

BASE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module", params=list(TWINS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["mlx", "torch"])
def model(request: pytest.FixtureRequest, name: str) -> Any:
    checkpoint = open_checkpoint(str(twin(name)))
    return (
        build(checkpoint, "auto", "float32")
        if request.param == "mlx"
        else TorchTransformer(checkpoint, "cpu", "float32")
    )


def tokens_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=count)


def masks(name: str, positions: np.ndarray, bias: np.ndarray) -> Any:
    """The bias as transformers takes it: additive (1, 1, N, N); where layers differ, one for each kind."""
    lowest = np.finfo(np.float32).min

    def as_mask(dense: np.ndarray) -> Any:
        return torch.from_numpy(np.maximum(dense, lowest))[None, None]

    config = reference(name).config
    window = getattr(config, "sliding_window", None)
    if window is None:
        return as_mask(bias)
    near = positions[None, :] > positions[:, None] - window
    sliding = as_mask(np.where(near, bias, -np.inf).astype(np.float32))
    if getattr(config, "layer_types", None) is None:
        return sliding
    return {"full_attention": as_mask(bias), "sliding_attention": sliding}


def causal(count: int) -> np.ndarray:
    return np.where(np.tri(count, dtype=bool), 0.0, -np.inf).astype(np.float32)


def test_a_full_pass_agrees_beyond_the_original_context(name: str, model: Any) -> None:
    tokens = tokens_of(70, seed=1)  # rope scalings start at 32, windows at 10
    with torch.inference_mode():
        wanted = reference(name)(torch.from_numpy(tokens)[None]).logits[0].numpy()
    got = model.forward(tokens, np.arange(70), None, model.new_cache()).logits
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_cached_decoding_agrees_across_the_window(name: str, model: Any) -> None:
    """The prompt ends before windows (10 to 20) and original contexts (32) do, decoding goes past both.

    Keys keep the frequencies they were cached with, as in transformers, where those depend on the length.
    """
    tokens = tokens_of(44, seed=1)
    theirs, ours = None, model.new_cache()
    for start, stop in [(0, 8), *((at, at + 1) for at in range(8, 44))]:
        with torch.inference_mode():
            out = reference(name)(
                torch.from_numpy(tokens[start:stop])[None], past_key_values=theirs, use_cache=True
            )
        theirs = out.past_key_values
        got = model.forward(tokens[start:stop], np.arange(start, stop), None, ours).logits
        np.testing.assert_allclose(got, out.logits[0].numpy(), atol=1e-4)


def test_a_superposed_step_agrees(name: str, model: Any) -> None:
    """Three members share a position, two follow at the next; the bias says who sees whom, and how much."""
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
        )
    cache = model.new_cache()
    model.forward(tokens[:prompt], positions[:prompt], None, cache, logits="none")
    first = model.forward(tokens[14:17], positions[14:17], bias[14:17, :17], cache).logits
    second = model.forward(tokens[17:], positions[17:], bias[17:], cache).logits
    np.testing.assert_allclose(np.concatenate([first, second]), out.logits[0, 14:].numpy(), atol=1e-4)


def test_frequencies_are_transformers_to_the_bit(name: str) -> None:
    architecture = open_checkpoint(str(twin(name))).architecture
    rotary = reference(name).model.rotary_emb
    kinds = ["full_attention_", "sliding_attention_"] if len(architecture.ropes) == 2 else [""]
    for rope, kind in zip(architecture.ropes, kinds, strict=True):
        theirs = getattr(rotary, f"{kind}original_inv_freq").numpy()
        np.testing.assert_array_equal(np.array(rope.inverse_frequencies, np.float32), theirs)
        assert rope.attention_factor == getattr(rotary, f"{kind}attention_scaling")


def test_weights_are_read_as_they_were_written(name: str) -> None:
    checkpoint, theirs = open_checkpoint(str(twin(name))), reference(name).state_dict()
    fused = 0
    for tensor in checkpoint.names():
        if tensor in theirs:
            np.testing.assert_array_equal(checkpoint.tensor(tensor).numpy(), theirs[tensor].numpy())
        else:
            fused += 1
    assert fused == (20 if name.startswith("phi") else 0)
    parameters = sum(each.numel() for each in reference(name).parameters())
    assert checkpoint.parameters == parameters


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
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "layer_types"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        architecture_from_config({**BASE, **changes})


@pytest.mark.parametrize("config", [None, [], "llama", 3, {}])
def test_a_config_that_is_none(config: Any) -> None:
    with pytest.raises(ModelError):
        architecture_from_config(config)


def test_settings_that_change_nothing_are_let_through() -> None:
    harmless = {
        "_name_or_path": "x", "torch_dtype": "bfloat16", "use_cache": True, "rope_interleaved": False,
        "is_llama_config": True, "pretraining_tp": 2, "transformers.js_config": {"dtype": "q4"},
        "rope_scaling": None, "head_dim": None, "clip_qkv": None,
    }  # fmt: skip
    assert architecture_from_config({**BASE, **harmless}) == architecture_from_config(BASE)


def test_defaults_are_those_of_transformers() -> None:
    """A config.json leaves out what equals its class's default, so an empty one must mean the same to us."""
    transformers = pytest.importorskip("transformers")
    classes = {
        "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2",
        "gemma3_text": "Gemma3Text", "phi3": "Phi3", "smollm3": "SmolLM3", "olmo2": "Olmo2",
        "granite": "Granite",
    }  # fmt: skip
    assert set(classes) == set(FAMILIES)
    for model_type, prefix in classes.items():
        full = getattr(transformers, f"{prefix}Config")().to_dict()
        stated = {key: value for key, value in full.items() if key in FAMILIES[model_type].defaults}
        stated |= {"model_type": model_type, "rope_parameters": full["rope_parameters"]}
        assert architecture_from_config(stated) == architecture_from_config({"model_type": model_type}), (
            model_type
        )
