"""The parts of a run, each with its JSON: tokens, steps, paths, the prompt (design: run file, version 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tempo_mlx.decode.step import Edge, Member, Removal, Step
from tempo_mlx.errors import RunFileError
from tempo_mlx.report.fields import Fields, as_array, as_integer, as_number


def _maybe_int(value: int | None) -> int | None:
    return None if value is None else int(value)


def _maybe_float(value: float | None) -> float | None:
    return None if value is None else float(value)


@dataclass(frozen=True)
class RunToken:
    """A member of a set (decode.step.Member) with its text."""

    id: int
    text: str
    probability: float
    slot: int | None
    weight: float | None
    parents: tuple[Edge, ...] = ()
    removed_after: int | None = None
    removed_why: Removal | None = None
    attention: float | None = None
    posterior: float | None = None
    position: int | None = None
    branch: int | None = None

    @classmethod
    def of(cls, member: Member, text: str) -> RunToken:
        """Plain Python numbers, whatever numpy scalars the member holds: JSON knows no others."""
        return cls(
            id=int(member.id),
            text=text,
            probability=float(member.probability),
            slot=_maybe_int(member.slot),
            weight=_maybe_float(member.weight),
            parents=tuple(Edge(int(e.slot), float(e.posterior), float(e.forward)) for e in member.parents),
            removed_after=_maybe_int(member.removed_after),
            removed_why=member.removed_why
            and Removal(
                member.removed_why.signal,
                float(member.removed_why.score),
                float(member.removed_why.threshold),
                bool(member.removed_why.unattended),
            ),
            attention=_maybe_float(member.attention),
            posterior=_maybe_float(member.posterior),
            position=_maybe_int(member.position),
            branch=_maybe_int(member.branch),
        )


@dataclass(frozen=True)
class RunRejected:
    """A candidate dropped before it got a slot."""

    id: int
    text: str
    probability: float
    why: str


@dataclass(frozen=True)
class RunStep:
    """Set number `step`; its tokens best first."""

    step: int
    position: int
    threshold: float | None
    exit_layer: int | None
    residual_probability: float
    tokens: tuple[RunToken, ...]
    rejected: tuple[RunRejected, ...] = ()

    @classmethod
    def of(cls, step: Step, texts: Sequence[str], rejected_texts: Sequence[str]) -> RunStep:
        """`texts`: of step.tokens; `rejected_texts`: of step.rejected."""
        return cls(
            step=int(step.step),
            position=int(step.position),
            threshold=_maybe_float(step.threshold),
            exit_layer=_maybe_int(step.exit_layer),
            residual_probability=float(step.residual_probability),
            tokens=tuple(RunToken.of(member, text) for member, text in zip(step.tokens, texts, strict=True)),
            rejected=tuple(
                RunRejected(int(item.id), text, float(item.probability), item.why)
                for item, text in zip(step.rejected, rejected_texts, strict=True)
            ),
        )


@dataclass(frozen=True)
class RunPath:
    """One reading. `logprob`: natural, summed over its tokens; `exact`: from the path's own forward pass."""

    token_ids: tuple[int, ...]
    text: str
    logprob: float
    exact: bool


@dataclass(frozen=True)
class RunPrompt:
    text: str
    token_ids: tuple[int, ...]


def step_to_dict(step: RunStep) -> dict[str, Any]:
    """One element of the run file's `steps`; also what a stream sends for each step."""
    return {
        "step": step.step,
        "position": step.position,
        "threshold": step.threshold,
        "exit_layer": step.exit_layer,
        "residual_probability": step.residual_probability,
        "tokens": [_token_to_dict(token) for token in step.tokens],
        "rejected": [
            {"id": item.id, "text": item.text, "probability": item.probability, "why": item.why}
            for item in step.rejected
        ],
    }


def _token_to_dict(token: RunToken) -> dict[str, Any]:
    why = token.removed_why
    values: dict[str, Any] = {
        "id": token.id,
        "text": token.text,
        "probability": token.probability,
        "slot": token.slot,
        "weight": token.weight,
        "parents": [[edge.slot, edge.posterior, edge.forward] for edge in token.parents],
        "removed_after": token.removed_after,
        "removed_why": why
        and {
            "signal": why.signal,
            "score": why.score,
            "threshold": why.threshold,
            "unattended": why.unattended,
        },
        "attention": token.attention,
        "posterior": token.posterior,
    }
    if token.position is not None:
        values["position"] = token.position
    if token.branch is not None:
        values["branch"] = token.branch
    return values


def read_step(fields: Fields) -> RunStep:
    step = RunStep(
        step=fields.integer("step"),
        position=fields.integer("position"),
        threshold=fields.maybe_number("threshold"),
        exit_layer=fields.maybe_integer("exit_layer"),
        residual_probability=fields.number("residual_probability"),
        tokens=tuple(_read_token(token) for token in fields.objects("tokens")),
        rejected=tuple(_read_rejected(item) for item in fields.objects("rejected")),
    )
    fields.done()
    return step


def _read_token(fields: Fields) -> RunToken:
    token = RunToken(
        id=fields.integer("id"),
        text=fields.text("text"),
        probability=fields.number("probability"),
        slot=fields.maybe_integer("slot"),
        weight=fields.maybe_number("weight"),
        parents=tuple(_read_edge(edge, fields.path("parents")) for edge in fields.array("parents")),
        removed_after=fields.maybe_integer("removed_after"),
        removed_why=_read_removal(fields),
        attention=fields.maybe_number("attention"),
        posterior=fields.maybe_number("posterior"),
        position=fields.integer("position") if fields.has("position") else None,
        branch=fields.integer("branch") if fields.has("branch") else None,
    )
    fields.done()
    return token


def _read_edge(value: object, where: str) -> Edge:
    edge = as_array(value, where)
    if len(edge) != 3:
        raise RunFileError(f"In the run file, {where} must hold triples [slot, P(i|j), P(j|i)].")
    return Edge(as_integer(edge[0], where), as_number(edge[1], where), as_number(edge[2], where))


def _read_removal(fields: Fields) -> Removal | None:
    value = fields.take("removed_why")
    if value is None:
        return None
    why = Fields(value, fields.path("removed_why"))
    removal = Removal(
        why.text("signal"), why.number("score"), why.number("threshold"), why.boolean("unattended")
    )
    why.done()
    return removal


def _read_rejected(fields: Fields) -> RunRejected:
    item = RunRejected(
        fields.integer("id"), fields.text("text"), fields.number("probability"), fields.text("why")
    )
    fields.done()
    return item


def read_path(fields: Fields) -> RunPath:
    path = RunPath(
        read_ids(fields, "token_ids"), fields.text("text"), fields.number("logprob"), fields.boolean("exact")
    )
    fields.done()
    return path


def read_ids(fields: Fields, name: str) -> tuple[int, ...]:
    return tuple(as_integer(item, fields.path(name)) for item in fields.array(name))
