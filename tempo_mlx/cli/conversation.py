"""A conversation in a terminal: how its answers are shown, and where it is kept."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import typer
from rich.console import Console

from tempo_mlx.cli.console import Interrupts, waiting
from tempo_mlx.cli.output import RunPrinter
from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import PromptError
from tempo_mlx.files import at_home, explained, path_of
from tempo_mlx.output_config import OutputConfig
from tempo_mlx.sessions.conversation import Conversation, read_conversation

if TYPE_CHECKING:
    from tempo_mlx.report.run import Run
    from tempo_mlx.sessions.session import Session

LAST = "last"  # the name that a conversation in a terminal is kept under by itself


class TerminalConversation(Conversation):
    """One whose answers are shown while they grow. last: the newest answer."""

    def __init__(self, session: Session, settings: GenerateConfig) -> None:
        super().__init__(session, settings)
        self.last: Run | None = None
        self.explained = False  # what brackets mean: once is enough

    def reset(self) -> None:
        super().reset()
        self.last = None

    def undo(self) -> str | None:
        self.last = None
        return super().undo()

    def choose(self, text: str) -> None:
        """Have the last message answered by this instead."""
        self.messages[-1], self.last = {**self.messages[-1], "content": text}, None

    def show(self, text: str, output: OutputConfig, out: Console, err: Console) -> Run:
        """Print the answer while it comes, and keep it; Ctrl-C ends it. Without one the message is forgotten."""
        with Interrupts() as interrupts:
            decoding = self.stream(text, interrupted=interrupts.reason)
            reading = f"Reading {len(decoding.prompt.token_ids)} tokens ..."
            with waiting(err, reading, output.quiet) as ended:
                printer = RunPrinter(output, out, err, decoding, ended, not self.explained)
                printer.follow()
            run = decoding.run()
            printer.finish(run)
            self.explained = self.explained or printer.explained
            if decoding.failure is not None:
                raise decoding.failure
        if interrupts.signal == signal.SIGTERM:
            raise typer.Exit(interrupts.exit_code)
        self.last = self.keep(run)
        return run

    def save_as(self, name: str) -> Path:
        """Write the conversation; a name alone goes where `take_up` and --resume look. Raises OutputError."""
        path = place_of(name)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.save(path)
        return path

    def take_up(self, name: str) -> str | None:
        """Go on with the messages of a file, and return its system message. Raises PromptError, ConfigError."""
        messages, settings = read_conversation(place_of(name))
        self.messages, self.last = [dict(message) for message in messages], None
        return settings.system


def place_of(name: str) -> Path:
    """Where a conversation of that name lies: a path is one, a word is a file among the user's own."""
    path = path_of(at_home(name), PromptError)
    if path.suffix or path.name != name:
        return path
    return state_directory() / "conversations" / f"{name}.json"


def state_directory() -> Path:
    """Where what outlasts a session is kept."""
    return platformdirs.user_state_path("tempo-mlx", appauthor=False)


def status(conversation: TerminalConversation) -> str:
    """One line: how fast the last answer came, how much of the context is used, and how wide its sets were.

    The model's name, which may be long, comes last: there a narrow terminal cuts.
    """
    loaded, run = conversation.session.loaded, conversation.last
    parts = []
    context = loaded.model.architecture.max_position_embeddings
    if run is not None and run.steps:
        width = sum(len(step.tokens) for step in run.steps) / len(run.steps)
        used = run.prompt_length + len(run.steps)
        if len(run.steps) > 1:
            parts.append(f"{run.timing['tokens_per_second']:.1f} steps/s")
        parts.append(f"{used} of {context} tokens used")
        parts.append(f"{width:.1f} tokens at once")
    else:
        parts.append(f"{context} tokens of context")
    return " | ".join([*parts, Path(loaded.config.model).name])
