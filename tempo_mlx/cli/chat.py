"""`tempo-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from tempo_mlx.cli.ask import answering
from tempo_mlx.cli.console import make_consoles
from tempo_mlx.cli.line import PipeReader, Reader, TerminalReader
from tempo_mlx.cli.options import EVERYDAY, ConfigFile, other_tables, with_settings
from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import TempoError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.output_config import OutputConfig
from tempo_mlx.resolution import ANSWER_TOKENS, Shortcuts
from tempo_mlx.settings import settings_of
from tempo_mlx.sources import load_settings

SETTINGS = (
    *settings_of(LoadConfig),
    *(name for name in settings_of(GenerateConfig) if name != "chat"),
    *settings_of(Shortcuts),
    *(
        "system_file",
        "view",
        "show_above",
        "show_token_ids",
        "show_probabilities",
        "color",
        "stream",
        "quiet",
    ),
)
WELCOME = "Type a message. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat."


@with_settings(
    *(LoadConfig, GenerateConfig, Shortcuts, OutputConfig),
    only=SETTINGS,
    everyday=EVERYDAY,
    defaults={"max_tokens": str(ANSWER_TOKENS)},
)
def chat(
    flags: dict[str, object],
    config: ConfigFile = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last conversation.", rich_help_panel="Input")
    ] = False,
) -> None:
    """Talk with a model; it remembers what was said.

    Type /help for what else can be done. Without a terminal every line of standard input is a message.

    \b
    Examples:
      tempo-mlx chat
      tempo-mlx chat -s "You are a librarian." --resume
    """
    from tempo_mlx.cli.commands import COMMANDS, Chat, run_command, take_up
    from tempo_mlx.cli.conversation import LAST, TerminalConversation, state_directory, status
    from tempo_mlx.cli.generate import generation_of, load_with_progress
    from tempo_mlx.sessions.session import Session

    given = answering(load_settings(config, os.environ, {"chat": True, **flags}, elsewhere=other_tables))
    settings, output = generation_of(given), given.make(OutputConfig)
    out, err = make_consoles(output.color)
    conversation = TerminalConversation(
        Session(load_with_progress(given.make(LoadConfig), err, output.quiet)), settings
    )
    talk = Chat(conversation, given, out, err)
    if resume:
        take_up(talk, LAST)
    people = keeps = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper) and not people:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # whatever the locale is
    reader: Reader = PipeReader(sys.stdin)
    if people:
        names = [f"/{name}" for name in COMMANDS]
        history = state_directory() / "chat-history"
        reader = TerminalReader(history, names, lambda: status(conversation), not out.no_color)
        talk.say(WELCOME)
    while not talk.ended and (text := reader.read()) is not None:
        try:
            with reader.answering():
                if text.startswith("/"):
                    run_command(talk, text)
                elif text:
                    talk.ask(text)
        except KeyboardInterrupt:
            if not people:
                raise
        except TempoError as error:
            if not people and not text.startswith("/"):
                raise
            talk.say(str(error))
        if keeps and conversation.messages:
            try:
                conversation.save_as(LAST)
            except TempoError as error:
                keeps = False
                talk.say(f"The conversation is not kept for --resume: {error}")
