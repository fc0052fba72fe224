"""Many prompts, one line each: in order, resumable, and one that fails does not stop the rest.

Input lines are JSON: `"a prompt"`, or `{"prompt": "...", "seed": 3, ...}` with settings of its own. Each gives one
line of output: a run file, or `{"format": "tempo-mlx/error", "index", "prompt", "error"}`. The time a run took is
left out, so that a batch that was killed and resumed has exactly the lines of an undisturbed one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tempo_mlx.api import stream
from tempo_mlx.config import GenerateConfig, as_dict
from tempo_mlx.errors import OutputError, PromptError, TempoError
from tempo_mlx.model.load import LoadedModel

ERROR_FORMAT = "tempo-mlx/error"


@dataclass(frozen=True)
class Item:
    """One line of the input."""

    prompt: str
    settings: Mapping[str, Any]


def read_items(path: Path) -> list[Item]:
    """The input's lines. Raises PromptError that names a line which is none."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"Cannot read the prompts in {path}: {error}.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    items = [_read_item(f"{path}, line {number}", line) for number, line in numbered]
    if not items:
        raise PromptError(f"{path} holds no prompt; write one JSON text, or object with a prompt, a line.")
    return items


def _read_item(where: str, line: str) -> Item:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f'{where} is not JSON; write "a prompt" or {{"prompt": "..."}}.') from error
    settings = dict(value) if isinstance(value, dict) else {"prompt": value}
    prompt = settings.pop("prompt", None)
    if not isinstance(prompt, str) or not prompt:
        raise PromptError(f"{where} has no prompt; give it a text that is not empty.")
    return Item(prompt, settings)


def run_batch(
    loaded: LoadedModel,
    items: Sequence[Item],
    configure: Callable[[Mapping[str, Any]], GenerateConfig],
    out: Path,
    interrupted: Callable[[], str | None] = lambda: None,
) -> Iterator[tuple[int, str | None]]:
    """Write a line for every item that `out` has none of yet; yields how many there are, and the line's error.

    configure: from a line's own settings to its configuration. interrupted: see api.stream; the line it cuts short
    is not written, and the batch ends. Raises OutputError when `out` holds something else or cannot be written.
    """
    done = _resume(out, items, configure)
    try:
        with out.open("a", encoding="utf-8") as file:
            for index in range(done, len(items)):
                error = None
                try:
                    line = _run_line(loaded, items[index], configure, interrupted)
                except TempoError as problem:
                    error = str(problem)
                    line = json.dumps(
                        {
                            "format": ERROR_FORMAT,
                            "index": index,
                            "prompt": items[index].prompt,
                            "error": error,
                        },
                        ensure_ascii=False,
                    )
                if line is None:
                    return
                file.write(line + "\n")
                file.flush()
                yield index + 1, error
    except OSError as problem:
        raise OutputError(
            f"Cannot write {out}: {problem.strerror or problem}; the lines before are whole, run it again to go on."
        ) from problem


def _run_line(
    loaded: LoadedModel,
    item: Item,
    configure: Callable[[Mapping[str, Any]], GenerateConfig],
    interrupted: Callable[[], str | None],
) -> str | None:
    decoding = stream(loaded, item.prompt, configure(item.settings), interrupted=interrupted)
    for _ in decoding:
        pass
    run = decoding.run()
    return None if run.finish_reason == "cancelled" else replace(run, timing={}).to_json()


def _resume(
    out: Path, items: Sequence[Item], configure: Callable[[Mapping[str, Any]], GenerateConfig]
) -> int:
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
                if done == len(items) or not _is_of(line, items[done], configure):
                    raise OutputError(
                        f"{out} was made from other prompts or settings; name another file, or remove it."
                    )
                done += 1
    except OSError as error:
        raise OutputError(f"Cannot continue {out}: {error.strerror or error}.") from error
    return done


def _is_of(line: bytes, item: Item, configure: Callable[[Mapping[str, Any]], GenerateConfig]) -> bool:
    """Whether a line of the output is that of `item`."""
    try:
        stored = json.loads(line)
        if stored["format"] == ERROR_FORMAT:
            return bool(stored["prompt"] == item.prompt)
        config = json.loads(json.dumps(as_dict(configure(item.settings))))
        return bool(item.prompt in stored["prompt"]["text"] and stored["config"] == config)
    except (ValueError, LookupError, TypeError, RecursionError, TempoError):
        return False
