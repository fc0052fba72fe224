"""Calibrating: what is fitted helps, what is promised holds, and no artifact serves another model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import tempo_mlx
from tempo_mlx.cli.main import main
from tempo_mlx.errors import ConfigError, ModelError
from tempo_mlx.exits import calibrate as calibrating
from tempo_mlx.exits import calibration, schedule
from tempo_mlx.exits.agreement import Outcome, Place, curve, design_effect, lower_bound, together
from tempo_mlx.exits.calibrate import cached, calibrate, forget_samples, stages_of
from tempo_mlx.exits.calibration import (
    Calibration,
    Exit,
    candidates,
    find_calibration,
    place_of,
    read_calibration,
)
from tempo_mlx.exits.samples import read_prompts, sample_texts
from tempo_mlx.exits.schedule import Costs, choose, choose_draft, drafting_price, price, with_schedule
from tests import twins
from tests.exits import loaded_with_exits


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(calibration, "cache_directory", lambda: tmp_path)
    return tmp_path


def test_texts_that_grow_together_are_those_that_grow_alone() -> None:
    loaded = tempo_mlx.load(str(twins.twin("llama")))
    prompts = read_prompts(loaded)[:5]
    eos = frozenset(loaded.tokenizer.eos_ids)
    samples = sample_texts(loaded.model, prompts, [1, 3], 12, eos, 0.0, 0)
    for text, prompt in enumerate(prompts):
        run = tempo_mlx.generate(loaded, prompt, decoder="plain", temperature=0, max_tokens=12)
        chosen = [step.tokens[0].id for step in run.steps]
        here = samples.texts == text
        assert samples.choices[here].tolist() == chosen
        assert samples.tokens[here].tolist() == [prompt[-1], *chosen[:-1]]
    head = np.array(loaded.model.logits(tempo_mlx.mlx.mx.array(samples.hidden[-1].astype(np.float32))))
    assert (head.argmax(axis=1) == samples.choices).mean() > 0.95  # float16 states


def test_a_calibration_is_kept_resumed_and_used(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(twins.twin("llama"))
    monkeypatch.setattr(calibrating, "WIDTHS", (64, 320))
    monkeypatch.setattr(calibrating, "LAST_WIDTHS", (320,))
    monkeypatch.setattr(calibrating, "FITTED_WIDTH", 320)
    made: list[int] = []
    sample = calibrating.sample_texts

    def counted(*arguments: Any, **rest: Any) -> Any:
        made.append(len(made))
        if len(made) == 3:
            raise KeyboardInterrupt
        return sample(*arguments, **rest)

    monkeypatch.setattr(calibrating, "sample_texts", counted)
    command = ["calibrate", path, "--tokens", "8", "--layers", "1,2"]
    assert main(command) == 130
    assert main(command) == 0
    assert len(made) == 3 + 18 - 2  # two were kept
    out = capsys.readouterr().out
    assert "layer" in out and "never" in out
    loaded = tempo_mlx.load(path)
    found = find_calibration(loaded.model.info)
    assert {item.layer for item in found.exits} == {1, 2, 3}
    assert [file.name for file in (home / "exits").iterdir()] == [place_of(found.key).name]
    last = [item for item in found.exits if item.layer == 3]
    assert last[0].margin(0.95) is not None and last[0].share(0.95) == pytest.approx(
        1.0
    )  # all the vocabulary
    forget_samples(found.key)


def test_a_calibration_is_resumed_by_its_own_model_and_settings_only(home: Path) -> None:
    info = {
        "id": "here",
        "sha256": "0" * 64,
        "dtype": "float32",
        "device": "cpu",
        "backend": "mlx",
        "kv_bits": None,
    }
    settings = {"layers": [1, 2], "tokens": 8, "prompts": [[1, 2]]}
    folder = stages_of(info, **settings)
    assert stages_of({**info, "id": "there"}, **settings) == folder
    others = [{"sha256": "1" * 64}, {"dtype": "float16"}, {"device": "gpu"}, {"kv_bits": 8}]
    places = [stages_of({**info, **other}, **settings) for other in others]
    places += [stages_of(info, **{**settings, **other}) for other in ({"layers": [1]}, {"prompts": [[1, 3]]})]
    assert len({folder, *places}) == 1 + len(places)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half of it", b"something else"])
def test_a_damaged_stage_is_made_again(home: Path, content: bytes) -> None:
    file = home / "stage.npz"
    file.write_bytes(content)
    for _ in range(2):
        assert cached(file, lambda: {"numbers": np.arange(3)})["numbers"].tolist() == [0, 1, 2]
    assert cached(file, dict)["numbers"].tolist() == [0, 1, 2]  # kept


def test_a_translator_finds_what_a_linear_layer_hides(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it more choices agree than without, on texts left out."""
    loaded = tempo_mlx.load(str(twins.twin("llama")))
    monkeypatch.setattr(calibrating, "WIDTHS", (320,))
    monkeypatch.setattr(calibrating, "LAST_WIDTHS", (320,))
    monkeypatch.setattr(calibrating, "FITTED_WIDTH", 320)
    with_them = calibrate(loaded, layers=[2], tokens=12)
    without = calibrate(loaded, layers=[2], tokens=12, translators=False)
    bounds = [found.exits[0].curve[-1, 1] for found in (with_them, without)]
    assert bounds[0] > bounds[1] + 0.05
    assert without.exits[0].weight is None


def test_another_models_calibration_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = loaded_with_exits("llama", {1: 0.5}, home, monkeypatch)
    qwen = tempo_mlx.load(str(twins.twin("qwen2")))
    kept = place_of(calibration.key_of(llama.model.info))
    kept.rename(place_of(calibration.key_of(qwen.model.info)))
    with pytest.raises(ModelError, match="of other weights"):
        tempo_mlx.stream(qwen, "The", early_exit=True)


def test_without_a_calibration_one_sentence_says_how_to_get_one(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(twins.twin("llama"))
    assert main(["generate", "The", "--model", path, "--early-exit"]) == 1
    assert f"make one with `tempo-mlx calibrate {path}`" in capsys.readouterr().err


def test_a_damaged_calibration_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_with_exits("llama", {1: 0.5}, home, monkeypatch)
    place = place_of(calibration.key_of(loaded.model.info))
    place.write_bytes(place.read_bytes().replace(b"tempo-mlx/exits", b"tempo-mlx/exitS"))
    with pytest.raises(ModelError, match="no calibration that this version reads"):
        tempo_mlx.stream(loaded, "The", early_exit=True)
    place.write_bytes(place.read_bytes()[:-5])
    with pytest.raises(ModelError, match="no calibration that this version reads"):
        tempo_mlx.stream(loaded, "The", early_exit=True)


def test_an_exit_that_only_drafts_is_kept_whole(tmp_path: Path) -> None:
    weight, offset = np.eye(4, dtype=np.float16) * 2, np.arange(4, dtype=np.float16)
    points = np.array([[0.5, 0.99, 1000.0]])
    drafting = Exit(1, 3, points, drafts={0.95: 0.5}, weight=weight, offset=offset)
    leaving = Exit(3, 2, points, pays={0.9: 0.25})
    Calibration("k", (drafting, leaving), np.arange(3, dtype=np.int32)).save(tmp_path / "k.safetensors")
    first, second = read_calibration(tmp_path / "k.safetensors", "k").exits
    assert (first.pays, first.drafts, second.pays, second.drafts) == ({}, {0.95: 0.5}, {0.9: 0.25}, {})
    assert np.array_equal(first.weight, weight) and np.array_equal(first.offset, offset)  # type: ignore[arg-type]
    assert second.weight is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layers": [1, 4]}, "Exit layer 4 is not one of the model's layers, which are 0 to 3"),
        ({"exit_layers": [2]}, "layers 1 were"),
        (
            {"exit_layers": [1, 2], "confidence_thresholds": [0.9]},
            "2 exit_layers and 1 confidence_thresholds",
        ),
        ({"exit_layers": [1, 1]}, "names a layer twice"),
        ({"confidence_thresholds": [0.9]}, "add --exit-layers"),
        ({"attention_threshold": 0.1}, "nothing to skip"),
        ({"lossless": True, "exit_kv": "propagate"}, "exit_kv has no effect beside lossless"),
        ({"decoder": "mcts"}, "early_exit has no effect with the mcts decoder"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    settings: dict[str, Any], message: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_with_exits("llama", {1: 0.5}, home, monkeypatch)
    with pytest.raises(ConfigError, match=message):
        tempo_mlx.stream(loaded, "The", early_exit=True, **settings)


def test_other_backends_and_shallow_models_are_refused(home: Path) -> None:
    torch = tempo_mlx.load(str(twins.twin("llama")), backend="torch")
    with pytest.raises(ConfigError, match="works on the MLX backend"):
        tempo_mlx.stream(torch, "The", early_exit=True)
    with pytest.raises(ConfigError, match="The model has 2 layers, and early exit needs at least 3"):
        candidates(2)
    assert candidates(30) == [3, 7, 11, 15, 19, 23, 27, 29]


def test_raw_confidence_needs_no_calibration_and_says_what_it_is(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = tempo_mlx.load(str(twins.twin("llama")))
    settings = {"decoder": "plain", "temperature": 0, "max_tokens": 20, "min_steps": 20}
    run = tempo_mlx.generate(
        loaded,
        "The",
        early_exit=True,
        raw_confidence=True,
        exit_layers=[1],
        confidence_thresholds=[0.0],
        **settings,
    )
    assert "not calibrated" in caplog.text
    assert run.early_exit is not None and run.early_exit["exits"][0]["left"] == 16  # four may wait at a time
    assert run.early_exit["exits"][0]["closed"] is False  # nothing was promised
    assert [step.exit_layer for step in run.steps[1:7]] == [1, 1, 1, 1, None, 1]


def test_a_text_that_is_none_is_one_sentence(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(twins.twin("llama"))
    missing, binary = tmp_path / "missing.txt", tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe")
    for file, words in ((missing, "is no file"), (binary, "line 1 is not UTF-8 text")):
        assert main(["calibrate", path, "--text", str(file)]) == 2
        error = capsys.readouterr().err
        assert words in error and str(file) in error and "Traceback" not in error


# Statistics


def test_the_bound_is_clopper_and_pearsons() -> None:
    assert lower_bound(59, 59) == pytest.approx(0.05 ** (1 / 59))
    assert lower_bound(95, 100) == pytest.approx(0.8978, abs=1e-3)  # scipy.stats.beta.ppf(0.05, 95, 6)
    assert lower_bound(0, 10) == 0.0


def test_texts_that_stand_and_fall_together_count_for_less() -> None:
    texts = np.repeat(np.arange(20), 30)
    alike = np.repeat(np.arange(20) % 4 != 0, 30)
    mixed = np.tile(np.arange(30) % 4 != 0, 20)
    assert design_effect(alike, texts) > 20
    assert design_effect(mixed, texts) == 1.0
    outcome = Outcome(np.linspace(1, 0, 600).astype(np.float32), alike)
    assert curve(outcome, texts)[-1, 1] < curve(Outcome(outcome.margins, mixed), texts)[-1, 1] - 0.05


def test_the_promise_holds_on_new_texts() -> None:
    """Margins drawn again and again: the agreement beyond the threshold is under its target about 1 time in 20."""
    random = np.random.default_rng(0)
    broken = 0
    for _ in range(40):
        texts = np.repeat(np.arange(30), 40)
        margins = random.exponential(size=len(texts)).astype(np.float32)
        right = random.random(len(texts)) < 1 - 0.3 * np.exp(-2 * margins)
        least = Exit(1, 1, curve(Outcome(margins, right), texts)).margin(0.95)
        if least is not None:
            true = 1 - 0.3 * np.exp(-3 * least) / 3 / np.exp(-least)  # mean of the error beyond `least`
            broken += true < 0.95
    assert broken <= 5


def test_exits_that_cost_more_than_they_save_stay_shut() -> None:
    costs = Costs(layers=10, layer=1.0, head=3.0, more_layer=0.1, more_head=0.1, look={1: 0.2, 2: 0.4})
    texts = np.zeros(200, np.int64)
    sure = np.arange(200) % 2 == 0
    outcomes = {
        (5, 1): Outcome(sure.astype(np.float32), sure),
        (5, 2): Outcome(sure.astype(np.float32), sure),
        (8, 1): Outcome(np.zeros(200, np.float32), sure),
        (9, 2): Outcome(np.ones(200, np.float32), sure),
    }
    thresholds = dict.fromkeys(outcomes, 0.5)
    assert choose(thresholds, outcomes, texts, costs) == [(5, 1), (9, 2)]
    always = {(9, 2): outcomes[9, 2].margins >= 0.5}
    assert price([(9, 2)], always, texts, costs) == pytest.approx(10 + 0.4 + 0.1 / 4)
    half = {(5, 1): sure}
    # of two tokens: one leaves after 6 layers, the other takes it along through the last 4
    assert price([(5, 1)], half, texts, costs) == pytest.approx(
        (6 + 0.2 + 0.1 / 4 + 10 + 4 * 0.1 + 0.2 + 3) / 2
    )


def test_the_exit_that_drafts_is_the_one_that_saves_most_or_none() -> None:
    costs = Costs(layers=10, layer=1.0, head=3.0, more_layer=0.1, more_head=0.3, look={1: 0.2})
    texts = np.zeros(120, np.int64)
    every = np.ones(120, bool)
    # six rows through 6 layers, five looks among them; then 4 layers and the head once for all; six tokens
    assert drafting_price((5, 1), every, every, texts, costs) == pytest.approx(
        (6 * 6 + 5 * 0.2 + 4 * (1 + 5 * 0.1) + 3 + 5 * 0.3) / 6
    )
    # a wrong draft costs its row, and gives nothing
    assert drafting_price((5, 1), every, ~every, texts, costs) == pytest.approx(
        (2 * 6 + 0.2 + 4 * 1.1 + 3.3), rel=0.01
    )
    # nothing is sure: a look each
    assert drafting_price((5, 1), ~every, every, texts, costs) == pytest.approx(13.2)
    # every other is sure, or right: two tokens at a time
    odd = np.arange(120) % 2 == 0
    upper, look = 4 * 1.0 + 3, 0.2
    two = 2 * 6 + 2 * look + upper + 0.7
    assert drafting_price((5, 1), odd, every, texts, costs) == pytest.approx(two / 2)
    assert drafting_price((5, 1), every, odd, texts, costs) == pytest.approx((two + 6 + 0.7) / 2, rel=0.01)
    # nothing is drafted beyond the end of a text
    three = 3 * 6 + 3 * look + upper + 2 * 0.7
    assert drafting_price((5, 1), every, every, np.arange(120) // 3, costs) == pytest.approx(three / 3)
    half = {
        (9, 1): Outcome(odd.astype(np.float32), every)
    }  # a token costs 11.85 of 13, which is too little gain
    assert choose_draft({(9, 1): 0.5}, half, texts, costs) is None
    sure = np.ones(120, np.float32)
    outcomes = {(place, 1): Outcome(sure, every) for place in (2, 5)}
    assert choose_draft({(2, 1): 0.5, (5, 1): 0.5}, outcomes, texts, costs) == (2, 1)
    assert choose_draft({(2, 1): 1.5, (5, 1): 1.0}, outcomes, texts, costs) == (5, 1)
    assert choose_draft({(2, 1): 1.5}, outcomes, texts, costs) is None
    assert choose_draft({}, outcomes, texts, costs) is None


def scheduled(
    outcomes: Mapping[Place, Outcome], fitted: Mapping[int, Any], monkeypatch: pytest.MonkeyPatch
) -> dict[Place, Exit]:
    """The exits of outcomes on texts of ten samples each, for one target."""
    monkeypatch.setattr(schedule, "TARGETS", (0.95,))
    costs = Costs(layers=10, layer=1.0, head=3.0, more_layer=0.1, more_head=0.1, look={1: 0.2, 2: 0.21})
    exits = with_schedule(outcomes, fitted, TEXTS, len(TEXTS), costs)
    return {(item.layer, item.width): item for item in exits}


TEXTS = np.arange(6000) // 10


def test_margins_are_raised_until_the_exits_keep_the_target_together_and_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the first exit is sure of is what is easy for the last one too."""
    random = np.random.default_rng(0)
    first, last = random.random((2, len(TEXTS))).astype(np.float32)
    chance = random.random(len(TEXTS))
    outcomes = {
        (5, 1): Outcome(first, chance > 0.2 * (1 - first)),
        (9, 2): Outcome(last, chance > 0.16 * (1 - last) * (first < 0.5)),
    }
    found = scheduled(outcomes, {5: None, 9: None}, monkeypatch)
    least = {place: item.pays[0.95] for place, item in found.items()}
    assert list(least) == [(5, 1), (9, 2)]
    assert 0.95 <= together(list(least), least, outcomes, TEXTS) < 0.96
    alone = {place: item.margin(0.95) for place, item in found.items()}
    assert together(list(alone), alone, outcomes, TEXTS) < 0.95  # type: ignore[arg-type]


def test_an_exit_that_only_drafts_is_scheduled_with_its_translator(monkeypatch: pytest.MonkeyPatch) -> None:
    sure = np.linspace(2, 1, len(TEXTS), dtype=np.float32)
    perfect = Outcome(sure, np.ones(len(TEXTS), bool))
    translator = np.ones((2, 2), np.float16), np.ones(2, np.float16)
    found = scheduled({(2, 1): perfect, (2, 2): perfect}, {2: translator}, monkeypatch)
    drafting, leaving = found[2, 1], found[2, 2]  # of equals leaving takes the wider, drafting the cheaper
    assert (set(drafting.pays), set(drafting.drafts)) == (set(), {0.95})
    assert drafting.drafts[0.95] == drafting.margin(0.95) == 1.0
    assert (set(leaving.pays), set(leaving.drafts)) == ({0.95}, set())
    assert drafting.weight is translator[0] and leaving.offset is translator[1]


def test_a_model_trained_to_be_left_early_is_read_as_it_is(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LayerSkip checkpoint is an ordinary Llama whose upper layers change little of what the head would say."""
    model = copy.deepcopy(twins.reference("llama"))
    for layer in model.model.layers[2:]:
        layer.self_attn.o_proj.weight.data *= 0.01
        layer.mlp.down_proj.weight.data *= 0.01
    path = tmp_path / "layerskip"
    model.save_pretrained(path)
    twins.write_tokenizer(path)
    for name in ("WIDTHS", "LAST_WIDTHS"):
        monkeypatch.setattr(calibrating, name, (320,))
    costs = Costs(layers=4, layer=1.0, head=1.0, more_layer=0.1, more_head=0.1, look={320: 0.1})
    monkeypatch.setattr(calibrating, "costs_of", lambda *_: costs)
    loaded = tempo_mlx.load(str(path))
    found = calibrate(loaded, layers=[0, 1], tokens=12, translators=False)
    found.save(place_of(found.key))
    assert all(item.weight is None for item in found.exits)
    assert {item.layer: 0.95 in item.pays for item in found.exits}[1]
    settings = {"decoder": "plain", "temperature": 0, "max_tokens": 40, "min_steps": 40}
    run = tempo_mlx.generate(loaded, "The", early_exit=True, **settings)
    assert run.early_exit is not None and run.early_exit["mean_layers"] < 3
    assert run.early_exit["agreement"] > 0.95
    full = tempo_mlx.generate(loaded, "The", **settings)
    lossless = tempo_mlx.generate(loaded, "The", early_exit=True, lossless=True, **settings)
    assert lossless.final_text == full.final_text
    assert any(0.95 in item.drafts for item in found.exits)
