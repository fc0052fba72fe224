"""What a command line that cannot be understood may have meant."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping

import typer

# What people know from other programs, and what it is called here.
MEANT: Mapping[str, str] = {
    "version": "tempo-mlx --version",
    "complete": "tempo-mlx generate",
    "completion": "tempo-mlx generate",
    "continue": "tempo-mlx generate",
    "prompt": "tempo-mlx generate",
    "question": "tempo-mlx ask",
    "talk": "tempo-mlx chat",
    "repl": "tempo-mlx chat",
    "server": "tempo-mlx serve",
    "start": "tempo-mlx serve",
    "download": "tempo-mlx models pull",
    "install": "tempo-mlx models pull",
    "delete": "tempo-mlx models remove",
    "info": "tempo-mlx models info",
    "quantize": "tempo-mlx convert",
    "quantise": "tempo-mlx convert",
    "benchmark": "tempo-mlx bench",
    "check": "tempo-mlx doctor or tempo-mlx verify",
    "settings": "tempo-mlx generate --help-all",
    "--max-new-tokens": "--max-tokens",
    "--max-length": "--max-tokens",
    "--num-predict": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--num-beams": "--decoder beam --beam-width",
    "--beams": "--decoder beam --beam-width",
    "--beam": "--decoder beam",
    "--do-sample": "--decoder sample",
    "--sample": "--decoder sample",
    "--num-return-sequences": "--branches",
    "--best": "--branches",
    "--greedy": "--decoder plain --temperature 0",
    "--json": "--format json",
    "--output": "--json-output-file",
    "--out": "--json-output-file",
    "--save": "--json-output-file",
    "-o": "--json-output-file",
    "--file": "--prompt-file",
    "-f": "--prompt-file",
    "-p": "--prompt",
    "--system-message": "--system",
    "--max-width": "--max-parallel-tokens",
    "--width": "--max-parallel-tokens",
    "--stop-sequence": "--stop",
    "--thinking": "--enable-thinking",
    "--think": "--enable-thinking",
    "--reasoning": "--enable-thinking",
    "--no-stream-output": "--no-stream",
    "--silent": "--quiet",
    "--debug": "--debug-mode",
    "--cpu": "--device cpu",
    "--gpu": "--device gpu",
    "--repeat-penalty": "--repetition-penalty",
    "--lora": "--adapter",
    "--adapter-path": "--adapter",
    "--prompt-cache-file": "--prompt-cache",
    "--grammar-file": "--grammar",
    "--schema": "--json-schema",
}
PROMPTED = ("generate", "ask")


def advice(error: typer.TyperException) -> str:
    """The error's sentence, with what may have been meant."""
    message = error.format_message().strip()
    if found := re.match(r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)[.]?$", message, re.DOTALL):
        return _extra(error, found[1])
    if found := re.match(r"No such option: (\S+?)[.?]?(?: |$)", message):
        return _unknown_option(error, found[1])
    if found := re.match(r"No such command (['\"])(.*)\1(?:\.|$)", message, re.DOTALL):
        return _unknown_command(found[2], message)
    return message if message.endswith((".", "?")) else message + "."


def _extra(error: typer.TyperException, words: str) -> str:
    name = _command_name(error)
    if name in PROMPTED:
        return (
            f"Words are left over ({words}); put the whole prompt in quotes: "
            f'tempo-mlx {name} "Once upon a time".'
        )
    return f"tempo-mlx {name} has no use for {words}; leave it out, or put what belongs together in quotes."


def _unknown_option(error: typer.TyperException, option: str) -> str:
    if option in MEANT:
        return f"There is no {option} here; write {MEANT[option]}."
    if option == "-" and _command_name(error) in PROMPTED:
        return f'A prompt that begins with - stands behind --: tempo-mlx {_command_name(error)} -- "- milk".'
    context = getattr(error, "ctx", None)
    known = [name for parameter in context.command.params for name in parameter.opts] if context else []
    near = difflib.get_close_matches(option, known, 1, 0.7)
    whole = "--help-all" if "--help-all" in known else "--help"
    said = (
        f"did you mean {near[0]}?"
        if near
        else f"tempo-mlx {_command_name(error)} {whole} shows what there is."
    )
    return f"There is no {option} here; {said}"


def _unknown_command(word: str, message: str) -> str:
    if word in MEANT:
        return f"There is no command {word}; write {MEANT[word]}."
    if " " in word.strip():
        return (
            f"A prompt needs a command before it: tempo-mlx generate {shlex.quote(word)}, or tempo-mlx ask."
        )
    near = re.search(r"Did you mean (.*)\?", message)
    said = f"did you mean {near[1]}?" if near else "tempo-mlx --help lists them."
    return f"There is no command {word}; {said}"


def _command_name(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    return str(context.info_name) if context else ""
