"""Bringing a superposed run back to life: from recorded steps to a decoder that can go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.step import Step
from tempo_mlx.decode.tempo import Tempo
from tempo_mlx.errors import ConfigError, RunFileError
from tempo_mlx.model.forward import Model
from tempo_mlx.report.records import RunPrompt
from tempo_mlx.report.run import Run


def enter_set(tempo: Tempo, record: Step) -> None:
    """Append a recorded set to the lattice: the same weights, edges and slots as when it was chosen."""
    kept = sorted((m for m in record.tokens if m.slot is not None), key=lambda m: m.slot or 0)
    if kept:
        parents = np.array([[edge.posterior for edge in m.parents] for m in kept]).T if record.step else None
        slots = tempo.lattice.append([m.weight or 0.0 for m in kept], parents)
        if slots.tolist() != [m.slot for m in kept]:
            raise RunFileError(f"The slots of step {record.step} do not follow those before it.")
        tempo.members.update({int(m.slot): m for m in kept if m.slot is not None})
    tempo.waiting = [m.id for m in kept]
    tempo.steps.append(record)


def learn(tempo: Tempo) -> None:
    """Tell the view which slots its rows are: the prompt's, then the alive ones that have been run."""
    prompt, view = tempo.lattice.prompt_length, tempo.cache
    view.learn(np.concatenate([np.arange(prompt), tempo.lattice.slots[: len(view) - prompt]]))


def run_set(tempo: Tempo) -> None:
    """Run the newest set's rows, without pruning."""
    rule, tempo.rule = tempo.rule, None
    tempo.run_rows()
    tempo.rule = rule


def remove_recorded(tempo: Tempo, steps: Sequence[Step]) -> None:
    """Remove what was removed once the newest set had been run."""
    newest = tempo.lattice.num_sets - 1
    gone = [m.slot for s in steps for m in s.tokens if m.removed_after == newest and m.slot in tempo.members]
    if gone:
        for slot in gone:
            del tempo.members[int(slot or 0)]
        tempo.cache.keep(tempo.lattice.remove(np.array(gone)))


def read_run(value: dict[str, Any], model: Model) -> tuple[GenerateConfig, RunPrompt, list[Step]]:
    """Settings, prompt and steps of a run file that came from anywhere. Raises RunFileError."""
    run = Run.from_json(json.dumps(value))
    for key in ("sha256", "revision"):
        theirs, ours = run.model.get(key), model.info.get(key)
        if theirs is not None and ours is not None and theirs != ours:
            raise RunFileError(
                f"The run was made by another model, {run.model.get('id')}; serve that one to go on with it."
            )
    known = {f.name for f in fields(GenerateConfig)}
    if unknown := sorted(set(run.config) - known):
        raise RunFileError(f"The run's config holds {unknown[0]}, which is not a setting.")
    try:
        config = GenerateConfig(**run.config)
    except ConfigError as error:
        raise RunFileError(f"The run's config cannot be used: {error}") from error
    ids = [*run.prompt.token_ids, *(token.id for step in run.steps for token in step.tokens)]
    if max(ids) >= model.architecture.vocab_size:
        raise RunFileError(f"The run holds token {max(ids)}, which is not in the model's vocabulary.")
    return config, run.prompt, read_steps(run)


def read_steps(run: Run) -> list[Step]:
    """The run's steps as a decoder keeps them. Raises RunFileError where an edge is missing."""
    rows: list[int] | None = None  # slots of the previous step
    steps = [Step.of(step) for step in run.steps]
    for step in steps:
        for member in step.tokens:
            if rows is not None and [edge.slot for edge in member.parents] != rows:
                raise RunFileError(
                    f"In the run's step {step.step}, token {member.id} lacks an edge to a parent."
                )
        rows = sorted(member.slot for member in step.tokens if member.slot is not None)
    return steps
