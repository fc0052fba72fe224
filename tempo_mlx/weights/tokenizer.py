"""Text to token ids and back, whatever the tokenizer came as.

Encoding is the `tokenizers` library's. Decoding is done here, from the bytes each token stands for, so that
text can be streamed token by token without ever splitting a character, and adds up to exactly what decoding
the whole would give.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import tokenizers

from tempo_mlx.errors import ModelError, PromptError
from tempo_mlx.weights.chat_template import ChatTemplate
from tempo_mlx.weights.library_errors import tokenizer_errors
from tempo_mlx.weights.quoting import Quoting
from tempo_mlx.weights.reasoning import Reasoning, reasoning_of
from tempo_mlx.weights.tokenizer_build import TURN_ENDS

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_BEFORE = "\ufdefbefore"  # a token before text that is not the first; a noncharacter, so that no text has it
_MAX_GROWTH = 64  # how many times longer than its text a normalizer may make a prompt


class Tokenizer:
    """`bos_id`: the token a text starts with, if the model has one; `eos_ids`: those that end a text."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocab_size: int,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        doubled: Mapping[int, str] | None = None,
    ) -> None:
        """vocab_size: rows of the model's embedding; chat_templates: by name, the usual one as `default`;
        special_tokens: bos_token and so on, for templates; doubled: ids whose token has another id too."""
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.chat_templates = dict(chat_templates or {})
        self.special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, ChatTemplate] = {}
        self._doubled = dict(doubled or {})
        self._without_special: tokenizers.Tokenizer | None = None
        added = backend.get_added_tokens_decoder()
        turns = turn_ends((token.content for token in added.values()), self.chat_templates.values())
        ends = {*eos_ids, *(index for index, token in added.items() if token.content in turns)}
        self.eos_ids = frozenset(each for each in ends if 0 <= each < vocab_size)
        self._literal = {index: token.content.encode() for index, token in added.items()}
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._byte_level, self.strips_first_space = _decoding(backend)
        _refuse_growth(backend)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids. add_special: with the BOS (or EOS) token that the model expects around a text.

        Raises: PromptError if a token of the text has no row in the embedding, or the text is not Unicode.
        """
        return self._readable(self._encode(self.backend, text, add_special))

    def _encode(self, backend: tokenizers.Tokenizer, text: str, add_special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError(
                "The prompt holds half a surrogate pair; give text that is valid Unicode."
            ) from None
        with tokenizer_errors("The model's tokenizer"):
            ids: list[int] = backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def _readable(self, ids: list[int]) -> list[int]:
        if unknown := [index for index in ids if index >= self.vocab_size]:
            raise PromptError(
                f"The prompt holds {self.backend.id_to_token(unknown[0])!r}, a token that this model cannot "
                "read; leave it out."
            )
        return ids

    def decode(self, ids: Iterable[int], *, continues: bool = False, skip_special: bool = False) -> str:
        """The text of `ids`. continues: they follow other text, so that a leading space is kept.

        Bytes that are not UTF-8 become U+FFFD, like in `detokenizer`.
        """
        detokenizer = self.detokenizer(continues=continues, skip_special=skip_special)
        return "".join([*map(detokenizer.add, ids), detokenizer.finish()])

    def detokenizer(self, *, continues: bool = False, skip_special: bool = False) -> Detokenizer:
        """A streaming `decode`."""
        strip = self.strips_first_space and not continues
        return Detokenizer(self, strip, self.special_ids if skip_special else frozenset())

    def token_text(self, index: int) -> str:
        """One token on its own; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(index).decode("utf-8", "replace")

    def token_bytes(self, index: int) -> bytes:
        """What the token adds to the text. Empty for ids that only pad the embedding."""
        if index not in self._bytes:
            self._bytes[index] = self._look_up(index)
        return self._bytes[index]

    def _look_up(self, index: int) -> bytes:
        if index in self._literal:
            return self._literal[index]
        token = self._doubled.get(index) or (
            self.backend.id_to_token(index) if 0 <= index < 1 << 31 else None
        )
        if token is None:
            return b""
        if self._byte_level:
            if all(character in _BYTES for character in token):
                return bytes(_BYTES[character] for character in token)
            return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()

    @cached_property
    def for_grammars(self) -> LLTokenizer:
        """The vocabulary as llguidance wants it; takes a second for a large one."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(
            TokenizerWrapper(Vocabulary(self)), n_vocab=self.vocab_size, eos_token=sorted(self.eos_ids)
        )

    def token_id(self, token: str) -> int | None:
        """The id of a token spelled as in the vocabulary, such as `</think>`; None if there is none."""
        index: int | None = self.backend.token_to_id(token)
        return index

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Any] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the model was trained to see it; `encode_chat` gives its ids too.

        messages: {"role": ..., "content": ...} each. template: the name of one of several. variables: whatever else the
        template knows, such as enable_thinking or reasoning_effort.
        Raises: PromptError if the template refuses the messages, ModelError if there is none or it is broken.
        """
        name = self._template_name(template, tools)
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self.chat_templates[name])
        settings = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        return self._compiled[name].render(messages, {**self.special_tokens, **settings})

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], begun: str = "", /, **settings: Any
    ) -> tuple[str, list[int]]:
        """`chat`'s text and its token ids; control tokens that a message spells are text there, and no tokens.

        begun: what the answer begins with.
        """
        quoting = Quoting((self.token_text(index) for index in self.special_ids), messages)
        rendered = self.chat(quoting.messages, **settings)
        ids = quoting.encode(
            rendered, lambda text: self.encode(text, add_special=False), self._encode_literal
        )
        text = quoting.text(rendered)
        if not begun:
            return text, ids
        before = self.reasoning.answer  # where the model says what is an answer
        ids = ids + self.encode(before, add_special=False) + self._encode_literal(begun, False)
        return f"{text}{before}{begun}", ids

    def _encode_literal(self, text: str, first: bool) -> list[int]:
        """Token ids of text in which no control token is meant; what is not first gets no prefix."""
        if self._without_special is None:
            self._without_special = tokenizers.Tokenizer.from_str(self.backend.to_str())
            self._without_special.encode_special_tokens = True
            self._without_special.add_tokens([tokenizers.AddedToken(_BEFORE, normalized=False)])
        ids = self._encode(self._without_special, text if first else _BEFORE + text, False)
        return self._readable(ids if first else ids[1:])

    def _template_name(self, wanted: str | None, tools: Sequence[Any] | None) -> str:
        """Which template: the one asked for, that for tools where there are some, the usual one, or the only one."""
        names = list(self.chat_templates)
        if not names:
            raise ModelError("This model has no chat template; use --raw, or a model tuned for chat.")
        fitting = [wanted] if wanted is not None else [*(["tool_use"] if tools else []), "default"]
        found = [name for name in fitting if name in names] or (
            names if wanted is None and len(names) == 1 else []
        )
        if not found:
            raise ModelError(
                f"This model has no chat template {fitting[-1]!r}, only {', '.join(sorted(names))}; use --raw."
            )
        return found[0]

    @property
    def reasoning(self) -> Reasoning:
        """How the model marks what is reasoning."""
        return reasoning_of(self.chat_templates.values())

    @property
    def chat_template_knows_thinking(self) -> bool:
        """Does the template have a switch `enable_thinking`?"""
        return any("enable_thinking" in source for source in self.chat_templates.values())


def turn_ends(tokens: Iterable[str], templates: Iterable[str]) -> set[str]:
    """Those of a vocabulary's tokens that end a turn, as the templates write them.

    Harmony's <|end|> ends a message within a turn: where <|call|> or <|flush|> ends the turn, it does not.
    """
    sources = list(templates)
    found = {token for token in TURN_ENDS.intersection(tokens) if any(token in source for source in sources)}
    return found - {"<|end|>"} if found & {"<|return|>", "<|call|>", "<|flush|>"} else found


class Vocabulary:
    """What llguidance asks of a tokenizer, under its names."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = min(tokenizer.eos_ids, default=0), tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(each for each in tokenizer.special_ids if each < tokenizer.vocab_size)

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self.tokenizer.encode(text, add_special=False)


class Detokenizer:
    """Text out of tokens as they come: `add` returns what is final, `finish` the rest."""

    def __init__(self, tokenizer: Tokenizer, strip_first_space: bool, skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._strip = strip_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def open(self) -> bool:
        """Whether a character has begun and is not complete."""
        return bool(self._decoder.getstate()[0])

    def add(self, index: int) -> str:
        if index in self._skip:
            return ""
        return self._emit(self._decoder.decode(self._tokenizer.token_bytes(index)))

    def finish(self) -> str:
        return self._emit(self._decoder.decode(b"", True))

    def _emit(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def byte_letters() -> dict[int, str]:
    """GPT-2's spelling of bytes as printable characters (openai/gpt-2, encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_BYTES = {letter: byte for byte, letter in byte_letters().items()}


def _state(component: Any) -> Any:
    """A part of a tokenizer as the table it has in tokenizer.json."""
    return None if component is None else json.loads(component.__getstate__())


def _parts(state: Any) -> list[dict[str, Any]]:
    """A sequence's members, or the one there is."""
    if state is None:
        return []
    for key in ("decoders", "normalizers", "pretokenizers"):
        if key in state:
            return [part for each in state[key] for part in _parts(each)]
    return [state]


def _decoding(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Whether tokens spell bytes in GPT-2's alphabet; whether a text's first space is dropped.

    Raises: ModelError for a decoder that is neither that nor SentencePiece's.
    """
    parts = _parts(_state(backend.decoder))
    kinds = {part["type"] for part in parts}
    if kinds == {"ByteLevel"}:
        return True, False
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        strip = any(
            part["type"] == "Strip" and part["content"] == " " and part["start"] > 0 for part in parts
        )
        meta = any(part["type"] == "Metaspace" and part.get("prepend_scheme") != "never" for part in parts)
        if all(part["type"] != "Replace" or _is_space_mark(part) for part in parts):
            return False, strip or meta
    raise ModelError(
        f"The tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is not supported; byte-level BPE "
        "and SentencePiece tokenizers are."
    )


def _is_space_mark(part: Mapping[str, Any]) -> bool:
    return part.get("pattern") == {"String": "▁"} and part.get("content") == " "


def _refuse_growth(backend: tokenizers.Tokenizer) -> None:
    """Refuse a normalizer that could blow a short prompt up: a chain of doublings needs few lines."""
    growth = 1.0
    for part in _parts(_state(backend.normalizer)):
        added = str(part.get("content", part.get("prepend", "")))
        pattern = part.get("pattern", {})
        matched = len(pattern["String"].encode()) if isinstance(pattern, dict) and "String" in pattern else 1
        growth *= max(1.0, len(added.encode()) / max(1, matched))
    if growth > _MAX_GROWTH:
        raise ModelError("The tokenizer's normalizer makes text many times longer; the model is refused.")
