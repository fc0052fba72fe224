"""`tempo-mlx bench`: equal work first, fair turns, and a page that says what was measured, missed goals included."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tempo_mlx.bench import generation, processes, steps
from tempo_mlx.bench.contenders import NAMES, STORED, Field, check_equal, line_up
from tempo_mlx.bench.machine import read_bandwidth
from tempo_mlx.bench.page import page
from tempo_mlx.bench.results import Measurement, Result, cells, read_results, to_json
from tempo_mlx.bench.steps import Products, linears, tokens, weight_bytes
from tempo_mlx.bench.suites import SUITES, choose
from tempo_mlx.bench.timing import Timing, interleaved
from tempo_mlx.cli.main import main
from tempo_mlx.errors import BackendError, ConfigError, ModelError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.model.device import cpu_packs
from tempo_mlx.weights.convert import convert
from tests import twins

pytest.importorskip("transformers")

PLAIN = [name for name in NAMES if name != STORED]  # that run a model whose weights are not packed


@pytest.fixture(scope="module")
def field() -> Any:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed; it needs Python 3.11")
    said: list[str] = []
    with line_up(LoadConfig(model=str(twins.twin("llama"))), NAMES, said.append) as field:
        assert said == [] and [each.name for each in field.contenders] == PLAIN
        yield field


def test_cases_take_turns_and_the_first_run_of_each_turn_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempo_mlx.bench.timing.SETTLE", 0.0)
    log: list[str] = []
    seconds = iter(range(1, 100))

    def case(name: str) -> float:
        log.append(name)
        return float(next(seconds))

    timings = interleaved({"a": lambda: case("a"), "b": lambda: case("b")}, 2, repeats=2)
    assert "".join(log) == "aaabbbaaabbb"
    assert timings["a"].samples == (2, 3, 8, 9) and timings["b"].samples == (5, 6, 11, 12)
    assert timings["a"].quartile == 2.75 and timings["a"].median == 5.5
    assert timings["a"].spread == pytest.approx((8.25 - 2.75) / 5.5)
    log.clear()
    interleaved({"a": lambda: case("a"), "b": lambda: case("b")}, 2, warm_up=False)
    assert "".join(log) == "abab"


def test_every_contender_says_the_same(field: Field) -> None:
    ids = tokens(field, 24)
    worst = check_equal(field, ids)
    assert set(worst) == set(PLAIN[1:]) and max(worst.values()) < 1e-4
    expected = field.ours.start(ids)[1]
    for each in field.contenders:
        state, logits = each.start(ids, copies=3)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        first = each.rows(state, [5, 6, 7])
        assert first.shape == (3, 320) and first.dtype == np.float32
        np.testing.assert_array_equal(each.rows(state, [5, 6, 7]), first)  # rows are forgotten


def test_long_runs_are_without_what_takes_minutes_for_them(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "LENGTHS", (8, 24))
    monkeypatch.setattr(steps, "SHORT", 8)
    found = steps.context(field, steps.Effort(True, 1e10, 100.0))
    named = {
        case: [row.contender for row in found.rows if row.case == case] for case in ("8 slots", "24 slots")
    }
    assert named == {"8 slots": ["tempo-mlx", "mlx-lm", "transformers"], "24 slots": ["tempo-mlx", "mlx-lm"]}


def test_unequal_work_is_not_timed(field: Field) -> None:
    class Other:
        name = "mlx-lm"

        def start(self, ids: Any, copies: int = 1) -> Any:
            state, logits = field.ours.start(ids)
            return state, logits + 0.1

        rows = None

    with pytest.raises(ModelError, match=r"mlx-lm and tempo-mlx differ by 0\.1 in a logit"):
        broken = Field(field.loaded, [field.ours, Other()], field.directory)  # type: ignore[list-item]
        broken.contenders[1].rows = field.ours.rows  # type: ignore[method-assign]
        check_equal(broken, tokens(field, 24))


def test_products_are_those_of_a_pass(field: Field) -> None:
    model: Any = field.loaded.model
    products = Products(model, 3)
    shapes = [tuple(x.shape) for x in products.of]
    assert len(shapes) == 4 * 4 + 1 and set(shapes) == {(3, 64), (3, 96)}
    products()
    parameters = sum(linear.weight.size for linear in linears(model))
    assert weight_bytes(model) == 4 * parameters


def test_bandwidth_is_a_bandwidth() -> None:
    assert 1e9 < read_bandwidth(rounds=1) < 1e13


def test_rows_as_text_and_json() -> None:
    fast, slow = Timing((0.01, 0.01)), Timing((0.02, 0.02))
    row = Measurement.of("1 row", "tempo-mlx", fast, ("mlx-lm", slow))
    assert cells(row) == ("1 row", "tempo-mlx", "10.0 ms", "10.0 ms", "0%", "0.50 x mlx-lm")
    (line,) = to_json(Result("decode", "", [row], floor=5.0), {"cores": 2})
    assert json.loads(line) == {
        "benchmark": "decode", "case": "1 row", "contender": "tempo-mlx", "unit": "ms", "value": 10.0, "median": 10.0,
        "spread": 0.0, "runs": 2, "ratio": 0.5, "reference": "mlx-lm", "floor": 5.0, "environment": {"cores": 2},
    }  # fmt: skip


def test_the_page_says_which_goals_are_missed(tmp_path: Path) -> None:
    result = Result(
        "decode",
        "A step.",
        [Measurement.of("1 row", "tempo-mlx", Timing((0.01,)))],
        floor=5.0,
        floor_is="why",
    )
    result.goal("kept", 0.9, 1.0)
    result.goal("missed", 1.1, 1.0)
    result.goal("not measured", None, 1.0)
    result.load_average = 0.5
    quiet, unknown = Result("rows", "", load_average=0.1), Result("load", "")
    text = page(
        tmp_path / "docs" / "speed.md", [quiet, result, unknown], {"cores": 2}, False,
        {"decode": tmp_path / "results" / "decode.svg"}, {"mlx-lm": 1e-5},
    )  # fmt: skip
    assert "| decode | kept | 0.90 | 1 | yes |" in text and "| decode | missed | 1.10 | 1 | **no** |" in text
    assert "not measured" not in text and "Floor: 5.0 ms (why)." in text and "0.10 to 0.50" in text
    assert "(../results/decode.svg)" in text and "mlx-lm 1.0e-05" in text


def test_suites_are_named_singly_or_with_commas() -> None:
    assert choose([]) == list(SUITES)
    assert choose(["prefill,decode", "rows"]) == ["decode", "rows", "prefill"]
    assert choose([], also=["m"]) == [*SUITES, "models"] and choose(["models"], also=["m"]) == ["models"]
    with pytest.raises(ConfigError, match="needs one: add --also MODEL"):
        choose(["models"])
    with pytest.raises(ConfigError, match="speed is no suite; choose from texts, decode"):
        choose(["speed"])
    with (
        pytest.raises(ConfigError, match=r"llama\.cpp is no contender"),
        line_up(LoadConfig(), ["llama.cpp"], print),
    ):
        pass


IN_PROCESS = "decode,rows,context,prefill,tempo,pruning,branches"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--model",
        str(twins.twin("llama")),
        "--output",
        str(tmp_path / "out"),
        "--page",
        str(tmp_path / "docs" / "p.md"),
    ]
    assert main(["bench", "--quick", "--suite", IN_PROCESS, *options]) == 0
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert {line["benchmark"] for line in lines} == set(IN_PROCESS.split(","))
    assert {line["contender"] for line in lines if line["benchmark"] == "decode"} == set(PLAIN)
    assert all(line["value"] > 0 and line["environment"]["model"] == "llama" for line in lines)
    assert (tmp_path / "out" / "speed.jsonl").read_text().splitlines() == [
        line for line in out.splitlines() if line.startswith("{")
    ]
    page_text = (tmp_path / "docs" / "p.md").read_text()
    for name in IN_PROCESS.split(","):
        assert f"\n## {name}\n" in page_text and f"](../out/{name}.svg)" in page_text
        assert (tmp_path / "out" / f"{name}.svg").read_text().count("<path") > 5
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
    assert "original TEMPO is left out: name a checkout" in page_text
    assert str(tmp_path) not in page_text and str(twins.twin("llama")) not in page_text
    for fact in ("share outside the products", "attention mass on / off", "sets of 4", "Floor:", "GB/s"):
        assert fact in out and fact in page_text
    assert main(["bench", "--suite", "speed", *options]) == 2


def test_a_suite_measured_again_takes_the_place_of_its_last_results(tmp_path: Path) -> None:
    store = tmp_path / "speed.json"
    options = ["--model", str(twins.twin("llama")), "--output", str(tmp_path), "--contender", "mlx-lm"]
    for suite in ("prefill", "decode", "prefill"):
        assert main(["bench", "--quick", "--suite", suite, *options]) == 0
    text = (tmp_path / "speed.md").read_text()
    assert (
        text.index("\n## decode\n") < text.index("\n## prefill\n") and text.count("\n## ") == 3
    )  # and the goals
    conditions = json.loads(store.read_text())["conditions"]
    found = read_results(store, conditions)
    assert (
        list(found) == ["decode", "prefill"]
        and [asdict(r) for r in found.values()] == json.loads(store.read_text())["suites"]
    )
    assert found["decode"].rows[0].value > 0 and found["decode"].goals[0].bound == 0.95
    assert read_results(store, {**conditions, "mlx": "0"}) == {}
    store.write_text("{")
    assert read_results(store, conditions) == {} == read_results(tmp_path / "none.json", conditions)


def test_a_mac_without_the_extra_still_gets_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch, transformers and matplotlib are optional: what needs them is left out, and said."""
    monkeypatch.setattr(
        "tempo_mlx.bench.contenders.find_spec", lambda name: "found" if name == "mlx_lm" else None
    )
    monkeypatch.setattr("tempo_mlx.bench.plots.find_spec", lambda name: None)
    options = ["--model", str(twins.twin("llama")), "--output", str(tmp_path)]
    assert main(["bench", "--quick", "--suite", "decode", *options]) == 0
    captured = capsys.readouterr()
    assert "transformers is left out: it is not installed" in captured.err
    assert "No plots: matplotlib is not installed" in captured.err
    assert "| tempo-mlx |" in (tmp_path / "speed.md").read_text() and not list(tmp_path.glob("*.svg"))


def test_packed_weights_are_compared_with_mlx_lm_alone(tmp_path: Path) -> None:
    from tempo_mlx import loading
    from tempo_mlx.model.mlx_backend import build
    from tempo_mlx.weights import open_checkpoint

    packed = convert(str(twins.twin("llama")), tmp_path / "packed", bits=8, group_size=32)
    model = build(open_checkpoint(str(packed)), "auto", "auto", packed=True)
    model.info["device"] = "metal"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tempo_mlx.bench.contenders.load_model",
            lambda config: loading.LoadedModel(model, open_checkpoint(config.model).tokenizer(), config),
        )
        with line_up(LoadConfig(model=str(packed)), NAMES, said.append) as field:
            assert [each.name for each in field.contenders] == ["tempo-mlx", "mlx-lm"]
            assert check_equal(field, tokens(field, 24))["mlx-lm"] < 1e-3
    assert (
        len(said) == 2 and "transformers is left out: it does not compute with weights that stay" in said[1]
    )


def test_a_cpu_computes_a_file_as_it_is_and_as_the_others_are_given_it(tmp_path: Path) -> None:
    if not cpu_packs():
        pytest.skip("this machine's CPU does not multiply packed weights")
    packed = convert(str(twins.twin("llama")), tmp_path / "packed", bits=8, group_size=32)
    with line_up(LoadConfig(model=str(packed)), NAMES, pytest.fail) as field:
        assert [each.name for each in field.contenders] == list(NAMES) and list(field.own) == list(NAMES[:2])
        assert [own.model.info["quantization"] is None for own in field.own.values()] == [True, False]
        assert max(check_equal(field, tokens(field, 24)).values()) < 1e-4


def test_processes_of_their_own(field: Field) -> None:
    from tempo_mlx.bench.steps import Effort

    budget = Effort(True, 1e10, 100.0)
    few = Field(
        field.loaded,
        [each for each in field.contenders if each.name in ("tempo-mlx", "mlx-lm")],
        field.directory,
    )
    results = [suite(few, budget) for suite in (processes.load, processes.memory, processes.startup)]
    assert [[row.contender for row in result.rows] for result in results] == [["tempo-mlx", "mlx-lm"]] * 3
    assert [result.rows[0].unit for result in results] == ["ms", "MB", "ms"]
    assert 30 < results[1].rows[0].value < 2000  # MB of a Python process with a tiny model
    assert all(len(result.goals) == 1 for result in results)
    with pytest.raises(BackendError, match="A process of the benchmark failed"):
        missing = replace(field.loaded, config=LoadConfig(model="/nowhere"))
        processes.load(Field(missing, few.contenders, field.directory), budget)


def test_the_original_runs_in_a_process_of_its_own(tmp_path: Path, field: Field) -> None:
    """A stand-in with the modules of the original that the comparison uses."""
    for package in ("src", "src/experiments", "src/modeling"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "src/modeling/model_wrapper.py").write_text(
        "def TEMPOModelWrapper(model, tokenizer, device): return model\n"
    )
    (tmp_path / "src/experiments/experiment_runner.py").write_text(
        "TokenizerAdapter = dict\n"
        "class ExperimentRunner:\n"
        "    def __init__(self, model, tokenizer, device): self.model = model\n"
        "    def run_experiment(self, settings):\n"
        "        print('noise')\n"
        "        return {'generation_time': settings['max_tokens'] * 0.5}\n"
    )
    assert processes.run_original(tmp_path, field.directory, ["a", "b"], 7) == 7.0
    from tempo_mlx.bench.steps import Effort

    result = generation.tempo(field, Effort(True, 1e10, 100.0), original=tmp_path)
    assert result.value("one logical step", "original TEMPO") == pytest.approx(500.0)
    assert [goal.what for goal in result.goals] == [
        "one logical step, times the original's",
        "one row, times the original's",
    ]


def test_products_alone_is_what_the_share_is_of(field: Field) -> None:
    from tempo_mlx.bench.steps import Effort, rows

    result = rows(field, Effort(True, 1e10, 100.0))
    whole = result.value("1 row", "tempo-mlx")
    alone = result.value("1 row, products alone", "tempo-mlx")
    (share,) = [goal.value for goal in result.goals if goal.what == "k = 1, share outside the products"]
    assert whole is not None and alone is not None and share == pytest.approx(1 - alone / whole)
    assert any(re.fullmatch(r"8 rows, with attention mass", row.case) for row in result.rows)
