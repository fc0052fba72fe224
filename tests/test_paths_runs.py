"""Paths read off real lattices: exact log-probabilities, far enough apart, best first."""

from __future__ import annotations

import pytest

from tempo_mlx.api import generate, stream
from tempo_mlx.decode.paths import candidate_paths, edit_distance
from tests.trees import loaded, prompt, teacher


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize(
    "settings", [{}, {"use_retroactive_pruning": True, "pruning_window": 4}, {"attend": "all"}]
)
def test_paths_have_exact_log_probabilities(settings: dict[str, object], backend: str) -> None:
    model, ids = loaded(backend=backend, often=True), prompt(1)
    run = generate(model, ids, threshold=0.03, max_tokens=14, paths=4, path_distance=0.1, **settings)
    assert len(run.paths) > 1
    for path in run.paths:
        assert path.exact
        assert path.logprob == pytest.approx(
            sum(teacher("llama", ids, path.token_ids)), abs=1e-4 * len(path.token_ids)
        )


def test_paths_are_distinct_readings_of_the_lattice_best_first() -> None:
    ids = prompt(2)
    run = generate(loaded(), ids, threshold=0.03, max_tokens=16, paths=5, path_distance=0.25)
    means = [path.logprob / len(path.token_ids) for path in run.paths]
    assert means == sorted(means, reverse=True) and 1 < len(run.paths) <= 5
    for number, path in enumerate(run.paths):
        for step, token in zip(run.steps, path.token_ids, strict=True):
            assert token in {member.id for member in step.tokens}
        for other in run.paths[:number]:
            assert edit_distance(path.token_ids, other.token_ids) >= 0.25 * 16
    candidates = candidate_paths(run.steps, 5, 42, 0.25)
    best = max(candidates, key=lambda tokens: sum(teacher("llama", ids, tokens)) / len(tokens))
    assert run.paths[0].token_ids == tuple(best)


def test_reading_paths_leaves_a_run_under_way_undisturbed() -> None:
    settings = {"threshold": 0.03, "max_tokens": 12, "paths": 3}
    decoding = stream(loaded(), prompt(3), **settings)
    for _ in range(5):
        next(decoding)
    assert decoding.run().paths
    for _ in decoding:
        pass
    assert decoding.run().steps == generate(loaded(), prompt(3), **settings).steps


def test_without_paths_there_are_none() -> None:
    assert generate(loaded(), prompt(4), threshold=0.03, max_tokens=4).paths == ()
