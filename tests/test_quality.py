"""The quality benchmark: its measures on texts whose answer is known, its readings, and a quick run to the page."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
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
from benchmarks.quality.answers import Claim
from benchmarks.quality.prices import price
from benchmarks.quality.prompts import KINDS, Prompt, read_prompts
from benchmarks.quality.running import Plan
from tempo_mlx.decode.combine import log_probabilities
from tests import twins
from tests.small import small

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


@pytest.mark.parametrize(
    ("low", "value", "high", "verdict"),
    [
        (2.0, 2.5, 3.0, "yes"),
        (1.9, 2.5, 3.0, "yes, but the interval reaches beyond"),
        (1.0, 1.9, 2.1, "no, but the interval reaches beyond"),
        (1.0, 1.5, 1.9, "**no**"),
    ],
)
def test_a_claim_is_sure_only_when_its_interval_is(
    low: float, value: float, high: float, verdict: str
) -> None:
    assert Claim("", summary.Value(value, low, high), 2.0, True).verdict == verdict
    assert Claim("", summary.Value(-value, -high, -low), -2.0).verdict == verdict


def test_passes_are_priced_by_their_rows() -> None:
    prices = {"1": 1.0, "5": 3.0, "10": 4.0}
    assert price({"1": 10, "3": 2, "10": 1}, prices) == pytest.approx(10 * 1.0 + 2 * 2.0 + 4.0)


def test_records_agree_with_the_runs_they_come_from(loaded: tempo_mlx.LoadedModel) -> None:
    """Log-probabilities and passes are those the run itself reports."""
    prompt = Prompt("code-01", "code", "the end and")
    record = running.measure(loaded, arms.BRANCHES, prompt, Plan(8), loaded.model)
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


def test_prompts_side_by_side_are_what_they_are_alone(loaded: tempo_mlx.LoadedModel, tmp_path: Path) -> None:
    prompts = [
        Prompt(f"code-{n:02d}", "code", f"the {said}") for n, said in enumerate(("end and", "sea", "old inn"))
    ]
    for arm in (arms.GREEDY, arms.NUCLEUS, arms.BRANCHES, arms.FIVE_OF_EIGHT, arms.LINEAGE):
        paths = {together: tmp_path / f"{arm.name}-{together}.jsonl" for together in (1, 2)}
        for together, path in paths.items():
            assert len(list(running.run_arm(loaded, arm, prompts, Plan(8, together=together), path))) == 3
        alone, beside = ({r["prompt"]: r for r in running.read_records(path)} for path in paths.values())
        for id_, one in alone.items():
            other = beside[id_]
            assert other["seconds"] is None and other["cpu_seconds"] is None and one["seconds"] > 0
            assert one["passes"] and all(
                one[key] == other[key] for key in ("seed", "tokens", "passes", "width")
            )
            for reading, texts in one["readings"].items():
                for text, same in zip(texts, other["readings"][reading], strict=True):
                    assert text.get("ids") == same.get("ids")
                    assert text["nats"] == pytest.approx(same["nats"], abs=0.01)


def test_passes_are_made_as_one(
    loaded: tempo_mlx.LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks import side_by_side

    together, made = side_by_side.together, []
    monkeypatch.setattr(
        side_by_side, "together", lambda model, asks: [made.append(len(asks)), together(model, asks)][1]
    )
    prompts = [Prompt(f"code-{n:02d}", "code", "the end and") for n in range(4)]
    list(running.run_arm(loaded, arms.BRANCHES, prompts, Plan(4, together=3), tmp_path / "made.jsonl"))
    assert max(made) == 3


def test_a_further_seed_draws_other_texts(loaded: tempo_mlx.LoadedModel, tmp_path: Path) -> None:
    prompt = read_prompts("test")[0]
    zero, again, one = (
        running.measure(loaded, arms.NUCLEUS, prompt, Plan(8, seed=n), loaded.model) for n in (0, 0, 1)
    )
    assert zero["seed"] == 1972 and zero["readings"] == again["readings"] != one["readings"]
    seeds = {(prompt.id, n): running.measure(loaded, arms.GREEDY, prompt, Plan(1, seed=n), loaded.model)["seed"]
             for prompt in read_prompts()[:12] for n in (0, 1, 2)}  # fmt: skip
    assert len(set(seeds.values())) == len(seeds)
    names = [running.file_of(tmp_path, arms.NUCLEUS, seed).name for seed in (0, 2)]
    assert names == ["nucleus.jsonl", "nucleus.seed-2.jsonl"]


def test_of_a_beam_of_two_the_first_text_is_read(loaded: tempo_mlx.LoadedModel) -> None:
    record = running.measure(
        loaded, arms.BEAM_OF_TWO, Prompt("code-01", "code", "the end and"), Plan(8), loaded.model
    )
    run = tempo_mlx.generate(loaded, "the end and", decoder="beam", beam_width=2, max_tokens=8, min_steps=8)
    assert [text["ids"] for text in record["readings"]["first"]] == [run.paths[0].token_ids]
    assert set(record["passes"]) == {2} and set(record["readings"]) == {"first"}


def test_texts_that_end_have_lengths_of_their_own() -> None:
    few = small(6)
    prompt, lengths = Prompt("code-01", "code", "ca"), set()
    for arm in (arms.NUCLEUS, arms.BRANCHES, arms.LINEAGE):
        record = running.measure(few, arm, prompt, Plan(12, ends=True), few.model)
        for reading, texts in record["readings"].items():
            for text in texts:
                length = running.length_of(text, record)
                assert ("ids" in text) == (reading in running.KEPT) and ("tokens" in text) != ("ids" in text)
                assert sum(running.in_quarters(length)) == length <= 12
                if "ids" in text:
                    scores = tempo_mlx.score(few, prompt.text, [list(text["ids"])])
                    assert sum(text["nats"]) == pytest.approx(-scores[0].log_prob, abs=0.01)
                    assert len(text["ids"]) == length and text["text"] == few.tokenizer.decode(
                        text["ids"], continues=True
                    )
                    lengths.add(length)
    assert len(lengths) > 2
    full = running.measure(few, arms.NUCLEUS, prompt, Plan(12), few.model)["readings"]["texts"]
    assert [len(text["ids"]) for text in full] == [12] * 5


def test_lengths_are_counted_by_text() -> None:
    record = kept_run("code-01", [([1, 2, 3, 4, 5], 5.0), ([6], 1.0)])
    record["readings"]["drawn"] = [{"tokens": 3, "nats": [3.0, 0, 0, 0]}]
    record["readings"]["random"] = [{"nats": [5.0, 0, 0, 0]}]  # as many as the run has steps
    entry = summary.make_entry("made", [record], "texts", never, {}, whole=True)
    assert entry.tokens.tolist() == [[3, 1, 1, 1]] and entry.numbers["length"].tolist() == [3.0]
    assert summary.perplexity(entry) == pytest.approx(math.e)
    assert entry.numbers["distinct_2"].tolist() == [
        0.25
    ]  # nothing is cut; three texts that are missing are the first
    assert np.isnan(entry.numbers["cpu_seconds"]).all() and np.isnan(entry.numbers["seconds"]).all()
    for reading, length in (("drawn", 3), ("random", 5)):
        assert summary.make_entry("made", [record], reading, never, {}, whole=True).tokens.sum() == length


def test_a_text_that_ends_at_once_leaves_the_others_whole() -> None:
    texts, words = [[1, 2, 1, 2], [3]], ["a b a b", "c"]
    cut, whole = (metrics.diversity(texts, words, 2, whole=each) for each in (False, True))
    assert whole["distinct_2"] == pytest.approx(2 / 3) and cut["distinct_2"] == 0.0
    assert whole["distinct_1"] == pytest.approx(3 / 5) and cut["distinct_1"] == 1.0


def kept_run(
    prompt: str, texts: list[tuple[list[int], float]], reading: str = "texts", **differences: Any
) -> dict[str, Any]:
    """A line of results, the tokens of its texts being their letters."""
    return {
        "prompt": prompt,
        "tokens": max(len(ids) for ids, _ in texts),
        "readings": {
            reading: [
                {"ids": ids, "text": "".join(chr(96 + id_) for id_ in ids), "nats": [nats, 0, 0, 0]}
                for ids, nats in texts
            ]
        },
        "passes": {"1": 4},
        "width": 1.0,
        "seconds": None,
        "cpu_seconds": None,
        **differences,
    }


def never() -> Any:
    raise AssertionError("no tokenizer is needed")


def test_a_quick_run_writes_the_page_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = (str(twins.twin(name)) for name in ("llama", "mistral"))
    options = ["--quick", "--model", model, "--judge", other, "--out", str(tmp_path), "--together", "2"]
    command.main([*options, "test", "--minutes", "0"])
    assert "go" in capsys.readouterr().out.splitlines()[-1]
    folder = tmp_path / "llama" / "quick"
    first = (folder / "test" / "greedy.jsonl").read_text()
    assert first.count("\n") == 1
    some = ["--quick", "--model", other, "--judge", model, "--out", str(tmp_path), "--prompts", "1"]
    command.main([*some, "test", "judge", "--only", "greedy", "branches", "diverse-beam-1", "lineage"])
    command.main([*options, "test", "--seed", "1", "--only", "nucleus", "greedy"])
    command.main(options)
    assert (folder / "test" / "greedy.jsonl").read_text().startswith(first)
    page = (folder / "quality.md").read_text()
    for heading in (
        "What holds",
        "Across models",
        "Judged by other models",
        "Longer texts, ended by the model",
        "How much is luck",
        "llama in full",
        "Targets",
        "Five texts",
        "The same budget",
        "Lattices",
        "Pruning",
        "By length",
        "Texts of mistral",
    ):
        assert page.count(f"\n## {heading}\n") == 1, heading
    assert "\nmistral of the texts of llama:\n" in page and "\nllama of the texts of mistral:\n" in page
    assert "\n| claim | llama | mistral |\n" in page
    full, _, short = page.partition("\n## Texts of mistral\n")
    for arm in (*arms.MAIN, *arms.STUDIES):
        assert len(running.read_records(folder / "test" / f"{arm.name}.jsonl")) == command.QUICK["prompts"]
        assert arm.label in full
    assert "| branches | 1 |" in short and "nucleus" not in short
    assert not (folder / "test" / "greedy.seed-1.jsonl").exists()
    assert "nan" not in page and (folder / "images" / "quality-front.png").stat().st_size > 1000
    before = files(folder)
    command.main([*options, "test", "tuning", "long", "divergence", "judge"])
    assert files(folder) == before
    monkeypatch.setattr(tempo_mlx, "load", never)  # the page needs no model
    (folder / "quality.md").unlink()
    command.main([*options, "report"])
    assert (folder / "quality.md").read_text() == page


def files(folder: Path) -> dict[str, Any]:
    return {str(path): path.read_text() for path in folder.rglob("*.jsonl")}


def test_a_stage_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["tests"])
    assert "unknown stage tests; choose from test, long, divergence" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["judge"])
    assert "needs --judge" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["judge", "--model", "a/b", "--judge", "c/b.gguf"])
    assert "does not judge its own texts" in capsys.readouterr().err


def test_a_stage_hands_on_what_the_command_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, runs, judges = [], [], []
    monkeypatch.setattr(tempo_mlx, "load", lambda name: [loads.append(name), twin][1])
    monkeypatch.setattr(command, "run_arm", lambda *given: [runs.append(given), ()][1])
    monkeypatch.setattr(command, "run_judge", lambda *given: [judges.append(given), ()][1])
    twin = SimpleNamespace(model=SimpleNamespace(info={"id": "one"}))
    options = ["--out", str(tmp_path), "--model", "one", "--prompts", "3"]
    command.main([*options, "test", "--only", "mcts"])
    command.main([*options, "long", "--seed", "2", "--together", "4"])
    command.main([*options, "tuning", "--only", "greedy"])
    plans = [(arm.name, len(prompts), plan) for _, arm, prompts, plan, _ in runs]
    drawn = Plan(128, ends=True, seed=2, together=4)
    assert plans == [
        ("mcts", 3, Plan(32)),
        ("nucleus", 3, drawn),
        ("branches-sample", 3, drawn),
        ("greedy", 3, Plan(40)),
    ]
    assert [str(path.relative_to(tmp_path / "one" / "full")) for *_, path in runs[:2]] == [
        "test/mcts.jsonl", "long/nucleus.seed-2.jsonl",
    ]  # fmt: skip
    command.main([*options, "judge", "--judge", "home/two.gguf"])
    ((_, rated, prompts, folder, judged, _),) = judges
    assert {"lineage", "beam-2", "greedy", "threshold"} < {arm.name for arm in rated} and len(prompts) == 3
    assert arms.NUCLEUS not in rated  # of no pair that is compared
    assert (folder, judged) == (tmp_path / "one/full/test", tmp_path / "one/full/judge/two")
    assert loads == ["one"] * 3 + ["home/two.gguf"]


def test_rivals_are_tuned_as_ours_are() -> None:
    of_eight = {arm.name: arm for arm in arms.TUNING if arm.worth is not None}
    for strength in (0.5, 1, 2):  # what best of 8 pays for a pair of tokens is the strength, as of branches
        arm = of_eight[f"diverse-beam-{strength}-5-of-8"]
        assert arm.worth == arm.settings["diversity_strength"] == strength


def test_results_of_two_versions_say_both(tmp_path: Path) -> None:
    for version, dtype in (("0.1.0", None), ("0.2.0", "float32"), ("0.2.0", None)):
        command.write_about(tmp_path, {"tempo_mlx": version, "id": "home/model.gguf", "dtype": dtype})
    assert json.loads((tmp_path / "about.json").read_text()) == {
        "tempo_mlx": "0.1.0, 0.2.0", "id": "model", "dtype": "float32",
    }  # fmt: skip
