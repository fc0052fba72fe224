"""A run file as what an editable run begins from: settings, prompt, and the steps as a decoder keeps them."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.step import Step
from tempo_mlx.errors import ConfigError, RunFileError
from tempo_mlx.model.forward import Model
from tempo_mlx.report.checks import check_vocabulary
from tempo_mlx.report.records import RunPrompt
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import require_settings
from tempo_mlx.resolution import upgrade


def read_run(value: dict[str, Any], model: Model) -> tuple[GenerateConfig, RunPrompt, list[Step]]:
    """Settings, prompt and steps of a run file that came from anywhere. Raises RunFileError."""
    run = Run.from_json(json.dumps(value))
    require_settings(run)
    for key in ("sha256", "revision"):
        theirs, ours = run.model.get(key), model.info.get(key)
        if theirs is not None and ours is not None and theirs != ours:
            raise RunFileError(
                f"The run was made by another model, {run.model.get('id')}; serve that one to go on with it."
            )
    settings = upgrade(run.config)
    if unknown := sorted(set(settings) - {f.name for f in fields(GenerateConfig)}):
        raise RunFileError(f"The run's config holds {unknown[0]}, which is not a setting.")
    try:
        config = GenerateConfig(**settings)
    except ConfigError as error:
        raise RunFileError(f"The run's config cannot be used: {error}") from error
    check_vocabulary(run, model.architecture.vocab_size)
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
