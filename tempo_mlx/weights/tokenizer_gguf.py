"""The tokenizer that a GGUF file carries in its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tempo_mlx.errors import ModelError
from tempo_mlx.weights import tokenizer_build as build
from tempo_mlx.weights.gguf_file import GGUFFile, StringArray
from tempo_mlx.weights.pre_tokenizers import COMPOSING, SPLITS, STARTING, WHOLE_WORDS
from tempo_mlx.weights.tokenizer import Tokenizer


def from_gguf(file: GGUFFile, vocab_size: int) -> Tokenizer:
    """The tokenizer in `file`. Raises: ModelError naming what is missing, malformed or not supported."""
    metadata, path = file.metadata, file.path
    kind = metadata.get("tokenizer.ggml.model")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(_strings(metadata, "tokens"))]
    if not tokens or len(tokens) > vocab_size:
        raise ModelError(
            f"{path} has {len(tokens)} tokens and {vocab_size} embedding rows; the model is refused."
        )
    types = _numbers(metadata, "token_type", len(tokens), build.NORMAL)
    ids = {name: _token(metadata, f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "eot", "eom")}
    if kind == "gpt2":
        backend, starts = _byte_level(metadata, tokens)
    elif kind == "gemma4":
        backend, starts = _sentencepiece(metadata, tokens, _merges(metadata), space_prefix=False), True
    elif kind == "llama":
        usual = {"bos": 1, "eos": 2} if len(tokens) > 2 else {}
        ids |= {name: index for name, index in usual.items() if ids[name] is None}
        merges = build.merges_from_ranks(tokens, _ranks(metadata, tokens), types)
        prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is True
        backend, starts = _sentencepiece(metadata, tokens, merges, space_prefix=prefix), True
    else:
        raise ModelError(
            f"The GGUF tokenizer {str(kind)[:40]!r} is not supported; gpt2, llama and gemma4 are."
        )
    build.add_special_tokens(backend, tokens, types)
    bos, eos = ids["bos"], ids["eos"]
    with_bos = metadata.get("tokenizer.ggml.add_bos_token", starts) is True or kind == "gemma4"
    with_eos = metadata.get("tokenizer.ggml.add_eos_token", False) is True
    build.set_affixes(
        backend,
        None if bos is None or not with_bos else (tokens[bos], bos),
        None if eos is None or not with_eos else (tokens[eos], eos),
    )
    named = {
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": _token(metadata, "unknown_token_id", len(tokens)),
    }
    return Tokenizer(
        backend,
        vocab_size=vocab_size,
        bos_id=bos,
        eos_ids=[each for each in (eos, ids["eot"], ids["eom"]) if each is not None],
        chat_templates=_templates(metadata),
        special_tokens={name: tokens[index] for name, index in named.items() if index is not None},
        doubled=_doubled(tokens),
    )


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name; the main one is `default`."""
    key = "tokenizer.chat_template"
    found = {"default" if name == key else name[len(key) + 1 :]: text for name, text in metadata.items()
             if name == key or name.startswith(f"{key}.")}  # fmt: skip
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _doubled(tokens: Sequence[str]) -> dict[int, str]:
    """Ids whose token has an id before them."""
    first: dict[str, int] = {}
    return {index: token for index, token in enumerate(tokens) if first.setdefault(token, index) != index}


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[Any, bool]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in SPLITS:
        raise ModelError(
            f"The GGUF pre-tokenizer {str(pre)[:40]!r} is not supported; supported are {', '.join(SPLITS)}."
        )
    merges = _merges(metadata)
    backend = build.byte_level_bpe(
        tokens, merges, SPLITS[pre], ignore_merges=pre in WHOLE_WORDS, composes=pre in COMPOSING
    )
    return backend, pre in STARTING


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for merge in _strings(metadata, "merges"):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise ModelError(
                f"The GGUF tokenizer has the malformed merge {merge[:40]!r}; the model is refused."
            )
        merges.append((merge[:cut], merge[cut + 1 :]))
    return merges


def _ranks(metadata: Mapping[str, Any], tokens: list[str]) -> Sequence[float]:
    """How early a SentencePiece token is merged: by its score."""
    if not str(metadata.get("general.architecture")).startswith("gemma"):
        return _numbers(metadata, "scores", len(tokens), None)
    # Gemma's scores do not follow its merges, its order does; and runs of spaces are written as such.
    tokens[:] = ["▁" * len(token) if token.strip(" ") == "" else token for token in tokens]
    return range(0, -len(tokens), -1)


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], merges: list[tuple[str, str]], *, space_prefix: bool
) -> Any:
    unknown = _token(metadata, "unknown_token_id", len(tokens))
    return build.sentencepiece_bpe(
        tokens, merges, unknown=None if unknown is None else tokens[unknown], space_prefix=space_prefix
    )


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, StringArray):
        raise ModelError(
            f"The GGUF file has no list tokenizer.ggml.{key}; give a file that includes its tokenizer."
        )
    return list(value)


def _numbers(metadata: Mapping[str, Any], key: str, count: int, default: int | None) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None and default is not None:
        return [default] * count
    if not isinstance(value, np.ndarray) or value.shape != (count,) or not np.all(np.isfinite(value)):
        raise ModelError(
            f"The GGUF list tokenizer.ggml.{key} does not fit the {count} tokens; the model is refused."
        )
    return list(value.tolist())


def _token(metadata: Mapping[str, Any], key: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    return value if type(value) is int and 0 <= value < count else None
