"""`tempo-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console

from tempo_mlx.cli.console import Interrupts, make_consoles
from tempo_mlx.cli.options import ConfigFile, other_tables, with_settings
from tempo_mlx.cli.output import RunPrinter
from tempo_mlx.config import GenerateConfig, LoadConfig, OutputConfig
from tempo_mlx.resolution import Shortcuts
from tempo_mlx.settings import settings_of
from tempo_mlx.sources import load_settings

if TYPE_CHECKING:
    from tempo_mlx.report.run import Run
    from tempo_mlx.sessions.session import Session

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
    from tempo_mlx.sessions.session import Session

    given = load_settings(config, os.environ, {"chat": True, **flags}, elsewhere=other_tables)
    if not any("max_tokens" in source for source in (given.flags, given.environment, given.file)):
        given = given.with_flags(max_tokens=ANSWER_TOKENS)
    settings, output = given.generation(), given.make(OutputConfig)
    out, err = make_consoles(output.color)
    loaded = load_with_progress(given.make(LoadConfig), err, output.quiet)
    conversation = Conversation(Session(loaded), settings)
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
    """The messages so far, and the session in which each prompt goes on from the last."""

    session: Session
    settings: GenerateConfig
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        self.messages.clear()

    def ask(self, text: str, output: OutputConfig, out: Console, err: Console) -> Run:
        """Print the answer while it comes, and remember it; Ctrl-C ends it early."""
        from tempo_mlx.api import encode_chat

        self.messages.append({"role": "user", "content": text})
        prompt = encode_chat(self.session.loaded, self.messages, self.settings)
        with Interrupts() as interrupts:
            decoding = self.session.stream(prompt, self.settings, interrupted=interrupts.reason)
            printer = RunPrinter(output, out, err, decoding)
            printer.follow()
            run = decoding.run()
            printer.finish(run)
            if decoding.failure is not None:
                raise decoding.failure
        self.messages.append({"role": "assistant", "content": run.final_text})
        return run
