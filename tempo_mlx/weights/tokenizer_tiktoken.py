"""Byte-level vocabularies without a tokenizer.json: vocab.json and merges.txt, tiktoken's lists, Mistral's tekken.json.

A list gives tokens as bytes in base64, in the order they are merged; which pairs make a token follows from it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tempo_mlx.errors import ModelError
from tempo_mlx.weights import tokenizer_build as build
from tempo_mlx.weights.pre_tokenizers import COMPOSING, SPLITS
from tempo_mlx.weights.tokenizer import byte_letters

# What a tokenizer's class or a model's type says of the cuts; nothing there does.
_CUTS = (
    ("qwen3_5", "qwen35"), ("qwen", "qwen2"), ("glm", "glm4"), ("llama", "llama3"), ("gpt2", "gpt-2"),
    ("starcoder", "starcoder"), ("smollm", "smollm"), ("cohere", "command-r"), ("olmo", "olmo"), ("phi", "gpt-2"),
    ("hunyuan", "hunyuan"),
)  # fmt: skip


def _pre(kind: str, default: str) -> str:
    return next((pre for word, pre in _CUTS if word in kind), default)


def read_vocabulary(vocabulary: Any, merges: Path, kind: str) -> tokenizers.Tokenizer:
    """GPT-2's two files. kind: the tokenizer's class and the model's type, which say how it cuts."""
    if not isinstance(vocabulary, dict) or sorted(map(str, vocabulary.values())) != sorted(
        map(str, range(len(vocabulary)))
    ):
        raise ModelError(f"The vocab.json beside {merges} is not a table of tokens; the model is refused.")
    pairs = []
    for line in merges.read_text("utf-8", "replace").splitlines():
        left, _, right = line.partition(" ")
        if right and not line.startswith("#version"):
            pairs.append((left, right))
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    pre = _pre(kind, "gpt-2")
    return build.byte_level_bpe(tokens, pairs, SPLITS[pre], ignore_merges=False, composes=pre in COMPOSING)


def read_tiktoken(path: Path, kind: str) -> tokenizers.Tokenizer:
    """A list of `base64 rank` lines: Llama 3's and Kimi's tokenizer.model, qwen.tiktoken."""
    ranked = {}
    for line in path.read_bytes().split(b"\n"):
        text, _, rank = line.strip().partition(b" ")
        if text:
            ranked[_bytes(text, path)] = int(rank) if rank.isdigit() else -1
    if sorted(ranked.values()) != list(range(len(ranked))):
        raise ModelError(f"{path} does not rank its tokens from 0 on; the model is refused.")
    pre, words = _pre(kind, "llama3"), sorted(ranked, key=ranked.__getitem__)
    return _from_bytes(words, SPLITS[pre], first=[], composes=pre in COMPOSING)


def read_tekken(path: Path, table: Any) -> tokenizers.Tokenizer:
    """Mistral's own file: control tokens first, then what its pattern's pieces are merged to."""
    config = table.get("config") if isinstance(table, dict) else None
    entries = table.get("vocab") if isinstance(table, dict) else None
    special = (table.get("special_tokens") or []) if isinstance(table, dict) else []
    if not isinstance(config, dict) or not isinstance(entries, list) or not isinstance(special, list):
        raise ModelError(f"{path} is not a vocabulary; the model is refused.")
    pattern, size, reserved = (
        config.get(key) for key in ("pattern", "default_vocab_size", "default_num_special_tokens")
    )
    if (
        not isinstance(pattern, str)
        or type(size) is not int
        or type(reserved) is not int
        or reserved > 1 << 16
    ):
        raise ModelError(f"{path} states no pattern or sizes (config); the model is refused.")
    names = {each.get("rank"): each.get("token_str") for each in special if isinstance(each, dict)}
    control = [str(names.get(index) or f"<SPECIAL_{index}>") for index in range(reserved)]
    words = [
        _bytes(str(each.get("token_bytes")).encode(), path)
        for each in entries[: max(0, size - reserved)]
        if isinstance(each, dict)
    ]
    backend = _from_bytes(words, (pattern,), first=control)
    build.add_tokens(backend, dict.fromkeys(control, True))
    if "<s>" in control:
        build.set_affixes(backend, ("<s>", control.index("<s>")), None)
    return backend


def _bytes(text: bytes, path: Path) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ModelError(f"{path} holds a token that is not base64; the model is refused.") from None


def _from_bytes(
    words: Sequence[bytes], cuts: Sequence[str], *, first: Sequence[str], composes: bool = False
) -> tokenizers.Tokenizer:
    letters: Mapping[int, str] = byte_letters()
    tokens = ["".join(letters[byte] for byte in word) for word in words]
    merges = build.merges_from_ranks(tokens, range(0, -len(tokens), -1), [build.NORMAL] * len(tokens))
    return build.byte_level_bpe([*first, *tokens], merges, cuts, ignore_merges=True, composes=composes)
