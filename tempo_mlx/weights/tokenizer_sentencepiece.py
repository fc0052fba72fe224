"""A SentencePiece model file (sentencepiece_model.proto)."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers
from google.protobuf.message import DecodeError
from google.protobuf.runtime_version import VersionError

from tempo_mlx.errors import ModelError
from tempo_mlx.weights import tokenizer_build as build
from tempo_mlx.weights.damage import damaged


def read_sentencepiece(path: Path) -> tokenizers.Tokenizer:
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
        raise ModelError(f"{path} is not a SentencePiece model of kind BPE or unigram; the model is refused.")
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
    return backend


def _sentencepiece_model(path: Path) -> Any:
    """The file as a sentencepiece_model_pb2.ModelProto, the only reader that tells kind and normalization rules."""
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
        raise damaged(path, "is not a SentencePiece model") from None
