"""Many prompts, one line each: in order, resumable, and one that fails does not stop the rest.

Input lines are JSON: `"a prompt"`, or `{"prompt": "...", "seed": 3, ...}` with settings of its own. Each gives one
line of output: a run file, or `{"format": "tempo-mlx/error", "index", "prompt", "error"}`. The time a run took is
left out, so that a batch that was killed and resumed has exactly the lines of an undisturbed one. The same holds for a
batch that is spread over the ranks of mlx.launch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tempo_mlx.api import encode_chat, stream
from tempo_mlx.batch_file import batch_file
from tempo_mlx.config import GenerateConfig, as_dict
from tempo_mlx.decode.prefill import Interrupt, never
from tempo_mlx.errors import ConfigError, OutputError, PromptError, RankLostError, RunFileError, TempoError
from tempo_mlx.files import read_lines
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.loading import LoadedModel, load_model
from tempo_mlx.ranks import processes as ranks
from tempo_mlx.ranks.model import check_same
from tempo_mlx.report.run import Run
from tempo_mlx.resolution import upgrade
from tempo_mlx.strict import is_unicode
from tempo_mlx.weights import Progress, Tokenizer, open_checkpoint

ERROR_FORMAT = "tempo-mlx/error"


Configure = Callable[[Mapping[str, Any]], GenerateConfig]


@dataclass(frozen=True)
class Item:
    """One line of the input. config: or why there is none."""

    index: int
    prompt: str
    config: GenerateConfig | str


def read_items(path: Path, configure: Configure) -> list[Item]:
    """The input's lines. configure: from a line's own settings to its configuration.

    Raises PromptError that names a line which is none.
    """
    lines = read_lines(path, "the prompts")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    items = [
        _read_item(index, f"{path}, line {number}", line, configure)
        for index, (number, line) in enumerate(numbered)
    ]
    if not items:
        raise PromptError(f"{path} holds no prompt; write one JSON text, or object with a prompt, a line.")
    return items


def _read_item(index: int, where: str, line: str, configure: Configure) -> Item:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f'{where} is not JSON; write "a prompt" or {{"prompt": "..."}}.') from error
    settings = dict(value) if isinstance(value, dict) else {"prompt": value}
    prompt = settings.pop("prompt", None)
    if not isinstance(prompt, str) or not prompt:
        raise PromptError(f"{where} has no prompt; give it a text that is not empty.")
    try:
        return Item(index, prompt, configure(settings))
    except TempoError as problem:
        return Item(index, prompt, str(problem))


Line = tuple[str | None, str | None]  # the line, None when it was interrupted; and the error that it tells of


class Maker(Protocol):
    """What makes lines; interrupted: see api.stream. info: of its model, as a run says it."""

    @property
    def info(self) -> Mapping[str, Any]: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    def __call__(self, items: Sequence[Item], interrupted: Interrupt) -> Iterator[Line]: ...


class Here:
    """Makes lines in this process, one after the other."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded, self.info, self.tokenizer = loaded, loaded.model.info, loaded.tokenizer

    def __call__(self, items: Sequence[Item], interrupted: Interrupt) -> Iterator[Line]:
        for item in items:
            yield make_line(self.loaded, item, interrupted)


def run_batch(
    make: Maker,
    items: Sequence[Item],
    out: Path,
    interrupted: Interrupt = never,
    keep_errors: bool = False,
) -> Iterator[tuple[int, str | None]]:
    """Write a line for every item that `out` has none of yet, and another for those that failed, unless `keep_errors`.

    Yields the number, from 1, of every item that has its line, and the line's error. interrupted: the line it cuts
    short is not written, and the batch ends. Raises OutputError when `out` holds something else, is written by another
    process or cannot be written; RankLostError.
    """
    failed: dict[int, str] = {}
    seen = Seen(make, items, failed, out)
    with batch_file(out, seen) as file:
        for number in range(file.kept):
            if number not in failed or keep_errors:
                yield number + 1, failed.get(number)
        again = [] if keep_errors else [items[number] for number in failed]
        made: dict[int, str] = {}  # in place of lines that said an error
        try:
            for item, (line, error) in zip(again, make(again, interrupted), strict=False):
                if line is None:
                    return
                made[item.index] = line
                yield item.index + 1, error
        finally:
            if made:
                file.replace(made)
        rest = items[file.kept :]
        for item, (line, error) in zip(rest, make(rest, interrupted), strict=False):
            if line is None:
                return
            file.append(line)
            yield item.index + 1, error


def make_line(loaded: LoadedModel, item: Item, interrupted: Interrupt) -> Line:
    """Raises RankLostError: whose loss is not this line's."""
    if isinstance(item.config, str):
        return _error_line(item, item.config)
    try:
        decoding = stream(loaded, item.prompt, item.config, interrupted=interrupted)
        for _ in decoding:
            pass
        run = decoding.run()
    except RankLostError:
        raise
    except TempoError as problem:
        return _error_line(item, str(problem))
    if isinstance(decoding.failure, RankLostError):
        raise decoding.failure
    if decoding.failure is not None:
        return _error_line(item, str(decoding.failure))
    return None if run.finish_reason == "cancelled" else replace(run, timing={}).to_json(), None


def _error_line(item: Item, error: str) -> Line:
    line = {"format": ERROR_FORMAT, "index": item.index, "prompt": item.prompt, "error": error}
    return json.dumps(line, ensure_ascii=not is_unicode(item.prompt + error)), error


class Spread:
    """Makes lines on all ranks of mlx.launch, each with a whole model of its own."""

    def __init__(self, config: LoadConfig, progress: Progress | None = None) -> None:
        """Raises what `load_model` does, and ConfigError where there are no ranks."""
        if ranks.rank() is None:
            raise ConfigError(
                "--data-parallel spreads prompts over ranks, and there is only this process; start it with "
                "`mlx.launch -n 2 -- tempo-mlx batch ...`, or leave it out."
            )
        self.leader = ranks.lead()
        self.leader.set_timeout(config.rank_timeout)
        checkpoint = open_checkpoint(config.model, progress=progress)  # fetched once, before all ask for it
        self.tokenizer = checkpoint.tokenizer()
        self.number = self.leader.number()
        infos = self.leader.run_all(_load, self.number, config)
        check_same(infos, config)
        self.info: Mapping[str, Any] = infos[0]

    def __call__(self, items: Sequence[Item], interrupted: Interrupt) -> Iterator[Line]:
        return self.leader.spread(_make_line, [(self.number, item) for item in items], interrupted)


def _load(local: ranks.Local, number: int, config: LoadConfig) -> dict[str, Any]:
    local.objects[number] = loaded = load_model(config, alone=True)
    return loaded.model.info


def _make_line(local: ranks.Local, number: int, item: Item) -> Line:
    return make_line(local.objects[number], item, lambda: "cancelled" if local.stopping.is_set() else None)


@dataclass(frozen=True)
class Seen:
    """Holds the lines of an output to the items, one by one; `failed` gets the errors they tell of, by number."""

    make: Maker
    items: Sequence[Item]
    failed: dict[int, str]
    out: Path

    def __call__(self, number: int, line: bytes) -> None:
        """Raises OutputError where the line was made from something else."""
        fault = "prompts" if number >= len(self.items) else self.fault(self.items[number], line)
        if fault is not None:
            raise OutputError(
                f"Line {number + 1} of {self.out} was made from other {fault}; name another file, or remove it."
            )

    def fault(self, item: Item, line: bytes) -> str | None:
        """What a line of the output was made from that is not the item's."""
        try:
            stored = json.loads(line)
            if stored["format"] == ERROR_FORMAT:
                self.failed[item.index] = str(stored["error"])
                return None if (stored["index"], stored["prompt"]) == (item.index, item.prompt) else "prompts"
            run = Run.from_json(line)
        except (ValueError, LookupError, TypeError, RecursionError, RunFileError):
            return "data than a batch's"
        if isinstance(item.config, str) or not same_settings(run.config, item.config):
            return "settings"
        if run.prompt.text != prompt_text(self.make.tokenizer, item.prompt, item.config):
            return "prompts"
        return None if of_model(run.model) == of_model(self.make.info) else "weights, or computed otherwise"


def prompt_text(tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> str:
    """What a run says of its prompt."""
    if not config.chat:
        return prompt
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}], config).text


def same_settings(stored: Mapping[str, Any], config: GenerateConfig) -> bool:
    """Whether a run's settings are these, as a file has them; a width that was measured for `auto` is any."""
    asked = json.loads(json.dumps(as_dict(config)))
    if config.max_parallel_tokens == "auto":
        asked["max_parallel_tokens"] = stored.get("max_parallel_tokens")
    return bool(upgrade(stored) == asked)


def of_model(info: Mapping[str, Any]) -> dict[str, Any]:
    """What of a model changes its numbers: its weights and what computes them, not where they lie."""
    values: dict[str, Any] = json.loads(json.dumps(dict(info)))
    values.pop("id", None)
    return values
