"""The tokenizer of a Hugging Face directory, in whichever files it is: tokenizer.json, vocab.json and merges.txt, a
SentencePiece model, tiktoken's list of bytes, Mistral's tekken.json; and what other files add to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from tempo_mlx.errors import ModelError
from tempo_mlx.weights import tokenizer_build as build
from tempo_mlx.weights.json_file import read_json
from tempo_mlx.weights.library_errors import tokenizer_errors
from tempo_mlx.weights.tokenizer import Tokenizer
from tempo_mlx.weights.tokenizer_sentencepiece import read_sentencepiece
from tempo_mlx.weights.tokenizer_tiktoken import read_tekken, read_tiktoken, read_vocabulary

_MAX_TOKENIZER = 128 << 20
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")


def from_directory(path: Path, config: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer of a model directory. Raises: ModelError saying what is missing or malformed."""
    settings = _settings(path)
    special = {role: text for role in _ROLES if (text := _text(settings.get(role))) is not None}
    backend = _read(path, settings, str(config.get("model_type")))
    build.add_later_tokens(backend, _later_tokens(path, settings), path)
    stated = _optional_table(path / "generation_config.json").get("eos_token_id")
    ends = config.get("eos_token_id") if stated is None else stated
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else config.get("bos_token_id")
    return Tokenizer(
        backend,
        vocab_size=vocab_size,
        bos_id=bos if type(bos) is int else None,
        eos_ids=[each for each in (*(ends if isinstance(ends, list) else [ends]), eos) if type(each) is int],
        chat_templates=_chat_templates(path, settings),
        special_tokens=special,
    )


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, filled up from special_tokens_map.json."""
    settings = _optional_table(path / "tokenizer_config.json")
    return {
        **_optional_table(path / "special_tokens_map.json"),
        **{k: v for k, v in settings.items() if v is not None},
    }


def _optional_table(path: Path) -> Mapping[str, Any]:
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a table of settings; the model is refused.")
    return value


def _text(token: Any) -> str | None:
    """A special token's text: plain, or a table with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _read(path: Path, settings: Mapping[str, Any], model_type: str) -> tokenizers.Tokenizer:
    """The vocabulary, from the first of the files that there is."""
    fast, pieces, tekken = path / "tokenizer.json", path / "tokenizer.model", path / "tekken.json"
    lists = sorted(path.glob("*.tiktoken"))
    if fast.exists():
        _bound(fast)
        with tokenizer_errors(fast):
            return tokenizers.Tokenizer.from_file(str(fast))
    if tekken.exists():
        return read_tekken(tekken, read_json(tekken, _MAX_TOKENIZER))
    if pieces.exists():
        _bound(pieces)
        if _TIKTOKEN.match(pieces.read_bytes()[:4096]) is None:
            return _with_affixes(read_sentencepiece(pieces), settings)
        lists = [pieces]
    kind = f"{settings.get('tokenizer_class')} {model_type}".lower()
    if lists:
        _bound(lists[0])
        return read_tiktoken(lists[0], kind)
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        _bound(path / "merges.txt")
        return read_vocabulary(read_json(path / "vocab.json", _MAX_TOKENIZER), path / "merges.txt", kind)
    raise ModelError(
        f"{path} holds no tokenizer.json, tokenizer.model, tekken.json, *.tiktoken, nor vocab.json with merges.txt; "
        "put those of the model it was made from beside it."
    )


def _bound(path: Path) -> None:
    if path.stat().st_size > _MAX_TOKENIZER:
        raise ModelError(f"{path} is larger than {_MAX_TOKENIZER >> 20} MiB; the model is refused.")


def _later_tokens(path: Path, settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Tokens that were added after the vocabulary was made: id -> text, and whether it is special."""
    stated = settings.get("added_tokens_decoder")
    later: dict[int, tuple[str, bool]] = {}
    if isinstance(stated, dict):
        for key, value in stated.items():
            text = _text(value)
            if text and str(key).isdigit() and len(str(key)) < 10:
                later[int(key)] = text, isinstance(value, dict) and value.get("special") is True
    special = {_text(settings.get(role)) for role in _ROLES} | {*_additional(settings)}
    for text, index in _optional_table(path / "added_tokens.json").items():
        if type(index) is int and text:
            later.setdefault(index, (text, text in special))
    return later


def _additional(settings: Mapping[str, Any]) -> Iterator[str]:
    stated = settings.get("additional_special_tokens")
    for each in stated if isinstance(stated, list) else []:
        if (text := _text(each)) is not None:
            yield text


def _with_affixes(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BOS (unless told otherwise, as in Llama's tokenizer class) and EOS around a text."""
    affixes = []
    for role, flag, default in (("bos_token", "add_bos_token", True), ("eos_token", "add_eos_token", False)):
        text = _text(settings.get(role)) or {"bos_token": "<s>", "eos_token": "</s>"}[role]
        index = backend.token_to_id(text)
        affixes.append((text, index) if settings.get(flag, default) is True and index is not None else None)
    build.set_affixes(backend, affixes[0], affixes[1])
    return backend


def _chat_templates(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """By name, the usual one as `default`: from files of their own, chat_template.json or tokenizer_config.json."""
    named = _named(
        _optional_table(path / "chat_template.json").get("chat_template", settings.get("chat_template"))
    )
    files = {"default": path / "chat_template.jinja"}
    files |= {each.stem: each for each in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    for name, file in files.items():
        if file.is_file():
            if file.stat().st_size > 1 << 20:
                raise ModelError(f"{file} is larger than 1 MiB; the model is refused.")
            named[name] = file.read_text("utf-8", "replace")
    return named


def _named(template: Any) -> dict[str, str]:
    """One template, a table of several, or a list of {"name", "template"}."""
    if isinstance(template, list):
        template = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
    table = template if isinstance(template, dict) else {"default": template}
    return {name: text for name, text in table.items() if isinstance(name, str) and isinstance(text, str)}
