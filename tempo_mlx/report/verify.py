"""Was the run what it says? One dense forward pass over all its tokens, built from the run file alone.

Every member that was run becomes a row with its recorded position, and the (N, N) additive bias is replayed
from the recorded parents, weights and removals. No cache grows, nothing is compacted, so an error in any of
that shows as a difference. Compared with the record: probabilities, weights, residual probabilities and
both edge probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempo_mlx.arrays import Float32s, Floats, Ints
from tempo_mlx.decode.combine import COMBINE_RULES, combine, edges, log_probabilities, shares
from tempo_mlx.decode.prefill import CHUNK
from tempo_mlx.decode.step import RunStep, RunToken
from tempo_mlx.errors import ModelError, RunFileError
from tempo_mlx.lattice import ATTEND_RULES, CARRY_RULES, Lattice
from tempo_mlx.model.forward import Model
from tempo_mlx.model.rope import follows_length
from tempo_mlx.report.checks import check_vocabulary
from tempo_mlx.report.run import Run
from tempo_mlx.strict import Number, Switch, Text, read

# Of a probability, by what computed it. Half precision: about twice the largest difference measured on SmolLM2-135M
# (torch on the CPU: float16 0.011, bfloat16 0.054), where one row and many take different kernels.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# By the bits of a quantised KV cache. Where nothing is removed the replay repeats the run to 1e-6; a removed slot that
# is masked instead of dropped can change the last bit of a sum, and with it a rounding: 0.01 and 0.16 were measured.
KV_TOLERANCES = {8: 5e-2, 4: 0.4}


@dataclass(frozen=True)
class Difference:
    """One recorded number beside the one recomputed. `token`: text of the member, None for the step's own."""

    quantity: str
    step: int
    token: str | None
    recorded: float
    recomputed: float

    @property
    def size(self) -> float:
        return abs(self.recorded - self.recomputed)


@dataclass(frozen=True)
class Verification:
    """worst: the largest difference of each quantity. rows: N, of the dense pass.

    agreement: share of steps whose recorded best token is the recomputed one. lossy: tokens left the model early,
    so that not exactness but agreement is what the run promises.
    """

    worst: tuple[Difference, ...]
    tolerance: float
    steps: int
    rows: int
    compared: int
    agreement: float
    lossy: bool = False

    @property
    def max_difference(self) -> float:
        return max((difference.size for difference in self.worst), default=0.0)

    @property
    def ok(self) -> bool:
        return self.max_difference < self.tolerance


@dataclass(frozen=True)
class DenseRun:
    """A run as the inputs of one forward pass: N rows in slot order, without the last step's (nothing follows)."""

    tokens: Ints  # (N,)
    positions: Ints  # (N,)
    bias: Float32s  # (N, N)
    parents: Float32s  # (N, N): what rows continue, for layers that keep a state
    removals: dict[int, list[int]]  # after a set: slots that later rows no longer continue
    set_ends: list[int]  # slots up to the end of the prompt, and of each set


def verify(run: Run, model: Model) -> Verification:
    """Recompute a run with one dense forward pass and compare every probability in it.

    Raises ModelError where `model` is not the run's, RunFileError where the run holds tokens that it does
    not have.
    """
    _check_model(run, model)
    temperature = _setting(run, "temperature", Number)
    dense = dense_run(run)
    log_probs = log_probabilities(_logits(dense, model), temperature)  # (N, V)
    worst: dict[str, Difference] = {}
    compared = agreed = 0
    replay = _replay_lattice if run.is_lattice else _replay_tree
    for differences, agrees in (*replay(run, log_probs), *_replay_paths(run, model)):
        agreed += agrees
        compared += len(differences)
        for difference in differences:
            if difference.quantity not in worst or difference.size > worst[difference.quantity].size:
                worst[difference.quantity] = difference
    return Verification(
        worst=tuple(sorted(worst.values(), key=lambda difference: -difference.size)),
        tolerance=max(tolerance_of(run.model), tolerance_of(model.info)),
        steps=len(run.steps),
        rows=len(dense.tokens),
        compared=compared,
        agreement=agreed / len(run.steps) if run.steps else 1.0,
        lossy=any(step.exit_layer is not None for step in run.steps)
        and not run.config.get("lossless", False),
    )


def dense_run(run: Run) -> DenseRun:
    """The rows and the bias of a run, from the run file alone."""
    rows = [_in_slot_order(step) for step in run.steps[:-1]]
    tokens = [*run.prompt.token_ids, *(token.id for members in rows for token in members)]
    positions = list(range(run.prompt_length))
    for step, members in zip(run.steps, rows, strict=False):
        positions += [step.position if token.position is None else token.position for token in members]
    bias = np.full((len(tokens), len(tokens)), -np.inf, np.float32)
    prompt = np.tril(np.ones((run.prompt_length, run.prompt_length), bool))
    bias[: run.prompt_length, : run.prompt_length][prompt] = 0.0
    bias[run.prompt_length :, : run.prompt_length] = 0.0
    parents = np.eye(len(tokens), k=-1, dtype=np.float32)
    removals: dict[int, list[int]] = {}
    for token in (token for members in rows for token in members):
        if token.removed_after is not None and token.slot is not None:
            removals.setdefault(token.removed_after, []).append(token.slot)
    if run.is_lattice:
        _fill_from_lattice(bias, parents, removals, run, rows)
    else:
        _fill_from_ancestors(bias, parents, run, rows)
    set_ends = np.cumsum([run.prompt_length, *(len(members) for members in rows)]).tolist()
    return DenseRun(
        np.array(tokens, np.int64), np.array(positions, np.int64), bias, parents, removals, set_ends
    )


def _fill_from_lattice(
    bias: Float32s, parents: Float32s, removals: dict[int, list[int]], run: Run, rows: list[list[RunToken]]
) -> None:
    """Append and remove as the run did; each set's rows are scattered from alive columns to all slots."""
    lattice = Lattice(run.prompt_length)
    attend = _choice(run, "attend", ATTEND_RULES)
    intraset = _setting(run, "allow_intraset_token_visibility", Switch)
    carry = _choice(run, "carry", CARRY_RULES) if "carry" in run.config else "best"
    for index, members in enumerate(rows):
        posterior = None
        if index:
            posterior = np.array(
                [
                    [edge.posterior for edge in sorted(token.parents, key=lambda edge: edge.slot)]
                    for token in members
                ]
            ).T
            if posterior.shape != (len(rows[index - 1]), len(members)):
                raise RunFileError(f"In the run's step {index}, a token lacks a parent of the previous step.")
        slots = lattice.append([token.weight or 0.0 for token in members], posterior)
        columns = np.concatenate([np.arange(run.prompt_length), lattice.slots])
        bias[slots[:, None], columns] = lattice.bias(attend, intraset)
        parents[slots] = 0.0
        parents[slots[:, None], columns] = lattice.parents(carry)
        if index in removals:
            lattice.remove(removals[index])


def _fill_from_ancestors(bias: Float32s, parents: Float32s, run: Run, rows: list[list[RunToken]]) -> None:
    """A row continues its one parent, and sees what that sees, and itself."""
    for members in rows:
        for token in members:
            parents[token.slot] = 0.0
            parents[token.slot, token.parents[0].slot if token.parents else run.prompt_length - 1] = 1.0
            if token.parents:
                bias[token.slot] = bias[token.parents[0].slot]
            bias[token.slot, token.slot] = 0.0


def _logits(dense: DenseRun, model: Model) -> Float32s:
    """(N, V). One pass; or one for each set, as they were run, where rotary angles depend on how long the text was
    then, or where the cache rounds what it stores, so that the last bit of a sum can become a step of the rounding."""
    cache = model.new_cache()
    ends = [len(dense.tokens)]
    if model.architecture.recurrent and dense.removals:
        return _logits_with_removals(dense, model)
    longest = int(dense.positions.max()) + 1
    if any(follows_length(rope, longest) for rope in model.architecture.ropes) or model.info.get("kv_bits"):
        ends = [*range(CHUNK, dense.set_ends[0], CHUNK), *dense.set_ends]
    parts = []
    start = 0
    for end in ends:
        rows = slice(start, end)
        out = model.forward(
            dense.tokens[rows],
            dense.positions[rows],
            dense.bias[rows, :end],
            cache,
            parents=dense.parents[rows, :end] if model.architecture.recurrent else None,
            logits="all",
        )
        assert out.logits is not None
        parts.append(out.logits)
        start = end
    return np.concatenate(parts)


def _logits_with_removals(dense: DenseRun, model: Model) -> Float32s:
    """(N, V). What a state was made of differs before and after a removal: a pass for each set, as they were run, and
    what was removed leaves the states with the slots."""
    cache, parts = model.new_cache(), []
    alive = np.empty(0, np.int64)
    start = 0
    for index, end in enumerate(dense.set_ends):
        rows = np.arange(start, end)
        alive = np.concatenate([alive, rows])
        bias, parents = (table[rows[:, None], alive] for table in (dense.bias, dense.parents))
        out = model.forward(dense.tokens[rows], dense.positions[rows], bias, cache, parents=parents)
        assert out.logits is not None
        parts.append(out.logits)
        if gone := dense.removals.get(index - 1):
            stays = ~np.isin(alive, gone)
            cache.keep(np.flatnonzero(stays))
            alive = alive[stays]
        start = end
    return np.concatenate(parts)


def _replay_lattice(run: Run, log_probs: Float32s) -> Iterator[tuple[list[Difference], bool]]:
    """Step by step: combine the rows of the last set, and what follows from them for this one."""
    rule = _choice(run, "combine", COMBINE_RULES)
    rows = np.array([run.prompt_length - 1])  # of the dense pass that decide the step
    weights: Floats = np.ones(1)
    for step in run.steps:
        distribution = combine(log_probs[rows], weights, rule)
        ids = [token.id for token in step.tokens]
        posterior, forward = edges(log_probs[rows], weights, ids)
        result: list[Difference] = []
        members = _in_slot_order(step)
        next_weights = shares(distribution[[token.id for token in members]])
        by_slot = {token.slot: weight for token, weight in zip(members, next_weights.tolist(), strict=True)}
        for column, token in enumerate(step.tokens):
            result.append(_of("probability", step, token, token.probability, distribution[token.id]))
            if token.slot is not None:
                result.append(_of("weight", step, token, token.weight or 0.0, by_slot[token.slot]))
            for edge in token.parents:
                row = int(np.searchsorted(rows, edge.slot))
                result.append(_of("P(i|j)", step, token, edge.posterior, posterior[row, column]))
                result.append(_of("P(j|i)", step, token, edge.forward, forward[row, column]))
        for item in step.rejected:
            result.append(
                Difference("rejected", step.step, item.text, item.probability, float(distribution[item.id]))
            )
        residual = 1.0 - float(distribution[ids].sum(dtype=np.float64))
        result.append(Difference("residual", step.step, None, step.residual_probability, residual))
        yield result, int(distribution.argmax()) == step.tokens[0].id
        rows, weights = np.array([token.slot for token in members]), next_weights


def _replay_tree(run: Run, log_probs: Float32s) -> Iterator[tuple[list[Difference], bool]]:
    """Every member under its own parent's row; the residual is the mean over those rows."""
    num_rows = 1
    for step in run.steps:
        result = []
        rows = [token.parents[0].slot if token.parents else run.prompt_length - 1 for token in step.tokens]
        probabilities = np.exp(log_probs[rows, [token.id for token in step.tokens]], dtype=np.float64)
        with_row = [token.slot is not None for token in step.tokens]
        mass = probabilities[with_row].sum()
        for token, probability in zip(step.tokens, probabilities.tolist(), strict=True):
            result.append(_of("probability", step, token, token.probability, probability))
            result += [_of("P(j|i)", step, token, edge.forward, probability) for edge in token.parents]
            result += [_of("P(i|j)", step, token, edge.posterior, 1.0) for edge in token.parents]
            if token.weight is not None:
                result.append(_of("weight", step, token, token.weight, probability / mass))
        residual = 1.0 - float(probabilities.sum()) / num_rows
        result.append(Difference("residual", step.step, None, step.residual_probability, residual))
        num_rows = sum(with_row)
        yield result, step.tokens[0].id in log_probs[rows].argmax(axis=1)


def _replay_paths(run: Run, model: Model) -> Iterator[tuple[list[Difference], bool]]:
    """The log-probability per token of each exact path, as ordinary text after the prompt."""
    for path in run.paths:
        count = len(path.token_ids)
        if not path.exact or not count:
            continue
        tokens = [*run.prompt.token_ids, *path.token_ids[:-1]]
        forward = model.forward(tokens, range(len(tokens)), None, model.new_cache(), logits="all")
        assert forward.logits is not None
        rows = log_probabilities(forward.logits[-count:])  # (count, V)
        log_prob = float(rows[np.arange(count), list(path.token_ids)].sum(dtype=np.float64))
        recorded, recomputed = path.logprob / count, log_prob / count
        yield [Difference("path, log P a token", count - 1, path.text, recorded, recomputed)], False


def _of(quantity: str, step: RunStep, token: RunToken, recorded: float, recomputed: Any) -> Difference:
    return Difference(quantity, step.step, token.text, recorded, float(recomputed))


def _in_slot_order(step: RunStep) -> list[RunToken]:
    return sorted(
        (token for token in step.tokens if token.slot is not None), key=lambda token: token.slot or 0
    )


def _setting(run: Run, name: str, kind: Any) -> Any:
    if name not in run.config:
        raise RunFileError(f"The run file lacks config.{name}.")
    return read(kind, run.config[name], RunFileError, where=f"config.{name}")


def _choice(run: Run, name: str, choices: Sequence[str]) -> str:
    value: str = _setting(run, name, Text)
    if value not in choices:
        raise RunFileError(f"The run's config.{name} is {value!r}; it must be one of {', '.join(choices)}.")
    return value


def tolerance_of(info: Any) -> float:
    """Of the numbers of a model with this `info`, the model of a run file or one at hand."""
    by_type = TOLERANCES.get(str(info.get("dtype")), max(TOLERANCES.values()))
    bits = info.get("kv_bits")
    return by_type if bits is None else max(by_type, KV_TOLERANCES[8 if bits == 8 else 4])


def require_settings(run: Run) -> None:
    """RunFileError where the run's settings alone do not say how to decode it again, or to go on."""
    if run.custom is not None:
        names = ", ".join(f"{name} {rule.name}" for name, rule in run.custom.items())
        raise RunFileError(
            f"The run was made with functions of its own ({names}), which its file does not hold; decode it again from "
            "Python with them, or verify its numbers without --rerun."
        )


def _check_model(run: Run, model: Model) -> None:
    if run.model.get("kv_bits") != model.info.get("kv_bits"):
        raise ModelError(
            f"The run was made with kv_bits {run.model.get('kv_bits') or 'off'}, and this model was loaded with "
            f"{model.info.get('kv_bits') or 'off'}; load it as it was for the run."
        )
    for name in ("sha256", "revision"):
        recorded, present = run.model.get(name), model.info.get(name)
        if recorded is not None and present is not None and recorded != present:
            raise ModelError(
                f"The run was made with other weights ({name} {str(recorded)[:12]}) than this model's "
                f"({str(present)[:12]}); name the run's own model, {run.model.get('id')}."
            )
    check_vocabulary(run, model.architecture.vocab_size)
