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
from typing import Any

import tokenizers

from tempo_mlx.errors import ModelError, PromptError
from tempo_mlx.weights.chat_template import ChatTemplate
from tempo_mlx.weights.library_errors import tokenizer_errors

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
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
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """vocab_size: rows of the model's embedding; special_tokens: bos_token and so on, for templates."""
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_ids = frozenset(each for each in eos_ids if 0 <= each < vocab_size)
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self._compiled: ChatTemplate | None = None
        added = backend.get_added_tokens_decoder()
        self._literal = {index: token.content.encode() for index, token in added.items()}
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._byte_level, self.strips_first_space = _decoding(backend)
        _refuse_growth(backend)

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids. add_special: with the BOS (or EOS) token that the model expects around a text.

        Raises: PromptError if a token of the text has no row in the embedding, or the text is not Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError(
                "The prompt holds half a surrogate pair; give text that is valid Unicode."
            ) from None
        with tokenizer_errors("The model's tokenizer"):
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special).ids
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
        token: str | None = self.backend.id_to_token(index) if 0 <= index < 1 << 31 else None
        if token is None:
            return b""
        if self._byte_level:
            if all(character in _BYTES for character in token):
                return bytes(_BYTES[character] for character in token)
            return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()

    def token_id(self, token: str) -> int | None:
        """The id of a token spelled as in the vocabulary, such as `</think>`; None if there is none."""
        index: int | None = self.backend.token_to_id(token)
        return index

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as the model was trained to see it; encode it with add_special=False.

        messages: {"role": ..., "content": ...} each. Raises: PromptError if the template refuses them,
        ModelError if there is no template or it is broken.
        """
        if self.chat_template is None:
            raise ModelError("This model has no chat template; use --raw, or a model tuned for chat.")
        if self._compiled is None:
            self._compiled = ChatTemplate(self.chat_template)
        settings: dict[str, Any] = {**self.special_tokens, "add_generation_prompt": add_generation_prompt}
        if enable_thinking is not None:
            settings["enable_thinking"] = enable_thinking
        return self._compiled.render(messages, settings)

    @property
    def chat_template_knows_thinking(self) -> bool:
        """Does the template have a switch `enable_thinking`?"""
        return self.chat_template is not None and "enable_thinking" in self.chat_template


class Detokenizer:
    """Text out of tokens as they come: `add` returns what is final, `finish` the rest."""

    def __init__(self, tokenizer: Tokenizer, strip_first_space: bool, skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._strip = strip_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

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


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters, reversed (openai/gpt-2, encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


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
