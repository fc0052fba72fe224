"""`tempo-mlx ask`: a question, its answers, and how probable each is."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tempo_mlx.cli.console import Interrupts, log_to_stderr, make_consoles, waiting, write_data, write_text
from tempo_mlx.cli.generate import (
    CONFIGS,
    cache_to_keep,
    continue_prompt,
    generation_of,
    load_with_progress,
    report,
    save_cache,
)
from tempo_mlx.cli.options import EVERYDAY, ConfigFile, other_tables, settings_but, with_settings
from tempo_mlx.cli.output import check_writable, format_of, save, shows_or_saves_a_run
from tempo_mlx.cli.prompts import read_prompt
from tempo_mlx.config import GenerateConfig, unused
from tempo_mlx.errors import ConfigError, TempoError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.output_config import OutputConfig
from tempo_mlx.resolution import ANSWER_TOKENS, ASKED, VERIFIED
from tempo_mlx.settings import settings_of
from tempo_mlx.sources import Given, load_settings

if TYPE_CHECKING:
    from tempo_mlx.asking import Asking
    from tempo_mlx.report.answers import Answers
    from tempo_mlx.report.run import Run

SEARCHING = "Looking for other answers; Ctrl-C ends with these."
BY_TEXT = {"answer_regex": None, "by": "text"}


def _option(flag: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(flag, metavar=metavar, rich_help_panel="Answers", help=help)


AnswerRegex = Annotated[
    str | None,
    _option(
        "--answer-regex", "Texts in which this finds the same (its first group) are one answer.", "REGEX"
    ),
]
AnswerNumber = Annotated[bool, _option("--answer-number", "Texts with the same last number are one answer.")]
Vote = Annotated[
    str | None,
    _option(
        "--vote",
        "Choose one text. majority: of the answer that most give; mass: of the most probable answer; mean: of the best "
        "mean log-probability a token; window: whose least sure stretch is the surest.",
        "majority|mass|mean|window",
    ),
]
VerifyWith = Annotated[
    str | None,
    _option(
        "--verify-with",
        "Choose the first text that this command, which gets it on standard input, ends with 0 for. It runs without "
        "network, for at most 10 seconds.",
        "COMMAND",
    ),
]


@with_settings(
    *CONFIGS,
    only=settings_but(*CONFIGS, leave=("chat",)),
    everyday=(*EVERYDAY, "choices", "leaves"),
    defaults={
        "max_tokens": str(ANSWER_TOKENS),
        "decoder": f"{ASKED['decoder']}; {VERIFIED['decoder']} with --verify-with",
        "leaves": str(ASKED["leaves"]),
        "coverage": str(ASKED["coverage"]),
        "threshold": f"{ASKED['threshold']}; {GenerateConfig.threshold} under other decoders",
        "beam_width": f"{GenerateConfig.beam_width}; {VERIFIED['beam_width']} with --verify-with",
    },
)
def ask(
    flags: dict[str, object],
    text: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="The question; - reads standard input.")
    ] = None,
    config: ConfigFile = None,
    answer_regex: AnswerRegex = None,
    answer_number: AnswerNumber = False,
    vote: Vote = None,
    verify_with: VerifyWith = None,
) -> None:
    """Ask a model a question, and show its answers with their probabilities.

    Distinct texts are found, the most probable first, each with its exact probability; texts that say the same are one
    answer; the rest was not looked at. --choices scores given answers exactly. The model's chat template is applied,
    and never shown. Settings of another decoder, such as --branches 5 or --view phrases, show what that decoder makes.
    --vote and --verify-with choose among the texts of any decoder that gives some; --verify-with, where no decoder is
    asked for, among diverse beams.

    \b
    Examples:
      tempo-mlx ask "What is the capital of Australia?"
      tempo-mlx ask "Is 91 a prime number?" --choices yes,no
      tempo-mlx ask "What is 7 times 8?" --answer-number --leaves 16 --coverage 0.95
      tempo-mlx ask "Write a haiku." --view phrases
    """  # fmt: skip
    given = answering(load_settings(config, os.environ, {"chat": True, **flags}, elsewhere=other_tables))
    by = {"answer_regex": answer_regex, "by": "number" if answer_number else "text"}
    chooser = chooser_of(vote, verify_with, by)
    defaults = defaults_of(given, verify_with is not None)
    choices = given.flags.get("choices")
    if isinstance(choices, list | tuple) and choices:
        given = replace(given, flags={name: given.flags[name] for name in given.flags if name != "choices"})
        check_alone(given, by, chooser)
        show_choices(given, text, [str(choice) for choice in choices])
    elif chooser is None and by == BY_TEXT and defaults is None:
        continue_prompt(given, text)
    elif shows_a_run(given):
        raise ConfigError(
            "--view, --show-token-ids and the formats jsonl and html show a whole run, not its answers; leave out "
            "that, or the choice of a text."
        )
    else:
        show_answers(given, text, by, chooser, defaults or {})


def answering(given: Given) -> Given:
    """With room for an answer, where the length is not given."""
    if any("max_tokens" in source for source in (given.flags, given.environment, given.file)):
        return given
    return given.with_flags(max_tokens=ANSWER_TOKENS)


def defaults_of(given: Given, verified: bool) -> Mapping[str, Any] | None:
    """What finds the texts, unless it is given. None: what is given is for another decoder, or shows a whole run."""
    if shows_a_run(given):
        return None
    choices = (VERIFIED, ASKED) if verified else (ASKED,)
    return next((defaults for defaults in choices if uses(defaults["decoder"], given)), None)


def shows_a_run(given: Given) -> bool:
    """Whether something was given that shows more of a run than answers."""
    output = given.make(OutputConfig)
    return output.view is not None or output.show_token_ids or format_of(output) in ("jsonl", "html")


def uses(decoder: str, given: Given) -> bool:
    """Whether nothing was given that another decoder is for."""
    names = settings_of(GenerateConfig)
    values = {
        name: value for source in (given.file, given.flags) for name, value in source.items() if name in names
    }
    asked = {"decoder": decoder, **values}
    if not any(unused(name, asked) for name in values if values[name] != names[name].default):
        return asked["decoder"] == decoder
    return generation_of(given).decoder == decoder


Chooser = Callable[["Run"], int | None]  # the text that is chosen, by its place; None: none is good enough


def chooser_of(vote: str | None, verify_with: str | None, by: dict[str, Any]) -> Chooser | None:
    """Raises ConfigError."""
    if vote is None and verify_with is None:
        return None
    if vote is not None and verify_with is not None:
        raise ConfigError("--vote and --verify-with both choose a text; leave one of them out.")
    from tempo_mlx import voting
    from tempo_mlx.asking import way_of

    if verify_with is not None:
        test = voting.program(verify_with)
        return lambda run: voting.verified(run, test)
    way = voting.vote_of(vote or "")
    return lambda run: voting.choose(run, way, way_of(**by))


def show_chosen(run: Run, chooser: Chooser, out: Console) -> None:
    """The text alone. Raises ConfigError where none passes."""
    at = chooser(run)
    if at is None:
        from tempo_mlx.decode.registry import DECODERS

        count, texts = len(run.paths), settings_of(GenerateConfig)[DECODERS[run.decoder].texts or "leaves"]
        asked = run.config[texts.name]
        more = f"more, as with {texts.flag} {2 * asked}"
        others = "others, as with --decoder diverse-beam"
        raise TempoError(f"None of the {count} texts passes; ask for {more if count >= asked else others}.")
    write_text(out, run.paths[at].text.strip() + "\n")


def show_answers(
    given: Given,
    text: str | None,
    by: dict[str, Any],
    chooser: Chooser | None,
    defaults: Mapping[str, Any],
) -> None:
    """Load the model, ask, print the answers, save and report; ends the command with its exit code."""
    from tempo_mlx.asking import begin

    output, question = given.make(OutputConfig), read(given, text)
    if chooser is not None and format_of(output) == "json":
        raise ConfigError(
            "--vote and --verify-with print the text they choose; leave out --format json, or save the run with "
            "--json-output-file."
        )
    settings = generation_of(given.with_flags(**open_to(given, defaults)))
    check_writable(output, given.make(LoadConfig))
    loaded, out, err, started = start(given, output)
    brief = chooser is None and by == BY_TEXT and format_of(output) != "json" and not limited(given)
    with Interrupts() as interrupts:
        asking = begin(loaded, question, config=settings, interrupted=interrupts.reason, brief=brief, **by)
        keep = cache_to_keep(asking.decoding)
        follow(asking, out if out.is_terminal and format_of(output) == "text" else err, output.quiet)
        answers: Answers = asking.answers()
    run = answers.run
    assert run is not None
    failure = asking.decoding.failure
    try:
        if failure is not None and not run.paths:
            raise failure
        if brief and answers.open_ended:
            show_open_ended(answers, out, output.quiet)
        elif chooser is None:
            print_answers(answers, output, out, texts=by == BY_TEXT)
        else:
            show_chosen(run, chooser, out)
    finally:  # also where no text passes
        for file in save(run, output):
            if not output.quiet:
                err.print(f"Saved {file}", soft_wrap=True)
        save_cache(asking.decoding, keep, output, err)
    if failure is not None:
        raise failure
    report(run, {"total_seconds": time.perf_counter() - started}, output, err)
    raise typer.Exit(interrupts.exit_code)


def limited(given: Given) -> bool:
    """Whether it was said how much to look at."""
    sources = (given.flags, given.environment, given.file)
    return any(
        name in source for source in sources for name in ("leaves", "coverage", "max_passes", "timeout")
    )


def show_open_ended(answers: Answers, out: Console, quiet: bool) -> None:
    """The text that the model would say, and why no others."""
    from tempo_mlx.report.styles import MARK_STYLE

    said = answers.texts[0]
    write_text(out, said.text.strip() + "\n")
    if out.is_terminal and not quiet:
        out.print(
            f"\nOne of very many texts (its probability is {power(said.log_mass)}), so others are not "
            "listed. To see some: --leaves 8; to go by what they come to: --answer-number, --answer-regex, --choices.",
            style=MARK_STYLE,
        )


def power(log: float) -> str:
    """A probability by its logarithm, which of a long text is too small for a float."""
    return f"{math.exp(log):.1g}" if log > -700.0 else f"1e{log / math.log(10.0):.0f}"


def open_to(given: Given, defaults: Mapping[str, Any]) -> dict[str, object]:
    """Their decoder, and those of the others that nobody gave."""
    sources = (given.flags, given.environment, given.file)
    values = {**defaults, **given.flags}
    return {
        name: value
        for name, value in defaults.items()
        if name == "decoder"
        or (not any(name in source for source in sources) and unused(name, values) is None)
    }


def check_alone(given: Given, by: dict[str, Any], chooser: Chooser | None) -> None:
    """Raises ConfigError for what has no effect where given answers are scored: there are no texts, and no run."""
    from tempo_mlx.asking import check_choices

    if chooser is not None or by != BY_TEXT:
        raise ConfigError(
            "--choices are the answers themselves; leave out --answer-regex, --answer-number, --vote and "
            "--verify-with."
        )
    asked = replace(given, environment={})  # which sets defaults, and asks for nothing
    check_choices("text", None, asked.generation(), {**asked.flags, **asked.file})
    if shows_or_saves_a_run(asked.make(OutputConfig)):
        raise ConfigError(
            "--choices are scored without a run to show or save; leave that out, or print the answers with --format "
            "json."
        )


def show_choices(given: Given, text: str | None, choices: list[str]) -> None:
    from tempo_mlx.asking import score_choices

    output, question, settings = given.make(OutputConfig), read(given, text), generation_of(given)
    loaded, out, _, _ = start(given, output)
    print_answers(score_choices(loaded, question, choices, settings), output, out)


def read(given: Given, text: str | None) -> str:
    output = given.make(OutputConfig)
    return read_prompt(text, output.prompt, output.prompt_file)


def start(given: Given, output: OutputConfig) -> tuple[Any, Console, Console, float]:
    """The model, stdout and stderr, and when it began."""
    out, err = make_consoles(output.color)
    log_to_stderr(output.verbose, output.debug_mode)
    started = time.perf_counter()
    return load_with_progress(given.make(LoadConfig), err, output.quiet), out, err, started


def follow(asking: Asking, console: Console, quiet: bool) -> None:
    """Ask to the end; a terminal shows the answers so far."""
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        for _ in asking:
            pass
        return
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from tempo_mlx.report.bars import bars
    from tempo_mlx.report.styles import MARK_STYLE

    def shown(answers: Answers) -> Group:
        return Group(bars(answers, console.width), Text(SEARCHING, MARK_STYLE))

    with waiting(console, "Reading the question ...") as ended:
        first = next(asking, None)
        ended()
    if first is not None:
        with Live(shown(first), console=console, auto_refresh=False, transient=True) as live:
            for answers in asking:
                live.update(shown(answers), refresh=True)


def print_answers(answers: Answers, output: OutputConfig, out: Console, texts: bool = True) -> None:
    """Bars on a terminal, the best answer alone elsewhere, or JSON. texts: those instead, where there are too many for
    bars.
    """
    from tempo_mlx.report.bars import bars
    from tempo_mlx.report.listing import listing

    people, texts = out.is_terminal and not output.quiet, texts and answers.open_ended
    if format_of(output) == "json":
        write_data(out, json.dumps(answers.to_dict(), ensure_ascii=False, allow_nan=False) + "\n")
    elif texts and not people:
        write_text(out, answers.texts[0].text.strip() + "\n")
    elif people:
        out.print(listing(answers.texts) if texts else bars(answers, out.width))
    elif answers.best is not None:
        write_text(out, answers.best.text + "\n")
