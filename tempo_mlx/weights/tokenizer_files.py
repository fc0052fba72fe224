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
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")


def from_directory(path: Path, config: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer of a model directory. Raises: ModelError saying what is missing or malformed."""
    settings = _settings(path)
    special = {role: text for role in _ROLES if (text := _text(settings.get(role))) is not None}
    backend, starts = _read(path, settings, str(config.get("model_type")))
    build.add_later_tokens(backend, _later_tokens(path, settings), path)
    build.add_named_tokens(backend, list(_named_tokens(settings)), special.values(), vocab_size)
    if starts is not None:
        _set_affixes(backend, settings, starts)
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


def _read(
    path: Path, settings: Mapping[str, Any], model_type: str
) -> tuple[tokenizers.Tokenizer, bool | None]:
    """The vocabulary, from the first of the files that there is; and whether a text starts with BOS unless the settings
    say otherwise, as in Llama's tokenizer class, or None where the file itself says."""
    fast, pieces, tekken = path / "tokenizer.json", path / "tokenizer.model", path / "tekken.json"
    lists = sorted(path.glob("*.tiktoken"))
    if fast.exists():
        _bound(fast)
        with tokenizer_errors(fast):
            return tokenizers.Tokenizer.from_file(str(fast)), None
    if tekken.exists():
        return read_tekken(tekken, read_json(tekken, _MAX_TOKENIZER)), None
    if pieces.exists():
        _bound(pieces)
        if _TIKTOKEN.match(pieces.read_bytes()[:4096]) is None:
            return read_sentencepiece(pieces), True
        lists = [pieces]
    kind = f"{settings.get('tokenizer_class')} {model_type}".lower()
    if lists:
        _bound(lists[0])
        return read_tiktoken(lists[0], kind), False
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        _bound(path / "merges.txt")
        vocabulary = read_json(path / "vocab.json", _MAX_TOKENIZER)
        return read_vocabulary(vocabulary, path / "merges.txt", kind), False
    raise ModelError(
        f"{path} holds no tokenizer.json, tokenizer.model, tekken.json, *.tiktoken, nor vocab.json with merges.txt; "
        "put those of the model it was made from beside it."
    )


def _bound(path: Path) -> None:
    if path.stat().st_size > _MAX_TOKENIZER:
        raise ModelError(f"{path} is larger than {_MAX_TOKENIZER >> 20} MiB; the model is refused.")


def _later_tokens(path: Path, settings: Mapping[str, Any]) -> dict[int, tokenizers.AddedToken]:
    """Tokens that were added after the vocabulary was made, by id."""
    stated = settings.get("added_tokens_decoder")
    normalizes = (path / "tokenizer.json").exists()  # others are matched before anything is rewritten
    later: dict[int, tokenizers.AddedToken] = {}
    for key, value in stated.items() if isinstance(stated, dict) else ():
        special = isinstance(value, dict) and value.get("special") is True
        token = _added(value, special, normalizes)
        if token is not None and str(key).isdigit() and len(str(key)) < 10:
            later[int(key)] = token
    special_texts = {token.content for token in _named_tokens(settings)}
    for text, index in _optional_table(path / "added_tokens.json").items():
        if type(index) is int and (token := _added(text, text in special_texts)) is not None:
            later.setdefault(index, token)
    return later


def _named_tokens(settings: Mapping[str, Any]) -> Iterator[tokenizers.AddedToken]:
    """The special tokens that have a role, and the further ones."""
    further: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        stated = settings.get(key)
        further += stated.values() if isinstance(stated, dict) else stated if isinstance(stated, list) else []
    for value in (*map(settings.get, _ROLES), *further):
        if (token := _added(value, True)) is not None:
            yield token


def _added(token: Any, special: bool, normalizes: bool = False) -> tokenizers.AddedToken | None:
    """A token as files state one: its text, or a table with that and how it is matched."""
    if not (text := _text(token)):
        return None
    stated = token if isinstance(token, dict) else {}
    matched = {key: stated.get(key) is True for key in ("single_word", "lstrip", "rstrip")}
    normalized = normalizes and stated.get("normalized") is True
    return tokenizers.AddedToken(text, special=special, normalized=normalized, **matched)


def _set_affixes(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], starts: bool) -> None:
    """BOS and EOS around a text, as the settings tell."""
    affixes = []
    for role, flag, default in (
        ("bos_token", "add_bos_token", starts),
        ("eos_token", "add_eos_token", False),
    ):
        text = _text(settings.get(role)) or {"bos_token": "<s>", "eos_token": "</s>"}[role]
        index = backend.token_to_id(text)
        affixes.append((text, index) if settings.get(flag, default) is True and index is not None else None)
    build.set_affixes(backend, affixes[0], affixes[1])


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
