"""An independent replay of a run file: slow, obvious, and without any of our model, lattice or decoding code.

Written from the definitions only (who sees whom, the recursion, the run file). Everything is a loop over the
JSON of a run; the model is transformers', called once with explicit position_ids and a 4-D additive mask.
`differences` returns the largest difference of each recorded quantity from its recomputed value.
"""

from __future__ import annotations

import math
from typing import Any

import torch

RunJson = dict[str, Any]
Token = dict[str, Any]
Gamma = dict[int, dict[int, float]]  # set -> slot -> gamma of one row


def rows_of(step: dict[str, Any]) -> list[Token]:
    """The members of a set that have a row, lowest slot first."""
    return sorted(
        (token for token in step["tokens"] if token["slot"] is not None), key=lambda token: token["slot"]
    )


def is_seen(token: Token, by_set: int) -> bool:
    """Whether rows of set `by_set` see this member of an earlier set."""
    return token["removed_after"] is None or token["removed_after"] >= by_set


def visible_members(run: RunJson, earlier: int, by_set: int) -> list[Token]:
    return [token for token in rows_of(run["steps"][earlier]) if is_seen(token, by_set)]


def gammas(run: RunJson) -> dict[int, Gamma]:
    """gamma_j(u, m) for every row j: how probable it is that a path through j used member m of set u."""
    result: dict[int, Gamma] = {}
    for now in range(len(run["steps"])):
        for row in rows_of(run["steps"][now]):
            gamma: Gamma = {}
            for earlier in range(now):
                alive = visible_members(run, earlier, now)
                mass: dict[int, float] = {}
                for member in alive:
                    total = 0.0
                    for parent, posterior, _ in row["parents"]:
                        if earlier == now - 1:
                            total += posterior * (1.0 if parent == member["slot"] else 0.0)
                        else:
                            total += posterior * result[parent][earlier].get(member["slot"], 0.0)
                    mass[member["slot"]] = total
                whole = sum(mass.values())
                if whole == 0.0:
                    mass = {member["slot"]: member["weight"] for member in alive}
                    whole = sum(mass.values())
                gamma[earlier] = {slot: value / whole for slot, value in mass.items()}
            result[row["slot"]] = gamma
    return result


def chains(run: RunJson, gamma: dict[int, Gamma]) -> dict[int, dict[int, int]]:
    """The chain of best predecessors of every row: earlier set -> slot."""
    result: dict[int, dict[int, int]] = {}
    for now in range(len(run["steps"])):
        for row in rows_of(run["steps"][now]):
            chain: dict[int, int] = {}
            if now > 0:
                best_slot, best = -1, -1.0
                for parent, posterior, _ in sorted(row["parents"]):
                    if posterior > best:
                        best_slot, best = parent, posterior
                chain = dict(result[best_slot])
                chain[now - 1] = best_slot
                for earlier in list(chain):
                    alive = [member["slot"] for member in visible_members(run, earlier, now)]
                    if chain[earlier] in alive:
                        continue
                    del chain[earlier]
                    if alive:
                        chain[earlier] = max(alive, key=lambda slot: gamma[row["slot"]][earlier][slot])
            result[row["slot"]] = chain
    return result


def dense_bias(run: RunJson) -> torch.Tensor:
    """(N, N) float64, rows and columns by slot: 0 full, log of a share partial, -inf not at all."""
    prompt = len(run["prompt"]["token_ids"])
    size = prompt + sum(len(rows_of(step)) for step in run["steps"])
    bias = torch.full((size, size), -math.inf, dtype=torch.float64)
    for row in range(prompt):
        for column in range(row + 1):
            bias[row, column] = 0.0
    lattice = run["decoder"] in ("superposed", "plain")
    attend = run["config"]["attend"] if lattice else "ancestors"
    siblings = lattice and run["config"]["allow_intraset_token_visibility"]
    gamma = gammas(run) if lattice else {}
    chain = chains(run, gamma) if attend == "best" else {}
    for now, step in enumerate(run["steps"]):
        for row in rows_of(step):
            slot = row["slot"]
            bias[slot, :prompt] = 0.0
            bias[slot, slot] = 0.0
            if attend == "ancestors":
                if now > 0:
                    parent = row["parents"][0][0]
                    for column in range(prompt, size):
                        bias[slot, column] = max(bias[slot, column], bias[parent, column])
                continue
            for earlier in range(now):
                alive = visible_members(run, earlier, now)
                weight = sum(member["weight"] for member in alive)
                for member in alive:
                    other = member["slot"]
                    if attend == "all":
                        bias[slot, other] = 0.0
                    elif attend == "weighted":
                        bias[slot, other] = math.log(member["weight"] / weight)
                    elif attend == "lineage":
                        share = gamma[slot][earlier][other]
                        bias[slot, other] = math.log(share) if share > 0.0 else -math.inf
                    elif attend == "best":
                        bias[slot, other] = 0.0 if chain[slot].get(earlier) == other else -math.inf
                    else:
                        raise ValueError(attend)
            if siblings:
                for sibling in rows_of(step):
                    if sibling["slot"] != slot:
                        bias[slot, sibling["slot"]] = 0.0 if attend == "all" else math.log(sibling["weight"])
    return bias


def row_log_probabilities(run: RunJson, model: Any) -> torch.Tensor:
    """(N, V) log P(v | row) after temperature, by one forward pass of a transformers model in float32."""
    tokens = list(run["prompt"]["token_ids"])
    positions = list(range(len(tokens)))
    for step in run["steps"]:
        for row in rows_of(step):
            tokens.append(row["id"])
            positions.append(row.get("position", step["position"]))
    mask = dense_bias(run).clamp(min=torch.finfo(torch.float32).min).to(torch.float32)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            attention_mask=mask[None, None],
            use_cache=False,
        ).logits[0]
    temperature = run["config"]["temperature"] or 1.0
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def combined(rows: list[torch.Tensor], weights: list[float], rule: str) -> torch.Tensor:
    """The next distribution (V,) from the rows' log-probabilities, in slot order."""
    if rule == "last":
        return rows[-1].exp()
    if rule == "mix":
        return torch.tensor(weights, dtype=torch.float64) @ torch.stack(rows).exp()
    if rule == "mean":
        return torch.stack(rows).exp().mean(dim=0)
    if rule == "product":
        return torch.softmax(torch.stack(rows).mean(dim=0), dim=-1)
    if rule == "max":
        largest = torch.stack(rows).exp().max(dim=0).values
        return largest / largest.sum()
    raise ValueError(rule)


def differences(run: RunJson, model: Any) -> dict[str, float]:
    """Largest |recorded - recomputed| of probability, weight, residual, posterior edge and forward edge."""
    log_probs = row_log_probabilities(run, model)
    worst = dict.fromkeys(("probability", "weight", "residual", "posterior", "forward"), 0.0)

    def compare(quantity: str, recorded: float, recomputed: float) -> None:
        worst[quantity] = max(worst[quantity], abs(recorded - recomputed))

    slots, weights = [len(run["prompt"]["token_ids"]) - 1], [1.0]
    for step in run["steps"]:
        if run["decoder"] not in ("superposed", "plain"):
            for token in step["tokens"]:
                row = token["parents"][0][0] if token["parents"] else slots[0]
                probability = math.exp(log_probs[row, token["id"]])
                compare("probability", token["probability"], probability)
                for _, posterior, forward in token["parents"]:
                    compare("posterior", posterior, 1.0)
                    compare("forward", forward, probability)
            continue
        distribution = combined([log_probs[slot] for slot in slots], weights, run["config"]["combine"])
        with_row = sum(
            float(distribution[token["id"]]) for token in step["tokens"] if token["slot"] is not None
        )
        residual = 1.0
        next_slots, next_weights = [], []
        for token in sorted(step["tokens"], key=lambda token: -1 if token["slot"] is None else token["slot"]):
            probability = float(distribution[token["id"]])
            residual -= probability
            compare("probability", token["probability"], probability)
            if token["slot"] is not None:
                compare("weight", token["weight"], probability / with_row)
                next_slots.append(token["slot"])
                next_weights.append(probability / with_row)
            forward = {slot: math.exp(log_probs[slot, token["id"]]) for slot in slots}
            total = sum(weight * forward[slot] for slot, weight in zip(slots, weights, strict=True))
            weight_of = dict(zip(slots, weights, strict=True))
            for slot, recorded_posterior, recorded_forward in token["parents"]:
                compare("posterior", recorded_posterior, weight_of[slot] * forward[slot] / total)
                compare("forward", recorded_forward, forward[slot])
        compare("residual", step["residual_probability"], residual)
        slots, weights = next_slots, next_weights
    return worst
