"""Texts that follow a grammar: of every text so far, the tokens that may come next.

The grammar is a JSON schema, a regular expression, a list of choices or a Lark grammar; llguidance follows it. A text
may end where the grammar may, and nowhere else. Nothing here knows of branches: the state after a text is that after
its beginning, forked and moved on by the rest, and is kept for the texts that follow it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from tempo_mlx.arrays import Bools
from tempo_mlx.config import GRAMMARS, GenerateConfig
from tempo_mlx.errors import ConfigError, DeadEndError

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

    from tempo_mlx.weights import Tokenizer

KEPT = 512  # states of texts; others are made again
# One way to write JSON: a model that may put blanks anywhere can put nothing else until its tokens are spent.
LAYOUT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """One grammar over one vocabulary. `allowed` is a function of the texts; what it keeps only saves time."""

    def __init__(self, start: LLMatcher, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._states: dict[tuple[int, ...], LLMatcher] = {(): start}
        self._worker = ThreadPoolExecutor(1)
        self.forced: list[int] = []  # what must follow the one text that `ahead` was told last
        self._ahead: tuple[list[tuple[int, ...]], Future[Bools]] | None = None

    def ahead(self, texts: Sequence[Sequence[int]]) -> None:
        """Begin in another thread what `allowed` will be asked next; the model can run meanwhile."""
        keys = [tuple(text) for text in texts]
        self.forced = list(self._state(keys[0]).compute_ff_tokens()) if len(keys) == 1 else []
        self._ahead = keys, self._worker.submit(self._masks, keys)

    def allowed(self, texts: Sequence[Sequence[int]], any_text: bool = False) -> Bools:
        """(k, V): what may follow each text. Raises DeadEndError where nothing may, unless `any_text` is expected."""
        keys = [tuple(text) for text in texts]
        begun, self._ahead = self._ahead, None
        masks = None if begun is None else begun[1].result()
        if masks is None or begun is None or begun[0] != keys:
            masks = self._masks(keys)
        for text in [text for text, mask in zip(keys, masks, strict=True) if not mask.any() and not any_text]:
            raise DeadEndError(
                f"The grammar lets nothing follow token {len(text)} of the text ({fault_of(self._state(text))}); "
                "simplify the grammar."
            )
        return masks

    def _masks(self, texts: list[tuple[int, ...]]) -> Bools:
        masks = np.zeros((len(texts), self.vocab_size), np.bool_)
        for mask, text in zip(masks, texts, strict=True):
            state = self._state(text)
            # Bytes that hold 8 tokens each, in the order of their bits.
            bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")
            mask[:] = bits[: self.vocab_size]
            mask &= not state.is_error()
        return masks

    def _state(self, text: tuple[int, ...]) -> LLMatcher:
        if text in self._states:
            return self._states[text]
        known = len(text) - 1
        while text[:known] not in self._states:
            known -= 1
        state = self._states[text[:known]].deep_copy()
        state.consume_tokens(list(text[known:]))
        self._states[text] = state
        if len(self._states) > KEPT:
            del self._states[next(key for key in self._states if key)]  # not the beginning
        return state


def make_constraint(config: GenerateConfig, tokenizer: Tokenizer) -> Constraint | None:
    """What the settings ask for; None where that is nothing. Raises ConfigError."""
    if (name := grammar_setting(config)) is None:
        return None
    from llguidance import LLMatcher

    state = LLMatcher(tokenizer.for_grammars, grammar_of(config, name), log_level=0)
    if state.is_error():
        raise ConfigError(f"{name} is no grammar that can be followed: {fault_of(state)}.")
    return Constraint(state, tokenizer.vocab_size)


def check_grammar(config: GenerateConfig) -> None:
    """Raises ConfigError for a grammar that nothing can follow, before a model is asked."""
    if (name := grammar_setting(config)) is None:
        return
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ConfigError(f"{name} needs llguidance; pip install 'tempo-mlx[schema]' brings it.") from None
    try:
        fault = LLMatcher.validate_grammar(grammar_of(config, name))
    except ValueError as error:  # a schema that is no JSON
        fault = str(error)
    if fault:
        raise ConfigError(f"{name} is no grammar that can be followed: {first_line(fault)}.")


def grammar_setting(config: GenerateConfig) -> str | None:
    """The setting that holds the run's grammar."""
    return next((name for name in GRAMMARS if getattr(config, name)), None)


def grammar_of(config: GenerateConfig, name: str) -> str:
    """In llguidance's own words."""
    from llguidance import LLMatcher

    makers: Mapping[str, Callable[[Any], str]] = {
        "json_schema": lambda text: LLMatcher.grammar_from_json_schema(text, defaults=LAYOUT),
        "regex": LLMatcher.grammar_from_regex,
        "choices": lambda texts: LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts))),
        "grammar": LLMatcher.grammar_from_lark,
    }
    return makers[name](getattr(config, name))


def fault_of(state: LLMatcher) -> str:
    return first_line(state.get_error()) or "no token of the vocabulary fits"


def first_line(text: str) -> str:
    """Of an error of llguidance's, which goes on with its own state."""
    return text.strip().partition("\n")[0].rstrip(".")[:300]
