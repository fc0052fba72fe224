"""Several models beside each other, and what they make of each other's texts, on results whose figures are known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sacrebleu")
pytest.importorskip("rapidfuzz")
pytest.importorskip("matplotlib")

import tempo_mlx
from benchmarks.quality import across, arms, judge, results, running, summary
from benchmarks.quality.answers import Claim, beside, claims
from benchmarks.quality.page import FULL, write_page
from benchmarks.quality.prompts import read_prompts
from benchmarks.studies import append_record, read_records
from tests.test_quality import kept_run, loaded, made, never

__all__ = ["loaded"]  # a fixture


# Judges


def test_a_judge_reads_the_texts_with_its_own_tokenizer(
    loaded: tempo_mlx.LoadedModel, tmp_path: Path
) -> None:
    prompts = read_prompts("test")[:3]
    for prompt in prompts:
        append_record(
            tmp_path / "test" / "branches.jsonl",
            kept_run(prompt.id, [([1, 2], 1.0), ([3], 1.0)])
            | {
                "readings": {
                    "texts": [{"ids": [7], "text": "the é", "nats": [1, 0, 0, 0]}],
                    "drawn": [{"nats": [1] * 4}],
                }
            },
        )
    run = partial(judge.run_judge, loaded, [arms.BRANCHES, arms.BEAM], folder=tmp_path / "test",
                  judged=tmp_path / "judged", tokenizer=never)  # fmt: skip
    assert len(list(run(prompts=prompts[:2]))) == 2 and len(list(run(prompts=prompts))) == 1
    lines = read_records(tmp_path / "judged" / "branches.jsonl")
    assert [line["prompt"] for line in lines] == [prompt.id for prompt in prompts]
    (score,) = tempo_mlx.score(loaded, prompts[0].text, ["the é"])
    assert lines[0]["readings"] == {"texts": [[round(-score.log_prob, 3), len(score.log_probs), 6]]}


def test_texts_that_were_kept_as_ids_are_read_by_their_tokenizer(loaded: tempo_mlx.LoadedModel) -> None:
    ids = loaded.tokenizer.encode("the end")
    assert running.words_of({"ids": ids}, lambda: loaded.tokenizer) == "the end"
    assert running.words_of({"ids": ids, "text": "kept"}, never) == "kept"


def test_judgements_are_by_byte_and_paired(tmp_path: Path) -> None:
    """Ours take half the nats of theirs on every prompt that both have."""
    folder = tmp_path / "writer" / "full"
    readings = {"branches": "texts", "diverse-beam-1": "texts", "lineage": "best", "attend-all": "best"}
    missing = {"branches": 0, "diverse-beam-1": 5}
    for name, reading in readings.items():
        nats = 2.0 if name in ("branches", "lineage") else 4.0
        for n in range(6):
            id_ = f"code-{n:02d}"
            record = kept_run(id_, [([1, 2], 1.0)] * 5, reading)
            record["readings"] |= dict.fromkeys(running_of(name), record["readings"][reading])
            append_record(folder / "test" / f"{name}.jsonl", record)
            if n != missing.get(name):
                line = {"prompt": id_, "readings": {reading: [[nats, 1, 4], [nats, 9, 4]]}}
                append_record(folder / "judge" / "other" / f"{name}.jsonl", line)
    found, lattice = across.judge(results.Results(folder))
    assert (found.judge, found.writer, found.ours, found.theirs) == (
        "other", "writer", "branches", "diverse beam 1",
    )  # fmt: skip
    assert found.prompts == 4 and found.each == (0.5, 1.0)
    assert str(found.difference) == "-0.500 [-0.500, -0.500]" and found.verdict == "better"
    assert (lattice.theirs, lattice.prompts, lattice.difference.value) == ("attend all: best", 6, -0.5)
    others = [replace(found, difference=summary.Value(*value)) for value in ((0.1, 0.05, 0.2), (0.1, -0.05, 0.2),
                                                                            (-0.1, -0.2, 0.05))]  # fmt: skip
    assert [other.verdict for other in others] == ["worse", "undecided", "undecided"]
    enough = [replace(found, prompts=9), replace(others[0], prompts=8), replace(found, prompts=10)]
    said = across.what_holds({}, [found, *enough])[-1]
    assert said.endswith("\n  - branches, beside diverse beam 1: better (n 9, 10); worse (n 8)")
    assert (
        "| 4 | branches | diverse beam 1 | 0.500 | 1.000 | -0.500 [-0.500, -0.500] |"
        in across.judged([found])[-1]
    )


def running_of(arm: str) -> tuple[str, ...]:
    """The readings of an arm's runs."""
    return next(each.readings for each in (*arms.MAIN, *arms.STUDIES) if each.name == arm)


# Several models


def test_what_holds_names_the_models() -> None:
    def claim(what: str, low: float, value: float = 2.5, high: float = 3.0) -> Claim:
        return Claim(
            what, summary.Value(value, low, high), 2.0, True, 12, says=f"it has at least 2 of {what}"
        )

    by_model = {
        "one": [claim("all", 2.1), claim("part", 2.1), claim("no", 1.5, 1.7, 1.9)],
        "two": [claim("all", 2.2), claim("part", 1.9), claim("no", 1.9), claim("new", 2.1)],
    }
    lines = across.what_holds(by_model, [])[-1].splitlines()
    assert lines[1:] == [
        "- On every model:",
        "  - it has at least 2 of all",
        "  - it has at least 2 of new (asked of two)",
        "- On some:",
        "  - it has at least 2 of part: yes on one; undecided on two",
        "- On none:",
        "  - it has at least 2 of no: undecided on two; no on one",
    ]
    assert across.what_holds({"one": by_model["one"][:1]}, [])[-1].endswith(
        "- On some: none.\n- On none: none."
    )
    rows = across.claims_table(by_model).splitlines()
    assert rows[0] == "| claim | one | two |"
    assert rows[2] == "| all (>= 2) | 2.50 [2.10, 3.00], n 12 | 2.50 [2.20, 3.00], n 12 |"
    assert rows[5] == "| new (>= 2) | - | 2.50 [2.10, 3.00], n 12 |"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("qwen2.5-coder-0.5b-instruct-q4_k_m", "qwen2.5-coder-0.5b"),
        ("smollm2-135m", "smollm2-135m"),
        ("qwen3-4b-Q8_0", "qwen3-4b"),
    ],
)
def test_a_model_is_called_what_it_is(name: str, short: str) -> None:
    assert results.Results(Path(name) / "full").short == short


def test_one_model_stored_in_two_ways_keeps_its_names() -> None:
    models = [results.Results(Path(name) / "full") for name in ("a-1b-q4_0", "a-1b-q8_0", "b-q8_0")]
    assert across.names_of(models) == ["a-1b-q4_0", "a-1b-q8_0", "b"]


def test_a_claim_says_of_how_many_prompts_it_is() -> None:
    tests = {"branches": made("branches", [4.0, 6.0, 8.0]), "beam": made("beam", [2.0, 3.0])}
    (found,) = claims(tests)
    assert found.what == "branches: distinct-2, times beam's" and found.target == ">= 2.2"
    assert found.says == "branches have at least 2.2 times beam search's different bigrams"
    assert (found.value.value, found.prompts, found.verdict) == (2.0, 2, "**no**")


def test_seeds_are_compared_on_the_prompts_they_share(tmp_path: Path) -> None:
    folder = tmp_path / "writer" / "full"
    for seed, prompts, nats in ((0, 4, 4.0), (3, 3, 8.0)):
        for n in range(prompts):
            path = running.file_of(folder / "test", arms.NUCLEUS, seed)
            append_record(path, kept_run(f"code-{n:02d}", [([1, 2, 3, 4], nats)] * 5))
    rows = across.luck([results.Results(folder)])[-1].splitlines()[2:]
    assert [row.split(" | ")[:5] for row in rows] == [
        ["| writer", "nucleus 0.9", "0", "3", "2.72 [2.72, 2.72]"],
        ["| writer", "nucleus 0.9", "3", "3", "7.39 [7.39, 7.39]"],
    ]
    running.file_of(folder / "test", arms.NUCLEUS, 3).unlink()
    assert across.luck([results.Results(folder)]) == []


def test_longer_texts_are_not_cut_and_have_claims_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "writer" / "full"
    texts = {"greedy": [([1, 2], 2.0)], "branches": [([n, 9, 9], 3.0) for n in range(4)] + [([9], 1.0)]}
    for stage, nats in (("long", 0.0), ("test", 1.0)):
        for name, of in texts.items():
            more = [(ids, value + nats * (name == "greedy")) for ids, value in of]
            append_record(folder / stage / f"{name}.jsonl", kept_run("code-00", more))
    (tmp_path / "another" / "full" / "judge").mkdir(parents=True)
    (model,) = results.read_results(tmp_path, "full")
    title, _, table, _, said = across.longer([model])
    greedy, branches = (row.split(" | ") for row in table.splitlines()[2:])
    assert greedy[1:4] == ["greedy", "1", "2.00 [2.00, 2.00]"] and greedy[-1] == "- |"
    assert (
        branches[1:4] == ["branches", "1", "2.60 [2.60, 2.60]"] and branches[-1] == "0.625 [0.625, 0.625] |"
    )
    assert "branches: perplexity, times greedy's (<= 1.1) | 1.00 [1.00, 1.00], n 1 |" in said
    assert title.endswith("ended by the model") and across.longer([]) == []


def test_one_text_is_not_said_to_be_diverse() -> None:
    costs = {"passes": np.ones(2), "rows": np.array([2.0, 4.0])}
    one = {
        name: replace(made(name, [1.0, 2.0]), numbers=costs) for name in ("lineage: best", "beam-2: first")
    }
    five = {name: replace(made(name, [1.0, 2.0]), texts=5) for name in ("branches", "diverse-beam-1")}
    for entry in five.values():
        entry.numbers.update(costs)
    table = beside(one | five)
    assert table is not None
    several, single = table.splitlines()[2:]
    assert single == "| lineage: best | beam-2: first | 2 | 1.00 [1.00, 1.00] | - | 1.00 | 1.00 |"
    assert several.startswith("| branches | diverse-beam-1 | 2 | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |")
    assert beside({}) is None


def test_the_model_whose_tables_are_all_shown_comes_first(tmp_path: Path) -> None:
    for name in ("another", FULL):
        append_record(
            tmp_path / name / "full" / "test" / "greedy.jsonl", kept_run("code-00", [([1, 2, 3, 4], 1.0)])
        )
        (tmp_path / name / "full" / "about.json").write_text(f'{{"id": "{name}"}}')
    write_page(tmp_path, "full", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert f"Measured on {FULL}, another." in page and f"\n## {FULL} in full\n" in page
    assert page.index(f"## {FULL} in full") < page.index("## Texts of another")
