"""Tiny random models of every family, made by transformers' own classes, saved as directories one can open.

`twin(name)` gives the directory (made once a session), `reference(name)` the transformers model in it.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import zlib
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.twin_table import GGUF_TWINS, SIZES, TWINS, WIDE_TWINS

SPECIAL = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Those whose runs other tests are about, which need some contrast.
_STRONG = frozenset(
    ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3", "SmolLM3", "Olmo2", "Granite")
)


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
    family, differences = {**TWINS, **GGUF_TWINS, **WIDE_TWINS}[name]
    config_class = getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    config = config_class(**deepcopy({**SIZES, **differences}))  # transformers fills in what it is given
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for parameter_name, parameter in [*model.named_parameters(), *_shipped_buffers(model)]:
            noise = torch.randn(parameter.shape, generator=generator)
            leaf = parameter_name.rsplit(".", 1)[-1]
            if leaf == "A_log":
                parameter.copy_(torch.log(1.0 + 3.0 * torch.rand(parameter.shape, generator=generator)))
            elif (
                leaf in ("D", "dt_bias", "layer_scalar", "sinks") or "expert" in leaf or "correction" in leaf
            ):
                parameter.copy_((0.0 if "bias" in leaf or leaf == "sinks" else 1.0) + 0.3 * noise)
            elif parameter.ndim <= 1:  # norms around their neutral value, biases around zero
                offset = (
                    family in ("Gemma", "Gemma2", "Gemma3Text", "VaultGemma", "Nemotron")
                    or "Qwen3Next" in family
                )
                offset = (offset or family.startswith("Qwen3_5")) and "linear_attn" not in parameter_name
                parameter.copy_((0.0 if leaf == "bias" or offset else 1.0) + 0.2 * noise)
            elif "embed" in parameter_name:
                parameter.copy_(noise * (0.2 if config.tie_word_embeddings else 1.0))
            else:
                scale = 1.5 if family in _STRONG else 1.2
                parameter.copy_(noise * scale * parameter.shape[-1] ** -0.5)
    return model


def _shipped_buffers(model: Any) -> list[tuple[str, Any]]:
    """What is saved with a model beside its parameters, and takes part in its passes."""
    kinds = ("e_score_correction_bias", "expert_bias", "layer_scalar")
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(kinds)]


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
