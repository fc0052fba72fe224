"""The embedded model: packed and dequantised weights against each other and against transformers' GGUF loader."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tempo_mlx.model.mlx_backend import build  # noqa: E402
from tempo_mlx.weights import Checkpoint, open_checkpoint  # noqa: E402

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("smollm2-135m")


@pytest.fixture(scope="module")
def theirs(checkpoint: Checkpoint) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.path.parent, gguf_file=checkpoint.path.name, dtype=torch.float32
    ).eval()


def test_every_weight_is_the_one_transformers_reads(checkpoint: Checkpoint, theirs: Any) -> None:
    weights = theirs.state_dict()
    for name in checkpoint.names():
        np.testing.assert_array_equal(checkpoint.tensor(name).numpy(), weights[name].numpy())


def test_packed_and_dequantised_weights_and_transformers_agree(checkpoint: Checkpoint, theirs: Any) -> None:
    ids = checkpoint.tokenizer().encode(PROMPT)
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0].numpy()
    for packed in (False, True):
        model = build(checkpoint, "auto", "float32", packed=packed)
        got = model.forward(ids, np.arange(len(ids)), None, model.new_cache()).logits
        assert model.info["quantization"] == ("q4_1" if packed else None)
        np.testing.assert_allclose(got, wanted, atol=5e-4)
