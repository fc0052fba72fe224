"""The studies of pruning and attention: what hindsight is, on answers that are known, and a quick run to the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import tempo_mlx
from benchmarks import attention_study, pruning_ablation
from benchmarks.pruning_ablation import BASELINE, HORIZON, concordance, outsiders
from benchmarks.studies import read_records
from tempo_mlx.decode.score import score_sequences
from tests import twins

PROMPT, BEST = [3, 4, 5], [6, 7, 8, 9]


@pytest.fixture(scope="module")
def loaded() -> tempo_mlx.LoadedModel:
    return tempo_mlx.load(str(twins.twin("llama")))


def test_pairs_are_ranked_as_hindsight_ranks_them() -> None:
    exact = {0: np.array([-3.0, -1.0, -2.0])}
    assert concordance({0: np.array([0.1, 0.9, 0.5])}, exact) == [3, 3]
    assert concordance({0: np.array([0.9, 0.5, 0.1])}, exact) == [1, 3]
    assert concordance({0: np.array([True, False, False])}, exact) == [
        0.5,
        3,
    ]  # what is known of others: nothing
    assert concordance({0: np.array([0.9, 0.5, 0.1])}, {0: np.array([np.nan, -1.0, -2.0])}) == [1, 1]


def test_an_outsider_is_no_member_and_the_model_goes_on_from_it(loaded: tempo_mlx.LoadedModel) -> None:
    vocabulary = range(loaded.model.architecture.vocab_size)
    first = [
        float(row[-1]) for row in score_sequences(loaded.model, PROMPT, [[*BEST[:2], t] for t in vocabulary])
    ]
    ranked = sorted(vocabulary, key=lambda token: -first[token])
    for members in (ranked[:1], ranked[:3]):
        (found,) = outsiders(loaded, PROMPT, BEST, {2: members}).values()
        outsider = ranked[len(members)]
        own = tempo_mlx.generate(
            loaded,
            [*PROMPT, *BEST[:2], outsider],
            decoder="plain",
            temperature=0.0,
            max_tokens=HORIZON,
            min_steps=HORIZON,
        )
        assert found == [step.tokens[0].id for step in own.steps] and len(found) == HORIZON


def test_an_outsider_does_not_end_the_text(
    loaded: tempo_mlx.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No set of a lattice that is kept from ending has such a token, though it may be the likeliest."""
    logits = loaded.model.forward([*PROMPT, *BEST[:2]], np.arange(5), None, loaded.model.new_cache()).logits
    assert logits is not None
    first, second, third = (int(token) for token in np.argsort(-logits[-1])[:3])
    monkeypatch.setattr(loaded.tokenizer, "eos_ids", frozenset({second}))
    (found,) = outsiders(loaded, PROMPT, BEST, {2: [first]}).values()
    own = tempo_mlx.generate(
        loaded, [*PROMPT, *BEST[:2], third], decoder="plain", temperature=0.0, max_tokens=HORIZON,
        min_steps=HORIZON,
    )  # fmt: skip
    assert found == [step.tokens[0].id for step in own.steps]


def run(module: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """With a threshold at which a small random model has sets of several."""
    command = [
        "--quick",
        "--threshold",
        "0.03",
        "--model",
        str(twins.twin("llama")),
        "--out",
        str(folder),
        "--page",
        str(folder / "page.md"),
    ]
    monkeypatch.setattr("sys.argv", [module.__name__, *command])
    module.main()


def test_the_ablation_writes_its_page_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(pruning_ablation, monkeypatch, tmp_path)
    page = (tmp_path / "page.md").read_text("utf-8")
    (path,) = tmp_path.glob("quick/*/lineage.jsonl")
    records = read_records(path)
    assert (
        len(records) == 4 and "4 prompts" in page and (tmp_path / "images" / "pruning-lineage.png").exists()
    )
    for record in records:
        pairs = {kind: found["posterior"][1] for kind, found in record["concordance"].items()}
        assert pairs["continuation"] == pairs["outsider"] == pairs["both"] > pairs["other pairs"]
        agreed, of = record["concordance"]["other pairs"][BASELINE]
        assert agreed == of / 2  # among others, to know which one is best says nothing
    monkeypatch.setattr(pruning_ablation, "study", None)
    run(pruning_ablation, monkeypatch, tmp_path)
    assert (tmp_path / "page.md").read_text("utf-8") == page


def test_the_attention_study_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(attention_study, monkeypatch, tmp_path)
    page = (tmp_path / "page.md").read_text("utf-8")
    (about,) = (json.loads(path.read_text("utf-8")) for path in tmp_path.glob("quick/*/about.json"))
    assert "## All prompts (4)" in page and f"Model {about['id']}, 24 steps" in page
