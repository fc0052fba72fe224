"""The task benchmark: what it counts, and problems that are run side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tempo_mlx
from benchmarks.tasks import page
from benchmarks.tasks.arms import ARMS, Arm, arms_for
from benchmarks.tasks.problems import WORKED, Problem, Task, has, read_task, sum_, words_of
from benchmarks.tasks.running import run_arm
from benchmarks.tasks.summary import (
    auroc,
    best_mean,
    confidence,
    majority,
    pass_at,
    program_of,
    programs,
    shared,
    verified,
)
from tests import twins

RECORD: dict[str, Any] = {
    "problem": "one",
    "texts": ["a", "b", "c", "c"],
    "answers": ["1", "2", "2", None],
    "right": [False, True, True, False],
    "shown": [False, False, True, False],
    "logprobs": [-0.1, -2.0, -3.0, -3.0],
    "tokens": [1, 40, 10, 10],
    "rows": 40,
    "passes": 20,
    "seconds": None,
}


def test_of_texts_in_order_the_first_count_and_of_drawn_ones_any() -> None:
    assert [pass_at(k)("enumerate", RECORD) for k in (1, 2)] == [0.0, 1.0]
    drawn = [pass_at(k)("nucleus", RECORD) for k in (1, 2, 3, 4)]
    assert drawn == pytest.approx([2 / 4, 1 - 1 / math.comb(4, 2), 1.0, 1.0])


def test_votes_count_once_each_or_by_mass() -> None:
    assert majority(by_mass=False)("enumerate", RECORD) == 1.0  # two say 2
    assert majority(by_mass=True)("enumerate", RECORD) == 0.0  # e^-0.1 is more than e^-2 and e^-3
    mass, right = confidence(RECORD, by_mass=True)
    assert (mass, right) == (pytest.approx(math.exp(-0.1)), False)
    assert confidence(RECORD, by_mass=False) == (0.5, True)
    programs = {
        **RECORD,
        "texts": ["    return 1", "    a = 2; return a", "    b = 2\n    return b", "    return"],
    }
    assert majority(False, program_of)("enumerate", {**programs, "answers": programs["texts"]}) == 1.0


def test_the_text_that_is_chosen() -> None:
    assert best_mean("enumerate", RECORD) == 1.0  # -2 / 40 is the best of a token
    assert verified("enumerate", RECORD) == 1.0  # the third does what is shown
    assert verified("enumerate", {**RECORD, "shown": None}) == 0.0  # the first


def test_programs_differ_by_more_than_names_comments_and_layout() -> None:
    same = ["    for i in x: print(i)", "    # so\n    for one in x:\n        'each'\n        print(one)\n"]
    others = ["    for i in x: print(x)", "    for i in y: print(i)", "    for i in"]
    assert programs("", {"texts": [*same, *others]}) == 4
    assert shared("", {"texts": ["abcd", "abce", "xbcd", "abcd"]}) == pytest.approx((3 / 4 + 0 + 1) / 3)


@pytest.mark.parametrize(
    ("confidences", "area"), [([0.9, 0.8, 0.1], 1.0), ([0.1, 0.2, 0.9], 0.0), ([0.5, 0.5, 0.5], 0.5)]
)
def test_area_under_the_curve(confidences: list[float], area: float) -> None:
    assert auroc(confidences, [True, True, False]) == area
    assert math.isnan(auroc(confidences, [True] * 3))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Canberra", True),
        ("The capital is **Canberra**.", True),
        ("canberran", False),
        (
            "Sydney, Melbourne, Perth, Hobart, Darwin, Adelaide, Brisbane, Cairns, Canberra or Newcastle",
            False,
        ),
    ],
)
def test_an_answer_has_the_right_words_and_few_others(text: str, right: bool) -> None:
    assert has(words_of(text), words_of("Canberra")) is right


def test_the_questions_are_150_and_another_data_set_is_refused(tmp_path: Path) -> None:
    assert len(read_task("questions", None).problems) == 150
    other = tmp_path / "other.jsonl"
    other.write_text("{}\n")
    with pytest.raises(SystemExit, match="the results are of"):
        read_task("humaneval", other)


def test_a_sum_follows_worked_ones_and_is_right_by_its_last_number() -> None:
    problem = sum_("one", {"question": "How many?", "answer": "2 * 600 = 1200\n#### 1,200"})
    assert problem.prompt.startswith(WORKED) and problem.prompt.endswith("Question: How many?\nAnswer:")
    worked = [part.rsplit("The answer is ", 1)[1] for part in WORKED.strip().split("\n\n")]
    assert worked == ["42.", "185.", "298."]
    assert problem.solves(" 2 * 600 = 1200. The answer is 1,200.") and not problem.solves(" 1200 or 1201")


@pytest.mark.parametrize("name", ["greedy", "nucleus", "enumerate", "branches-3"])
def test_problems_side_by_side_are_what_they_are_alone(tmp_path: Path, name: str) -> None:
    loaded = tempo_mlx.load(str(twins.twin("llama")))
    problems = [
        Problem(str(n), f"the {said} sand", lambda text: "a" in text, None, lambda text: text)
        for n, said in enumerate(("white", "red", "old", "last sea of"))
    ]
    task = Task("made", problems, {"max_tokens": 8})
    arm = next(arm for arm in ARMS if arm.name == name)
    files = {together: tmp_path / f"{together}.jsonl" for together in (1, 3)}
    for together, path in files.items():
        assert len(list(run_arm(loaded, task, arm, problems[:3], path, together))) == 3
        assert len(list(run_arm(loaded, task, arm, problems, path, together))) == 1  # what is there is kept
    alone, beside = (page.read_records(path) for path in files.values())
    same = ("problem", "texts", "tokens", "right", "rows", "passes", "finish")
    order = {record["problem"]: record for record in beside}
    for record in alone:
        assert {key: record[key] for key in same} == {key: order[record["problem"]][key] for key in same}
        assert record["seconds"] > 0 and order[record["problem"]]["seconds"] is None


def test_the_page_says_what_the_files_say(tmp_path: Path) -> None:
    for folder, arm, right, seconds in (
        ("humaneval", "greedy", [True], None),
        ("humaneval", "nucleus", [True, False], None),
        ("humaneval-timing", "greedy", [True], 4.0),
    ):
        path = tmp_path / "results" / "made" / folder / f"{arm}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = ["a", "b"][: len(right)]
        record = RECORD | {"texts": texts, "right": right, "shown": right, "seconds": seconds}
        record |= {"logprobs": [-1.0] * len(right), "tokens": [3] * len(right), "answers": texts}
        path.write_text(json.dumps(record) + "\n")
    page.write_page(tmp_path / "results", tmp_path / "tasks.md")
    lines = (tmp_path / "tasks.md").read_text().splitlines()
    greedy, nucleus = (
        next(line for line in lines if line.startswith(f"| {name}")) for name in ("greedy", "nucleus")
    )
    assert greedy.split(" | ")[1:3] == ["1", "1.000 [1.000, 1.000]"] and greedy.endswith(" 40 | 20 | 4.0 |")
    assert nucleus.split(" | ")[2] == "0.500 [0.500, 0.500]" and nucleus.endswith(" 40 | 20 | |")


def test_how_many_samples_take_as_many_rows() -> None:
    found = {"nucleus": {"one": RECORD}}  # 40 rows for 8 texts
    assert [page.texts_for(rows, found) for rows in (1, 21, 39, 400)] == [1, 4, 8, 8]
    always = {"one": {**RECORD, "right": [False] * 4 + [True] * 4}}
    half = page.against(
        "branches-3", pass_at(8), "nucleus", pass_at(4), {"branches-3": always, "nucleus": always}
    )
    assert half.value == pytest.approx(1 / math.comb(8, 4))  # of four drawn none is right once in 70


def test_an_arm_that_is_not_finished_is_no_column_of_the_table() -> None:
    every = {"one": RECORD, "two": RECORD}
    found, missing = page.whole({"greedy": every, "nucleus": {"one": RECORD}})
    assert list(found) == ["greedy"] and missing == "nucleus sampling, T 0.8, p 0.95 (1 of 2)"
    assert page.whole({}) == ({}, "")


def test_arms_for_tuning_are_not_reported() -> None:
    tried = {arm.name for arm in ARMS if arm.tried}
    assert tried and not tried & {arm.name for arm in arms_for("humaneval", tuning=False)}
    assert tried <= {arm.name for arm in arms_for("humaneval", tuning=True)}
    assert isinstance(ARMS[0], Arm)
