"""The line that every run ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempo_mlx.report.run import Run

ENDINGS = {
    "stop": "came to its end", "length": "reached its length", "cancelled": "stopped early",
    "timeout": "stopped: time is up", "memory": "stopped: the cache is full",
}  # fmt: skip


def summary(run: Run, peak_bytes: int | None = None) -> str:
    """How long, how fast, how wide, and why it stopped. peak_bytes: memory of the process at its highest."""
    steps = len(run.steps)
    members = sum(len(step.tokens) for step in run.steps)
    removed = sum(token.removed_after is not None for step in run.steps for token in step.tokens)
    parts = [f"{steps} step{'s' * (steps > 1)}" if steps else "nothing generated"]
    if steps > 1 and (rate := number(run.timing, "tokens_per_second")):
        parts.append(f"{rate:.1f} steps/s")
    if steps:
        parts.append(f"{members} tokens, {members / steps:.1f} a step")
    if removed and run.is_lattice:  # on a tree a token goes with the texts that it was part of
        parts.append(f"{removed} of them removed")
    if (seconds := number(run.timing, "prefill_seconds")) is not None:
        parts.append(f"first token after {seconds:.1f} s")
    if peak_bytes is not None:
        parts.append(f"peak memory {peak_bytes / 1e9:.1f} GB")
    if run.early_exit is not None:
        parts.append(early_exit(run.early_exit, run.timing))
    parts.append(ENDINGS[run.finish_reason])
    return " | ".join(parts)


def number(values: Mapping[str, Any], name: str) -> float | None:
    """A figure of a run, if it is one: a file may say anything."""
    value = values.get(name)
    return value if isinstance(value, (int, float)) else None


def _listed(value: object) -> list[Mapping[str, Any]]:
    """The objects in a list, if it is one."""
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, (list, tuple)) else []


def early_exit(section: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    """What the audit of a run says, and how many steps were run ahead, in a few words."""
    agreement, layers = number(section, "agreement"), number(section, "mean_layers")
    if section.get("lossless"):
        said = ["early exit, lossless"]
    elif agreement is not None:
        said = [f"{agreement:.1%} of audited early choices agreed"]
    elif any(number(each, "left") for each in _listed(section.get("exits"))):
        said = ["early choices not audited"]
    else:
        said = ["nothing left early"]
    if layers is not None:
        said.append(f"{layers:.1f} layers a step")
    if ahead := number(section, "accepted") or number(timing, "early_exit_accepted"):
        said.append(f"{ahead} steps run ahead")
    return ", ".join(said)
