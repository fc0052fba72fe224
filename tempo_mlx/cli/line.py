"""Where a chat's messages come from: a terminal with line editing and history, or a pipe, a line each.

A message of several lines stands between three quotes, is pasted, or is written with Alt-Enter.
"""

from __future__ import annotations

import os
import select
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from tempo_mlx.errors import PromptError
from tempo_mlx.strict import is_unicode

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings

QUOTES = '"""'
END = "\x04"  # Ctrl-D


class Reader(Protocol):
    """Gives one message after the other."""

    def read(self) -> str | None:
        """The next message, without the blanks around it; None at the end."""
        ...

    def answering(self) -> AbstractContextManager[None]:
        """While an answer is printed."""
        ...


class PipeReader:
    """A message a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def read(self) -> str | None:
        text = self._file.readline()
        if not text:
            return None
        while is_open(text) and (line := self._file.readline()):
            text += line
        if not is_unicode(text):
            raise PromptError("What standard input holds is not UTF-8 text; convert it first.")
        return message_of(text)

    def answering(self) -> AbstractContextManager[None]:
        return nullcontext()


def is_open(text: str) -> bool:
    """Whether a message began with three quotes that have not been closed."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def message_of(text: str) -> str:
    """The message without its quotes."""
    text = text.strip()
    return text.removeprefix(QUOTES).removesuffix(QUOTES).strip() if text.startswith(QUOTES) else text


class TerminalReader:
    """Line editing, history across sessions, and what was typed while an answer came."""

    def __init__(
        self, history: Path, commands: Sequence[str], toolbar: Callable[[], str], color: bool = True
    ) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.output import ColorDepth

        try:
            history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            history.open("ab").close()
            remembered: FileHistory | InMemoryHistory = FileHistory(str(history))
        except OSError:  # no place of one's own, or a full one
            remembered = InMemoryHistory()
        self._waiting: list[str] = []  # messages typed while an answer came
        self._begun = ""  # and one not ended
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            history=remembered,
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            key_bindings=_keys(),
            bottom_toolbar=toolbar,
            color_depth=None if color else ColorDepth.DEPTH_1_BIT,
        )

    def read(self) -> str | None:
        if self._waiting:
            message = self._waiting.pop(0)
            sys.stdout.write(f"> {message}\n")
            if self._session.history.get_strings()[-1:] != [message]:  # as those typed at the prompt
                self._session.history.append_string(message)
            return message
        begun, self._begun = self._begun, ""
        if begun == END:
            return None
        while True:
            try:
                return message_of(self._session.prompt(default=begun))
            except KeyboardInterrupt:  # by a signal, not by the key
                begun = ""
            except EOFError:
                return None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While an answer is printed: what is typed does not show, and is kept for afterwards. Ctrl-C stays Ctrl-C.

        So is what was typed ahead of it, which the line before has read already; it comes first.
        """
        from prompt_toolkit.input.typeahead import get_typeahead

        self._begun += "".join(press.data for press in get_typeahead(self._session.input))
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
        quiet = list(before)
        quiet[0] &= ~termios.ICRNL
        quiet[3] = (quiet[3] & ~(termios.ECHO | termios.ICANON)) | termios.NOFLSH
        termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
        try:
            yield
        finally:
            typed = b""
            while select.select([descriptor], [], [], 0)[0] and (more := os.read(descriptor, 4096)):
                typed += more
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
            lines = typed_lines(self._begun + typed.decode("utf-8", "ignore"))
            self._waiting += [line for line in lines[:-1] if line.strip()]
            self._begun = lines[-1]


def typed_lines(keys: str) -> list[str]:
    """What keys that nobody watched come to: whole lines, and last the one begun; END alone if that ends the chat."""
    lines = [""]
    for key in keys:
        if key == END and not lines[-1]:
            return [*lines[:-1], END]
        if key in "\r\n":
            lines.append("")
        elif key in "\b\x7f":
            lines[-1] = lines[-1][:-1]
        elif key == "\x1b":
            break  # keys that move about: what follows cannot be known
        elif key.isprintable():
            lines[-1] += key
    return lines


def _keys() -> KeyBindings:
    """Enter sends, unless three quotes are open; Alt-Enter begins a new line; Ctrl-C clears, as in shells."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        if is_open(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def clear(event: KeyPressEvent) -> None:  # were the line left for it, the key that follows could be lost
        event.current_buffer.reset()

    return keys
