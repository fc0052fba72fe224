"""What a lattice's probabilities are worth: measures beside the same found another way, and how a study goes on."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sacrebleu")
pytest.importorskip("rapidfuzz")
pytest.importorskip("matplotlib")

import tempo_mlx
from benchmarks import superposition, superposition_page
from benchmarks.quality.divergence import rows_of
from benchmarks.studies import read_records
from benchmarks.superposition import (
    BINS,
    LATTICES,
    SPELLED,
    Case,
    binned,
    exact_after,
    mass_said,
    measure_plain,
    measure_rows,
    measure_texts,
    measure_tree,
    total_variation,
)
from benchmarks.superposition_page import after_width, calibration_error, reliability
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.combine import log_probabilities
from tempo_mlx.decode.paths import layers_of, members_of, path_score, sample_paths
from tempo_mlx.model import device
from tests import twins
from tests.small import LENGTH, PROMPT, log_prob, small

TEXT = "the end and"
VOCABULARY = 8  # of the small model, the last of which ends a text
LETTERS = range(VOCABULARY - 1)


@pytest.fixture(scope="module")
def loaded() -> tempo_mlx.LoadedModel:
    return tempo_mlx.load(str(twins.twin("llama")))


def test_the_first_case_is_the_defaults() -> None:
    first, *_ = LATTICES.values()
    usual = GenerateConfig()
    assert (first.attend, first.threshold) == (usual.attend, usual.threshold)
    assert first.max_parallel_tokens == usual.max_parallel_tokens


def test_rows_that_see_one_past_are_exact_and_others_are_not(loaded: tempo_mlx.LoadedModel) -> None:
    narrow = measure_rows(loaded, TEXT, Case(threshold=1.0, tokens=8))
    assert narrow["widths"] == [1] * 8 and len(narrow["kl"]) == len(narrow["tv"]) == 7
    assert max(narrow["kl"]) < 1e-5 and max(narrow["tv"]) < 1e-4
    wide = measure_rows(loaded, TEXT, Case("all", 0.03, tokens=8))
    assert wide["widths"][0] > 1
    assert wide["kl"][0] < 1e-5 and wide["tv"][0] < 1e-4  # rows of the first set see the prompt alone
    assert max(wide["kl"]) > 1e-3 and max(wide["tv"]) > 1e-2
    bound = np.sqrt(
        np.array(wide["kl"]) / 2
    )  # of total variation, for each text (Pinsker): so for their means
    assert (np.array(wide["tv"]) <= bound + 1e-4).all()


def test_rows_are_whole_where_a_device_chooses(
    loaded: tempo_mlx.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    assert loaded.chooser is not None
    rows = rows_of(tempo_mlx.stream(loaded, TEXT, threshold=0.03, max_tokens=3))
    assert {row.shape[1] for row in rows} == {loaded.model.architecture.vocab_size}


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_exact_distributions_are_those_of_each_text_alone(name: str) -> None:
    model, ids, texts = tempo_mlx.load(str(twins.twin(name))).model, [97, 98, 99], [[5], [5, 6, 7], [8, 6]]
    for text, got in zip(texts, exact_after(model, ids, texts), strict=True):
        alone = model.forward([*ids, *text], np.arange(3 + len(text)), None, model.new_cache(), logits="last")
        assert np.abs(log_probabilities(alone.logits)[-1] - got).max() < 1e-4


def test_total_variation_is_what_would_have_to_move() -> None:
    p, q = np.log([[0.5, 0.3, 0.2], [1.0, 1e-30, 1e-30]]), np.log([[0.2, 0.3, 0.5], [1e-30, 1e-30, 1.0]])
    assert total_variation(p.astype(np.float32), q.astype(np.float32)) == pytest.approx([0.3, 1.0])


def test_bins_hold_pairs_sums_and_differences() -> None:
    sums = binned([[0.05, 0.12], [0.18, 1.0]], [[0.5, 0.2], [0.02, 0.7]], least=0.1)
    assert sums.shape == (BINS, 4)
    assert sums[0].tolist() == [0, 0, 0, 0]  # less recorded than counts
    assert sums[1] == pytest.approx([2, 0.3, 0.22, 0.24])
    assert sums[-1] == pytest.approx([1, 1.0, 0.7, 0.3])
    assert calibration_error(sums) == pytest.approx((0.08 + 0.3) / 3)
    assert binned([0.1], [0.1], least=0.1)[1, 0] == 1


def test_what_is_recorded_is_held_against_each_text_alone(loaded: tempo_mlx.LoadedModel) -> None:
    """The same pairs from the run's own record, and from a pass over every text by itself."""
    case, seed = Case(threshold=0.05, tokens=6), 3
    found = measure_rows(loaded, TEXT, case, seed)
    run = tempo_mlx.generate(loaded, TEXT, **case.settings)
    layers = layers_of(run.steps)
    edges, sets = np.zeros((2, BINS, 4))
    for t in range(1, case.tokens):
        for past in sample_paths(layers[:t], superposition.DRAWN, [seed, t - 1]):  # not by what comes after
            members = members_of(layers[:t], past)
            ids = [*run.prompt.token_ids, *(member.id for member in members)]
            out = loaded.model.forward(
                ids, np.arange(len(ids)), None, loaded.model.new_cache(), logits="last"
            )
            exact = np.exp(log_probabilities(out.logits)[-1])
            for member in layers[t].members:
                (edge,) = (edge for edge in member.parents if edge.slot == members[-1].slot)
                edges += binned(edge.forward, exact[member.id], case.threshold)
                sets += binned(member.probability, exact[member.id], case.threshold)
    assert max(found["widths"]) > 1
    assert np.array(found["edges"]) == pytest.approx(edges, abs=1e-3)
    assert np.array(found["sets"]) == pytest.approx(sets, abs=1e-3)
    assert np.abs(edges[:, 3]).sum() > 0.05  # there is something to tell apart


def test_plain_sampling_records_what_a_fresh_score_says(
    loaded: tempo_mlx.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure_plain(loaded, TEXT, Case(tokens=12), seed=5)
    sums = np.array(found["sets"])
    assert sums[:, 0].sum() == 12 and 0 < found["worst"] < 1e-4 and calibration_error(sums) < 1e-4
    assert found != measure_plain(loaded, TEXT, Case(tokens=12), seed=6)
    scored = superposition.score_sequences
    monkeypatch.setattr(
        superposition, "score_sequences", lambda *rest: [each + 1.0 for each in scored(*rest)]
    )
    off = measure_plain(loaded, TEXT, Case(tokens=12), seed=5)
    assert off["worst"] > 0.01 and calibration_error(np.array(off["sets"])) > 0.01


def test_a_lattice_holds_the_mass_of_all_texts_it_spells(monkeypatch: pytest.MonkeyPatch) -> None:
    """By transformers, one text after another."""
    case = Case(threshold=0.05, tokens=LENGTH)
    found = measure_texts(small(VOCABULARY), list(PROMPT), case)
    layers = layers_of(tempo_mlx.generate(small(VOCABULARY), list(PROMPT), **case.settings).steps)
    choices = list(itertools.product(*(range(len(layer.members)) for layer in layers)))
    texts = [
        tuple(layer.members[i].id for layer, i in zip(layers, choice, strict=True)) for choice in choices
    ]
    masses = [math.exp(log_prob(VOCABULARY, text)) for text in texts]
    said = [math.exp(path_score(layers, choice)) for choice in choices]
    assert found["texts"] == len(texts) > 8 and found["scored"] == pytest.approx(1.0)
    assert found["rows"] == sum(found["widths"][:-1]) == sum(len(layer.members) for layer in layers[:-1])
    assert found["mass"] == pytest.approx(sum(masses), abs=1e-5)
    assert found["said"] == mass_said(layers) == pytest.approx(sum(said))
    assert found["mass"] != pytest.approx(found["said"], abs=1e-3)
    monkeypatch.setattr(superposition, "MOST_TEXTS", 5)
    some = measure_texts(small(VOCABULARY), list(PROMPT), case)
    best = sorted(range(len(said)), key=lambda at: -said[at])[:5]
    assert some["mass"] == pytest.approx(sum(masses[at] for at in best), abs=1e-5)
    assert some["scored"] == pytest.approx(sum(said[at] for at in best) / sum(said))
    assert some["texts"] == found["texts"]


def after_letters(text: tuple[int, ...]) -> list[float]:
    return [math.exp(log_prob(VOCABULARY, (*text, letter))) for letter in LETTERS]


def test_a_tree_knows_what_follows_its_rows() -> None:
    """One row of texts of two tokens: all that begin with the best first token, whose row it is."""
    found = measure_tree(small(VOCABULARY), list(PROMPT), Case(threshold=0.0, tokens=2), rows=1)
    best = int(np.argmax(after_letters(())))
    assert found["rows"] == 1 and found["texts"] == len(LETTERS)
    assert found["mass"] == pytest.approx(sum(after_letters((best,))), abs=1e-6)
    assert found["greedy"] == pytest.approx(max(after_letters((best,))), abs=1e-6)


def test_a_tree_with_rows_enough_knows_everything() -> None:
    found = measure_tree(small(VOCABULARY), list(PROMPT), Case(threshold=0.0, tokens=3), rows=1000)
    assert found["texts"] == len(LETTERS) ** 3 and found["rows"] == len(LETTERS) + len(LETTERS) ** 2
    masses = (math.exp(log_prob(VOCABULARY, text)) for text in itertools.product(LETTERS, repeat=3))
    assert found["mass"] == pytest.approx(sum(masses), abs=1e-5)


def test_the_width_is_that_of_the_set_before_the_row() -> None:
    line: dict[str, Any] = {"widths": [3, 1, 2, 8], "kl": [9.0, 0.5, 0.25]}
    lines = [line] * superposition_page.FEWEST
    found = [after_width(lines, "kl", low, high) for low, high in ((3, 4), (1, 1), (2, 8))]
    assert [None if each is None else each.value for each in found] == [0.5, 0.25, 0.5]
    assert after_width(lines, "kl", 8, 8) is None and after_width(lines[1:], "kl", 1, 1) is None


def test_a_point_of_the_diagram_is_its_pairs() -> None:
    lines = [{"sets": binned([0.12, 0.18], [0.2, 0.3]).tolist()}, {"sets": binned([0.15], [0.7]).tolist()}]
    pairs, recorded, exact = reliability(lines, "sets", 1)
    assert pairs == 3 and recorded == pytest.approx(0.15) and exact.value == pytest.approx(0.4)
    assert reliability(lines, "sets", 5)[0] == 0


def test_a_stopped_study_goes_on_to_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(twins.twin("llama")), "--out", str(tmp_path / "out"), "--prompts", "2"]
    superposition.main([*options, "--minutes", "0"])
    assert "goes on from here" in capsys.readouterr().out
    (folder,) = (tmp_path / "out").iterdir()
    first = (folder / "rows.jsonl").read_text("utf-8")
    assert first.count("\n") == 1
    superposition.main(options)
    assert (folder / "rows.jsonl").read_text("utf-8").startswith(first)
    counts = {path.stem: len(read_records(path)) for path in folder.glob("*.jsonl")}
    assert counts == {"rows": 2 * len(LATTICES), "plain": 2, "texts": 2 * len(SPELLED)}
    before = {path.name: path.read_text("utf-8") for path in folder.iterdir()}
    superposition.main(options)
    assert {path.name: path.read_text("utf-8") for path in folder.iterdir()} == before
    page = tmp_path / "docs" / "superposition.md"
    superposition.main(["report", "--out", str(tmp_path / "out"), "--page", str(page)])
    text = page.read_text("utf-8")
    assert "nan" not in text and f"\n## {folder.name}\n" in text
    assert text.index("## In short") < text.index(f"## {folder.name}")
    pictures = {path.name for path in (tmp_path / "docs" / "images").iterdir() if path.suffix == ".svg"}
    assert len(pictures) == 3 and all(f"images/{name})" in text for name in pictures)
    assert superposition_page.read_results(folder)["texts"].keys() == SPELLED.keys()
