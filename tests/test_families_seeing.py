"""The text part of models that see against transformers' whole ones, given text alone: mrope is rope there."""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tempo_mlx.load_config import LoadConfig  # noqa: E402
from tempo_mlx.loading import load_model  # noqa: E402
from tests.twin_table import VOCABULARY  # noqa: E402
from tests.twins import write_tokenizer  # noqa: E402

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": None,
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
PLACES = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}


def rope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **more}


# classes -> what their text and vision configs say
SEEING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen2_5_VL": ({"rope_parameters": rope(2, 3, 3)}, VISION),
    "Qwen3VL": (
        {"head_dim": 16, "rope_parameters": rope(3, 3, 2, mrope_interleaved=True)},
        {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    "Glm4v": ({"rope_parameters": rope(2, 1, 1, partial_rotary_factor=0.5)}, {**VISION, "patch_size": 14}),
}


@cache
def reference(name: str) -> Any:
    text, vision = SEEING[name]
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, **text}, vision_config=vision, **PLACES
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                1.0 + 0.2 * noise if parameter.ndim <= 1 else noise * 1.2 * parameter.shape[-1] ** -0.5
            )
    return model


@pytest.fixture(params=list(SEEING))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["mlx", "torch"])
def model(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> Any:
    reference(name).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    return load_model(
        LoadConfig(model=str(tmp_path), backend=request.param, device="cpu", dtype="float32")
    ).model


def theirs(name: str, tokens: list[int]) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = reference(name)(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    return logits


def test_text_alone_is_what_it_is_to_the_whole_model(name: str, model: Any) -> None:
    """In one pass, from a cache, and as two branches in one cache of which one is dropped."""
    tokens = np.random.default_rng(3).integers(10, 250, 40).tolist()
    wanted = theirs(name, tokens)
    found = model.forward(tokens, np.arange(40), None, model.new_cache()).logits
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    cache = model.new_cache()
    for start, stop in ((0, 20), (20, 21), (21, 22)):
        part = model.forward(tokens[start:stop], np.arange(start, stop), None, cache).logits
        np.testing.assert_allclose(part, wanted[start:stop], atol=1e-4)
    bias = np.zeros((2, 24), np.float32)
    bias[0, 23] = bias[1, 22] = -np.inf
    both = model.forward([11, 12], [22, 22], bias, cache).logits
    for row, token in enumerate((11, 12)):
        np.testing.assert_allclose(both[row], theirs(name, [*tokens[:22], token])[-1], atol=1e-4)
    cache.keep(np.delete(np.arange(24), 22))
    last = model.forward([13], [23], None, cache).logits
    np.testing.assert_allclose(last[0], theirs(name, [*tokens[:22], 12, 13])[-1], atol=1e-4)
