"""Random models of real models' shapes, for scripts/gpu_check.py: none is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {  # E, F, layers, H, K, V: Llama 3.2 1B's, and one for a rehearsal
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (128, 256, 2, 4, 2, 512),
}


def random_model(folder: Path, shape: str) -> Path:
    """A Llama of random bfloat16 weights, with enough contrast that sets are wide; made once."""
    if (folder / "config.json").exists():
        return folder
    from tempo_mlx.mlx import mx

    hidden, inner, layers, heads, groups, vocabulary = SHAPES[shape]
    dim = hidden // heads
    mx.random.seed(1)

    def weight(out: int, into: int, gain: float = 1.5) -> Any:
        made = (mx.random.normal((out, into)) * (gain * into**-0.5)).astype(mx.bfloat16)
        mx.eval(made)
        return made

    ones = mx.ones((hidden,), mx.bfloat16)
    tensors = {"model.embed_tokens.weight": weight(vocabulary, hidden, hidden**0.5)}
    tensors |= {"model.norm.weight": ones, "lm_head.weight": weight(vocabulary, hidden, 4.0)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        tensors |= {name + f"{norm}_layernorm.weight": ones for norm in ("input", "post_attention")}
        for part, out in (("q", heads), ("k", groups), ("v", groups)):
            tensors[name + f"self_attn.{part}_proj.weight"] = weight(out * dim, hidden)
        tensors[name + "self_attn.o_proj.weight"] = weight(hidden, hidden)
        tensors |= {name + f"mlp.{part}_proj.weight": weight(inner, hidden) for part in ("gate", "up")}
        tensors[name + "mlp.down_proj.weight"] = weight(hidden, inner)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "vocab_size": vocabulary, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "eos_token_id": 256, "bos_token_id": 256, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "th"]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_gguf(path: Path, shape: str) -> Path:
    """A Llama as Q4_K_M stores it, Q4_K and Q6_K, with random blocks; made once."""
    if path.exists():
        return path
    import gguf

    hidden, inner, layers, heads, groups, vocabulary = SHAPES[shape]
    hidden, inner = max(hidden, 256), max(inner, 256)  # whole blocks
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path.with_suffix(".part"), "llama")
    for key, value in {
        "context_length": 4096, "embedding_length": hidden, "block_count": layers, "feed_forward_length": inner,
        "attention.head_count": heads, "attention.head_count_kv": groups, "rope.dimension_count": hidden // heads,
        "vocab_size": vocabulary,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    tokens = alphabet()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    padding = [f"[PAD{index}]" for index in range(len(tokens), vocabulary)]
    writer.add_token_list([*tokens, *padding])
    writer.add_token_types([3 if token == "<|end|>" else 1 for token in tokens] + [5] * len(padding))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(256)
    random = np.random.default_rng(2)

    def add(name: str, out: int, into: int, kind: str, gain: float = 1.5) -> None:
        blocks = random_blocks(random, out * into // 256, kind, gain * into**-0.5)
        whole = blocks.reshape(out, -1)
        writer.add_tensor(name, whole, raw_dtype=gguf.GGMLQuantizationType[kind])

    add("token_embd.weight", vocabulary, hidden, "Q4_K", hidden**0.5)
    add("output.weight", vocabulary, hidden, "Q6_K", 4.0)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        wide, narrow = hidden, hidden // heads * groups
        finer = "Q6_K" if layer % 2 else "Q4_K"
        for name, out, into, kind in (
            ("attn_q", wide, hidden, "Q4_K"), ("attn_k", narrow, hidden, "Q4_K"), ("attn_v", narrow, hidden, finer),
            ("attn_output", hidden, wide, "Q4_K"), ("ffn_gate", inner, hidden, "Q4_K"),
            ("ffn_up", inner, hidden, "Q4_K"), ("ffn_down", hidden, inner, finer),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", out, into, kind)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix(".part").rename(path)


def random_blocks(random: np.random.Generator, count: int, kind: str, deviation: float) -> np.ndarray:
    """Super-blocks of 256 weights around 0; deviation: of them, roughly."""
    if kind == "Q4_K":  # d, dmin, 12 bytes of scales, 128 of codes: d s q - dmin m
        blocks = random.integers(0, 256, (count, 144), np.uint8)
        scale = np.array([deviation / 225, 7.5 * deviation / 225], np.float16)
        blocks[:, :4] = scale.view(np.uint8)
        return blocks
    blocks = random.integers(0, 256, (count, 210), np.uint8)  # codes, 16 signed scales, d: d s (q - 32)
    blocks[:, 208:] = np.array([deviation / 1370], np.float16).view(np.uint8)
    return blocks
