"""Layers that keep a state, where rows continue more than one row: sets, trees, removals, going back.

transformers has no such thing, so what these are held against is the reference, which makes every state anew from the
first row in every pass, and for branches, in test_families.py, transformers itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tempo_mlx  # noqa: E402
from tempo_mlx.architecture import states as limits  # noqa: E402
from tempo_mlx.decode import score as scoring  # noqa: E402
from tempo_mlx.errors import ConfigError, ModelError  # noqa: E402
from tempo_mlx.exits.ahead import Lookup, Payoff  # noqa: E402
from tempo_mlx.mlx import mx  # noqa: E402
from tempo_mlx.model import states  # noqa: E402
from tempo_mlx.model.lineage import Lineage, segments  # noqa: E402
from tempo_mlx.model.mlx_backend import build  # noqa: E402
from tempo_mlx.model.recurrent import unit_lower_inverse  # noqa: E402
from tempo_mlx.model.torch_backend import TorchTransformer  # noqa: E402
from tempo_mlx.report.verify import verify  # noqa: E402
from tempo_mlx.sessions.arena import Arena  # noqa: E402
from tempo_mlx.weights import open_checkpoint  # noqa: E402
from tempo_mlx.weights.memory import estimate_memory  # noqa: E402
from tests.twins import twin  # noqa: E402

PROMPT, WIDTH, DEPTH = 20, 3, 4
ROWS = PROMPT + WIDTH * DEPTH
KINDS = ["qwen3_5", "lfm2", "granite4-h", "falcon_h1"]  # each kind of state, and one beside attention
TOLERANCE = 3e-4


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    checkpoint = open_checkpoint(str(twin(str(request.param))))
    return build(checkpoint, "cpu", "float32"), TorchTransformer(checkpoint, "cpu", "float32")


class Lattice:
    """Random sets after a prompt, each member continuing all of the set before with random weights."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.tokens = random.integers(256, size=ROWS)
        sets = np.repeat(np.arange(DEPTH), WIDTH)
        self.positions = np.concatenate([np.arange(PROMPT), PROMPT + sets])
        self.parents = np.eye(ROWS, k=-1, dtype=np.float32)
        for row in range(PROMPT, ROWS):
            self.parents[row] = 0
            first = row - (row - PROMPT) % WIDTH - WIDTH
            above = [PROMPT - 1] if first < PROMPT else range(first, first + WIDTH)
            self.parents[row, above] = random.dirichlet(np.ones(len(above)))
        gamma = np.eye(ROWS)
        for row in range(ROWS):
            gamma[row, :row] = self.parents[row, :row] @ gamma[:row, :row]
        with np.errstate(divide="ignore"):
            self.bias = np.log(gamma).astype(np.float32)

    def run(
        self,
        model: Any,
        removed: dict[int, list[int]] | None = None,
        chunk: int = PROMPT,
        open_sets: int | None = None,
    ) -> np.ndarray:
        """Logits of the sets' rows, a set in a pass; after set t, the slots removed[t] go. open_sets: how many the
        cache is told may still lose rows."""
        cache, columns, found = model.new_cache(), list(range(PROMPT)), []
        for start in range(0, PROMPT, chunk):
            part = slice(start, min(start + chunk, PROMPT))
            model.forward(self.tokens[part], self.positions[part], None, cache, logits="none")
        for step in range(DEPTH):
            rows = list(range(PROMPT + step * WIDTH, PROMPT + (step + 1) * WIDTH))
            columns += rows
            bias, parents = (table[np.ix_(rows, columns)] for table in (self.bias, self.parents))
            out = model.forward(self.tokens[rows], self.positions[rows], bias, cache, parents=parents)
            found.append(out.logits)
            gone = (removed or {}).get(step, [])
            if gone:
                cache.keep(np.array([at for at, slot in enumerate(columns) if slot not in gone]))
                columns = [slot for slot in columns if slot not in gone]
            if open_sets is not None:
                cache.settle(sum(slot < PROMPT + (step + 1 - open_sets) * WIDTH for slot in columns))
        self.cache = cache
        return np.concatenate(found)


def test_a_set_continues_the_mean_of_its_parents(pair: tuple[Any, Any]) -> None:
    """The same by steps, with states held from one to the next, in one pass over everything, and by the reference."""
    ours, theirs = pair
    lattice = Lattice()
    wanted = lattice.run(theirs)
    np.testing.assert_allclose(lattice.run(ours), wanted, atol=TOLERANCE)
    np.testing.assert_allclose(lattice.run(ours, chunk=3), wanted, atol=TOLERANCE)
    for model in pair:
        everything = model.forward(
            lattice.tokens, lattice.positions, lattice.bias, model.new_cache(), parents=lattice.parents
        ).logits
        np.testing.assert_allclose(everything[PROMPT:], wanted, atol=TOLERANCE)


def test_parents_change_what_follows(pair: tuple[Any, Any]) -> None:
    lattice, other = Lattice(), Lattice()
    other.parents[-1] = np.roll(other.parents[-1], 1)
    for model in pair:
        assert np.abs(lattice.run(model)[-1] - other.run(model)[-1]).max() > 0.01


def test_a_removal_is_a_replay_without_it(pair: tuple[Any, Any]) -> None:
    """One member, and then a whole set: later rows continue what is left, the weights scaled to sum 1."""
    ours, theirs = pair
    lattice = Lattice(seed=2)
    removed = {1: [PROMPT + 1], 2: [PROMPT + WIDTH + i for i in range(WIDTH)]}
    wanted = lattice.run(theirs, removed)
    np.testing.assert_allclose(lattice.run(ours, removed), wanted, atol=TOLERANCE)
    assert np.abs(wanted[-1] - lattice.run(theirs)[-1]).max() > 0.01
    # as if the member had never been: from the set after the removal on
    without = Lattice(seed=2)
    gone = PROMPT + 1
    rows = slice(PROMPT + WIDTH, PROMPT + 2 * WIDTH)
    without.parents[rows, gone] = 0
    without.parents[rows] /= without.parents[rows].sum(axis=1, keepdims=True)
    lineage = Lineage()
    lineage.append(ROWS, lattice.parents)
    lineage.keep(np.delete(np.arange(ROWS), gone))
    slots, weights = lineage.of(rows.start - 1)
    np.testing.assert_allclose(weights, without.parents[rows.start][slots + (slots >= gone)], rtol=1e-6)


class BrokenOff:
    """A model that begins every pass with other tokens first, and breaks it off between its layers."""

    def __init__(self, model: Any, patch: pytest.MonkeyPatch) -> None:
        self.model, self.patch, self.new_cache = model, patch, model.new_cache

    def forward(self, tokens: np.ndarray, *arguments: Any, **rest: Any) -> Any:
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        with self.patch.context() as patch:
            if isinstance(self.model, TorchTransformer):
                patch.setattr(self.model, "_fed", stop)
            else:
                patch.setattr(self.model, "blocks", [*self.model.blocks[:-1], stop])
            with pytest.raises(KeyboardInterrupt):
                self.model.forward(np.sort(tokens), *arguments, **rest)
        return self.model.forward(tokens, *arguments, **rest)


def test_a_pass_that_was_broken_off_leaves_nothing(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, or since memory ran out: a conversation goes on from its cache, and replays what it has of rows."""
    removed = {1: [PROMPT + 1], 2: [PROMPT + WIDTH + i for i in range(WIDTH)]}
    for model in pair:
        for chunk in (PROMPT, 1):
            wanted = Lattice(seed=6).run(model, removed, chunk)
            got = Lattice(seed=6).run(BrokenOff(model, monkeypatch), removed, chunk)
            np.testing.assert_allclose(got, wanted, atol=TOLERANCE)


def test_going_back_is_as_if_it_had_not_been(pair: tuple[Any, Any]) -> None:
    lattice = Lattice(seed=3)
    for model in pair:
        cache = model.new_cache()
        model.forward(lattice.tokens[:PROMPT], lattice.positions[:PROMPT], None, cache, logits="none")
        copied = cache.copy()
        rows = np.arange(PROMPT, ROWS)
        table = lattice.bias[rows], lattice.parents[rows]
        arguments = lattice.tokens[rows], lattice.positions[rows], table[0]
        first = model.forward(*arguments, cache, parents=table[1]).logits
        again = model.forward(*arguments, copied, parents=table[1]).logits
        np.testing.assert_allclose(again, first, atol=1e-5)
        cache.truncate(PROMPT + WIDTH)
        assert len(cache) == PROMPT + WIDTH
        later = rows[WIDTH:]
        third = model.forward(
            lattice.tokens[later],
            lattice.positions[later],
            lattice.bias[later],
            cache,
            parents=lattice.parents[later],
        ).logits
        np.testing.assert_allclose(third, first[WIDTH:], atol=TOLERANCE)


def test_long_texts_leave_checkpoints_to_go_back_to(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stretch is not journalled, so going back into it goes back to where it began; a prefix is run again."""
    monkeypatch.setattr(states, "STRETCH", 8)
    monkeypatch.setattr(states, "JOURNAL", 4)
    model, theirs = pair
    tokens = np.random.default_rng(4).integers(256, size=40)
    wanted = theirs.forward(tokens, np.arange(40), None, theirs.new_cache()).logits
    cache = model.new_cache()
    for start, stop in ((0, 10), (10, 20), (20, 23), (23, 29), (29, 30)):
        got = model.forward(tokens[start:stop], np.arange(start, stop), None, cache).logits
        np.testing.assert_allclose(got, wanted[start:stop], atol=TOLERANCE)
    cache.truncate(17)
    assert len(cache) == 10
    got = model.forward(tokens[10:], np.arange(10, 40), None, cache).logits
    np.testing.assert_allclose(got, wanted[10:], atol=TOLERANCE)
    with pytest.raises(ModelError, match="start the run anew"):
        cache.keep(np.delete(np.arange(40), 5))
    cache.truncate(3)
    assert len(cache) == 0


def test_what_no_removal_can_reach_leaves_the_journal(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wide lattice, of which the decoder says how far back it may still remove: the same rows, of a short journal."""
    ours, theirs = pair
    lattice = Lattice(seed=6)
    removed = {1: [PROMPT + WIDTH + 1], 2: [PROMPT + 2 * WIDTH - 1], 3: [PROMPT + 3 * WIDTH - 2]}
    wanted = lattice.run(theirs, removed)
    monkeypatch.setattr(states, "JOURNAL", 2)
    np.testing.assert_allclose(lattice.run(ours, removed, open_sets=2), wanted, atol=TOLERANCE)
    assert len(lattice.cache.recurrent().rows) <= 3 * WIDTH
    assert lattice.cache.recurrent().journal.count <= 2 * 3 * WIDTH + 2
    with pytest.raises(ModelError, match="start the run anew"):
        lattice.cache.copy().keep(np.delete(np.arange(len(lattice.cache)), range(PROMPT, PROMPT + WIDTH)))
    with pytest.raises(ModelError, match="further back than the states"):
        lattice.cache.recurrent().replay({PROMPT - 1})


def test_rows_that_are_no_more_leave_the_journal(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows are tried after a text and forgotten, again and again; a copy of the cache is not disturbed."""
    monkeypatch.setattr(states, "JOURNAL", 8)
    lattice, model = Lattice(), pair[0]
    cache = model.new_cache()
    model.forward(lattice.tokens[:PROMPT], lattice.positions[:PROMPT], None, cache, logits="none")
    before, parents = len(cache), np.zeros((2, PROMPT + 2), np.float32)
    parents[:, PROMPT - 1] = 1
    bias = np.zeros_like(parents)
    arguments = lattice.tokens[:2], np.full(2, PROMPT), bias
    other = cache.copy()
    first = model.forward(*arguments, cache, parents=parents).logits
    for _ in range(30):
        cache.keep(np.arange(before))
        again = model.forward(*arguments, cache, parents=parents).logits
    assert cache.recurrent().journal.count <= 2 * (PROMPT + 2) + 8
    for found in (again, model.forward(*arguments, other, parents=parents).logits):
        np.testing.assert_allclose(found, first, atol=1e-6)


def test_states_further_back_are_replayed(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree whose rows go on from anywhere (as MCTS does), with room for the newest states only."""
    monkeypatch.setattr(states, "HELD_BYTES", 0)
    ours, theirs = pair
    tokens = np.random.default_rng(5).integers(256, size=PROMPT + 5)
    above = [PROMPT - 1, PROMPT - 1, PROMPT, PROMPT + 2, PROMPT]  # the last goes on from an old row
    found: list[np.ndarray] = []
    for model in (ours, theirs):
        cache, seen, logits = model.new_cache(), [list(range(i + 1)) for i in range(PROMPT)], []
        model.forward(tokens[:PROMPT], np.arange(PROMPT), None, cache, logits="none")
        for row, parent in enumerate(above, PROMPT):
            seen.append([*seen[parent], row])
            bias, parents = np.full((1, row + 1), -np.inf, np.float32), np.zeros((1, row + 1), np.float32)
            bias[0, seen[row]], parents[0, parent] = 0, 1
            logits.append(
                model.forward(tokens[[row]], [len(seen[row]) - 1], bias, cache, parents=parents).logits
            )
        found.append(np.concatenate(logits))
    np.testing.assert_allclose(found[0], found[1], atol=TOLERANCE)


def test_a_cache_says_what_its_states_take(pair: tuple[Any, Any]) -> None:
    model = pair[0]
    cache = model.new_cache()
    model.forward([1, 2, 3], [0, 1, 2], None, cache, logits="none")
    numbers = sum(layer.recurrent.numbers for layer in model.architecture.layers if layer.recurrent)
    assert cache.nbytes > 4 * numbers
    arrays = [a for memory in cache.recurrent().memories.values() for a in memory.held.values()]
    assert sum(a.size for a in arrays) == numbers  # the last row's
    inputs = sum(layer.recurrent.inputs for layer in model.architecture.layers if layer.recurrent)
    assert sum(a.size for a in cache.recurrent().journal.arrays()) == 3 * inputs


def test_an_estimate_covers_what_a_wide_run_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of three, of which some may still be removed, well beyond where the journal is cut."""
    monkeypatch.setattr(states, "JOURNAL", 24)
    monkeypatch.setattr(limits, "JOURNAL", 24)
    for name in KINDS:
        checkpoint = open_checkpoint(str(twin(name)))
        model = build(checkpoint, "cpu", "float32")
        cache = model.new_cache()
        model.forward(np.arange(20), np.arange(20), None, cache, logits="none")
        estimate = estimate_memory(checkpoint, dtype="float32", slots=256, width=3)
        for _ in range(30):
            size = len(cache) + 3
            parents = np.zeros((3, size), np.float32)
            parents[:, len(cache) - 1] = 1
            model.forward(
                [1, 2, 3],
                np.full(3, len(cache)),
                np.zeros((3, size), np.float32),
                cache,
                parents=parents,
                logits="none",
            )
            cache.settle(len(cache) - 9)
        assert estimate.states / 12 < cache.nbytes <= estimate.cache + estimate.states
        assert sum(a.nbytes for a in cache.recurrent().journal.arrays()) < estimate.states / 2


def test_lineage() -> None:
    lineage = Lineage()
    lineage.append(3, None)
    lineage.append(2, np.array([[0, 0, 1, 0, 0], [0, 0, 1, 0, 0]], np.float32))
    lineage.append(2, np.array([[0, 0, 0, 0.25, 0.75, 0, 0], [0, 0, 0, 0, 1, 0, 0]], np.float32))
    assert (lineage.chain, len(lineage)) == (4, 7)  # the first of the set is a chain still
    runs = [(part.start, part.stop, part.chain) for part in segments(lineage, 0, 7, exposed=False)]
    assert runs == [(0, 3, True), (3, 5, False), (5, 7, False)]
    assert segments(lineage, 0, 3, exposed=True)[0].stop == 1
    other = lineage.copy()
    assert lineage.keep(np.arange(7)) is None
    assert lineage.keep(np.array([0, 1, 2, 4, 5, 6])) == 4  # slot 3 goes: 5 continues 4 alone
    assert [lineage.of(slot)[0].tolist() for slot in range(6)] == [[], [0], [1], [2], [3], [3]]
    assert lineage.of(4)[1].tolist() == [1.0]
    assert other.keep(
        np.array([0, 1, 2, 5, 6])
    )  # the whole set goes: its children continue what it continued
    assert [other.of(slot)[0].tolist() for slot in (3, 4)] == [[2], [2]]
    other.truncate(2)
    assert len(other) == 2


def test_the_inverse_that_chunks_are_solved_with() -> None:
    """Of keys that are all alike, where powers of the matrix would overflow into noise."""
    matrix = np.eye(64) + np.tril(np.full((2, 64, 64), 0.999), -1)
    found = np.array(unit_lower_inverse(mx.array(matrix.astype(np.float32))))
    np.testing.assert_allclose(found, np.linalg.inv(matrix), atol=1e-5)


RUNS = {
    "superposed": {"threshold": 0.02},
    "soft": {"threshold": 0.02, "carry": "lineage"},
    "pruned": {
        "threshold": 0.02,
        "carry": "lineage",
        "pruning_signal": "posterior",
        "posterior_threshold": 0.2,
        "complete_removal_mode": "remove_position",
    },
    "branches": {"branches": 3},
    "beam": {"decoder": "beam"},
    "mcts": {"decoder": "mcts", "mcts_simulations": 4},
    "plain": {"decoder": "plain", "temperature": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(RUNS))
def test_runs_on_hybrids_are_what_they_say(kind: str) -> None:
    """Decoded on states held and replayed, and recomputed from the run file alone, by the reference too."""
    for name in ("qwen3_5", "lfm2", "granite4-h"):
        loaded = tempo_mlx.load(str(twin(name)), dtype="float32")
        run = tempo_mlx.generate(loaded, "the sand and the sea", max_tokens=7, **RUNS[kind])
        assert kind != "pruned" or any(token.removed_why for step in run.steps for token in step.tokens)
        for each in (loaded, tempo_mlx.load(str(twin(name)), backend="torch")):
            result = verify(run, each)
            assert result.ok, (name, result.findings)


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2_moe", "granite4-h", "bamba", "mamba2"])
def test_runs_with_removals_verify_whatever_was_drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of block, with edges of both kinds, and journals so short that they are cut under way."""
    monkeypatch.setattr(states, "JOURNAL", 3)
    loaded = tempo_mlx.load(str(twin(name)), dtype="float32")
    gone = 0
    for seed in range(8):
        run = tempo_mlx.generate(
            loaded,
            "the sand and the sea"[: 4 + 2 * seed],
            max_tokens=9,
            min_steps=9,
            threshold=0.02,
            carry=("best", "lineage")[seed % 2],
            pruning_signal="posterior",
            posterior_threshold=0.1 + 0.03 * seed,
            pruning_window=1 + seed % 4,
            complete_removal_mode=("keep_token", "keep_unattended", "remove_position")[seed % 3],
        )
        gone += sum(token.removed_why is not None for step in run.steps for token in step.tokens)
        result = verify(run, loaded)
        assert result.ok, (seed, result.findings)
    assert gone > 20


def test_soft_and_hard_edges_differ() -> None:
    loaded = tempo_mlx.load(str(twin("qwen3_5")), dtype="float32")
    runs = [
        tempo_mlx.generate(loaded, "the sand", max_tokens=6, threshold=0.02, carry=carry)
        for carry in ("best", "lineage")
    ]
    last = [run.steps[-1].tokens[0].probability for run in runs]
    assert last[0] != pytest.approx(last[1], abs=1e-6)


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "granite4-h", "gemma4-e"])
@pytest.mark.parametrize("settings", [{"decoder": "plain", "temperature": 0.0}, {"threshold": 0.1}])
def test_guesses_run_ahead_change_nothing(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two right guesses and a wrong one at a time, which is dropped, and with it what states were made of it."""
    monkeypatch.setattr(states, "JOURNAL", 4)
    monkeypatch.setattr(Payoff, "allows", lambda self, source: True)
    loaded = tempo_mlx.load(str(twin(name)), dtype="float32")
    settings = {"max_tokens": 16, "min_steps": 16, **settings}
    whole = tempo_mlx.generate(loaded, "the sand", **settings)
    text = [*whole.prompt.token_ids, *(step.tokens[0].id for step in whole.steps)]
    monkeypatch.setattr(
        Lookup, "guess", lambda self: [*text[len(self._tokens) :][:2], 7] if self._tokens else []
    )
    ours = tempo_mlx.generate(loaded, "the sand", early_exit=True, lossless=True, **settings)
    for step, wanted in zip(ours.steps, whole.steps, strict=True):
        assert [token.id for token in step.tokens] == [token.id for token in wanted.tokens]
        np.testing.assert_allclose(
            [token.probability for token in step.tokens],
            [token.probability for token in wanted.tokens],
            atol=1e-4,
        )
    assert ours.early_exit is not None and ours.early_exit["lossless"]
    assert verify(ours, loaded).ok
    if "decoder" in settings:
        assert ours.timing["early_exit_drafted"] > ours.timing["early_exit_accepted"] > 0


@pytest.mark.parametrize("attend", ["all", "weighted"])
def test_rules_that_mean_nothing_to_states_are_refused(attend: str) -> None:
    loaded = tempo_mlx.load(str(twin("lfm2")))
    with pytest.raises(ConfigError, match="whose layers keep a state"):
        tempo_mlx.generate(loaded, "the sand", max_tokens=3, attend=attend)


@pytest.mark.parametrize("name", KINDS)
def test_long_texts_that_part_early_are_scored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several passes, of which the first are of one text alone; its journal goes where nothing goes on from it."""
    random = np.random.default_rng(3)
    one, other = (random.integers(256, size=40).tolist() for _ in range(2))
    texts = [one, [*one[:20], *other[:20]], other]
    loaded = tempo_mlx.load(str(twin(name)), dtype="float32")
    whole = tempo_mlx.score(loaded, [5, 6, 7], texts)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 8 * loaded.model.architecture.vocab_size)
    monkeypatch.setattr(states, "JOURNAL", 4)
    for found, wanted in zip(tempo_mlx.score(loaded, [5, 6, 7], texts), whole, strict=True):
        np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=TOLERANCE)
    kept: list[int] = []
    settle = states.States.settle

    def noted(self: states.States, slot: int) -> None:
        settle(self, slot)
        kept.append(len(self.rows))

    monkeypatch.setattr(states.States, "settle", noted)
    tempo_mlx.score(loaded, [5, 6, 7], [one])
    assert kept and max(kept) <= 4


def test_scores_and_paths_on_a_hybrid() -> None:
    """Continuations in one tree score as each alone; and a run's paths are such scores."""
    loaded = tempo_mlx.load(str(twin("qwen3_5")), dtype="float32")
    together = tempo_mlx.score(loaded, "the sand", [" and", " and the", " is"])
    for text, found in zip([" and", " and the", " is"], together, strict=True):
        assert found.log_prob == pytest.approx(
            tempo_mlx.score(loaded, "the sand", [text])[0].log_prob, abs=1e-4
        )
    run = tempo_mlx.generate(loaded, "the sand", max_tokens=5, threshold=0.02, paths=2)
    assert verify(run, loaded).ok


def test_what_hybrids_do_not_have_is_said() -> None:
    loaded = tempo_mlx.load(str(twin("lfm2")))
    for settings in ({}, {"lossless": True, "exit_layers": [1]}, {"lossless": True, "exit_lookup": False}):
        with pytest.raises(ModelError, match="choose --lossless and no exit layers"):
            tempo_mlx.generate(loaded, "the sand", max_tokens=3, early_exit=True, **settings)
    torch_one = tempo_mlx.load(str(twin("lfm2")), backend="torch")
    with pytest.raises(ModelError, match="leave out --backend torch"):
        Arena(torch_one.model, 100)
