"""A conversation: what was said so far, and a model that answers what is said next."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tempo_mlx.api import DecodingKeywords, Message, Stream, check_config, checked_messages
from tempo_mlx.config import GenerateConfig, as_dict, unused
from tempo_mlx.decode.decoder import DecoderSpec
from tempo_mlx.errors import PromptError
from tempo_mlx.files import read_text, write_atomic
from tempo_mlx.keywords import DecoderName, GenerateSettings
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.run import Run
from tempo_mlx.resolution import ANSWER_TOKENS, resolve
from tempo_mlx.sessions.session import Session
from tempo_mlx.settings import shown

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack

FORMAT = "tempo-mlx/conversation"
VERSION = 1
NO_SETTINGS = ("prune", "select", "schedule", "value", "logits_processors", "interrupted", "cache")


class Conversation:
    """Questions and answers. Each prompt goes on from the cache of the last one.

        talk = Conversation(model, system="You are brief.", threshold=0.2)
        print(talk.ask("What is a lattice?").final_text)

    An answer can also be shown while it grows; it is kept, with its question, once its run is, however it ended:

        answer = talk.stream("And in music?")
        for step in answer:
            print(step.best_text, end="")
        talk.keep(answer.run())

    A terminal's chat is one, too (cli/conversation.py).

    messages: what was said, as {"role", "content"}, without the system message; it may be changed between turns.
    settings: of the answers to come, which end after 512 steps unless `max_tokens` is given; it may be replaced.
    session: runs what prompts share only once.
    """

    def __init__(
        self,
        loaded: LoadedModel | Session,
        config: GenerateConfig | None = None,
        *,
        messages: Iterable[Message] = (),
        decoder: DecoderName | None = None,
        **settings: Unpack[GenerateSettings],
    ) -> None:
        """Settings as for `generate`, or a whole configuration; the chat template always applies.

        Raises ConfigError; PromptError for messages that are none.
        """
        self.session = loaded if isinstance(loaded, Session) else Session(loaded)
        self.messages = checked_messages(messages)
        given: dict[str, Any] = {**settings} if decoder is None else {**settings, "decoder": decoder}
        if config is not None:
            check_config(config, given)
        else:
            config = resolve({"max_tokens": ANSWER_TOKENS, **given, "chat": True})
        self.settings = replace(config, chat=True)
        self._question = ""

    def ask(self, text: str, **settings: Unpack[DecodingKeywords]) -> Run:
        """The whole answer, which is kept. settings: for this turn, over those of the conversation."""
        return self.keep(self.stream(text, **settings).complete())

    def stream(self, text: str, **settings: Unpack[DecodingKeywords]) -> Stream:
        """Begin an answer. Nothing of this turn is kept before `keep`. Raises PromptError, ConfigError."""
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"The message is {shown(text)}; give a text that says something.")
        given: dict[str, Any] = {**settings}
        own = {name: given.pop(name) for name in NO_SETTINGS if name in given}
        decoder = given.get("decoder")
        if isinstance(decoder, DecoderSpec):
            own["decoder"], given["decoder"] = decoder, decoder.name
        config = replace(resolve(given, changed(self.settings)), chat=True) if given else self.settings
        decoding = self.session.stream([*self.messages, {"role": "user", "content": text}], config, **own)
        self._question = text
        return decoding

    def keep(self, run: Run, text: str | None = None) -> Run:
        """Add the last question and its answer. text: one of `run.texts`, where that is not to be the best.

        Raises PromptError for what is neither.
        """
        if not isinstance(run, Run):
            raise PromptError(f"{shown(run)} is no run; give what the stream's run() returned.")
        if text is not None and not isinstance(text, str):
            raise PromptError(f"The answer is {shown(text)}; give a text, or leave it out.")
        self.messages.append({"role": "user", "content": self._question})
        self.messages.append({"role": "assistant", "content": run.final_text if text is None else text})
        return run

    def undo(self) -> str | None:
        """Forget the last question and what came after it; returns the question, None where there was none."""
        asked = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            return None
        question: str = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        return question

    def again(self, **settings: Unpack[DecodingKeywords]) -> Run:
        """Another answer to the last question, in place of the first; another `seed`, say. Raises PromptError."""
        said = [*self.messages]
        question = self.undo()
        if question is None:
            raise PromptError("Nothing was asked yet; ask something first.")
        try:
            return self.ask(question, **settings)
        except BaseException:
            self.messages[:] = said
            raise

    def reset(self) -> None:
        """Forget all that was said."""
        self.messages.clear()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was said, and the settings, as JSON. Raises OutputError."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.session.loaded.config.model,
            "settings": changed(self.settings),
            "messages": self.messages,
        }
        write_atomic(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, loaded: LoadedModel | Session, path: str | os.PathLike[str]) -> Conversation:
        """A conversation that was saved. Raises PromptError, ConfigError."""
        messages, settings = read_conversation(path)
        return cls(loaded, settings, messages=messages)

    def __repr__(self) -> str:
        turns = sum(message["role"] == "user" for message in self.messages)
        return f"<Conversation of {turns} turns with {self.session.loaded.config.model}>"


def read_conversation(path: str | os.PathLike[str]) -> tuple[list[Message], GenerateConfig]:
    """What was said, and the settings, of a file that `save` wrote. Raises PromptError, ConfigError."""
    try:
        content = json.loads(read_text(path, "the conversation"))
    except (ValueError, RecursionError):
        content = None
    fields = content if isinstance(content, dict) and content.get("format") == FORMAT else {}
    messages, settings = fields.get("messages"), fields.get("settings")
    if fields.get("version") != VERSION or not isinstance(messages, list) or not isinstance(settings, dict):
        raise PromptError(
            f"{path} holds no conversation of version {VERSION}; give a file that one was saved in."
        )
    return checked_messages(messages), resolve(settings)


def changed(config: GenerateConfig) -> dict[str, Any]:
    """Those settings in force that are not what the others make of them: at their defaults, mostly. They make the
    same configuration.
    """
    values, default = as_dict(config), as_dict(GenerateConfig())
    values = {name: value for name, value in values.items() if not unused(name, values)}
    found = {name: value for name, value in values.items() if value != default[name]}
    made = as_dict(resolve({}, found))
    return {name: value for name, value in values.items() if name in found or value != made[name]}
