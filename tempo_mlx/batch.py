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
from typing import Any

from tempo_mlx.api import stream
from tempo_mlx.config import GenerateConfig, LoadConfig, as_dict
from tempo_mlx.decode.prefill import Interrupt, never
from tempo_mlx.errors import ConfigError, OutputError, PromptError, RankLostError, TempoError
from tempo_mlx.files import read_text
from tempo_mlx.loading import LoadedModel, load_model
from tempo_mlx.ranks import processes as ranks
from tempo_mlx.ranks.model import check_same
from tempo_mlx.resolution import upgrade
from tempo_mlx.weights import Progress, open_checkpoint

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
    lines = read_text(path, "the prompts").splitlines()
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
MakeLines = Callable[[Sequence[Item], Interrupt], Iterator[Line]]


def make_lines(loaded: LoadedModel, items: Sequence[Item], interrupted: Interrupt) -> Iterator[Line]:
    """One after the other. interrupted: see api.stream."""
    for item in items:
        yield make_line(loaded, item, interrupted)


def run_batch(
    make: MakeLines,
    items: Sequence[Item],
    out: Path,
    interrupted: Interrupt = never,
) -> Iterator[tuple[int, str | None]]:
    """Write a line for every item that `out` has none of yet; yields how many there are, and the line's error.

    make: `make_lines` with a model, or a `Spread`. interrupted: the line it cuts short is not written, and the batch
    ends. Raises OutputError when `out` holds something else or cannot be written, RankLostError.
    """
    items = items[_resume(out, items) :]
    try:
        with out.open("a", encoding="utf-8") as file:
            for item, (line, error) in zip(items, make(items, interrupted), strict=False):
                if line is None:
                    return
                file.write(line + "\n")
                file.flush()
                yield item.index + 1, error
    except OSError as problem:
        raise OutputError(
            f"Cannot write {out}: {problem.strerror or problem}; the lines before are whole, run it again to go on."
        ) from problem


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
    if decoding.failure is not None:
        raise decoding.failure
    return None if run.finish_reason == "cancelled" else replace(run, timing={}).to_json(), None


def _error_line(item: Item, error: str) -> Line:
    line = {"format": ERROR_FORMAT, "index": item.index, "prompt": item.prompt, "error": error}
    return json.dumps(line, ensure_ascii=False), error


class Spread:
    """Makes lines on all ranks of mlx.launch, each with a whole model of its own; called as `make_lines` is."""

    def __init__(self, config: LoadConfig, progress: Progress | None = None) -> None:
        """Raises what `load_model` does, and ConfigError where there are no ranks."""
        if ranks.rank() is None:
            raise ConfigError(
                "--data-parallel spreads prompts over ranks, and there is only this process; start it with "
                "`mlx.launch -n 2 -- tempo-mlx batch ...`, or leave it out."
            )
        self.leader = ranks.lead()
        self.leader.set_timeout(config.rank_timeout)
        open_checkpoint(config.model, progress=progress)  # fetched once, before all ask for it
        self.number = self.leader.number()
        check_same(self.leader.run_all(_load, self.number, config), config)

    def __call__(self, items: Sequence[Item], interrupted: Interrupt) -> Iterator[Line]:
        return self.leader.spread(_make_line, [(self.number, item) for item in items], interrupted)


def _load(local: ranks.Local, number: int, config: LoadConfig) -> dict[str, Any]:
    local.objects[number] = loaded = load_model(config, alone=True)
    return loaded.model.info


def _make_line(local: ranks.Local, number: int, item: Item) -> Line:
    return make_line(local.objects[number], item, lambda: "cancelled" if local.stopping.is_set() else None)


def _resume(out: Path, items: Sequence[Item]) -> int:
    """How many items `out` has whole lines of; half a line at its end, from a kill, is cut off."""
    if not out.exists():
        return 0
    done = 0
    try:
        with out.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    file.truncate(file.tell() - len(line))
                    break
                if done == len(items) or not _is_of(line, items[done]):
                    raise OutputError(
                        f"{out} was made from other prompts or settings; name another file, or remove it."
                    )
                done += 1
    except OSError as error:
        raise OutputError(f"Cannot continue {out}: {error.strerror or error}.") from error
    return done


def _is_of(line: bytes, item: Item) -> bool:
    """Whether a line of the output is that of `item`."""
    try:
        stored = json.loads(line)
        if stored["format"] == ERROR_FORMAT:
            return bool(stored["prompt"] == item.prompt)
        if isinstance(item.config, str):
            return False
        config = json.loads(json.dumps(as_dict(item.config)))
        return bool(item.prompt in stored["prompt"]["text"] and upgrade(stored["config"]) == config)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
