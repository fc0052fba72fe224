"""`tempo-mlx ask`: a question, answered."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from tempo_mlx.cli.generate import CONFIGS, continue_prompt
from tempo_mlx.cli.options import EVERYDAY, ConfigFile, other_tables, settings_but, with_settings
from tempo_mlx.sources import Given, load_settings

ANSWER_TOKENS = 512  # unless max_tokens is given


@with_settings(*CONFIGS, only=settings_but(*CONFIGS, leave=("chat",)), everyday=EVERYDAY)
def ask(
    flags: dict[str, object],
    text: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="The question; - reads standard input.")
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Ask a model a question, and show where its answer could have been another.

    The model's chat template is applied, and never shown. Answers end after 512 steps unless --max-tokens says
    otherwise.

    \b
    Examples:
      tempo-mlx ask "What is a lattice?"
      tempo-mlx ask "Name a colour." --branches 5
      tempo-mlx ask "Write a haiku." -s "You are a sailor." -t 0.7
    """
    continue_prompt(
        answering(load_settings(config, os.environ, {"chat": True, **flags}, elsewhere=other_tables)), text
    )


def answering(given: Given) -> Given:
    """With room for an answer, where the length is not given."""
    if any("max_tokens" in source for source in (given.flags, given.environment, given.file)):
        return given
    return given.with_flags(max_tokens=ANSWER_TOKENS)
