"""The entry point: parses, runs a command, turns errors into one sentence and an exit code.

Exit codes: 0 success; 1 a failed run; 2 bad usage; 128 + the signal when one ended the run (130: Ctrl-C),
with what had been generated printed and saved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from tempo_mlx._version import __version__
from tempo_mlx.cli import models
from tempo_mlx.cli.advice import advice
from tempo_mlx.cli.ask import ask
from tempo_mlx.cli.batch import batch
from tempo_mlx.cli.bench import bench
from tempo_mlx.cli.calibrate import calibrate
from tempo_mlx.cli.chat import chat
from tempo_mlx.cli.console import (
    discard_stdout,
    fill_closed_streams,
    make_consoles,
    say,
    tolerate_any_encoding,
)
from tempo_mlx.cli.convert import convert
from tempo_mlx.cli.doctor import doctor
from tempo_mlx.cli.generate import generate
from tempo_mlx.cli.help import Command, Group, columns
from tempo_mlx.cli.ollama import in_our_words
from tempo_mlx.cli.score import score
from tempo_mlx.cli.serve import serve
from tempo_mlx.cli.show import show
from tempo_mlx.cli.verify import verify
from tempo_mlx.errors import TempoError
from tempo_mlx.files import reason_of
from tempo_mlx.ranks import processes as ranks

COMPLETE = "_TEMPO_MLX_COMPLETE"  # set by what --install-completion installs
app = typer.Typer(
    name="tempo-mlx",
    cls=Group,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, ask, chat, score, batch, show, verify, convert, calibrate, doctor, bench, serve):
    app.command(cls=Command)(command)
app.add_typer(models.app, name="models")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tempo-mlx {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version)
    ] = False,
) -> None:
    """TEMPO on MLX: keep every probable token at each step, and process them together.

    \b
      tempo-mlx generate "Once upon a time"     continues a text
      tempo-mlx ask "What is a lattice?"        answers a question
      tempo-mlx chat                            talks

    tempo-mlx COMMAND --help says more.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own unless given); returns the exit code.

    Of several ranks started with it, rank 0 runs it and the others follow.
    """
    arguments = in_our_words(sys.argv[1:] if argv is None else argv)
    if fill_closed_streams():
        return _fail(
            "Standard output is closed, so that no result could be written; open it, or send it to a file.", 1
        )
    tolerate_any_encoding()
    try:
        if ranks.rank():
            ranks.follow()
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except TempoError as error:
        if "--debug-mode" in arguments:
            raise
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        return _fail(advice(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("Interrupted.", 130)
    except BrokenPipeError:
        discard_stdout()
        return 0
    except OSError as error:
        if "--debug-mode" in arguments:
            raise
        discard_stdout()
        return _fail(sentence_of(error), 1)


def sentence_of(error: OSError) -> str:
    """What the system refused. Files are named where they are used; what has no name is standard output."""
    if error.filename is None:
        return f"Cannot write to standard output: {reason_of(error)}; what was not saved to a file is lost."
    return f"Cannot use {error.filename}: {reason_of(error)}."


def _run(arguments: list[str]) -> int:
    """Parse and run; the exit code. Typer's own `main` would swallow Ctrl-C and a closed pipe, which we answer."""
    command = typer.main.get_command(app)
    if COMPLETE in os.environ:  # the shell asks what could follow, is answered, and that is all
        command.main(arguments, prog_name="tempo-mlx")
    try:
        with command.make_context("tempo-mlx", arguments, terminal_width=columns()) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _fail(sentence: str, code: int) -> int:
    err = make_consoles()[1]
    say(err, f"Error: {sentence}")
    return code
