"""The tokenizer of a Hugging Face directory: tokenizer.json, or a SentencePiece model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers
from google.protobuf.message import DecodeError
from google.protobuf.runtime_version import VersionError

from tempo_mlx.errors import ModelError
from tempo_mlx.weights import tokenizer_build as build
from tempo_mlx.weights.json_file import read_json
from tempo_mlx.weights.library_errors import tokenizer_errors
from tempo_mlx.weights.tokenizer import Tokenizer

_MAX_TOKENIZER = 128 << 20
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def from_directory(path: Path, config: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer of a model directory. Raises: ModelError saying what is missing or malformed."""
    settings = _optional_table(path / "tokenizer_config.json")
    special = {role: text for role in _ROLES if (text := _text(settings.get(role))) is not None}
    if (path / "tokenizer.json").exists():
        backend = _read_fast(path / "tokenizer.json")
    elif (path / "tokenizer.model").exists():
        backend = _read_sentencepiece(path / "tokenizer.model", settings)
    else:
        raise ModelError(f"{path} holds neither tokenizer.json nor tokenizer.model; fetch the model again.")
    ends = _optional_table(path / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else config.get("bos_token_id")
    return Tokenizer(
        backend,
        vocab_size=vocab_size,
        bos_id=bos if type(bos) is int else None,
        eos_ids=[each for each in (*(ends if isinstance(ends, list) else [ends]), eos) if type(each) is int],
        chat_template=_chat_template(path, settings),
        special_tokens=special,
    )


def _optional_table(path: Path) -> Mapping[str, Any]:
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a table of settings; fetch the model again.")
    return value


def _text(token: Any) -> str | None:
    """A special token's text: plain, or a table with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json, the first there is."""
    file = path / "chat_template.jinja"
    if file.exists():
        if file.stat().st_size > 1 << 20:
            raise ModelError(f"{file} is larger than 1 MiB; the model is refused.")
        return file.read_text("utf-8", "replace")
    template = _optional_table(path / "chat_template.json").get(
        "chat_template", settings.get("chat_template")
    )
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_fast(path: Path) -> tokenizers.Tokenizer:
    if path.stat().st_size > _MAX_TOKENIZER:
        raise ModelError(f"{path} is larger than {_MAX_TOKENIZER >> 20} MiB; the model is refused.")
    with tokenizer_errors(str(path)):
        return tokenizers.Tokenizer.from_file(str(path))


def _read_sentencepiece(path: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """A SentencePiece model (sentencepiece_model.proto), of kind BPE or unigram."""
    model = _sentencepiece_model(path)
    tokens = [piece.piece for piece in model.pieces]
    scores = [piece.score for piece in model.pieces]
    types = [piece.type for piece in model.pieces]
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    # a piece that is no UTF-8 comes as bytes
    if (
        not tokens
        or not all(isinstance(token, str) for token in tokens)
        or trainer.model_type not in (trainer.BPE, trainer.UNIGRAM)
    ):
        raise ModelError(
            f"{path} is not a SentencePiece model of kind BPE or unigram; fetch the model again."
        )
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise ModelError(
            f"{path} rewrites text before it cuts it (normalization rules), which tempo-mlx reads only from "
            "a tokenizer.json; convert the tokenizer with transformers."
        )
    unknown = types.index(build.UNKNOWN) if build.UNKNOWN in types else None
    if trainer.model_type == trainer.BPE:
        backend = build.sentencepiece_bpe(
            tokens,
            build.merges_from_ranks(tokens, scores, types),
            unknown=None if unknown is None else tokens[unknown],
            space_prefix=normalizer.add_dummy_prefix,
        )
    else:
        backend = build.sentencepiece_unigram(
            tokens,
            scores,
            unknown=unknown,
            space_prefix=normalizer.add_dummy_prefix,
            byte_fallback=build.BYTE in types,
        )
    build.add_special_tokens(backend, tokens, types)
    _add_later_tokens(backend, path.parent, settings)
    _set_affixes(backend, settings)
    return backend


def _sentencepiece_model(path: Path) -> Any:
    """The file as a sentencepiece_model_pb2.ModelProto, the only reader that tells kind and normalization rules."""
    if path.stat().st_size > _MAX_TOKENIZER:
        raise ModelError(f"{path} is larger than {_MAX_TOKENIZER >> 20} MiB; the model is refused.")
    try:  # here, since few models need it
        messages: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    except VersionError:  # sentencepiece does not say which protobuf its messages were generated for
        installed = version("protobuf")
        raise ModelError(
            f"sentencepiece {version('sentencepiece')} needs a newer protobuf than {installed} to read {path}; "
            "update it with `python -m pip install --upgrade protobuf`."
        ) from None
    try:
        return messages.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise ModelError(f"{path} is not a SentencePiece model; fetch the model again.") from None


def _add_later_tokens(backend: tokenizers.Tokenizer, path: Path, settings: Mapping[str, Any]) -> None:
    """Tokens that were added after the SentencePiece model was trained, with the ids they were given."""
    stated = settings.get("added_tokens_decoder")
    later = (
        {int(key): value for key, value in stated.items() if key.isdigit()}
        if isinstance(stated, dict)
        else {}
    )
    for text, index in _optional_table(path / "added_tokens.json").items():
        if type(index) is int:
            later.setdefault(index, {"content": text})
    for index in sorted(later):
        content = _text(later[index])
        if content is None or backend.token_to_id(content) == index:
            continue
        token = tokenizers.AddedToken(content, normalized=False, special=later[index].get("special") is True)
        backend.add_tokens([token])
        if backend.token_to_id(content) != index:
            raise ModelError(
                f"The tokenizer in {path} gives {content[:40]!r} the id {index}, which is not free."
            )


def _set_affixes(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """BOS (unless told otherwise, as in Llama's tokenizer class) and EOS around a text."""
    affixes = []
    for role, flag, default in (("bos_token", "add_bos_token", True), ("eos_token", "add_eos_token", False)):
        text = _text(settings.get(role)) or {"bos_token": "<s>", "eos_token": "</s>"}[role]
        index = backend.token_to_id(text)
        affixes.append((text, index) if settings.get(flag, default) is True and index is not None else None)
    build.set_affixes(backend, affixes[0], affixes[1])
