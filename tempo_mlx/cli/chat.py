"""`tempo-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tempo_mlx.cli.console import Interrupts, make_consoles
from tempo_mlx.cli.options import ConfigFile, other_tables, with_settings
from tempo_mlx.cli.output import RunPrinter
from tempo_mlx.config import GenerateConfig, LoadConfig, OutputConfig, Shortcuts
from tempo_mlx.settings import settings_of
from tempo_mlx.sources import load_settings

if TYPE_CHECKING:
    from tempo_mlx.model.load import LoadedModel
    from tempo_mlx.report.run import Run

ANSWER_TOKENS = 512  # unless max_tokens is given
SETTINGS = (
    *settings_of(LoadConfig),
    *settings_of(GenerateConfig),
    *settings_of(Shortcuts),
    *("show_token_ids", "show_probabilities", "color", "stream", "quiet"),
)
HELP = "Type a message. /reset forgets the conversation, /exit (or Ctrl-D) ends it, Ctrl-C stops an answer."


@with_settings(LoadConfig, GenerateConfig, Shortcuts, OutputConfig, only=SETTINGS)
def chat(flags: dict[str, object], config: ConfigFile = None) -> None:
    """Talk with a model, by any decoder; the conversation is kept, and its cache with it.

    Answers end after 512 steps unless --max-tokens says otherwise. Type /reset to begin anew, /exit to end.
    """
    from tempo_mlx.cli.generate import load_with_progress

    given = load_settings(config, os.environ, {"chat": True, **flags}, elsewhere=other_tables)
    if not any("max_tokens" in source for source in (given.flags, given.environment, given.file)):
        given = given.with_flags(max_tokens=ANSWER_TOKENS)
    settings, output = given.generation(), given.make(OutputConfig)
    out, err = make_consoles(output.color)
    conversation = Conversation(load_with_progress(given.make(LoadConfig), err, output.quiet), settings)
    if sys.stdin.isatty():
        err.print(HELP, style="dim")
    while (text := _read(err)) is not None:
        if text == "/exit":
            break
        if text == "/reset":
            conversation.reset()
        elif text:
            conversation.ask(text, output, out, err)


def _read(err: Console) -> str | None:
    """The next message, without the blanks around it; None at the end of the input."""
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401 (line editing and history for input)

            return input("> ").strip()
        line = sys.stdin.readline()
        return line.strip() if line else None
    except EOFError:
        err.print()
        return None


@dataclass
class Conversation:
    """The messages so far, and the cache of the last prompt, which the next one begins with."""

    loaded: LoadedModel
    settings: GenerateConfig
    messages: list[dict[str, str]] = field(default_factory=list)
    _ids: Sequence[int] = ()  # of the prompt in _cache
    _cache: Any = None

    def reset(self) -> None:
        self.messages.clear()

    def ask(self, text: str, output: OutputConfig, out: Console, err: Console) -> Run:
        """Print the answer while it comes, and remember it; Ctrl-C ends it early."""
        from tempo_mlx.api import encode_chat, stream

        self.messages.append({"role": "user", "content": text})
        ids = encode_chat(self.loaded, self.messages, self.settings).token_ids
        with Interrupts() as interrupts:
            decoding = stream(
                self.loaded, ids, self.settings, cache=self._prefix(ids), interrupted=interrupts.reason
            )
            printer = RunPrinter(output, out, err, decoding)
            try:
                for step in decoding:
                    printer.add(step)
            finally:
                printer.stop()
            run = decoding.run()
            printer.finish(run)
        if decoding.decoder is not None:
            self._ids, self._cache = ids, decoding.decoder.cache
        self.messages.append({"role": "assistant", "content": run.final_text})
        return run

    def _prefix(self, ids: Sequence[int]) -> Any:
        """The cache cut back to what `ids` begins with, at most all but the last; None if that is nothing."""
        pairs = zip(self._ids, ids[:-1], strict=False)
        shared = next(
            (n for n, (old, new) in enumerate(pairs) if old != new), min(len(self._ids), len(ids) - 1)
        )
        cache, self._cache, self._ids = self._cache, None, ()
        if cache is None or shared == 0:
            return None
        cache.truncate(shared)
        return cache
