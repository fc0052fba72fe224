"""A Gemma 3 in K-quants with an embedded SentencePiece vocabulary, against transformers reading the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tempo_mlx.model.mlx_backend import build  # noqa: E402
from tempo_mlx.model.torch_backend import TorchTransformer  # noqa: E402
from tempo_mlx.weights import open_checkpoint  # noqa: E402
from tests.ggufs import add_sentencepiece_tokenizer, write  # noqa: E402

WIDTH, LAYERS, HEADS, HEAD_DIM, FEED = 256, 6, 2, 256, 512
# where a block keeps its float16 scales
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}
TEXTS = [
    "the cat sat on the mat", "  two spaces, and a   few more ", "naïve café 😀 \u3042",
    "numbers 1234, (yes?)\n\n\tend",
    "<start_of_turn>user\nhello<end_of_turn>\n", "a<start_of_turn> b", "", " ", "\n", "é\u0301\u200d zebra-quartz",
]  # fmt: skip


def random_blocks(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random valid blocks: the gguf package has no quantiser for K-quants, but any bytes with sane scales are some."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    random = np.random.default_rng(seed)
    blocks = random.integers(256, size=(rows * columns // block, size), dtype=np.uint8)
    wide = {"Q4_K": 2e-4, "Q5_K": 1e-4, "Q6_K": 1.5e-5, "Q3_K": 1e-3, "Q2_K": 4e-3}[kind]
    for start in SCALES[kind]:
        scales = (random.uniform(0.5, 1.0, len(blocks)) * wide).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma") / "gemma3.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    for key, value in {
        "context_length": 256, "embedding_length": WIDTH, "block_count": LAYERS, "feed_forward_length": FEED,
        "attention.head_count": HEADS, "attention.head_count_kv": 1, "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM, "attention.sliding_window": 8,
    }.items():  # fmt: skip
        writer.add_uint32(f"gemma3.{key}", value)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("gemma3.rope.freq_base", 1e6)
    vocabulary = add_sentencepiece_tokenizer(writer, space_prefix=False)
    seed = 0

    def add(name: str, kind: str, rows: int, columns: int) -> None:
        nonlocal seed
        seed += 1
        blocks = random_blocks(kind, rows, columns, seed)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])

    def norm(name: str, size: int) -> None:
        nonlocal seed
        seed += 1
        weight = 1 + 0.2 * np.random.default_rng(seed).normal(size=size)
        writer.add_tensor(f"{name}.weight", weight.astype(np.float32))

    add("token_embd", "Q6_K", vocabulary, WIDTH)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_q", "Q4_K", HEADS * HEAD_DIM, WIDTH)
        add(f"blk.{layer}.attn_k", "Q5_K", HEAD_DIM, WIDTH)
        add(f"blk.{layer}.attn_v", "Q6_K", HEAD_DIM, WIDTH)
        add(f"blk.{layer}.attn_output", "Q4_K", WIDTH, HEADS * HEAD_DIM)
        add(f"blk.{layer}.ffn_gate", "Q3_K", FEED, WIDTH)
        add(f"blk.{layer}.ffn_up", "Q2_K", FEED, WIDTH)
        add(f"blk.{layer}.ffn_down", "Q6_K", WIDTH, FEED)
        for part in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            norm(f"blk.{layer}.{part}", WIDTH)
        norm(f"blk.{layer}.attn_q_norm", HEAD_DIM)
        norm(f"blk.{layer}.attn_k_norm", HEAD_DIM)
    norm("output_norm", WIDTH)
    write(writer)
    return path


@pytest.fixture(scope="module")
def theirs(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_logits_agree(path: Path, theirs: Any, backend: str) -> None:
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.architecture.family == "gemma3_text"
    model: Any = (
        build(checkpoint, "auto", "float32")
        if backend == "mlx"
        else TorchTransformer(checkpoint, "cpu", "float32")
    )
    tokens = np.random.default_rng(0).integers(3, 400, size=24)  # past the window of 8
    with torch.inference_mode():
        wanted = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()
    assert wanted.std() > 0.1
    got = model.forward(tokens, np.arange(24), None, model.new_cache()).logits
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_tokens_agree(path: Path) -> None:
    ours = open_checkpoint(str(path)).tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        ids = ours.encode(text, add_special=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids) == text == theirs.decode(ids), text
