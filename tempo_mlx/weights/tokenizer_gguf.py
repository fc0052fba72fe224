"""The tokenizer that a GGUF file carries in its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tempo_mlx.errors import ModelError
from tempo_mlx.weights import tokenizer_build as build
from tempo_mlx.weights.gguf_file import GGUFFile, StringArray
from tempo_mlx.weights.tokenizer import Tokenizer

# Pre-tokenizers of vocabularies whose whole words win over merges, and that start every text with BOS.
_WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})
# Tokens that end a turn; files made before eot_token_id existed do not say which of them does.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|eom_id|>")


def from_gguf(file: GGUFFile, vocab_size: int) -> Tokenizer:
    """The tokenizer in `file`. Raises: ModelError naming what is missing, malformed or not supported."""
    metadata, path = file.metadata, file.path
    kind = metadata.get("tokenizer.ggml.model")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(_strings(metadata, "tokens"))]
    if not tokens or len(tokens) > vocab_size:
        raise ModelError(f"{path} has {len(tokens)} tokens and {vocab_size} embedding rows; fetch it again.")
    types = _numbers(metadata, "token_type", len(tokens), build.NORMAL)
    ids = {name: _token(metadata, f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "eot", "eom")}
    if kind == "gpt2":
        backend, starts = _byte_level(metadata, tokens)
    elif kind == "llama":
        backend, starts = _sentencepiece(metadata, tokens, types), True
    else:
        raise ModelError(f"The GGUF tokenizer {str(kind)[:40]!r} is not supported; gpt2 and llama are.")
    build.add_special_tokens(backend, tokens, types)
    bos, eos = ids["bos"], ids["eos"]
    with_bos = bos is not None and metadata.get("tokenizer.ggml.add_bos_token", starts) is True
    with_eos = eos is not None and metadata.get("tokenizer.ggml.add_eos_token", False) is True
    build.set_affixes(
        backend,
        (tokens[bos], bos) if with_bos and bos is not None else None,
        (tokens[eos], eos) if with_eos and eos is not None else None,
    )
    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    ends = [each for each in (eos, ids["eot"], ids["eom"]) if each is not None]
    ends += [
        index for token in _END_OF_TURN if (index := _in_template(token, tokens, types, template)) is not None
    ]
    named = {
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": _token(metadata, "unknown_token_id", len(tokens)),
    }
    return Tokenizer(
        backend,
        vocab_size=vocab_size,
        bos_id=bos,
        eos_ids=ends,
        chat_template=template,
        special_tokens={name: tokens[index] for name, index in named.items() if index is not None},
    )


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[Any, bool]:
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in build.SPLITS:
        raise ModelError(
            f"The GGUF pre-tokenizer {str(pre)[:40]!r} is not supported; supported are "
            f"{', '.join(build.SPLITS)}."
        )
    merges = []
    for merge in _strings(metadata, "merges"):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise ModelError(
                f"The GGUF tokenizer has the malformed merge {merge[:40]!r}; fetch the model again."
            )
        merges.append((merge[:cut], merge[cut + 1 :]))
    whole = pre in _WHOLE_WORDS
    return build.byte_level_bpe(tokens, merges, build.SPLITS[pre], ignore_merges=whole), whole


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int]) -> Any:
    if str(metadata.get("general.architecture")).startswith("gemma"):
        # Gemma's scores do not follow its merges, its order does; and runs of spaces are written as such.
        tokens[:] = ["▁" * len(token) if token.strip(" ") == "" else token for token in tokens]
        ranks: Sequence[float] = range(0, -len(tokens), -1)
    else:
        ranks = _numbers(metadata, "scores", len(tokens), None)
    unknown = _token(metadata, "unknown_token_id", len(tokens))
    return build.sentencepiece_bpe(
        tokens,
        build.merges_from_ranks(tokens, ranks, types),
        unknown=None if unknown is None else tokens[unknown],
        space_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True) is True,
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
            f"The GGUF list tokenizer.ggml.{key} does not fit the {count} tokens; fetch it again."
        )
    return list(value.tolist())


def _token(metadata: Mapping[str, Any], key: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    return value if type(value) is int and 0 <= value < count else None


def _in_template(token: str, tokens: Sequence[str], types: Sequence[int], template: str | None) -> int | None:
    """The id of a turn-ending token that the chat template writes."""
    if template is None or token not in template or token not in tokens:
        return None
    index = tokens.index(token)
    return index if types[index] in (build.CONTROL, build.USER_DEFINED) else None
