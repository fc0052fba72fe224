"""`tempo-mlx score`: exact log-probabilities of continuations."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from tempo_mlx.cli.console import make_consoles, write_data
from tempo_mlx.cli.options import ConfigFile, other_tables, with_settings
from tempo_mlx.cli.prompts import read_prompt
from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import PromptError
from tempo_mlx.files import read_lines
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.report.safe import isolated
from tempo_mlx.settings import settings_of
from tempo_mlx.sources import Given, load_settings

CONTROL = [name for name, setting in settings_of(GenerateConfig).items() if setting.row.group == "Control"]


@with_settings(LoadConfig, GenerateConfig, only=(*settings_of(LoadConfig), *CONTROL))
def score(
    flags: dict[str, object],
    prompt: Annotated[str, typer.Argument(help="What the continuations continue; - reads standard input.")],
    continuations: Annotated[
        list[str] | None, typer.Argument(metavar="CONTINUATION...", help='Texts, such as " Paris".')
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Read more continuations, one a line.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the log-probability of each token.")
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Score continuations of a prompt, all in one pass over the tree they make.

    Prints the log-probability, its mean per token, and the text, in the order given. They are the model's own, unless
    a bias, penalties, a grammar or a truncation is given.
    """
    from tempo_mlx.cli.generate import CONFIGS, load_with_progress
    from tempo_mlx.decode.score import score as score_all

    given = load_settings(config, os.environ, flags, configs=CONFIGS, elsewhere=other_tables)
    load, control = given.make(LoadConfig), None
    named = [
        {name: value for name, value in source.items() if name in CONTROL}
        for source in (given.flags, given.environment, given.file)
    ]
    if any(named):
        control = Given(*named).with_flags(decoder="plain").generation()
    text = read_prompt(prompt, None, None)
    lines = [] if file is None else read_lines(file, "the continuations")
    texts = [*(continuations or []), *lines]
    if not texts or not all(texts):
        raise PromptError(
            'There is an empty continuation, or none; give texts such as " Paris", or a --file.'
        )
    out, err = make_consoles()
    scores = score_all(load_with_progress(load, err, quiet=False), text, texts, control)
    if as_json:
        rows = [
            {"text": s.text, "token_ids": s.token_ids, "log_probs": s.log_probs, "log_prob": s.log_prob}
            for s in scores
        ]
        write_data(out, json.dumps(rows, ensure_ascii=False) + "\n")
        return
    for each in scores:
        text = isolated(each.text) if out.is_terminal else each.text
        out.print(f"{each.log_prob:10.4f} {each.mean_log_prob:10.4f}  {text}", soft_wrap=True)
