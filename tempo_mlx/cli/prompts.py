"""The prompt: an argument, a file, or standard input."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

from tempo_mlx.errors import PromptError


def read_prompt(argument: str | None, option: str | None, file: str | None) -> str:
    """The one prompt given. `-` reads standard input; the line break a file or pipe ends with is dropped.

    Raises PromptError where none, several or an empty one is given, or it is not text.
    """
    given = [text for text in (argument, option, file) if text is not None]
    if len(given) != 1:
        problem = "Several prompts are given" if given else "There is no prompt"
        raise PromptError(f'{problem}; give one: as argument ("Once upon a time", or - for standard input), '
                          "with --prompt, or with --prompt-file.")  # fmt: skip
    if file is not None:
        text = read_text(file)
    elif given[0] == "-":
        text = _decode(sys.stdin.buffer.read(), "standard input")
    else:
        text = given[0]
        _decode(text.encode("utf-8", "surrogateescape"), "the command line")
    if not text.strip():
        raise PromptError("The prompt is empty; write a few words for the model to continue.")
    return text


def read_text(file: str) -> str:
    """The text of a file, without the line break it ends with. Raises PromptError."""
    return _decode(_read(file), file)


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise PromptError(f"Cannot read {file}: {error.strerror or error}.") from error


def _decode(data: bytes, source: str) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise PromptError(f"What {source} holds is not UTF-8 text; convert it first.") from error
