"""Runs of the real loop, replayed: by `verify` on both backends, and by an independent reference."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tempo_mlx.api import generate, load  # noqa: E402
from tempo_mlx.config import as_dict  # noqa: E402
from tempo_mlx.decode.paths import readings_at_hand  # noqa: E402
from tempo_mlx.decode.step import Edge, Member, Step  # noqa: E402
from tempo_mlx.errors import ModelError, RunFileError  # noqa: E402
from tempo_mlx.loading import LoadedModel  # noqa: E402
from tempo_mlx.model import device  # noqa: E402
from tempo_mlx.model.mlx_backend import build  # noqa: E402
from tempo_mlx.model.torch_backend import TorchTransformer  # noqa: E402
from tempo_mlx.report.build import build_run  # noqa: E402
from tempo_mlx.report.records import RunPath, RunPrompt, RunRule  # noqa: E402
from tempo_mlx.report.run import Run  # noqa: E402
from tempo_mlx.report.verify import dense, verify  # noqa: E402
from tempo_mlx.report.verify.book import SPREAD, Tolerance, holds_target, noise_of, tolerance_for  # noqa: E402
from tempo_mlx.report.verify.claims import read_claims  # noqa: E402
from tempo_mlx.report.verify.dense import dense_run  # noqa: E402
from tempo_mlx.resolution import resolve  # noqa: E402
from tempo_mlx.weights import Checkpoint, open_checkpoint  # noqa: E402
from tests import twin_table, twins  # noqa: E402
from tests.replay import dense_bias, differences  # noqa: E402
from tests.runs import ByteTokenizer  # noqa: E402

TOLERANCE = 1e-4
VOCABULARY = 48
TOKENIZER = ByteTokenizer([f" t{index}".encode() for index in range(twin_table.VOCABULARY)])
PROMPT = (3, 14, 15, 9, 2, 6)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, spread enough that sets are wide and edges uneven."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(22.0 if name.startswith("lm_head") else 8.0)
    path = tmp_path_factory.mktemp("twin")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(twin: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(twin, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def checkpoint(twin: Path) -> Checkpoint:
    return open_checkpoint(str(twin))


@pytest.fixture(scope="module")
def models(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "mlx": build(checkpoint, "auto", "float32"),
        "torch": TorchTransformer(checkpoint, "cpu", "float32"),
    }


def with_tokenizer(model: Any, eos: int | None = None) -> LoadedModel:
    tokenizer = WordTokenizer(VOCABULARY, frozenset() if eos is None else frozenset({eos}))
    return LoadedModel(model, tokenizer)  # type: ignore[arg-type]


class WordTokenizer(ByteTokenizer):
    """Token i is the word ` ti`."""

    def __init__(self, count: int, eos_ids: frozenset[int]) -> None:
        super().__init__([f" t{index}".encode() for index in range(count)])
        self.eos_ids = eos_ids

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        return "".join(map(self.token_text, ids))


def decode(model: Any, eos: int | None = None, prune: Any = None, **settings: Any) -> Run:
    if settings.get("decoder") != "plain" and "selection" not in settings:
        settings = {"threshold": 0.08, **settings}
    return generate(with_tokenizer(model, eos), PROMPT, prune=prune, **{"max_tokens": 24, **settings})


# The families whose angles or windows differ, and one of every other kind of block.
REPLAYED = (
    "llama", "llama-tied", "llama3", "llama-dynamic", "mistral", "qwen2", "qwen2-yarn", "qwen3", "gemma2", "gemma3",
    "phi3", "phi4", "smollm3", "olmo2", "granite", "cohere", "gpt_neox", "qwen3_moe", "gpt_oss", "llama4",
    "deepseek_v3", "gemma3n", "gemma4-moe", "qwen3_5", "lfm2", "granite4-h",
)  # fmt: skip


@pytest.mark.parametrize("family", REPLAYED)
def test_runs_of_every_family(family: str) -> None:
    """Sliding windows count positions, not slots. Beyond the original context, some families' rotary angles follow
    the length of the text: those are replayed set by set. (transformers applies no window to a 4-D mask.)"""
    checkpoint = open_checkpoint(str(twins.twin(family)))
    model, torch_model = build(checkpoint, "auto", "float32"), TorchTransformer(checkpoint, "cpu", "float32")
    tokenizer = checkpoint.tokenizer()
    settings = {"threshold": 0.02, "max_tokens": 30, **PRUNING["posterior"]}
    run = generate(LoadedModel(model, tokenizer), PROMPT, **settings)
    for each in (model, torch_model):
        result = verify(run, LoadedModel(each, tokenizer))
        assert result.ok, result.findings
    attention = [layer.attention for layer in checkpoint.architecture.layers if layer.attention]
    windows = any(part.sliding_window or part.attention_chunk for part in attention)
    if (
        not windows
        and not checkpoint.architecture.recurrent
        and not any(rope.original_max_position_embeddings for rope in checkpoint.architecture.ropes)
    ):
        assert max(differences(json.loads(run.to_json()), twins.reference(family)).values()) < TOLERANCE


PRUNING: dict[str, dict[str, Any]] = {
    "kept": {},
    "posterior": {"pruning_signal": "posterior", "posterior_threshold": 0.2},
    "relative": {"pruning_signal": "posterior", "relative_posterior": True, "posterior_threshold": 0.4},
    "attention": {"attention_threshold": 0.05, "sigmoid_steepness": 0},
    "random": {"pruning_signal": "random", "posterior_threshold": 0.3},
    "unattended": {
        "pruning_signal": "random", "posterior_threshold": 0.7,
        "complete_removal_mode": "keep_unattended",
    },
    "whole positions": {
        "pruning_signal": "random", "posterior_threshold": 0.7,
        "complete_removal_mode": "remove_position", "pruning_window": 2,
    },
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    **{
        f"{attend}, {name}": {"attend": attend, **settings}
        for attend in ("lineage", "all", "weighted", "best")
        for name, settings in PRUNING.items()
    },
    "siblings seen under all": {
        "attend": "all",
        "allow_intraset_token_visibility": True,
        **PRUNING["posterior"],
    },
    "siblings seen under weighted": {"allow_intraset_token_visibility": True, **PRUNING["posterior"]},
    "positions of their own": {"custom_rope": False, **PRUNING["posterior"]},
    **{
        f"combine {rule}": {"combine": rule, **PRUNING["posterior"]}
        for rule in ("last", "mean", "product", "max")
    },
    "cold": {"temperature": 0.5, **PRUNING["posterior"]},
    "hot": {"temperature": 1.7, "threshold": 0.05, **PRUNING["posterior"]},
    "argmax": {"temperature": 0.0},
    "plain, sampled": {"decoder": "plain", "temperature": 1.3},
    "plain, greedy": {"decoder": "plain", "temperature": 0.0},
    "top-k": {"selection": "top-k", "top_k": 3, "attend": "best", **PRUNING["posterior"]},
    "scheduled": {"final_threshold": 1.0, "dynamic_target": "both", **PRUNING["posterior"]},
    "diversity before append": {"pruning_strategy": "diversity", **PRUNING["posterior"]},
    "coherence before append": {"pruning_strategy": "coherence"},
}


@pytest.mark.parametrize("name", CASES)
def test_every_run_is_reproduced_by_one_dense_pass(name: str, models: dict[str, Any], reference: Any) -> None:
    """End tokens among the members; on MLX, on torch, and through transformers from the JSON alone."""
    settings = CASES[name]
    run = decode(models["mlx"], eos=7, **settings)
    again = Run.from_json(run.to_json())
    worst = differences(json.loads(run.to_json()), reference)
    assert max(worst.values()) < TOLERANCE, worst
    for backend, model in models.items():
        result = verify(again, with_tokenizer(model, 7))
        cold = min(settings.get("temperature", 1.0) or 1.0, 1.0)
        assert result.ok and result.tolerance == TOLERANCE / cold, (backend, result.findings)
        assert result.steps == len(run.steps)


def test_the_cases_do_what_they_are_named_for(models: dict[str, Any]) -> None:
    """Sets are wide, members are removed, ends are among the members: else the test above proves little."""
    kept = decode(models["mlx"], eos=7, **CASES["lineage, kept"])
    assert np.mean([len(step.tokens) for step in kept.steps]) > 2
    for name in PRUNING:
        if name != "kept":
            assert removed(decode(models["mlx"], eos=7, **CASES[f"lineage, {name}"])) > 3, name
    ends = [decode(models["mlx"], eos=eos, **PRUNING["posterior"]) for eos in (8, 25, 36, 43, 44, 47)]
    assert any(run.finish_reason == "stop" for run in ends)
    assert sum(any(token.slot is None for step in run.steps for token in step.tokens) for run in ends) >= 4
    assert any(token.slot is None for step in kept.steps[:-1] for token in step.tokens)
    whole = decode(models["mlx"], eos=7, **CASES["best, whole positions"])
    assert any(all(token.removed_after is not None for token in step.tokens) for step in whole.steps)


def tree_run(model: Any, temperature: float = 1.0) -> Run:
    """Four texts that share beginnings, each probability from a pass over its own text alone."""
    texts = [(1, 2, 3, 4, 5), (1, 2, 3, 9, 5), (1, 7, 3, 4, 7), (8, 2, 2, 2, 11)]
    prompt = len(PROMPT)
    log_probs = {}
    exact = []
    for text in texts:
        ids = [*PROMPT, *text]
        logits = torch.from_numpy(
            model.forward(ids, range(len(ids)), None, model.new_cache()).logits
        ).double()
        for depth in range(len(text)):
            row = torch.log_softmax(logits[prompt - 1 + depth] / temperature, dim=-1)
            log_probs[text[: depth + 1]] = float(row[text[depth]])
        rows = torch.log_softmax(logits[prompt - 1 : -1], dim=-1)
        words = "".join(f" t{token}" for token in text if token != 11)
        exact.append(RunPath(text, words, float(sum(rows[i, token] for i, token in enumerate(text))), True))
    slots: dict[tuple[int, ...], int] = {}
    steps = []
    for depth in range(1, 6):
        nodes = sorted({text[:depth] for text in texts}, key=lambda node: log_probs[node])
        rows = [node for node in nodes if node[-1] != 11]  # 11 ends the text
        mass = sum(math.exp(log_probs[node]) for node in rows)
        num_parents = len([node for node in slots if len(node) == depth - 1]) or 1
        members = []
        for node in nodes:
            probability = math.exp(log_probs[node])
            parents = (Edge(slots[node[:-1]], 1.0, probability),) if depth > 1 else ()
            if node in rows:
                slots[node] = prompt + len(slots)
                members.append(Member(node[-1], probability, slots[node], probability / mass, parents))
            else:
                members.append(Member(node[-1], probability, None, None, parents))
        residual = 1.0 - sum(member.probability for member in members) / num_parents
        steps.append(Step(depth - 1, prompt + depth - 1, None, residual, tuple(members[::-1])))
    return build_run(
        steps,
        prompt=RunPrompt("".join(f" t{token}" for token in PROMPT), PROMPT),
        model_info=model.info,
        custom={"decoder": RunRule("by nobody's rule", None)},
        config=as_dict(resolve({"decoder": "tree", "branches": 4, "temperature": temperature})),
        tokenizer=TOKENIZER,
        decoder="tree",
        finish_reason="length",
        timing={},
        paths=exact,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_tree_is_verified_by_ancestors(temperature: float, models: dict[str, Any], reference: Any) -> None:
    run = tree_run(models["torch"], temperature)
    assert max(differences(json.loads(run.to_json()), reference).values()) < TOLERANCE
    for model in models.values():
        result = verify(run, with_tokenizer(model, 11))
        assert result.ok, result.findings
        assert "path, log P a token" in {difference.quantity for difference in result.worst}


def test_a_wrong_parent_or_path_of_a_tree_is_found_out(models: dict[str, Any]) -> None:
    value = json.loads(tree_run(models["torch"]).to_json())
    edges = [token["parents"][0] for token in value["steps"][3]["tokens"]]
    other = next(edge[0] for edge in edges if edge[0] != edges[0][0])
    wrong = json.loads(json.dumps(value))
    wrong["steps"][3]["tokens"][0]["parents"][0][0] = other
    assert not verify(Run.from_json(json.dumps(wrong)), with_tokenizer(models["torch"], 11)).ok
    value["paths"][2]["logprob"] += 0.01
    result = verify(Run.from_json(json.dumps(value)), with_tokenizer(models["torch"], 11))
    assert not result.ok and result.worst[0].quantity == "path, log P a token"


SEARCHES: dict[str, dict[str, Any]] = {
    "branches": {"branches": 4, "threshold": 0.05},
    "branches, sampled": {"branches": 3, "branch_choice": "sample", "threshold": 0.02, "temperature": 1.4},
    "branches, merged early": {"branches": 6, "merge_length": 1, "threshold": 0.01},
    "one branch": {"branches": 1},
    "beam": {"decoder": "beam", "beam_width": 3},
    "diverse beam": {"decoder": "diverse-beam", "beam_width": 4},
    "samples": {"decoder": "sample", "beam_width": 4, "temperature": 1.2},
    "paths of a lattice": {"paths": 4, "threshold": 0.03, **PRUNING["posterior"]},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_is_reproduced_by_one_dense_pass(name: str) -> None:
    checkpoint = open_checkpoint(str(twins.twin("llama")))
    tokenizer = checkpoint.tokenizer()
    for model in (build(checkpoint, "auto", "float32"), TorchTransformer(checkpoint, "cpu", "float32")):
        run = generate(LoadedModel(model, tokenizer), "the theory", max_tokens=20, **SEARCHES[name])
        assert len(run.steps) > 10 and run.paths
        result = verify(Run.from_json(run.to_json()), LoadedModel(model, tokenizer))
        assert result.ok, result.findings
        assert max(differences(json.loads(run.to_json()), twins.reference("llama")).values()) < TOLERANCE


def test_paths_that_version_0_1_0_chose_among_all_readings_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(str(twins.twin("llama")), device="cpu")
    settings: dict[str, Any] = {"paths": 3, "threshold": 0.01, "max_tokens": 24, "seed": 3}
    now = generate(loaded, "the theory", **settings)

    def every(steps: Any, count: int, seed: int, distance: float) -> list[list[int]]:
        return readings_at_hand(steps, count, seed)

    monkeypatch.setattr("tempo_mlx.decode.score.candidate_paths", every)
    before = generate(loaded, "the theory", **settings)
    monkeypatch.undo()
    assert before.steps == now.steps and before.paths != now.paths
    assert verify(before, loaded).ok and verify(now, loaded).ok
    neither = [before.paths[0], *now.paths[1:-1]] if before.paths[0] != now.paths[0] else now.paths[:-1]
    assert not verify(replace(now, paths=tuple(neither)), loaded).ok


def removed(run: Run) -> int:
    return sum(token.removed_after is not None for step in run.steps for token in step.tokens)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("eos", [8, 25, 36, 43, 44, 47])
def test_members_that_end_the_text(backend: str, eos: int, models: dict[str, Any], reference: Any) -> None:
    run = decode(models[backend], eos=eos, **PRUNING["posterior"])
    assert max(differences(json.loads(run.to_json()), reference).values()) < TOLERANCE
    assert verify(run, with_tokenizer(models[backend], eos)).ok


@pytest.mark.parametrize("name", ["lineage, random", "best, whole positions", "weighted, unattended", "hot"])
def test_our_bias_is_the_references(name: str, models: dict[str, Any]) -> None:
    run = decode(models["mlx"], **CASES[name])
    claims = read_claims(run, with_tokenizer(models["mlx"]))
    rows = dense_run(claims)
    bias = rows.bias(run.prompt_length, len(rows.tokens))
    assert bias is not None and rows.bias(0, run.prompt_length) is None  # plain causal
    size = len(rows.tokens)
    expected = dense_bias(json.loads(run.to_json()))[run.prompt_length : size, :size].numpy()
    np.testing.assert_array_equal(np.isinf(bias), np.isinf(expected))
    np.testing.assert_allclose(bias, expected, atol=1e-5)


def tampered(run: Run) -> Iterator[tuple[str, Run]]:
    """A recorded number, or what decides who sees whom, changed by a little."""
    steps = json.loads(run.to_json())["steps"]
    index = next(
        i for i in range(3, len(steps)) if len(steps[i]["tokens"]) > 1 and len(steps[i - 1]["tokens"]) > 1
    )
    gone = next(
        (i, j)
        for i, s in enumerate(steps)
        for j, t in enumerate(s["tokens"])
        if t["removed_after"] is not None
    )

    def changed(change: Any) -> Run:
        value = json.loads(run.to_json())
        change(value["steps"])
        return Run.from_json(json.dumps(value))

    def swap_parents(steps: Any) -> None:
        edges = steps[index]["tokens"][0]["parents"]
        edges[0][1], edges[1][1] = edges[0][1] / 2, edges[1][1] + edges[0][1] / 2

    def keep(steps: Any) -> None:
        steps[gone[0]]["tokens"][gone[1]].update(removed_after=None, removed_why=None)

    def later(steps: Any) -> None:
        steps[gone[0]]["tokens"][gone[1]]["removed_after"] += 1

    def set_value(field: str, delta: float) -> Any:
        def change(steps: Any) -> None:
            steps[index]["tokens"][0][field] += delta

        return change

    def residual(steps: Any) -> None:
        steps[index]["residual_probability"] += 1e-3

    yield "probability", changed(set_value("probability", -1e-3))
    yield "weight", changed(set_value("weight", -1e-3))
    yield "token", changed(set_value("id", 1 if steps[index]["tokens"][0]["id"] + 1 < VOCABULARY else -1))
    yield "position", changed(lambda steps: steps[index].update(position=steps[index]["position"] + 1))
    yield "residual", changed(residual)
    yield "P(i|j)", changed(swap_parents)
    yield "removal forgotten", changed(keep)
    yield "removal one step late", changed(later)


def test_a_changed_run_is_found_out(models: dict[str, Any], reference: Any) -> None:
    run = decode(models["torch"], **PRUNING["random"])
    assert verify(run, with_tokenizer(models["torch"])).ok
    for name, other in tampered(run):
        result = verify(other, with_tokenizer(models["torch"]))
        assert not result.ok, name
        assert max(differences(json.loads(other.to_json()), reference).values()) > TOLERANCE, name


def test_the_worst_difference_is_named(models: dict[str, Any]) -> None:
    """By a sentence, too, with the step, the token and both numbers."""
    value = json.loads(decode(models["torch"]).to_json())
    token = value["steps"][5]["tokens"][0]
    token["probability"] -= 0.01
    result = verify(Run.from_json(json.dumps(value)), with_tokenizer(models["torch"]))
    (worst,) = (difference for difference in result.worst if difference.quantity == "probability")
    assert (worst.step, worst.token) == (5, token["text"])
    assert worst.size == pytest.approx(0.01, abs=1e-4) and not worst.ok
    assert str(worst) in result.findings
    assert f"In step 5, token '{token['text']}', the file says probability" in str(worst)
    assert result.agreement == 1.0 and result.max_difference >= worst.size


def test_another_model_is_refused(models: dict[str, Any]) -> None:
    value = json.loads(decode(models["torch"], max_tokens=3).to_json())
    for change, error, message in (
        (lambda v: v["model"].update(sha256="0" * 64), ModelError, "other weights"),
        (lambda v: v["steps"][1]["tokens"][0].update(id=VOCABULARY), RunFileError, "vocabulary"),
        (lambda v: v["prompt"]["token_ids"].append(VOCABULARY), RunFileError, "slots"),
        (lambda v: v["config"].pop("attend"), RunFileError, "attend"),
        (lambda v: v["config"].update(attend="sideways"), RunFileError, "sideways"),
        (lambda v: v["config"].update(combine="magic"), RunFileError, "magic"),
        (lambda v: v["config"].update(temperature="hot"), RunFileError, "temperature"),
    ):
        broken = json.loads(json.dumps(value))
        change(broken)
        with pytest.raises(error, match=message):
            verify(Run.from_json(json.dumps(broken)), with_tokenizer(models["torch"]))


def test_an_interrupted_run_without_steps_is_verified(models: dict[str, Any]) -> None:
    value = json.loads(decode(models["torch"], max_tokens=1).to_json())
    value.update(steps=[], text="", final_text="", finish_reason="cancelled")
    result = verify(Run.from_json(json.dumps(value)), with_tokenizer(models["torch"]))
    assert result.ok and result.rows == 0, result.findings
    value["text"] = " t1"
    assert not verify(Run.from_json(json.dumps(value)), with_tokenizer(models["torch"])).ok


def test_the_replay_shares_no_code_with_what_it_checks() -> None:
    source = Path(__file__).with_name("replay.py").read_text()
    assert "tempo_mlx" not in source


# The verdict


def test_the_tolerance_is_the_loaded_models_and_grows_where_a_run_is_cold() -> None:
    flat = np.array([0.5, 0.3, 0.2], np.float32)
    sure = np.array([1.0 - 1e-9, 1e-9, 0.0], np.float32)
    for temperature in (0.0, 1.0, 5.0):
        assert Tolerance(1e-4, temperature).of(flat, 0) == Tolerance(1e-4, temperature).worst == 1e-4
    for temperature in (0.5, 0.02):
        cold = Tolerance(1e-4, temperature)
        assert cold.of(flat, 0) == pytest.approx(1e-4 / temperature, rel=1e-3) == cold.worst
        assert cold.of(sure, 0) == cold.of(sure, 1) == 1e-4  # hardly moves
    assert 0.05 < Tolerance(1e-4, 1e-3).of(np.array([0.7, 0.3], np.float32), 1) < 1.0


def test_half_precision_is_given_what_its_roundings_can_do() -> None:
    assert noise_of("float32", 30, 100) == 0.0
    noise = noise_of("bfloat16", 30, 100)
    assert noise == 8 * noise_of("float16", 30, 100) == pytest.approx(noise_of("bfloat16", 120, 100) / 2)
    assert noise < noise_of("bfloat16", 30, 1000) < 1.5 * noise
    # SmolLM2-135M in bfloat16, about 3 members a step: the largest differences of a run as a GPU computes it
    for steps, measured in ((24, 0.055), (220, 0.080)):
        base = noise_of("bfloat16", 30, 3 * steps) * SPREAD / 4
        assert 1.5 * measured < base < 2.5 * measured
    near, far = (np.random.default_rng(1).normal(size=1000) * spread for spread in (2, 8))
    tolerance = Tolerance(noise * SPREAD / 4, 1.0, noise)
    for logits, more in ((near, False), (far, True)):
        logits[0] = np.log(np.exp(logits[1:]).sum())  # even odds
        distribution = (np.exp(logits) / np.exp(logits).sum()).astype(np.float32)
        assert (tolerance.of(distribution, 0) > 1.5 * tolerance.base) == more


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_given_what_the_model_makes_of_its_roundings(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights make several times as much of them as trained ones. A run by other operations is within that, a
    forged logit is not.
    """
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    loaded = load(str(twins.twin("llama")), dtype=dtype)
    prompt = np.random.default_rng(0).integers(3, 256, size=32).tolist()
    settings = {"decoder": "plain", "temperature": 0.0, "max_tokens": 24}
    run = generate(loaded, prompt, **settings)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    tolerance = tolerance_for(loaded.model, run, resolve(settings))
    by_layers = noise_of(dtype, loaded.model.architecture.num_hidden_layers, len(run.steps))
    assert 1.3 * by_layers < tolerance.noise < 8 * by_layers
    assert tolerance.base == pytest.approx(tolerance.noise * SPREAD / 4)
    found = verify(run, loaded)
    assert found.ok and found.max_difference > 1e-4
    step = min(run.steps[1:], key=lambda step: abs(step.tokens[0].probability - 0.5))
    for times, honest in ((0.1, True), (40.0, False)):
        bias = [f"{step.tokens[0].id}={times * tolerance.base}"]
        forged = json.loads(generate(loaded, prompt, **settings, logit_bias=bias).to_json())
        forged["config"]["logit_bias"] = []
        assert verify(Run.from_json(json.dumps(forged)), loaded).ok == honest


def test_a_file_that_says_half_precision_is_held_to_the_models_own(models: dict[str, Any]) -> None:
    value = json.loads(decode(models["torch"]).to_json())
    value["model"]["dtype"] = "bfloat16"
    result = verify(Run.from_json(json.dumps(value)), with_tokenizer(models["torch"]))
    assert result.ok and result.tolerance == TOLERANCE


def test_logits_are_computed_in_chunks_of_rows_that_decide_something(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt gives one row, and no pass more than what LOGITS_AT_ONCE allows."""
    monkeypatch.setattr(dense, "LOGITS_AT_ONCE", 8 * VOCABULARY)
    model, seen = models["torch"], []
    forward = model.forward

    def watched(*arguments: Any, **named: Any) -> Any:
        out = forward(*arguments, **named)
        seen.append(0 if out.logits is None else len(out.logits))
        return out

    run = generate(
        with_tokenizer(model), [*range(1, 48)] * 3, max_tokens=24, threshold=0.08, max_parallel_tokens=4
    )
    monkeypatch.setattr(model, "forward", watched)
    result = verify(run, with_tokenizer(model))
    assert result.ok, result.findings
    assert seen[0] == 1 and 4 < max(seen) <= 8 and sum(seen) == result.rows - len(run.prompt.token_ids) + 1


def test_agreement_is_held_to_its_target_by_an_interval() -> None:
    assert holds_target([], 0.95) and holds_target([True] * 3, 0.95)
    assert holds_target([True] * 18 + [False] * 2, 0.95)  # 0.9 of 20 may well be 0.95
    assert not holds_target([True] * 90 + [False] * 10, 0.95)
    assert not holds_target([False] * 2, 0.95)
