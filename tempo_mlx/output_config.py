"""What the command line reads, shows and saves: settings that change no run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tempo_mlx.errors import ConfigError
from tempo_mlx.settings import Checked, row


def _input(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Input", help, **rest)


def _output(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Output", help, **rest)


def _diagnostics(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Diagnostics", help, "study", **rest)


# fmt: off
@dataclass(frozen=True)
class OutputConfig(Checked):
    """What only the command line knows: where the prompt comes from, what is shown and what is saved."""

    prompt: str | None = _input(None, "The prompt, the same as the argument; - reads standard input.")
    prompt_file: str | None = _input(None, "Read the prompt from this file.")
    system_file: str | None = _input(None, "Read the system message from this file.")
    view: Literal["phrases", "text", "sets"] | None = _output(
        None, "What is shown: the best text with other words that were probable, it alone, or all sets in brackets.",
        default_text="phrases on a terminal, text elsewhere",
    )
    show_above: float = _output(0.05, "The least share of an alternative that phrases show.", minimum=0, maximum=1)
    format: Literal["text", "json", "jsonl", "html"] = _output(
        "text", "What is printed; jsonl: one line a step.",
    )
    output_json: bool = _output(
        False, "The same as --format json, unless --json-output-file says where to save it.",
    )
    json_output_file: str | None = _output(None, "Save the run to this file.")
    output_dir: str | None = _output(None, "Save the run to a new file in this directory.")
    show_token_ids: bool = _output(False, "Show token ids beside the tokens; implies --view sets.", audience="study")
    show_probabilities: bool = _output(False, "Show probabilities beside what is probable.")
    color: bool = _output(True, "Use colours on a terminal.")
    stream: bool = _output(True, "Print while decoding.")
    quiet: bool = _output(False, "Print the text only, and no status.")
    verbose: bool = _diagnostics(False, "Say on stderr what is being done.")
    debug_mode: bool = _diagnostics(False, "Like --verbose, for every step, and show tracebacks.")
    profile: bool = _diagnostics(False, "Print how much time each phase took.")
    profile_output: str | None = _diagnostics(None, "Save the time table to this file, as JSON.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.show_token_ids and self.view not in (None, "sets"):
            raise ConfigError(f"show_token_ids has no effect with view {self.view}; choose --view sets, or drop it.")
# fmt: on
