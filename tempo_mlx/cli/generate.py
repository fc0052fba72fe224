"""`tempo-mlx generate`: continue a prompt."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tempo_mlx.cli.console import (
    Interrupts,
    log_to_stderr,
    make_consoles,
    notice_slow_blas,
    progress_bar,
    say_figures,
    waiting,
)
from tempo_mlx.cli.options import EVERYDAY, ConfigFile, other_tables, with_settings
from tempo_mlx.cli.output import RunPrinter, check_file, check_writable, format_of, save, shows_or_saves_a_run
from tempo_mlx.cli.prompts import read_prompt, read_text
from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import ConfigError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.output_config import OutputConfig
from tempo_mlx.report.safe import isolated
from tempo_mlx.resolution import Shortcuts
from tempo_mlx.sources import Given, load_settings

if TYPE_CHECKING:
    from tempo_mlx.api import Stream
    from tempo_mlx.loading import LoadedModel
    from tempo_mlx.report.run import Run

CONFIGS = (LoadConfig, GenerateConfig, Shortcuts, OutputConfig)
log = logging.getLogger("tempo_mlx.cli")


@with_settings(*CONFIGS, original=True, everyday=EVERYDAY)
def generate(
    flags: dict[str, object],
    text: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; - reads standard input.")
    ] = None,
    config: ConfigFile = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Show full decoding beside early exit, lossy and lossless.",
            rich_help_panel="Early exit",
            hidden=True,
        ),
    ] = False,
) -> None:
    """Continue a text, and show where other words were probable.

    On a terminal [best/other] marks such words; a pipe or a file gets the best text alone. The text goes to stdout,
    all else to stderr. Every option can also be set in a file given with --config and in the environment or a .env
    file, as TEMPO_ and its name in capitals.

    \b
    Examples:
      tempo-mlx generate "Once upon a time"
      tempo-mlx generate "Once upon a time" --branches 5
      tempo-mlx generate - < prompt.txt > text.txt
      tempo-mlx ask "What is a lattice?"     (applies the model's chat template)
    """
    given = load_settings(config, os.environ, flags, elsewhere=other_tables)
    continue_prompt(given, text, compare)


def continue_prompt(given: Given, text: str | None, compare: bool = False) -> None:
    """Load the model, decode, print, save and report; ends the command with its exit code."""
    from tempo_mlx.weights.memory import SLOTS

    output, load, settings = given.make(OutputConfig), given.make(LoadConfig), generation_of(given)
    prompt = read_prompt(text, output.prompt, output.prompt_file)
    if compare and not settings.early_exit:
        raise ConfigError("--compare shows what early exit changes; add --early-exit, or leave it out.")
    asked = replace(given, environment={}).make(OutputConfig)
    if compare and (shows_or_saves_a_run(asked) or format_of(asked) != "text"):
        raise ConfigError(
            "--compare shows several decodings, and has no run to show otherwise or to save; leave that out, or "
            "--compare."
        )
    check_writable(output, load)
    out, err = make_consoles(output.color)
    log_to_stderr(output.verbose, output.debug_mode)
    started = time.perf_counter()
    loaded = load_with_progress(load, err, output.quiet, settings.max_cache_tokens or SLOTS)
    seconds = {"load_seconds": time.perf_counter() - started}
    log.info("model %s", json.dumps(dict(loaded.model.info), default=str))
    log.info("settings %s", settings)
    if compare:
        side_by_side(loaded, prompt, settings, out)
        return
    run, code = decode(loaded, prompt, settings, output, out, err)
    seconds |= {name: value for name, value in run.timing.items() if name.endswith("_seconds")}
    seconds["total_seconds"] = time.perf_counter() - started
    report(run, seconds, output, err)
    if not output.quiet and (note := chat_hint(run, loaded)):
        err.print(note, style="dim")
    raise typer.Exit(code)


def generation_of(given: Given) -> GenerateConfig:
    """The generation settings in force, the system message from its file among them."""
    return with_system(given).generation()


def with_system(given: Given) -> Given:
    """With a file's text as the system message of the source that names the file, unless a stronger one has another."""
    for name in ("flags", "environment", "file"):
        source = getattr(given, name)
        file = source.get("system_file")
        if file is None and "system" in source:
            break
        if file is not None:
            if source.get("system") is not None:
                raise ConfigError(f"A system message is given besides the one in {file}; keep one of them.")
            return replace(given, **{name: {**source, "system": read_text(file)}})
    return given


def chat_hint(run: Run, loaded: LoadedModel) -> str | None:
    """What to do where a model that was made for talking ended at once, or wrote its template's own words."""
    tokenizer = loaded.tokenizer
    if (
        run.config["chat"]
        or not tokenizer.has_chat_template
        or run.finish_reason != "stop"
        or run.config["stop"]
    ):
        return None
    template = re.match(r"\s*<\|", run.final_text)
    if run.final_text.strip() and not template:
        return None
    return (
        "The model had nothing to add: it was made to answer, not to continue. "
        'Ask it with: tempo-mlx ask "...", or add --chat.'
    )


def load_with_progress(load: LoadConfig, err: Console, quiet: bool, slots: int | None = None) -> LoadedModel:
    """Load the model, with a bar while it is fetched and a notice of a slow BLAS. slots: see `load_model`."""
    from tempo_mlx.loading import load_model

    if load.backend == "mlx" and not quiet:
        notice_slow_blas(err)
    with (
        waiting(err, f"Loading {load.model} ...", quiet) as loading,
        progress_bar(err, f"Fetching {load.model}", quiet, before=loading) as progress,
    ):
        loaded = load_model(load, progress, slots=slots)
    # What is there now stays: a collection amid the text, which would go through all of it, is a pause one sees.
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    return loaded


def decode(
    loaded: LoadedModel,
    prompt: str,
    settings: GenerateConfig,
    output: OutputConfig,
    out: Console,
    err: Console,
) -> tuple[Run, int]:
    """Decode, print and save. What was generated is kept whatever ends it: Ctrl-C, a closed pipe, a limit.

    Returns the run and the exit code: 0, or 128 + the signal that ended it.
    """
    from tempo_mlx.api import stream

    with Interrupts() as interrupts:
        decoding = stream(loaded, prompt, settings, interrupted=interrupts.reason)
        keep = cache_to_keep(decoding)
        reading = f"Reading the prompt ({len(decoding.prompt.token_ids)} tokens) ..."
        closed = None
        with waiting(err, reading, output.quiet) as ended:
            printer = RunPrinter(output, out, err, decoding, begin=ended)
            try:
                printer.follow()
            except OSError as error:  # nobody reads on, or the disk is full
                closed = error
                decoding.cancel()
        run = decoding.run()
        if closed is None:
            try:
                printer.finish(run)
            except OSError as error:  # nobody reads on, or the disk is full
                closed = error
        for file in save(run, output):
            if not output.quiet:
                err.print(f"Saved {file}", soft_wrap=True)
        save_cache(decoding, keep, output, err)
        if closed is not None:
            raise closed
        if decoding.failure is not None:
            raise decoding.failure
        return run, interrupts.exit_code


def cache_to_keep(decoding: Stream) -> str | None:
    """The file that the prompt's cache is for where there is none yet; the decoding gets a cache that can be kept."""
    loaded = decoding.loaded
    if loaded.config.prompt_cache is None or loaded.prompt_cache is not None:
        return None
    check_file(loaded.config.prompt_cache)
    decoding.cache = loaded.model.new_cache()
    return loaded.config.prompt_cache


def save_cache(decoding: Stream, file: str | None, output: OutputConfig, err: Console) -> None:
    """Write what was run of the prompt; nothing where that was ended before its first part."""
    from tempo_mlx.prompt_cache import PromptCache

    if file is None or decoding.cache is None or not len(decoding.cache):
        return
    PromptCache(decoding.prompt.token_ids, decoding.cache).save(file, decoding.loaded.model)
    if not output.quiet:
        err.print(f"Saved the prompt's cache in {file}", soft_wrap=True)


def side_by_side(loaded: LoadedModel, prompt: str, settings: GenerateConfig, out: Console) -> None:
    """Decode in full, and with early exit, lossy and lossless, and show texts and figures."""
    from tempo_mlx.bench.exits import HEADINGS, arms_of, cells, decode_all
    from tempo_mlx.bench.exits import compare as hold_together
    from tempo_mlx.bench.results import text_table

    found = hold_together(loaded, decode_all(loaded, prompt, arms_of(settings), rounds=2))
    for item in found:
        out.print(f"{item.name}: {isolated(item.text)}", soft_wrap=True)
    out.print(text_table(HEADINGS, [cells(item) for item in found]), soft_wrap=True)


def report(run: Run, seconds: dict[str, Any], output: OutputConfig, err: Console) -> None:
    """The reasoning, the summary line and the time table: all that is not the text."""
    from tempo_mlx.bench.child import peak_bytes
    from tempo_mlx.files import write_atomic
    from tempo_mlx.report.summary import summary

    streamed = output.stream and run.is_lattice
    if run.reasoning and not streamed:
        err.print(isolated(run.reasoning), style="dim", soft_wrap=True)
    if not output.quiet:
        say_figures(err, summary(run, peak_bytes()))
    if output.profile:
        for name, value in seconds.items():
            err.print(f"{name.removesuffix('_seconds'):>12} {value:10.3f} s")
    if output.profile_output is not None:
        write_atomic(output.profile_output, json.dumps(seconds, indent=2) + "\n")
