"""Tiny random models of every family, made by transformers' own classes, saved as directories one can open.

`twin(name)` gives the directory (made once a session), `reference(name)` the transformers model in it.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 320  # 256 bytes, 4 special tokens, some pairs, and rows that no token has
SPECIAL = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": None,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_YARN = {**_LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0], "partial_rotary_factor": 0.75,
}  # fmt: skip
_GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

# name -> transformers' classes ("Llama" for LlamaConfig and LlamaForCausalLM) and what differs from _SIZES
TWINS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": _LINEAR}),
    "llama-dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            "max_position_embeddings": 32,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 12, "head_dim": 24}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": _YARN}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "gemma2": ("Gemma2", {"head_dim": 24, "sliding_window": 10, "query_pre_attn_scalar": 20}),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 24, "sliding_window": 10, "num_hidden_layers": 6, "query_pre_attn_scalar": 20,
            "rope_parameters": _GEMMA_ROPE,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 20}),
    "phi4": ("Phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}),
    "smollm3": ("SmolLM3", {"use_sliding_window": True, "sliding_window": 12}),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0, "logits_scaling": 0.5, "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        },
    ),
}  # fmt: skip


@cache
def _home() -> Path:
    home = Path(tempfile.mkdtemp(prefix="tempo-mlx-twins-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


@cache
def reference(name: str) -> Any:
    """The transformers model of a twin: float32, eager attention, every parameter random. Skips without those."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    family, differences = TWINS[name]
    config_class = getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    config = config_class(**{**_SIZES, **differences})
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norms around their neutral value, biases around zero
                neutral = 0.0 if parameter_name.endswith("bias") or family.startswith("Gemma") else 1.0
                parameter.copy_(neutral + 0.2 * noise)
            elif "embed" in parameter_name:
                parameter.copy_(noise * (0.2 if config.tie_word_embeddings else 1.0))
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5)
    return model


@cache
def twin(name: str) -> Path:
    """The directory of a twin: config.json, model.safetensors, tokenizer files."""
    path = _home() / name
    reference(name).save_pretrained(path)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer with four special tokens and a chat template, as Hugging Face lays them out."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "the"),
        ("i", "n"),
        ("a", "n"),
        ("an", "d"),
        ("Ġ", "and"),
        ("e", "r"),
    ]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *SPECIAL, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1],
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 259]}))
