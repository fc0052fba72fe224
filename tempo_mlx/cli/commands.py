"""What can be told a chat besides messages: /help, /set, /undo and so on."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tempo_mlx.cli.conversation import TerminalConversation
from tempo_mlx.cli.generate import generation_of, load_with_progress
from tempo_mlx.cli.output import RunPrinter
from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import ConfigError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.output_config import OutputConfig
from tempo_mlx.report.safe import isolated
from tempo_mlx.resolution import Shortcuts, resolve
from tempo_mlx.settings import settings_of, shown, suggestion
from tempo_mlx.sources import Given

if TYPE_CHECKING:
    from tempo_mlx.report.run import Run

BRANCHES = 3  # of /branches without a number


@dataclass
class Chat:
    """A conversation and all that a command may change of it."""

    conversation: TerminalConversation
    given: Given
    out: Console
    err: Console
    again: int = 0  # how often the last message was answered anew
    others: Sequence[str] = ()  # answers to the last message that were listed
    ended: bool = field(default=False)

    @property
    def output(self) -> OutputConfig:
        return self.given.make(OutputConfig)

    def say(self, text: str) -> None:
        self.err.print(isolated(text), style="dim")

    def change(self, **flags: object) -> None:
        """Give settings; those that cannot be change nothing. Raises ConfigError."""
        given = self.given.with_flags(**flags)
        given.make(OutputConfig)
        self.conversation.settings = generation_of(given)
        self.given = given

    def ask(self, text: str) -> Run:
        self.again, self.others = 0, ()
        return self.conversation.show(text, self.output, self.out, self.err)


Command = Callable[[Chat, str], None]


def run_command(chat: Chat, line: str) -> None:
    """Do what `line`, which begins with a slash, says. Raises TempoError where that is unknown or cannot be."""
    name, _, rest = line[1:].strip().partition(" ")
    name = ALSO.get(name, name)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        said = f"did you mean /{near[0]}?" if near else "/help lists them."
        raise ConfigError(f"There is no command /{name}; {said}")
    COMMANDS[name](chat, rest.strip())


def show_help(chat: Chat, rest: str) -> None:
    """Show this list."""
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"/{name} {HINTS.get(name, '')}".rstrip(), command.__doc__)
    chat.err.print(table, style="dim")
    chat.say(
        'Three quotes (""") begin and end a message of several lines. Ctrl-C stops an answer, Ctrl-D ends the chat.'
    )


def system(chat: Chat, rest: str) -> None:
    """Show or change the system message; none removes it."""
    if rest:
        chat.change(system=None if rest == "none" else rest, system_file=None)
    chat.say(f"System message: {chat.conversation.settings.system or 'none'}")


def model(chat: Chat, rest: str) -> None:
    """Show the model, or go on with another."""
    from tempo_mlx.sessions.session import Session

    if rest:
        load = replace(chat.given.make(LoadConfig), model=rest)
        chat.conversation.session = Session(load_with_progress(load, chat.err, chat.output.quiet))
        chat.given = chat.given.with_flags(model=rest)
    chat.say(f"Model: {chat.conversation.session.loaded.config.model}")


def set_(chat: Chat, rest: str) -> None:
    """Show the settings, or change one: /set temperature 0.7"""
    tables = {**settings_of(GenerateConfig), **settings_of(Shortcuts)}
    tables |= {name: settings_of(OutputConfig)[name] for name in ("view", "show_above", "show_probabilities")}
    name, _, value = rest.partition(" ")
    name = name.lstrip("-").replace("-", "_")
    if not name:
        given = {k: v for k, v in chat.given.flags.items() if k in tables and k != "chat"}
        chat.say(", ".join(f"{k} {v}" for k, v in given.items()) or "Everything is at its default.")
        return
    if name not in tables:
        raise ConfigError(f"{name} is not a setting; {suggestion(name, tables)}")
    if not value:
        now = getattr(chat.conversation.settings, name, chat.given.flags.get(name))
        chat.say(f"{name} is {now}; {tables[name].row.help}")
        return
    chat.change(**{name: tables[name].parse(value.strip(), name)})
    chat.say(f"{name} is {value.strip()}.")


def undo(chat: Chat, rest: str) -> None:
    """Forget your last message and its answer."""
    message, chat.others = chat.conversation.undo(), ()
    chat.say("There is nothing to undo." if message is None else f"Forgotten: {message}")


def again(chat: Chat, rest: str) -> None:
    """Answer your last message anew, with the settings as they are now and another seed."""
    said = [*chat.conversation.messages]
    message = chat.conversation.undo()
    if message is None:
        chat.say("There is nothing to answer yet.")
        return
    count, before = chat.again + 1, chat.conversation.settings
    try:
        chat.conversation.settings = replace(before, seed=before.seed + count)
        chat.ask(message)
    except BaseException:
        chat.conversation.messages = said
        raise
    finally:
        chat.conversation.settings, chat.again = before, count


def save(chat: Chat, rest: str) -> None:
    """Save the conversation under a name or in a file."""
    if not rest:
        raise ConfigError("Say where: /save NAME, or /save FILE.json.")
    chat.say(f"Saved {chat.conversation.save_as(rest)}")


def load(chat: Chat, rest: str) -> None:
    """Go on with a saved conversation."""
    if not rest:
        raise ConfigError("Say which: /load NAME, or /load FILE.json.")
    take_up(chat, rest)


def take_up(chat: Chat, name: str) -> None:
    """Load a conversation, and say how far it got."""
    system = chat.conversation.take_up(name)
    chat.change(system=system, system_file=None)
    chat.others = ()
    questions = sum(message["role"] == "user" for message in chat.conversation.messages)
    said = "1 message and its answer" if questions == 1 else f"{questions} messages and their answers"
    chat.say(f"Going on after {said}.")


def branches(chat: Chat, rest: str) -> None:
    """List other answers to your last message, with their shares; /pick takes one."""
    from tempo_mlx.api import encode_chat
    from tempo_mlx.sessions.conversation import changed

    count = settings_of(GenerateConfig)["branches"].parse(rest or str(BRANCHES), "/branches")
    conversation = chat.conversation
    asked = [m for m in conversation.messages if m["role"] == "user"]
    if not asked:
        chat.say("There is nothing to answer yet.")
        return
    now = conversation.settings
    wanted = replace(resolve({"branches": count}, changed(now)), chat=True)
    messages = conversation.messages[:-1]
    decoding = conversation.session.stream(
        encode_chat(conversation.session.loaded.tokenizer, messages, now), wanted
    )
    printer = RunPrinter(chat.output, chat.out, chat.err, decoding)
    printer.follow()
    run = decoding.run()
    printer.finish(run)
    listed = run.texts if chat.out.is_terminal else run.paths  # as they were numbered
    chat.others = [one.text for one in listed]


def pick(chat: Chat, rest: str) -> None:
    """Go on with one of the answers that /branches listed: /pick 2"""
    if not chat.others:
        chat.say("There is nothing to pick from; /branches lists other answers.")
        return
    if not rest.isdecimal() or not 1 <= int(rest) <= len(chat.others):
        raise ConfigError(f"/pick is {shown(rest)}; choose a whole number from 1 to {len(chat.others)}.")
    chat.conversation.choose(chat.others[int(rest) - 1])
    chat.say(f"Your last message is answered by number {int(rest)} now.")


def why(chat: Chat, rest: str) -> None:
    """Show where your last answer could have been another, and how probable that was."""
    from tempo_mlx.report.phrases import phrases_in

    run = chat.conversation.last
    if run is None or not run.is_lattice:
        chat.say("There is no answer to look at.")
        return
    table = Table("said", "share", "instead", "share", box=None, pad_edge=False)
    for phrase in phrases_in(run.steps, run.final_text, chat.output.show_above):
        for number, other in enumerate(phrase.alternatives):
            first = (isolated(phrase.text), f"{phrase.share or 0:.0%}") if not number else ("", "")
            table.add_row(*first, isolated(other.text), f"{other.share:.0%}")
    chat.err.print(table if table.row_count else "Nothing else was probable.")


def reset(chat: Chat, rest: str) -> None:
    """Forget the conversation."""
    chat.conversation.reset()
    chat.others = ()


def exit_(chat: Chat, rest: str) -> None:
    """End the chat."""
    chat.ended = True


COMMANDS: Mapping[str, Command] = {
    "help": show_help, "system": system, "model": model, "set": set_, "undo": undo, "again": again, "save": save,
    "load": load, "branches": branches, "pick": pick, "why": why, "reset": reset, "exit": exit_,
}  # fmt: skip
HINTS = {
    "system": "[TEXT]",
    "model": "[NAME]",
    "set": "[NAME VALUE]",
    "save": "NAME",
    "load": "NAME",
    "branches": "[N]",
    "pick": "N",
}
ALSO = {"bye": "exit", "quit": "exit", "q": "exit", "clear": "reset", "new": "reset", "?": "help", "retry": "again",
        "regen": "again"}  # fmt: skip
