"""The run: everything one generation decided, as one immutable object and one JSON file (format version 1).

A run file is complete: it holds enough to recompute every probability in it with one dense forward pass
(report/verify.py) and to draw every view without the model.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tempo_mlx.decode.paths import T, TokenSet, best_paths, is_usable, layers_of, members_of
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.decode.step import RunStep, RunToken
from tempo_mlx.errors import OutputError, RunFileError
from tempo_mlx.files import fault_of_json, path_of, reason_of, write_atomic
from tempo_mlx.report.checks import FINISH_REASONS, check
from tempo_mlx.report.notebook import run_html
from tempo_mlx.report.phrases import Phrase, phrases_in
from tempo_mlx.report.records import RunPath, RunPrompt, RunRule
from tempo_mlx.report.texts import ListedText, listed
from tempo_mlx.settings import shown
from tempo_mlx.strict import Object, Record, Text, Whole, as_object, copy_json, plain, read

if TYPE_CHECKING:
    import pandas

FORMAT = "tempo-mlx/run"
VERSION = 1
HEADER = {"format": FORMAT, "version": VERSION}


@dataclass(frozen=True, repr=False)
class Run(Record):
    """One generation.

    Checked when made: a run that contradicts itself raises RunFileError.
    """

    may_lack = frozenset({"early_exit", "custom"})

    model: Annotated[
        Object, "id, sha256 or revision, family, adapter, dtype, quantization, kv_bits, backend, device"
    ]
    versions: Annotated[Object, "of Python and of the packages that computed, by name"]
    decoder: Annotated[Text, Field(json_schema_extra={"enum": list(DECODERS)}), "what chose"]
    config: Annotated[Object, "every setting in force, by name, defaults included"]
    prompt: Annotated[RunPrompt, "what was continued"]
    steps: Annotated[tuple[RunStep, ...], "the parallel sets, in order"]
    tree: Annotated[Object | None, "statistics of a tree search; null without one"]
    reasoning: Annotated[Text | None, "what a thinking model thought; null without"]
    text: Annotated[Text, "every alternative, as [A/B]; the best reading where paths are searched"]
    final_text: Annotated[Text, "the best reading, up to a stop string, without reasoning"]
    paths: Annotated[tuple[RunPath, ...], "readings asked for or searched, best first"]
    finish_reason: Annotated[Text, Field(json_schema_extra={"enum": list(FINISH_REASONS)}), "why it ended"]
    timing: Annotated[Object, "seconds and rates, by name"]
    early_exit: Annotated[Object | None, "the audit, of a run that could leave the model early"] = None
    custom: Annotated[Mapping[str, RunRule] | None, "the caller's own functions, by what they decided"] = None

    def __post_init__(self) -> None:
        for name in ("model", "versions", "config", "tree", "timing", "early_exit"):
            object.__setattr__(self, name, copy_json(getattr(self, name), RunFileError, name))
        check(self)

    @property
    def prompt_length(self) -> int:
        return len(self.prompt.token_ids)

    @property
    def is_lattice(self) -> bool:
        """Whether it is one text of sets, to be read along their edges; otherwise `paths` are its texts."""
        return DECODERS[self.decoder].lattice

    @property
    def phrases(self) -> list[Phrase]:
        """The best reading of a lattice, cut where others differ from it; joined, the texts are `final_text`.

        A phrase with `alternatives` is a fork: each has a `text`, and the `share` of all readings that say it. What was
        not decoded as a lattice is one phrase.
        """
        if self.is_lattice:
            return phrases_in(self.steps, self.final_text)
        return [Phrase(self.final_text, None, (), 0, len(self.steps))] if self.final_text else []

    @property
    def texts(self) -> list[ListedText]:
        """The texts that were searched or asked for (branches, beams, samples, `paths`), each once, best first.

        Their shares sum to 1. Of a lattice without `paths` there are none; `phrases` say what it reads.
        """
        return listed(self.paths)

    @property
    def token_sets(self) -> list[list[tuple[str, float]]]:
        """For each step the members shown in the text, best first: (text, probability)."""
        return [
            [(token.text, token.probability) for token in step.tokens if is_usable(token)]
            for step in self.steps
        ]

    def to_dict(self) -> dict[str, Any]:
        """The run file as plain lists and dicts, in the order of the format."""
        return {**HEADER, **plain(self)}

    def to_json(self, indent: int | None = None) -> str:
        """One line of JSON, or indented; floats at full precision, so that `from_json` gives an equal run."""
        values = {**HEADER, **as_object(self)}
        return json.dumps(values, ensure_ascii=False, allow_nan=False, indent=indent, default=as_object)

    @classmethod
    def from_json(cls, text: str | bytes) -> Run:
        """The run in `text`. Raises RunFileError where that is no run file of a known version, or damaged."""
        if not isinstance(text, str | bytes | bytearray):
            raise RunFileError(f"{shown(text)} is no run file; give its text, or Run.load() its path.")
        try:
            with uncollected():
                return cls._read(json.loads(text, parse_constant=_refuse_constant))
        except RecursionError:
            raise RunFileError("The run file is nested too deeply to be one.") from None
        except ValueError as error:  # not JSON, not UTF-8, or a number of too many digits
            raise RunFileError(f"This is no run file: {fault_of_json(error)}.") from error

    @classmethod
    def _read(cls, values: Any) -> Run:
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise RunFileError(f'This is no run file: its "format" is not "{FORMAT}".')
        if read(Whole, values.get("version"), RunFileError, where="version") != VERSION:
            raise RunFileError(
                f"The run file has format version {values['version']}; this tempo-mlx reads version {VERSION}."
            )
        run: Run = read(cls, {k: v for k, v in values.items() if k not in HEADER}, RunFileError)
        return run

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the run file atomically. Raises OutputError."""
        write_atomic(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        place = path_of(path, RunFileError)
        try:
            content = place.read_bytes()
        except OSError as error:
            raise RunFileError(f"Cannot read {path}: {reason_of(error)}.").as_bad_usage() from error
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

    def __repr__(self) -> str:
        return (
            f"<Run {self.decoder}, {len(self.steps)} steps, {self.finish_reason}: {shown(self.final_text)}>"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: phrases of a lattice, and all `texts`, as a list."""
        phrases = self.phrases if self.is_lattice or not self.paths else []
        return run_html(self.prompt.text, phrases, self.texts)


@contextmanager
def uncollected() -> Iterator[None]:
    """A run is a tree of up to a million objects; looking for circles in it as it grows takes longer than reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _refuse_constant(name: str) -> float:
    raise RunFileError(f"The run file holds {name}, which is no number.")


def best_path(steps: Sequence[TokenSet[T]]) -> list[T]:
    """One member of each set, along the edges P(j|i); [] of no steps. See decode/paths.py for the rules."""
    layers = layers_of(steps)
    return members_of(layers, best_paths(layers)[0]) if layers else []
