"""tests/readings.json holds Python and the page (server/web/src/lib/readings.test.ts) to one reading of a lattice."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tempo_mlx.decode.paths import is_read, trace, usable
from tempo_mlx.decode.settled import SettledReading
from tempo_mlx.decode.step import Edge, Member, Removal, Step
from tempo_mlx.report.build import inline_text
from tempo_mlx.report.run import Run
from tempo_mlx.report.stops import cut_at_stop
from tests.readings import FILE, WRONG, best_by, ranks
from tests.runs import EOS

CASES = json.loads(FILE.read_text())


def name_of(case: dict[str, Any]) -> str:
    return case["name"]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_it_is_read_as_on_the_page(case: dict[str, Any]) -> None:
    run = Run.from_json(json.dumps(case["run"]))
    for path, expected in zip(run.paths, case["paths"], strict=True):
        assert ranks(run.steps, [chosen.member for chosen in trace(run.steps, path.token_ids)]) == expected
    if run.decoder == "superposed":
        path = run.best_path()
        assert ranks(run.steps, path) == case["best"]
        texts = [token.text if is_read(token) else "" for token in path]
        assert run.final_text == cut_at_stop("".join(texts), run.config.get("stop", ()))
        assert run.text == inline_text(run.steps, texts, len(run.final_text))


@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case["run"]["decoder"] == "superposed"], ids=name_of
)
def test_a_reading_that_grows_comes_to_the_same(case: dict[str, Any], endless: bool) -> None:
    run = Run.from_json(json.dumps(case["run"]))
    removals = [(s.step, t) for s in run.steps for t in s.tokens if t.removed_after is not None]
    window = max((token.removed_after - index for index, token in removals), default=0)
    reading: SettledReading[Member] = SettledReading(None if endless else window)
    members: dict[int, Member] = {}
    found, settled = [], []
    for record in run.steps:
        for _, token in removals:
            if min(token.removed_after, len(run.steps) - 2) == record.step - 1:  # the last set is not run
                member = members[token.slot]
                member.removed_after, member.removed_why = token.removed_after, token.removed_why
        tokens = [Member(t.id, t.probability, t.slot, t.weight, t.parents) for t in record.tokens]
        members |= {member.slot: member for member in tokens if member.slot is not None}
        found += reading.add(Step(record.step, record.position, None, 0.0, tokens))
        settled.append(len(found))
        growing = [chosen.member.id for chosen in (*found, *reading.tail)]
        assert len(growing) == record.step + 1
    assert growing == [token.id for token in run.best_path()]
    assert settled[-1] == 0 or not endless


@pytest.mark.parametrize("name", WRONG)
def test_the_cases_tell_a_wrong_rule(name: str) -> None:
    runs = [Run.from_json(json.dumps(case["run"])) for case in CASES]
    lattices = [run.steps for run in runs if run.decoder == "superposed"]
    assert any(best_by(WRONG[name], steps) != best_by(usable, steps) for steps in lattices)


def test_rows_gone_beside_an_end_of_text_do_not_hold_up_the_reading() -> None:
    """The set still takes part with its rows; once a chat stream waited there until the run ended."""
    reading: SettledReading[Member] = SettledReading(window=1)
    settled = []
    for index in range(6):
        before = (2 + index,) if index else ()
        edges = tuple(Edge(slot, 1.0, 0.5) for slot in before)
        tokens = [Member(1, 0.5, 3 + index, 1.0, edges), Member(EOS, 0.25, None, None, edges)]
        if index == 3:
            row = reading.tail[-1].member
            row.removed_after, row.removed_why = 2, Removal("posterior", 0.02, 0.1)
        settled.append(
            [chosen.member.slot for chosen in reading.add(Step(index, 3 + index, None, 0.0, tokens))]
        )
    assert settled == [[], [], [3], [4], [5], [6]]
