"""Lattices and how they are read: cases that Python and the page must agree on (tests/readings.json).

`python -m tests.readings` writes the file anew: small random lattices, those written by hand, and for every wrong rule
below the smallest lattice that hypothesis finds it to misread. Look at what changed before you commit it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import find, settings
from hypothesis import strategies as st

from tempo_mlx.decode.paths import (
    best_paths,
    is_usable,
    layer_after,
    layers_of,
    members_of,
    token_ids,
    trace,
    usable,
)
from tempo_mlx.decode.step import Edge, Member, Removal, Step
from tempo_mlx.report.records import RunPath
from tests.runs import EOS, ByteTokenizer, make_run, sky_steps, step

FILE = Path(__file__).with_suffix(".json")
PROMPT = 3  # tokens
GONE = Removal("posterior", 0.02, 0.1)
UNATTENDED = Removal("posterior", 0.02, 0.1, unattended=True)
TEXTS = [
    "<eos>",
    " was",
    " is",
    "\twas",
    "\tis",
    "\u00a0x",
    "\u00a0y",
    "\r\nwas",
    "\r\nis",
    "  a",
    " \tb",
    "\n",
    "\n\n",
]
TEXTS += ["x", ""]
TOKENIZER = ByteTokenizer([*(text.encode() for text in TEXTS), b"\xe2\x82", b"\xac", b" \xe2"])
LIKELY = (0.31, 0.17, 0.11, 0.07)

Rule = Callable[[Any, bool], Sequence[Member]]
Pick = Callable[[Sequence[Any]], Any]

WRONG: dict[str, Rule] = {
    "a middle set's end of text keeps the set's rows out": lambda step, last: [
        m for m in (list(filter(is_usable, step.tokens)) or step.tokens) if last or m.slot is not None
    ] or [step.tokens[-1]],
    "a removed member is read all the same": lambda step, last: [
        m for m in step.tokens if last or m.slot is not None
    ],
    "an unattended member is not read": lambda step, last: [
        m for m in usable(step, last) if m.removed_after is None
    ] or [m for m in step.tokens if last or m.slot is not None],
    "a set that is gone has its most probable member only": lambda step, last: [
        m for m in usable(step, last) if is_usable(m)
    ] or usable(step, last)[:1],
    "a path may not end with the end of text": lambda step, last: usable(step, False) or step.tokens,
    "the last set is read as those before it": lambda step, last: usable(step, True)
    if all(m.slot is None for m in step.tokens)
    else usable(step, False),
    "the most probable member is read": lambda step, last: usable(step, last)[:1],
    "ties go to the less probable": lambda step, last: usable(step, last)[::-1],
}  # fmt: skip


def best_by(rule: Rule, steps: Sequence[Step]) -> list[int]:
    """Ranks of the best path's members, if this rule said which a path may use."""
    layers: list[Any] = []
    for index, each in enumerate(steps):
        layers.append(layer_after(layers[-1] if layers else None, rule(each, index + 1 == len(steps))))
    return ranks(steps, members_of(layers, best_paths(layers)[0]))


def ranks(steps: Sequence[Any], members: Sequence[Any]) -> list[int]:
    """The place of each member in its set."""
    return [
        next(rank for rank, token in enumerate(each.tokens) if token is member)
        for each, member in zip(steps, members, strict=False)
    ]


def lattice(pick: Pick) -> list[Step]:
    """A lattice of up to four sets of up to three rows, some of whose members are removed or end the text."""
    count, slot, before = pick((1, 2, 3, 4)), PROMPT, []
    steps = []
    for index in range(count):
        last = index + 1 == count
        width, first = pick((1, 2, 3)), pick(range(1, len(TOKENIZER.pieces)))
        ids = [1 + (first + place) % (len(TOKENIZER.pieces) - 1) for place in range(width)]
        if pick((False, True)):
            ids.append(EOS)
        members = []
        rows = sum(token != EOS for token in ids)
        for place, token in enumerate(ids):
            edges = tuple(Edge(s, 1 / len(before), pick((0.5, 0.23, 0.07, 0.0))) for s in before)
            if token == EOS:
                members.append(Member(token, LIKELY[place], None, None, edges))
                continue
            member = Member(token, LIKELY[place], slot + rows - 1 - place, 0.5, edges)
            why = None if last else pick((None, GONE, UNATTENDED))
            if why is not None:
                member.removed_after, member.removed_why = pick(range(index + 1, count)), why
            members.append(member)
        before = list(range(slot, slot + rows))
        slot += rows
        steps.append(step(index, members))
    return steps


@st.composite
def lattices(draw: st.DrawFn) -> list[Step]:
    return lattice(lambda options: draw(st.sampled_from(options)))


def clear(steps: Sequence[Step]) -> bool:
    """Whether no other path is so nearly as probable that rounding could decide."""
    found = best_paths(layers_of(steps), 2)
    return len(found) == 1 or found[0].score - found[1].score > 1e-6


def pair(first: str, second: str) -> list[Step]:
    """One set of these two texts, and one that says which was meant."""
    one, two = TEXTS.index(first), TEXTS.index(second)
    return [step(0, [Member(one, 0.31, 4, 0.6), Member(two, 0.17, 3, 0.4)])]


def tie() -> list[Step]:
    """Two members that are alike but for their probability, then one that follows both alike."""
    edges = (Edge(3, 0.5, 0.25), Edge(4, 0.5, 0.25))
    first = [Member(1, 0.25, 4, 0.5), Member(2, 0.25, 3, 0.5)]
    return [step(0, first), step(1, [Member(13, 0.25, 5, 1.0, edges)])]


def branches() -> list[Step]:
    """Three texts: one ended early, two take the same token; one more was merged."""

    def on(
        token: int, probability: float, slot: int | None, branch: int, parent: int | None = None
    ) -> Member:
        edges = () if parent is None else (Edge(parent, 1.0, probability),)
        return Member(token, probability, slot, None if slot is None else 0.25, edges, branch=branch)

    first = [on(1, 0.5, 5, 0), on(2, 0.25, 4, 1), on(9, 0.125, 3, 2)]
    second = [on(EOS, 0.875, None, 0, 5), on(13, 0.75, 7, 1, 4), on(13, 0.5, 6, 2, 3)]
    third = [on(1, 0.5, 9, 2, 6), on(1, 0.25, 8, 1, 7)]
    first[0].removed_after, first[0].removed_why = 1, Removal("finished", -0.8, 0.0, unattended=True)
    return [step(0, first), step(1, second), step(2, third)]


def case(
    name: str, steps: Sequence[Step], paths: Sequence[Sequence[int]] | None = None, **config: Any
) -> dict[str, Any]:
    """A run, the ranks of its best path, and those of each of its paths."""
    decoder = "superposed" if paths is None else "tree"
    layers = layers_of(steps)
    if paths is None:
        paths = [ids for ids in (token_ids(layers, path) for path in best_paths(layers, 3)) if ids]
    recorded = [
        RunPath(tuple(ids), "".join(TOKENIZER.token_text(i) for i in ids if i), -1.0, True) for ids in paths
    ]
    run = replace(make_run(steps, TOKENIZER, decoder=decoder, paths=recorded, config=config), versions={})
    traces = [ranks(steps, [chosen.member for chosen in trace(steps, ids)]) for ids in paths]
    best = ranks(steps, members_of(layers, best_paths(layers)[0])) if decoder == "superposed" else traces[0]
    return {"name": name, "best": best, "paths": traces, "run": run.to_dict()}


def cases() -> list[dict[str, Any]]:
    found = [
        case(f"hypothesis: {name}", find(
            lattices(),
            lambda steps, rule=rule: clear(steps) and best_by(rule, steps) != best_by(usable, steps),
            settings=settings(derandomize=True, database=None, max_examples=20_000),
        ))
        for name, rule in WRONG.items() if not name.startswith("ties")
    ]  # fmt: skip
    found += [case(f"texts {a!r} and {b!r}", pair(a, b)) for a, b in pairwise(TEXTS[1:])]
    found.append(case("a tie", tie()))
    found.append(case("branches", branches(), [[1, EOS], [2, 13, 1], [9, 13, 1]]))
    for stop in (["\twas"], ["as"], ["x", "y"], [" is"], ["\u00a0y"], ["not there"]):
        found.append(case(f"stop {stop}", sky_steps(), stop=stop))
    random = np.random.default_rng(1)
    while len(found) < 56:
        steps = lattice(lambda options: options[int(random.integers(len(options)))])
        if len(steps) > 2 and clear(steps):
            found.append(case(f"random {len(found)}", steps))
    return found


if __name__ == "__main__":
    FILE.write_text("[\n" + ",\n".join(json.dumps(each) for each in cases()) + "\n]\n")
