"""How a run leaves the command line: printed while it grows or at its end, and saved whole."""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tempo_mlx.cli.console import short_collections, write_data, write_text
from tempo_mlx.errors import ConfigError, OutputError
from tempo_mlx.files import explained
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.output_config import OutputConfig

if TYPE_CHECKING:
    from tempo_mlx.api import Stream
    from tempo_mlx.decode.step import Step
    from tempo_mlx.report.run import Run
    from tempo_mlx.report.terminal import Printer
    from tempo_mlx.report.views import Look, View

log = logging.getLogger("tempo_mlx.cli")


class RunPrinter:
    """Prints one run to stdout in the format asked for: `follow` the decoding, then `finish` with the run."""

    def __init__(
        self,
        output: OutputConfig,
        out: Console,
        err: Console,
        decoding: Stream,
        begin: Callable[[], None] = lambda: None,
        explain: bool = True,
    ) -> None:
        """begin: called before anything is printed. explain: say what brackets mean, where any are shown to people."""
        self.output, self.out, self.err, self.decoding, self.begin = output, out, err, decoding, begin
        self.format = format_of(output)
        self.look = look_of(output, out)
        self.prompt = "" if decoding.config.chat else decoding.prompt.text  # a template is not for people
        self.view: View | None = None
        self.explain = explain and out.is_terminal and not output.quiet
        self.explained = False
        self.inline = decoding.task.spec.lattice
        self.streams = self.format == "text" and output.stream
        self.live: Printer | None = None

    def add(self, step: Step) -> None:
        if step.step == 0:
            self.begin()
        if self.streams:
            if step.step == 0:  # not before: a prompt that is refused prints nothing
                self.live = self._make_live() if self.inline else self._make_branches()
            if self.live is not None:
                self.live.add(step)
        elif self.format == "jsonl":
            from tempo_mlx.strict import plain

            write_data(self.out, event("step", plain(step.record(self.decoding.loaded.tokenizer))))

    def _make_live(self) -> Printer:
        from tempo_mlx.decode.settled import removal_window
        from tempo_mlx.report.terminal import make_printer

        decoding, config = self.decoding, self.decoding.config
        self.view = self.look.view_of(decoding.loaded.tokenizer, removal_window(config), config.stop)
        if decoding.task.thinks:
            from tempo_mlx.cli.thinking import ThinkingPrinter
            from tempo_mlx.decode.thinking import Splitter

            splitter = Splitter(decoding.task.opened, decoding.loaded.tokenizer.reasoning)
            return ThinkingPrinter(self.out, self.err, self.view, splitter)
        return make_printer(
            self.out,
            self.err,
            self.view,
            prompt=self.prompt,
            prompt_length=len(self.decoding.prompt.token_ids),
            status=not self.output.quiet,
        )

    def _make_branches(self) -> Printer | None:
        if self.decoding.task.spec.masses:  # whose steps are passes, at many places at once
            return None
        from tempo_mlx.report.terminal import make_branch_printer

        length, status = len(self.decoding.prompt.token_ids), not self.output.quiet
        return make_branch_printer(
            self.out, self.decoding.loaded.tokenizer, prompt_length=length, status=status
        )

    def follow(self) -> None:
        """Add every step of the decoding; the live display ends, whatever happens."""
        try:
            with short_collections():
                for step in self.decoding:
                    log.debug("step %s", step)
                    self.add(step)
        finally:
            if self.live is not None:
                self.live.finish()

    def finish(self, run: Run) -> None:
        """Print what only the finished run can say."""
        if self.format == "json":
            write_data(self.out, run.to_json() + "\n")
        elif self.format == "jsonl":
            write_data(self.out, event("run", run.to_dict()))
        elif self.format == "html":
            from tempo_mlx.report.html import to_html

            write_data(self.out, to_html(run.to_json(), run.phrases))
        else:
            from tempo_mlx.report.styles import LISTED

            if run.steps and self.inline and not self.streams:
                self.live = self._make_live()
                for step in self.decoding.steps:
                    self.live.add(step)
                self.live.finish()
            print_texts(run, self.output, self.look, self.out, self.prompt)
            legend = self.view.legend if self.view is not None else LISTED if len(run.texts) > 1 else ""
            if legend and self.explain:
                self.err.print(legend, style="dim")
                self.explained = True


def event(name: str, data: object) -> str:
    """A line of the format jsonl."""
    return json.dumps({"event": name, "data": data}, ensure_ascii=False, allow_nan=False) + "\n"


def format_of(output: OutputConfig) -> str:
    """The format of stdout; --output-json alone means JSON there, with a file it goes to the file."""
    return "json" if output.output_json and output.json_output_file is None else output.format


def look_of(output: OutputConfig, out: Console) -> Look:
    """How to show a run on `out`; --view decides, or what else is asked to be shown."""
    from tempo_mlx.report.text import make_label
    from tempo_mlx.report.views import Look

    view = output.view
    if view is None:
        people = out.is_terminal and not output.quiet
        view = (
            "sets" if output.show_token_ids else "phrases" if output.show_probabilities or people else "text"
        )
    label = make_label(output.show_token_ids, output.show_probabilities)
    return Look(view, output.show_above, output.show_probabilities, label, removed=out.is_terminal)


def shows_or_saves_a_run(output: OutputConfig) -> bool:
    """Whether more than texts is asked for: what only a whole run has."""
    saved = (output.json_output_file, output.output_dir, output.profile_output)
    shown = output.view is not None or output.show_token_ids or output.profile
    return shown or format_of(output) in ("jsonl", "html") or any(file is not None for file in saved)


def print_texts(run: Run, output: OutputConfig, look: Look, out: Console, prompt: str = "") -> None:
    """The texts of a run that has several, or the paths read off a lattice."""
    from tempo_mlx.report.listing import listing

    if not run.paths:
        return
    if not run.is_lattice and (
        output.view == "text" or (len(run.paths) == 1 and not output.show_probabilities)
    ):
        write_text(out, run.final_text + "\n")
    elif out.is_terminal:
        shown = listing(run.texts, "" if run.is_lattice else prompt, output.show_probabilities)
        out.print(shown)
    else:
        write_text(out, "".join(line + "\n" for line in path_lines(run, output.show_probabilities)))


def path_lines(run: Run, probabilities: bool) -> list[str]:
    """The run's paths or branches, best first, one a line; the lines of a text with breaks are indented."""
    lines = []
    for number, path in enumerate(run.paths, 1):
        mean = path.logprob / max(len(path.token_ids), 1)
        score = f" ({path.logprob:.2f}, {mean:.3f} a token)" if probabilities else ""
        lines.append(f"{number}.{score} {path.text.strip()}".replace("\n", "\n   "))
    return lines


def save(run: Run, output: OutputConfig) -> list[Path]:
    """Write the run wherever it was asked for; returns the files. Raises OutputError."""
    targets = [Path(output.json_output_file)] if output.json_output_file is not None else []
    if output.output_dir is not None:
        name = time.strftime("run-%Y%m%d-%H%M%S-") + secrets.token_hex(2) + ".json"
        targets.append(Path(output.output_dir) / name)
    for target in targets:
        run.save(target)
    return targets


def check_writable(output: OutputConfig, load: LoadConfig) -> None:
    """Raise OutputError now rather than after the run, where a file could not be written; ConfigError where one would
    be lost.
    """
    written = {"--json-output-file": output.json_output_file, "--profile-output": output.profile_output}
    read = {"--prompt-file": output.prompt_file, "--system-file": output.system_file, "--model": load.model}
    check_apart({**written, "--prompt-cache": load.prompt_cache}, read)
    if output.output_dir is not None:
        try:
            Path(output.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"Cannot make the directory {output.output_dir}: {error.strerror}.") from error
        _try_directory(Path(output.output_dir))
    for file in written.values():
        if file is not None:
            check_file(file)


def check_file(file: str | Path) -> None:
    """Raise OutputError where it could not be written."""
    place = Path(file)
    with explained(file):
        if place.is_dir():
            raise OutputError(f"Cannot write {file}: it is a directory; name a file in it.")
        direct = place.exists() and not place.is_file()  # a device or pipe
    if not direct:
        _try_directory(place.parent)


def check_apart(written: Mapping[str, str | Path | None], read: Mapping[str, str | Path | None]) -> None:
    """Raise ConfigError where what is written would take the place of another file that was named."""
    names: dict[str, str] = {}
    for name, file in (*read.items(), *written.items()):
        if file is None:
            continue
        place = os.path.realpath(file)
        if (
            place in names
            and name in written
            and not Path(place).is_char_device()
            and not Path(place).is_fifo()
        ):
            raise ConfigError(f"{names[place]} and {name} are both {file}; write to another file.")
        names[place] = name


def _try_directory(directory: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OutputError(
            f"Cannot write to {directory}: {error.strerror}; choose a directory that exists and is writable."
        ) from error
