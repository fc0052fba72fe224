"""A conversation with a model: its messages, what the next answer is made with, and how it is kept in a file."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import typer
from rich.console import Console

from tempo_mlx.cli.console import Interrupts, waiting
from tempo_mlx.cli.output import RunPrinter
from tempo_mlx.config import GenerateConfig, OutputConfig
from tempo_mlx.errors import TempoError
from tempo_mlx.files import write_atomic

if TYPE_CHECKING:
    from tempo_mlx.report.run import Run
    from tempo_mlx.sessions.session import Session

FORMAT = "tempo-mlx/conversation"
LAST = "last"  # the name that a conversation in a terminal is kept under by itself


@dataclass
class Conversation:
    """The messages so far, and the session in which each prompt goes on from the last."""

    session: Session
    settings: GenerateConfig
    messages: list[dict[str, str]] = field(default_factory=list)
    last: Run | None = None  # the newest answer
    explained: bool = False  # what brackets mean: once is enough

    def reset(self) -> None:
        self.messages.clear()
        self.last = None

    def undo(self) -> str | None:
        """Forget the last message and its answer; returns the message, if there is one."""
        self.last = None
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def ask(self, text: str, output: OutputConfig, out: Console, err: Console) -> Run:
        """Print the answer while it comes, and remember it; Ctrl-C ends it. Without one the message is forgotten."""
        from tempo_mlx.api import encode_chat

        self.messages.append({"role": "user", "content": text})
        try:
            prompt = encode_chat(self.session.loaded.tokenizer, self.messages, self.settings)
            with Interrupts() as interrupts:
                decoding = self.session.stream(prompt, self.settings, interrupted=interrupts.reason)
                reading = f"Reading {len(prompt.token_ids)} tokens ..."
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
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": run.final_text})
        self.last = run
        return run

    def save(self, name: str) -> Path:
        """Write the conversation; a name alone goes where `load` and --resume look. Raises OutputError."""
        path = place_of(name)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        said = {
            "format": FORMAT,
            "model": self.session.loaded.config.model,
            "system": self.settings.system,
            "messages": self.messages,
        }
        write_atomic(path, json.dumps(said, ensure_ascii=False, indent=2) + "\n")
        return path

    def load(self, name: str) -> str | None:
        """Take up the messages of a file, and return its system message. Raises TempoError."""
        path = place_of(name)
        try:
            said: Any = json.loads(path.read_text("utf-8"))
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in said["messages"]]
            system = said["system"]
            if said["format"] != FORMAT or not isinstance(system, str | None):
                raise ValueError
        except OSError as error:
            raise TempoError(f"Cannot read {path}: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise TempoError(f"{path} holds no conversation, as /save writes them.") from error
        self.messages, self.last = messages, None
        return system


def place_of(name: str) -> Path:
    """Where a conversation of that name lies: a path is one, a word is a file among the user's own."""
    path = Path(name).expanduser()
    if path.suffix or path.name != name:
        return path
    return state_directory() / "conversations" / f"{name}.json"


def state_directory() -> Path:
    """Where what outlasts a session is kept."""
    return platformdirs.user_state_path("tempo-mlx", appauthor=False)


def status(conversation: Conversation) -> str:
    """One line: how fast the last answer came, how much of the context is used, and how wide its sets were."""
    loaded, run = conversation.session.loaded, conversation.last
    parts = [Path(loaded.config.model).name]
    context = loaded.model.architecture.max_position_embeddings
    if run is not None and run.steps:
        width = sum(len(step.tokens) for step in run.steps) / len(run.steps)
        used = run.prompt_length + len(run.steps)
        parts.append(f"{run.timing['tokens_per_second']:.1f} steps/s")
        parts.append(f"{used} of {context} tokens used")
        parts.append(f"{width:.1f} rows a step")
    else:
        parts.append(f"{context} tokens of context")
    return " | ".join(parts)
