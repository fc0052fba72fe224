"""The quality benchmark: its measures on texts whose answer is known, its readings, and a quick run to the page."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sacrebleu")
pytest.importorskip("rapidfuzz")
pytest.importorskip("matplotlib")

import tempo_mlx
from benchmarks.quality import __main__ as command
from benchmarks.quality import arms, divergence, metrics, running, summary
from benchmarks.quality.prices import price
from benchmarks.quality.prompts import KINDS, Prompt, read_prompts
from tempo_mlx.decode.combine import log_probabilities
from tests import twins

ALIKE, APART = [[1, 2, 3, 4]] * 5, [[10 * i + j for j in range(4)] for i in range(5)]


@pytest.fixture(scope="module")
def loaded() -> tempo_mlx.LoadedModel:
    return tempo_mlx.load(str(twins.twin("llama")))


def test_the_prompts_are_split_evenly() -> None:
    everything = read_prompts()
    assert len(everything) == len({p.id for p in everything}) == len({p.text for p in everything}) == 120
    assert Counter(p.kind for p in everything) == dict.fromkeys(KINDS, 20)
    assert Counter(p.kind for p in read_prompts("tuning")) == dict.fromkeys(KINDS, 6)
    assert Counter(p.kind for p in read_prompts("test")) == dict.fromkeys(KINDS, 14)
    assert [p.kind for p in read_prompts("test")[:12]] == [*KINDS, *KINDS]
    assert all(p.text == p.text.rstrip(" ") for p in everything)  # a last space would be half a token


def test_measures_of_texts_that_are_all_alike_and_all_apart() -> None:
    assert metrics.distinct(ALIKE, 2) == pytest.approx(1 / 5) and metrics.distinct(APART, 2) == 1.0
    assert metrics.vendi(ALIKE) == pytest.approx(1.0) and metrics.vendi(APART) == pytest.approx(5.0)
    assert metrics.edit_distance(ALIKE) == 0.0 and metrics.edit_distance(APART) == 1.0
    assert metrics.edit_distance([[1, 2, 3, 4], [1, 3, 4]]) == pytest.approx(1 / 4)
    assert metrics.unique(ALIKE) == 1 and metrics.unique(APART) == 5
    assert metrics.self_bleu(["a cat sat on a mat"] * 3) == pytest.approx(100.0)
    assert metrics.self_bleu(["a cat sat on mats", "we drink tea there now"]) < 5
    assert metrics.repetition([[1, 2, 3, 1, 2, 3], [1, 2, 3, 4, 5, 6]]) == pytest.approx(1 / 8)


def test_texts_that_are_missing_count_as_repeated() -> None:
    few, many = (
        metrics.diversity(texts, ["a b c", "d e f"], 5)
        for texts in (APART[:2], [*APART[:2], *[APART[0]] * 3])
    )
    assert few["distinct_2"] == many["distinct_2"] == pytest.approx(2 / 5)
    assert few["unique"] == 2 and few["vendi"] == pytest.approx(many["vendi"]) and few["self_bleu"] > 50


def test_the_vendi_score_of_two_pairs_is_two() -> None:
    assert metrics.vendi([[1, 2, 3], [1, 2, 3], [7, 8, 9], [7, 8, 9]]) == pytest.approx(2.0)


def test_intervals_hold_the_figure_and_pairs_share_their_prompts() -> None:
    entry = made("one", [1.0, 2.0, 3.0, 4.0])
    value = summary.measured(entry, summary.mean("distinct_2"))
    assert value.value == 2.5 and 1.0 <= value.low < 2.5 < value.high <= 4.0
    other = made("other", [2.0, 4.0, 6.0])
    exact = summary.ratio(entry, other, summary.mean("distinct_2"))  # prompt by prompt the half
    assert (exact.value, exact.low, exact.high) == pytest.approx((0.5, 0.5, 0.5))
    assert summary.perplexity(entry) == pytest.approx(math.exp(2.5))
    assert str(summary.Value(1.234, 1.0, 2.0)) == "1.23 [1.00, 2.00]"


def made(label: str, values: list[float]) -> summary.Entry:
    names = tuple(f"code-{i:02d}" for i in range(len(values)))
    nats = np.array(values)[:, None] * np.full((1, 4), 2.5)
    return summary.Entry(
        label, names, 1, nats, np.full((len(values), 4), 2.5), {"distinct_2": np.array(values)}
    )


def test_a_claim_is_sure_only_when_its_interval_is() -> None:
    from benchmarks.quality.answers import Claim

    at_least = [
        Claim("", summary.Value(2.5, low, 3.0), bound, True).verdict
        for low, bound in ((2.1, 2), (1.9, 2), (2, 3))
    ]
    at_most = [
        Claim("", summary.Value(0.5, 0.4, high), bound).verdict
        for high, bound in ((0.6, 0.6), (0.7, 0.6), (1, 0.4))
    ]
    assert at_least == at_most == ["yes", "yes, but the interval reaches beyond", "**no**"]


def test_passes_are_priced_by_their_rows() -> None:
    prices = {"1": 1.0, "5": 3.0, "10": 4.0}
    assert price({"1": 10, "3": 2, "10": 1}, prices) == pytest.approx(10 * 1.0 + 2 * 2.0 + 4.0)


def test_records_agree_with_the_runs_they_come_from(loaded: tempo_mlx.LoadedModel) -> None:
    """Log-probabilities and passes are those the run itself reports."""
    prompt = Prompt("code-01", "code", "the end and")
    record = running.measure(loaded, arms.BRANCHES, prompt, 8)
    run = tempo_mlx.generate(loaded, prompt.text, branches=5, max_tokens=8, min_steps=8, seed=record["seed"])
    texts = record["readings"]["texts"]
    assert [text["ids"] for text in texts] == [path.token_ids for path in run.paths]
    for text, path in zip(texts, run.paths, strict=True):
        assert -sum(text["nats"]) == pytest.approx(path.logprob, abs=0.01)
    rows = [sum(token.slot is not None for token in step.tokens) for step in run.steps[:-1]]
    assert record["passes"] == dict(sorted(Counter(rows).items()))
    assert json.loads(json.dumps(record))["tokens"] == 8


def test_readings_of_a_lattice_follow_it(loaded: tempo_mlx.LoadedModel) -> None:
    run = tempo_mlx.generate(loaded, "the end and", max_tokens=12, min_steps=12, threshold=0.03, seed=5)
    members = [{token.id for token in step.tokens} for step in run.steps]
    assert max(map(len, members)) > 1
    assert running.read(run, "best", 0) == [token.id for token in run.best_path()]
    for reading in ("drawn", "random", "thinned: posterior", "thinned: probability"):
        text = running.read(run, reading, 0)
        assert text == running.read(run, reading, 0)
        assert all(id_ in here for id_, here in zip(text, members, strict=True))


def test_thinning_removes_what_the_signal_ranks_last(loaded: tempo_mlx.LoadedModel) -> None:
    run = tempo_mlx.generate(loaded, "the end and", max_tokens=12, min_steps=12, threshold=0.03, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "THINNED", 1.0)  # one member is left of every set that has been weighed
        text = running.read(run, "thinned: probability", 0)
    weighed = [t for t, step in enumerate(run.steps) if step.tokens[0].posterior is not None]
    assert weighed
    assert all(text[t] == run.steps[t].tokens[0].id for t in weighed)


def test_rows_that_see_one_chain_have_no_divergence(loaded: tempo_mlx.LoadedModel) -> None:
    """A lattice one token wide is an ordinary text; wider ones differ from their paths run alone."""
    narrow = divergence.measure(loaded, "the end and", "lineage", 1, 8)
    assert len(narrow["row"]) == 7 and max(narrow["row"]) < 1e-4 and narrow["width"] == 1.0
    wide = divergence.measure(loaded, "the end and", "all", 8, 8)
    assert wide["width"] > 1 and max(wide["row"][1:]) > 1e-3
    assert all(mixed <= row + 1e-6 for mixed, row in zip(wide["mixture"], wide["row"], strict=True))


def test_exact_rows_are_those_of_each_text_alone(loaded: tempo_mlx.LoadedModel) -> None:
    ids, texts = [97, 98, 99], [[5, 6, 7], [5, 9, 7]]
    rows = divergence.exact_rows(loaded.model, ids, texts)
    for text, got in zip(texts, rows, strict=True):
        alone = loaded.model.forward([*ids, *text], np.arange(6), None, loaded.model.new_cache())
        assert np.abs(log_probabilities(alone.logits)[3:5] - got).max() < 1e-4


def test_a_quick_run_writes_the_page_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(twins.twin("llama"))
    options = ["--quick", "--model", model, "--judge", model, "--out", str(tmp_path)]
    command.main([*options, "test", "--minutes", "0"])
    assert "go" in capsys.readouterr().out.splitlines()[-1]
    folder = next(tmp_path.iterdir()) / "quick"
    first = (folder / "test" / "greedy.jsonl").read_text()
    assert first.count("\n") == 1
    command.main(options)
    assert (folder / "test" / "greedy.jsonl").read_text().startswith(first)
    page = (folder / "quality.md").read_text()
    for heading in (
        "Targets",
        "Five texts",
        "The same budget",
        "Lattices",
        "Pruning",
        "By length",
        "Judged by",
    ):
        assert f"\n## {heading}" in page, heading
    for arm in (*arms.MAIN, *arms.STUDIES):
        assert len(running.read_records(folder / "test" / f"{arm.name}.jsonl")) == command.QUICK["prompts"]
        assert arm.label in page
    assert "nan" not in page and (folder / "images" / "quality-front.png").stat().st_size > 1000
    before = files(folder)
    command.main([*options, "test", "tuning", "divergence", "judge"])
    assert files(folder) == before


def files(folder: Path) -> dict[str, Any]:
    return {path.name: path.read_text() for path in folder.rglob("*.jsonl")}


def test_a_stage_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["tests"])
    assert "unknown stage tests; choose from test, divergence" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["judge"])
    assert "needs --judge" in capsys.readouterr().err
