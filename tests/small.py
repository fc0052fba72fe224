"""A language model with so few words that all its texts can be listed, and the list, by transformers alone."""

from __future__ import annotations

import json
import math
import tempfile
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tempo_mlx.api import load  # noqa: E402
from tempo_mlx.loading import LoadedModel  # noqa: E402

PROMPT = (1, 0, 2)
LENGTH = 4
Ids = tuple[int, ...]


@cache
def reference(vocabulary: int, seed: int = 0) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=vocabulary - 1,
        pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                noise * 1.2 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0 + 0.2 * noise
            )
    return model


@cache
def small(vocabulary: int, seed: int = 0) -> LoadedModel:
    """Token `vocabulary - 1` ends a text, the others are letters."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home)
        reference(vocabulary, seed).save_pretrained(path)
        letters = {chr(ord("a") + index): index for index in range(vocabulary - 1)}
        tokenizer = Tokenizer(models.BPE(vocab={**letters, "<|eos|>": vocabulary - 1}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|eos|>"])
        tokenizer.save(str(path / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        return load(str(path))


@cache
def after(vocabulary: int, seed: int = 0) -> dict[Ids, list[float]]:
    """log P of each next token after every text shorter than LENGTH that has not ended."""
    found: dict[Ids, list[float]] = {}
    texts: list[Ids] = [()]
    for _ in range(LENGTH):
        with torch.inference_mode():
            ids = torch.tensor([[*PROMPT, *text] for text in texts])
            logits = reference(vocabulary, seed)(ids).logits[:, -1].double()
        found |= dict(zip(texts, torch.log_softmax(logits, -1).tolist(), strict=True))
        texts = [(*text, token) for text in texts for token in range(vocabulary - 1)]
    return found


def ended(vocabulary: int, text: Ids) -> bool:
    return len(text) == LENGTH or (bool(text) and text[-1] == vocabulary - 1)


def log_prob(vocabulary: int, text: Ids, seed: int = 0) -> float:
    known = after(vocabulary, seed)
    return math.fsum(known[text[:at]][token] for at, token in enumerate(text))


@cache
def all_texts(vocabulary: int, seed: int = 0) -> dict[Ids, float]:
    """Every text with its probability."""
    known = after(vocabulary, seed)
    texts = [(*text, token) for text in known for token in range(vocabulary)]
    return {text: math.exp(log_prob(vocabulary, text, seed)) for text in texts if ended(vocabulary, text)}
