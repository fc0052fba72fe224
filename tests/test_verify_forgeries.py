"""Verify finds every lie: a table of forgeries, each tried on honest runs of every decoder that has what it changes.

A forgery changes the JSON of a run and says whether there was anything to change. What cannot be read as a run any more
(RunFileError) is caught, too. Honest runs of every decoder, at temperatures from 0.02 to 5 and held by both backends,
must be found exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from tempo_mlx.api import generate
from tempo_mlx.errors import TempoError
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import compare, decode_settings, tolerance_for, verify
from tests.honest import KINDS, TEMPERATURES, honest
from tests.trees import loaded, prompt

Value = dict[str, Any]
Forgery = Callable[[Value], object]  # False: nothing to change

SETTINGS: dict[str, dict[str, Any]] = {
    "superposed": {"threshold": 0.02, "pruning_signal": "posterior", "posterior_threshold": 0.2, "min_steps": 2},
    "attention": {"threshold": 0.02, "attention_threshold": 0.03, "sigmoid_steepness": 0.0, "attend": "all"},
    "whole sets": {
        "threshold": 0.02, "pruning_signal": "random", "posterior_threshold": 0.9,
        "complete_removal_mode": "keep_unattended", "min_steps": 10,
    },
    "scheduled": {
        "threshold": 0.01, "final_threshold": 0.2, "dynamic_target": "both", "pruning_signal": "random",
        "posterior_threshold": 0.3, "temperature": 1.5, "seed": 3,
    },
    "paths": {"threshold": 0.02, "paths": 3, "pruning_strategy": "diversity", "max_parallel_tokens": 6},
    "screened": {"threshold": 0.02, "pruning_strategy": "coherence", "coherence_threshold": 0.9, "min_steps": 10},
    "plain": {"decoder": "plain", "temperature": 0.8, "min_steps": 10},
    "greedy": {"decoder": "plain", "temperature": 0.0, "min_steps": 10},
    "tree": {"branches": 3, "threshold": 0.02, "min_steps": 3},
    "enumerate": {"leaves": 4, "threshold": 0.02, "min_steps": 3},
    "mcts": {"decoder": "mcts", "mcts_simulations": 8, "mcts_depth": 2, "threshold": 0.02, "min_steps": 10},
    "beam": {"decoder": "beam", "beam_width": 3, "min_steps": 4},
    "diverse-beam": {"decoder": "diverse-beam", "beam_width": 3, "min_steps": 4},
    "sample": {"decoder": "sample", "beam_width": 3, "min_steps": 10, "threshold": 0.02},
}  # fmt: skip


@cache
def written(name: str) -> str:
    return generate(loaded(often=True), prompt(3), max_tokens=10, **SETTINGS[name]).to_json()


def tokens(value: Value) -> Iterator[Value]:
    for step in value["steps"]:
        yield from step["tokens"]


def wide(value: Value) -> Value:
    """A set of at least two from the middle on, or the second step."""
    steps: list[Value] = value["steps"]
    return next((step for step in steps[2:] if len(step["tokens"]) > 1), steps[2])


def first(found: Iterator[Value]) -> Value:
    return next(found, {})


def removed(value: Value) -> Value:
    return first(token for token in tokens(value) if token["removed_why"])


def alive(value: Value) -> Value:
    return first(
        token for token in tokens(value) if token["posterior"] is not None and not token["removed_why"]
    )


def put(place: Callable[[Value], Value], **changes: object) -> Forgery:
    """Set fields; a function of the old value where there is something to add to."""

    def forge(value: Value) -> object:
        node = place(value)
        if not node or any(callable(new) and node.get(name) is None for name, new in changes.items()):
            return False
        for name, new in changes.items():
            node[name] = new(node[name]) if callable(new) else new
        return True

    return forge


def more(by: float) -> Callable[[float], float]:
    return lambda value: value + by if value + by < 1.0 or by >= 1.0 else value - by


def config(where: Callable[[Value], object] = bool, **changes: object) -> Forgery:
    """Other settings than those in force, of runs where that decides anything."""

    def forge(value: Value) -> object:
        value["config"].update(changes)
        return bool(where(json.loads(json.dumps(value))))

    return forge


def draws(value: Value) -> bool:
    return value["decoder"] == "sample" or (
        value["decoder"] == "plain" and value["config"]["temperature"] > 0
    )


def stop_inside(value: Value) -> object:
    """A stop string that the text holds."""
    value["config"]["stop"] = [value["final_text"][2:4]]
    return len(value["final_text"]) > 4


def whole(value: Value) -> Value:
    return value


def token(value: Value) -> Value:
    found: Value = wide(value)["tokens"][0]
    return found


def last(value: Value) -> Value:
    found: Value = wide(value)["tokens"][-1]
    return found


def edge(value: Value) -> list[Any]:
    found: list[Any] = token(value)["parents"][0]
    return found


def rejected(value: Value) -> Value:
    return first(item for step in value["steps"] for item in step["rejected"])


def path(value: Value) -> Value:
    return first(iter(value["paths"]))


def node(value: Value) -> Value:
    """A visited node of a search, below the root's children where there is one."""
    if value["decoder"] != "mcts":
        return {}
    nodes = [each for step in value["tree"]["steps"] for each in step["nodes"] if each["visits"]]
    return first(each for each in nodes if each["parent"] is not None) or first(iter(nodes))


def change_edge(place: int, by: float) -> Forgery:
    def forge(value: Value) -> object:
        edge(value)[place] = more(by)(edge(value)[place])

    return forge


def shift_posterior(value: Value) -> object:
    """P(i|j) of two parents, so that they still sum to 1."""
    parents = token(value)["parents"]
    if len(parents) < 2:
        return False
    moved = parents[0][1] / 2
    parents[0][1] -= moved
    parents[1][1] += moved
    return moved > 1e-6


def without_last(value: Value) -> object:
    value["steps"].pop()
    newest = len(value["steps"]) - 1
    for each in tokens(value):
        if each["removed_after"] is not None and each["removed_after"] > newest:
            each.update(removed_after=None, removed_why=None)
    if value["decoder"] == "mcts":
        value["tree"]["steps"].pop()


def without_a_member(value: Value) -> object:
    """The least probable of the last set, which no row follows."""
    step = value["steps"][-1]
    if len(step["tokens"]) < 2:
        return False
    gone = step["tokens"].pop()
    for each in step["tokens"]:
        if each["slot"] is not None and gone["slot"] is not None:
            each["slot"] -= 1
    return True


def reversed_steps(value: Value) -> object:
    """Two neighbouring steps say what the other does."""
    one, other = value["steps"][3], value["steps"][4]
    for a, b in zip(one["tokens"], other["tokens"], strict=False):
        a["id"], b["id"], a["text"], b["text"] = b["id"], a["id"], b["text"], a["text"]


def other_id(value: Value) -> object:
    ids = {each["id"] for each in wide(value)["tokens"]}
    token(value)["id"] = next(i for i in range(40, 90) if i not in ids and i % 16)


def swap_members(value: Value) -> object:
    step = wide(value)
    if len(step["tokens"]) < 2:
        return False
    a, b = step["tokens"][:2]
    a["id"], b["id"], a["text"], b["text"] = b["id"], a["id"], b["text"], a["text"]
    return True


def swap_slots(value: Value) -> object:
    with_slot = [each for each in wide(value)["tokens"] if each["slot"] is not None]
    if len(with_slot) < 2:
        return False
    a, b = with_slot[:2]
    a["slot"], b["slot"] = b["slot"], a["slot"]
    return True


def forget_removal(value: Value) -> object:
    found = removed(value)
    found and found.update(removed_after=None, removed_why=None)
    return bool(found)


def removal_later(value: Value) -> object:
    found = first(
        t for t in tokens(value) if t["removed_why"] and t["removed_after"] + 1 < len(value["steps"])
    )
    found and found.update(removed_after=found["removed_after"] + 1)
    return bool(found)


def invent_removal(value: Value) -> object:
    steps = value["steps"]
    found = first(t for t in tokens({"steps": steps[:5]}) if t["slot"] is not None and not t["removed_why"])
    signal = value["config"]["pruning_signal"] or "posterior"
    why = {"signal": signal, "score": 0.01, "threshold": 0.1, "unattended": False}
    found and found.update(removed_after=len(steps) - 2, removed_why=why)
    return bool(found) and len(steps) > 7


def change_why(**changes: object) -> Forgery:
    return put(lambda value: removed(value).get("removed_why") or {}, **changes)


def swap_paths(value: Value) -> object:
    paths = value["paths"]
    if len(paths) < 2:
        return False
    paths[0], paths[1] = paths[1], paths[0]
    return True


def drop_path(value: Value) -> object:
    return len(value["paths"]) > 1 and bool(value["paths"].pop())


def shorten_path(value: Value) -> object:
    found = path(value)
    return bool(found) and len(found["token_ids"]) > 1 and bool(found["token_ids"].pop())


def add_rejected(value: Value) -> object:
    item = {"id": 77, "text": "n", "probability": 0.3, "why": "diversity: same cluster as candidate 0"}
    wide(value)["rejected"].append(item)


def drop_rejected(value: Value) -> object:
    step = first(step for step in value["steps"] if step["rejected"])
    return bool(step) and bool(step["rejected"].pop())


def end_too_early(value: Value) -> object:
    """A token that ends the text, where min_steps rules that out: as if it had no row."""
    if value["config"]["min_steps"] < 10:
        return False
    value["config"]["min_steps"] = 0
    value["steps"][-1]["tokens"][0]["id"] = 257
    return True


def tree_total(name: str, by: int) -> Forgery:
    return put(lambda v: v["tree"] if v["decoder"] == "mcts" else {}, **{name: lambda number: number + by})


def add_unvisited(value: Value) -> object:
    """A node that nobody visited, below one that somebody did."""
    found = node(value)
    if found.get("parent") is None:
        return False
    nodes = next(step["nodes"] for step in value["tree"]["steps"] if found in step["nodes"])
    nodes.append({**found, "parent": nodes.index(found), "id": 77, "text": "n", "visits": 0, "value": 0.0})
    return found["text"] and not any(each["parent"] == nodes.index(found) for each in nodes[:-1])


def hide_node(value: Value) -> object:
    if value["decoder"] != "mcts":
        return False
    nodes = next(step["nodes"] for step in value["tree"]["steps"] if len(step["nodes"]) > 2)
    return bool(nodes.pop())


def early(layer: int, on: bool) -> Forgery:
    def forge(value: Value) -> object:
        """The switch that made any verdict good: one step that says it left early, beside another lie."""
        value["steps"][0]["exit_layer"] = layer
        if on:
            if value["decoder"] not in ("superposed", "plain", "tree"):
                return False
            value["config"]["early_exit"] = True
            value["early_exit"] = {"exits": [{"layer": layer}]}
        token(value)["probability"] = more(0.05)(token(value)["probability"])
        return True

    return forge


FORGERIES: dict[str, Forgery] = {
    # texts
    "final_text": put(whole, final_text=" Berlin"),
    "text": put(whole, text=" Berlin"),
    "both texts": put(whole, text=" Berlin", final_text=" Berlin"),
    "a letter more": put(whole, final_text=lambda text: text + "!"),
    "a token's text": put(token, text=" lie"),
    "the last token's text": put(lambda v: v["steps"][-1]["tokens"][0], text=" lie"),
    "another member's text": put(lambda v: last(v) if len(wide(v)["tokens"]) > 1 else {}, text=" lie"),
    "the prompt's text": put(lambda v: v["prompt"], text="Who?"),
    "the prompt's tokens": lambda v: v["prompt"]["token_ids"].__setitem__(1, 99),
    "a rejected text": put(rejected, text=" lie"),
    "reasoning": put(whole, reasoning="I thought long."),
    # numbers of members
    "a probability": put(token, probability=more(0.01)),
    "a small probability": put(last, probability=more(0.002)),
    "every probability of a set": lambda v: [
        t.update(probability=t["probability"] * 0.9) for t in wide(v)["tokens"]
    ],
    "a probability and its residual": lambda v: [
        token(v).update(probability=token(v)["probability"] - 0.001),
        wide(v).update(residual_probability=wide(v)["residual_probability"] + 0.001),
    ],
    "a residual": put(wide, residual_probability=more(1e-6)),
    "a weight": put(lambda v: first(t for t in tokens(v) if t["weight"] is not None), weight=more(1e-6)),
    "P(i|j)": shift_posterior,
    "P(j|i)": change_edge(2, 0.001),
    "P(i|j) of one parent": change_edge(1, 0.001),
    "a position": put(wide, position=lambda position: position + 1),
    "a member's position": put(token, position=9),
    "a posterior": put(alive, posterior=more(1e-6)),
    "every posterior": lambda v: (
        [t.update(posterior=0.5) for t in tokens(v) if t["posterior"] is not None] != []
    ),
    "a posterior where there is none": put(lambda v: v["steps"][-1]["tokens"][0], posterior=0.5),
    "no posterior": put(alive, posterior=None),
    "an attention": put(lambda v: first(t for t in tokens(v) if t["attention"]), attention=more(1e-3)),
    "no attention": put(lambda v: first(t for t in tokens(v) if t["attention"]), attention=None),
    "no attention at all": lambda v: (
        [t.update(attention=None) for t in tokens(v) if t["attention"] is not None] != []
    ),
    "an attention where there is none": put(
        lambda v: first(t for t in tokens(v) if t["attention"] is None), attention=0.2
    ),
    "a branch": put(token, branch=lambda branch: branch + 1),
    "a branch where there is none": put(lambda v: token(v) if "branch" not in token(v) else {}, branch=1),
    # which tokens
    "another token": other_id,
    "members that swap": swap_members,
    "slots that swap": swap_slots,
    "steps that swap": reversed_steps,
    "a step left out": without_last,
    "a step left out, as if that were the length": lambda v: [
        without_last(v),
        v["config"].update(max_tokens=9),
    ][0],
    "a member left out": without_a_member,
    "a token that ends the text": end_too_early,
    # candidates
    "a rejected probability": put(rejected, probability=more(0.01)),
    "a rejected token": put(rejected, id=77, text="n"),
    "a reason": put(rejected, why="taste"),
    "a candidate that was none": add_rejected,
    "a candidate left out": drop_rejected,
    # removals
    "a removal forgotten": forget_removal,
    "a removal one step late": removal_later,
    "a removal that was none": invent_removal,
    "a score": change_why(score=more(0.05)),
    "a bound": change_why(threshold=more(0.05)),
    "a signal": change_why(signal="probability"),
    "unattended": change_why(unattended=lambda said: not said),
    # readings
    "a path's text": put(path, text=" lie"),
    "a path's log-probability": put(path, logprob=more(1.0)),
    "a path's log-probability, not exact": put(path, logprob=more(1.0), exact=False),
    "paths that swap": swap_paths,
    "a path left out": drop_path,
    "a path cut short": shorten_path,
    # settings
    "threshold": config(threshold=0.004),
    "a higher threshold": config(threshold=0.3),
    "a step's threshold": put(wide, threshold=0.5),
    "min_steps": config(lambda v: not draws(v), min_steps=0),
    "temperature": config(temperature=1.05),
    "max_tokens": config(max_tokens=500),
    "fewer max_tokens": config(max_tokens=5, min_steps=0),
    "seed": config(lambda v: v["config"]["pruning_signal"] == "random", seed=99),
    "posterior_threshold": config(posterior_threshold=0.25),
    "pruning_signal": config(
        lambda v: removed(v) or v["decoder"] != "superposed", pruning_signal="probability"
    ),
    "no pruning": config(pruning_signal=None),
    "pruning_window": config(lambda v: v["config"]["pruning_signal"] != "random", pruning_window=1),
    "removal mode": config(
        lambda v: any(t["removed_why"]["unattended"] for t in tokens(v) if t["removed_why"]),
        complete_removal_mode="remove_position",
    ),
    "attend": config(attend="weighted"),
    "combine": config(combine="mean"),
    "max_parallel_tokens": config(max_parallel_tokens=1),
    "selection": config(selection="top-k", top_k=2),
    "width": config(beam_width=2, branches=2),
    "custom_rope": config(custom_rope=False),
    "stop": stop_inside,
    "strategy": config(pruning_strategy=None),
    "paths": config(paths=1),
    "simulations": config(mcts_simulations=7),
    "depth": config(mcts_depth=3),
    "decoder": put(whole, decoder="plain"),
    "decoder, in the settings too": lambda v: [
        v.update(decoder="plain"),
        v["config"].update(decoder="plain"),
    ],
    # what the whole says
    "finish_reason": put(whole, finish_reason=lambda reason: "stop" if reason == "length" else "length"),
    "memory": put(whole, finish_reason="memory"),
    "timeout": put(whole, finish_reason="timeout"),
    "left early, and a lie": early(2, on=False),
    "left early by the settings, and a lie": early(2, on=True),
    "an audit": put(whole, early_exit={"exits": []}),
    "a search where there was none": put(lambda v: v if v["tree"] is None else {}, tree={"steps": []}),
    "no search": put(lambda v: v if v["tree"] is not None else {}, tree=None),
    # searches
    "a value": put(node, value=more(0.01)),
    "visits": put(node, visits=lambda visits: visits + 1),
    "a prior": put(
        lambda v: first(iter(v["tree"]["steps"][0]["nodes"])) if v["decoder"] == "mcts" else {},
        prior=more(1e-3),
    ),
    "a deeper prior": put(node, prior=more(0.01)),
    "a node's text": put(node, text=" lie"),
    "a node left out": hide_node,
    "a node that nobody visited": add_unvisited,
    "a node above itself": put(node, parent=10_000),
    "simulations in all": tree_total("simulations", 1),
    "rows in all": tree_total("rows", 20),
    "depth in all": tree_total("max_depth", 1),
    "forward passes without end": tree_total("forward_passes", 100_000),
}


def caught(value: Value) -> bool:
    try:
        return not verify(Run.from_json(json.dumps(value)), loaded(often=True)).ok
    except TempoError:
        return True


# What only one kind of run has. Every other forgery is tried, and caught, on at least three.
FEW = frozenset({
    "a rejected text", "a rejected probability", "a rejected token", "a reason", "a candidate left out",
    "P(i|j)", "an attention", "no attention", "no attention at all", "seed", "removal mode", "strategy", "no search",
    "a value", "visits", "a prior", "a deeper prior",
    "a node's text", "a node left out", "a node that nobody visited", "a node above itself", "simulations in all",
    "rows in all", "depth in all", "forward passes without end", "pruning_window",
})  # fmt: skip


def test_the_runs_have_what_is_forged() -> None:
    """Else the table proves little."""
    runs = {name: Run.from_json(written(name)) for name in SETTINGS}
    for name in ("superposed", "attention", "whole sets", "scheduled", "tree", "beam"):
        assert any(token.removed_why for step in runs[name].steps for token in step.tokens), name
    assert any(t.removed_why and t.removed_why.unattended for s in runs["whole sets"].steps for t in s.tokens)
    assert all(len(run.steps) == 10 and run.final_text for run in runs.values())
    assert runs["paths"].paths and any(step.rejected for step in runs["paths"].steps)
    for name, run in runs.items():
        result = verify(run, loaded(often=True))
        assert result.ok, (name, result.findings)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_seed_that_drew_is_said_to_be_taken_at_its_word(name: str) -> None:
    """Any other seed passes there, and nowhere else where it decides something."""
    value = json.loads(written(name))
    value["config"]["seed"] = 99
    result = verify(Run.from_json(json.dumps(value)), loaded(often=True))
    said = [sentence for sentence in result.left_open if "seed 99" in sentence and "--rerun" in sentence]
    assert bool(said) == draws(value) and result.ok != (value["config"]["pruning_signal"] == "random")


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_caught_wherever_it_can_be_made(name: str) -> None:
    tried = []
    for kind in SETTINGS:
        value = json.loads(written(kind))
        if FORGERIES[name](value) is False or value == json.loads(written(kind)):
            continue
        assert caught(value), kind
        tried.append(kind)
    assert len(tried) >= (1 if name in FEW else 3), tried


@pytest.mark.parametrize(
    ("name", "words"),
    [("a removal forgotten", "so it is removed"), ("slots that swap", "the order of the slots of step")],
)
def test_a_forgery_is_called_by_what_it_is(name: str, words: str) -> None:
    """Others of its traces are found as well; the sentence that names it must be among them."""
    value = json.loads(written("superposed"))
    assert FORGERIES[name](value)
    found = verify(Run.from_json(json.dumps(value)), loaded(often=True)).findings
    assert any(words in sentence for sentence in found), found


def test_there_are_forgeries_enough() -> None:
    assert len(FORGERIES) - len(FEW) >= 60 and set(FORGERIES) >= FEW


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("decoder", KINDS)
def test_honest_runs_are_found_exact(decoder: str, backend: str) -> None:
    """Ten of each decoder, from 0.02 to 5 and at 0, on the backend that made them and on the other."""
    for kind in range(len(TEMPERATURES)):
        run = honest(decoder, kind, backend)
        for other in ("mlx", "torch"):
            result = verify(run, loaded(backend=other, often=True))
            assert result.ok, (kind, other, result.findings)


LIES = (
    "text", "final_text", "a token's text", "every posterior", "a rejected text", "a value", "a path's text",
    "a score", "a branch", "finish_reason", "the prompt's text",
)  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_decoding_again_gives_the_same_and_shows_a_lie(name: str) -> None:
    """In everything that is said: a text, a posterior, a candidate, a search, a path."""
    model, run = loaded(often=True), Run.from_json(written(name))
    config = decode_settings(run)
    again = generate(model, run.prompt, config)
    tolerance = tolerance_for(model.model, run, config)
    assert compare(run, again, tolerance, model.tokenizer).ok
    for lie in LIES:
        value = json.loads(written(name))
        if FORGERIES[lie](value) is False or value == json.loads(written(name)):
            continue
        found = compare(Run.from_json(json.dumps(value)), again, tolerance, model.tokenizer)
        assert len(found.differences) >= 1, lie
