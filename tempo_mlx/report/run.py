"""The run: everything one generation decided, as one immutable object and one JSON file (format version 1).

A run file is complete: it holds enough to recompute every probability in it with one dense forward pass
(report/verify.py) and to draw every view without the model.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempo_mlx.decode.paths import best_paths, layers_of, members_of
from tempo_mlx.errors import OutputError, RunFileError
from tempo_mlx.report.checks import check
from tempo_mlx.report.fields import Fields, copy_plain
from tempo_mlx.report.files import write_atomic
from tempo_mlx.report.records import (
    RunPath,
    RunPrompt,
    RunStep,
    RunToken,
    read_ids,
    read_path,
    read_step,
    step_to_dict,
)
from tempo_mlx.report.text import pieces, shown

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped,unused-ignore]

FORMAT = "tempo-mlx/run"
VERSION = 1


@dataclass(frozen=True)
class Run:
    """One generation. Checked when made: a run that contradicts itself raises RunFileError."""

    model: Mapping[str, Any]
    versions: Mapping[str, Any]
    decoder: str
    config: Mapping[str, Any]
    prompt: RunPrompt
    steps: tuple[RunStep, ...]
    tree: Mapping[str, Any] | None
    reasoning: str | None
    text: str
    final_text: str
    paths: tuple[RunPath, ...]
    finish_reason: str
    timing: Mapping[str, Any]
    early_exit: Mapping[str, Any] | None = None  # the audit, of a run that could leave the model early

    def __post_init__(self) -> None:
        for name in ("model", "versions", "config", "tree", "timing", "early_exit"):
            object.__setattr__(self, name, copy_plain(getattr(self, name), name))
        check(self)

    @property
    def prompt_length(self) -> int:
        return len(self.prompt.token_ids)

    @property
    def token_sets(self) -> list[list[tuple[str, float]]]:
        """For each step the members shown in the text, best first: (text, probability)."""
        return [[(token.text, token.probability) for token in shown(step.tokens)] for step in self.steps]

    def to_dict(self) -> dict[str, Any]:
        """The run file as plain lists and dicts, in the order of the format."""
        values: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "versions": self.versions,
            "decoder": self.decoder,
            "config": self.config,
            "prompt": {"text": self.prompt.text, "token_ids": list(self.prompt.token_ids)},
            "steps": [step_to_dict(step) for step in self.steps],
            "tree": self.tree,
            "reasoning": self.reasoning,
            "text": self.text,
            "final_text": self.final_text,
            "paths": [
                {
                    "token_ids": list(path.token_ids),
                    "text": path.text,
                    "logprob": path.logprob,
                    "exact": path.exact,
                }
                for path in self.paths
            ],
            "finish_reason": self.finish_reason,
            "timing": self.timing,
        }
        if self.early_exit is not None:
            values["early_exit"] = self.early_exit
        return values

    def to_json(self, indent: int | None = None) -> str:
        """One line of JSON, or indented; floats at full precision, so that `from_json` gives an equal run."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Run:
        """The run in `text`. Raises RunFileError where that is no run file of a known version, or damaged."""
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
        except RecursionError:
            raise RunFileError("The run file is nested too deeply to be one.") from None
        except ValueError as error:  # not JSON, not UTF-8, or a number of too many digits
            raise RunFileError(f"The run file is not valid JSON: {error}.") from error
        return _read_run(Fields(value, ""))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the run file atomically. Raises OutputError."""
        write_atomic(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise RunFileError(f"Cannot read {path}: {error.strerror or error}.") from error
        try:
            return cls.from_json(content)
        except RunFileError as error:
            raise RunFileError(f"{path}: {error}") from error

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each member. Raises OutputError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise OutputError("Run.to_dataframe() needs pandas: pip install pandas.") from error
        best = {(step, id(token)) for step, token in enumerate(self.best_path())}
        rows = [
            {
                "step": step.step,
                "position": step.position if token.position is None else token.position,
                "rank": rank,
                "id": token.id,
                "text": token.text,
                "probability": token.probability,
                "slot": token.slot,
                "weight": token.weight,
                "removed_after": token.removed_after,
                "removed_signal": token.removed_why.signal if token.removed_why else None,
                "attention": token.attention,
                "posterior": token.posterior,
                "branch": token.branch,
                "best_path": (index, id(token)) in best,
            }
            for index, step in enumerate(self.steps)
            for rank, token in enumerate(step.tokens)
        ]
        return pandas.DataFrame(rows)

    def best_path(self) -> tuple[RunToken, ...]:
        """One member of each set: the most probable path over the edges P(j|i) (Viterbi)."""
        return tuple(best_path(self.steps))

    def _repr_html_(self) -> str:
        """The inline text for notebooks; darker is more probable, the number is in the tooltip."""
        parts = [f'<span style="opacity:.6">{html.escape(self.prompt.text)}</span>']
        for step in self.steps:
            for piece in pieces(step.tokens, [token.text for token in step.tokens]):
                parts.append(_span(piece.text, piece.token.probability if piece.token else None))
        return f'<div style="white-space:pre-wrap">{"".join(parts)}</div>'


def _span(text: str, probability: float | None) -> str:
    if probability is None:
        return html.escape(text)
    style = f"background:color-mix(in srgb, #4a90d9 {round(60 * probability)}%, transparent)"
    return f'<span title="{probability:.4f}" style="{style}">{html.escape(text)}</span>'


def _refuse_constant(name: str) -> float:
    raise RunFileError(f"The run file holds {name}, which is no number.")


def _read_run(fields: Fields) -> Run:
    if fields.take("format") != FORMAT:
        raise RunFileError(f'This is no run file: its "format" is not "{FORMAT}".')
    version = fields.integer("version")
    if version != VERSION:
        raise RunFileError(
            f"The run file has format version {version}; this tempo-mlx reads version {VERSION}."
        )
    model, versions = fields.mapping("model"), fields.mapping("versions")
    decoder, config = fields.text("decoder"), fields.mapping("config")
    prompt = Fields(fields.take("prompt"), "prompt")
    run_prompt = RunPrompt(prompt.text("text"), read_ids(prompt, "token_ids"))
    prompt.done()
    steps = tuple(read_step(step) for step in fields.objects("steps"))
    tree = fields.take("tree")
    if tree is not None and not isinstance(tree, dict):
        raise RunFileError("In the run file, tree must be null or a JSON object.")
    early_exit = fields.mapping("early_exit") if fields.has("early_exit") else None
    run = Run(
        model=model,
        versions=versions,
        decoder=decoder,
        config=config,
        prompt=run_prompt,
        steps=steps,
        tree=tree,
        reasoning=fields.maybe_text("reasoning"),
        text=fields.text("text"),
        final_text=fields.text("final_text"),
        paths=tuple(read_path(path) for path in fields.objects("paths")),
        finish_reason=fields.text("finish_reason"),
        timing=fields.mapping("timing"),
        early_exit=early_exit,
    )
    fields.done()
    return run


def best_path(steps: Sequence[RunStep]) -> list[RunToken]:
    """One member of each set, along the edges P(j|i); [] of no steps. See decode/paths.py for the rules."""
    layers = layers_of(steps)
    return members_of(layers, best_paths(layers)[0]) if layers else []
