"""Several ranks are one: the same runs, a share of the memory, and an end in time when one is lost."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tempo_mlx
from tempo_mlx.api import stream
from tempo_mlx.cli.main import main
from tempo_mlx.errors import ConfigError, MemoryLimitError, RankLostError
from tempo_mlx.exits.distributed import DistributedExits
from tempo_mlx.loading import LoadedModel
from tempo_mlx.ranks.shards import plan_shards
from tempo_mlx.resolution import resolve
from tempo_mlx.weights import open_checkpoint
from tempo_mlx.weights.convert import convert
from tempo_mlx.weights.memory import Limit, require_memory
from tempo_mlx.weights.precision import Precision
from tempo_mlx.weights.tensor import Tensor
from tests.exits import loaded_with_exits
from tests.ggufs import gguf_twin
from tests.patience import patient
from tests.ranked import ROOT, TEMPO, free_ports, packed_logits, ranks, run_cases
from tests.twins import twin

FRANCE = "The capital of France is"
SMOLLM2 = "smollm2-135m"
LINEAGE = {"threshold": 0.03, "max_tokens": 8, "min_steps": 8}
POSTERIOR = {**LINEAGE, "use_retroactive_pruning": True, "posterior_threshold": 0.3}
ATTENTION = {
    **LINEAGE,
    "use_retroactive_pruning": True,
    "pruning_signal": "attention",
    "attention_threshold": 0.05,
}
EXITS = {"early_exit": True}
BRANCHES = {"branches": 3, "threshold": 0.02, "max_tokens": 6, "min_steps": 6}

# Plans and pieces


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_a_plan_covers_the_model_once_and_weighs_ranks_alike(count: int) -> None:
    """SmolLM2's 9 query heads share 3 key/value heads; ranks that share one of these hold it twice."""
    a = open_checkpoint(SMOLLM2).architecture
    shards = plan_shards(a, count, lambda layer: (32, 1))
    parts = [shard.layers[7] for shard in shards]
    for held, all_of_it in (
        ([part.queries for part in parts], a.num_attention_heads),
        ([part.columns for part in parts], a.intermediate_size),
        ([shard.vocabulary for shard in shards], a.vocab_size),
    ):
        assert [index for part in held for index in part] == list(range(all_of_it))
    keys = [key for part in parts for key in part.keys]
    for part in parts:
        assert {query // 3 for query in part.queries} == {*part.keys}
        assert len(part.queries) % len(part.keys) == 0
        assert {keys.count(key) for key in part.keys} == {part.copies}
        assert part.columns.start % 32 == 0
    layer = [(2 * len(s.queries) + 2 * len(s.keys)) * a.head_dim + 3 * len(s.columns) for s in parts]
    whole = (2 * a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim + 3 * a.intermediate_size
    assert max(layer) <= whole * (1 / count + 0.03)


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="9 attention heads cannot be spread over 10 ranks; start at most 9"
    ):
        plan_shards(open_checkpoint(SMOLLM2).architecture, 10)


def test_a_limit_counts_each_ranks_share() -> None:
    checkpoint = open_checkpoint(SMOLLM2)
    limit, precision = Limit(0.4e9, "allowed"), Precision("float32", packed=False)
    require_memory(checkpoint, limit, precision, ranks=2)
    with pytest.raises(MemoryLimitError):
        require_memory(checkpoint, limit, precision)


@cache
def quantised(tmp: Path, bits: int, name: str = "llama") -> Path:
    return convert(str(twin(name)), tmp / f"{name}-{bits}", bits=bits, group_size=32)


@pytest.mark.parametrize("kind", ["float32", "3 bits", "4 bits", "Q4_1"])
def test_columns_are_cut_out_of_every_kind_of_weight(kind: str, tmp_path: Path) -> None:
    tensor: Tensor
    if kind == "Q4_1":
        tensor = open_checkpoint(SMOLLM2).tensor("model.layers.3.mlp.down_proj.weight").rows(slice(4, 9))
    else:
        path = twin("llama") if kind == "float32" else quantised(tmp_path, int(kind[0]))
        tensor = open_checkpoint(str(path)).tensor("model.layers.1.mlp.down_proj.weight")
    for start, stop in ((0, 32), (32, 96), (7, 50)):
        part = tensor.cut(start, stop)
        np.testing.assert_array_equal(part.numpy(), tensor.numpy()[:, start:stop])
        assert part.shape == part.numpy().shape
        assert part.kind == (tensor.kind if start % 32 == 0 else "float32")


# Runs


CASES = [
    *[("llama", FRANCE, settings) for settings in (POSTERIOR, ATTENTION, BRANCHES)],
    *[("qwen2", FRANCE, settings) for settings in (POSTERIOR, BRANCHES)],
    ("qwen3", FRANCE, ATTENTION),
    *[(name, FRANCE, POSTERIOR) for name in ("llama-tied", "gemma2", "phi3")],
    ("olmo2", FRANCE, ATTENTION),  # whose norms reach over the heads of all ranks
    # one norm for attention and MLP; two, and no gate; no weights in norms; norms after the rotation; a part of it
    *[(name, FRANCE, POSTERIOR) for name in ("cohere2", "gpt_neox", "nanochat", "hunyuan_v1_dense", "glm4")],
    # sinks and biases of experts; latents; widths by layer, and a key that is its value; streams; norms by head; and
    # each kind of state
    *[(name, FRANCE, ATTENTION) for name in ("gpt_oss", "deepseek_v3", "gemma4-moe")],
    *[
        (name, FRANCE, POSTERIOR)
        for name in ("gemma3n", "cohere", "qwen3_next", "lfm2_moe", "granite4-h", "falcon_h1")
    ],
    ("qwen3_5", FRANCE, BRANCHES),
    ("llama-4-bit", FRANCE, POSTERIOR),
    ("llama-gguf", FRANCE, LINEAGE),
    *[("llama", FRANCE, {**settings, **EXITS}) for settings in (POSTERIOR, BRANCHES)],
    (SMOLLM2, FRANCE, {**POSTERIOR, "max_tokens": 5, "min_steps": 5}),
    (SMOLLM2, FRANCE, {**BRANCHES, "max_tokens": 3, "min_steps": 3}),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scale")


def path_of(name: str, home: Path) -> str:
    if name == SMOLLM2:
        return name
    if name == "llama-4-bit":
        return str(quantised(home, 4))
    return str(gguf_twin("llama") if name == "llama-gguf" else twin(name))


@pytest.fixture(scope="module")
def alone(home: Path) -> Iterator[list[dict[str, Any]]]:
    """The runs of one process."""
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # a pass leaves where its margin is wide; rank 3 has none of the list
        margins = {1: 0.25, 2: 0.2}
        loaded_with_exits("llama", margins, home, patch, shortlist=range(10, 230), device="cpu")
        yield runs_of_one(home)


def runs_of_one(home: Path) -> list[dict[str, Any]]:
    models = {name: tempo_mlx.load(path_of(name, home), device="cpu") for name, _, _ in CASES}
    return [
        tempo_mlx.generate(models[name], prompt, **settings).to_dict() for name, prompt, settings in CASES
    ]


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_give_the_runs_of_one_process_in_their_share_of_its_memory(
    count: int, home: Path, alone: list[dict[str, Any]]
) -> None:
    packed = [str(quantised(home, bits)) for bits in (3, 4)]
    packed += [str(quantised(home, 4, name)) for name in ("mixtral", "deepseek_v3", "lfm2_moe")]
    found = run_cases(count, [(path_of(name, home), *rest) for name, *rest in CASES], packed, home)
    for (name, _, settings), ours, theirs in zip(CASES, alone, found["runs"], strict=True):
        assert largest_difference(ours, theirs) < 1e-4, (name, settings)
    for path, theirs in zip(packed, found["logits"], strict=True):
        np.testing.assert_allclose(theirs, packed_logits(None, path), atol=1e-4)
    weights = 4 * open_checkpoint(SMOLLM2).parameters
    peaks = [peak for _, peak in found["memory"][SMOLLM2]]
    assert len(peaks) == count and max(peaks) <= weights * (1 / count + 0.15), [p / weights for p in peaks]
    assert sum(step_count(run, "removed_after") for run in alone) > 10  # or nothing was shown about removals
    early = [step["exit_layer"] for run in alone for step in run["steps"] if run["config"]["early_exit"]]
    assert None in early and len({*early}) > 2, early  # nor about exits


def largest_difference(ours: Any, theirs: Any, path: str = "") -> float:
    """Between the numbers of two runs; everything else must be equal."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        keys = [key for key in ours if key not in ("timing", "seconds")]
        return max((largest_difference(ours[key], theirs[key], f"{path}/{key}") for key in keys), default=0.0)
    if isinstance(ours, list):
        assert len(ours) == len(theirs), path
        pairs = enumerate(zip(ours, theirs, strict=True))
        return max((largest_difference(a, b, f"{path}/{i}") for i, (a, b) in pairs), default=0.0)
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs)
    assert ours == theirs, path
    return 0.0


def step_count(run: dict[str, Any], key: str) -> int:
    return sum(token[key] is not None for step in run["steps"] for token in step["tokens"])


def test_drafts_go_by_the_clock_and_are_refused_over_ranks() -> None:
    with pytest.raises(ConfigError, match="lossless has no effect on a model over several ranks"):
        DistributedExits(cast(Any, None), resolve({"early_exit": True, "lossless": True}), ())


# The command line


def launch(*arguments: str, count: int = 2, **options: Any) -> subprocess.CompletedProcess[str]:
    """`mlx.launch -n COUNT -- tempo-mlx ARGUMENTS`, as the documentation says it."""
    launcher = [str(Path(sys.executable).parent / "mlx.launch"), "-n", str(count), "--backend", "ring"]
    launcher += [
        "--starting-port",
        str(free_ports(count)[0]),
        "--cwd",
        str(ROOT),
        "--",
        sys.executable,
        *TEMPO,
    ]
    return subprocess.run(
        [*launcher, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_rank_0_alone_prints(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", FRANCE, "--model", str(twin("llama")), "--max-tokens", "4", "--no-stream"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    launched = launch(*command)
    assert launched.stdout == out
    assert launched.stderr.count("4 steps |") == err.count("4 steps |") == 1


def test_a_users_mistake_is_told_once() -> None:
    launched = launch("generate", FRANCE, "--threshold", "7")
    assert launched.stderr.count("Error:") == 1 and "threshold" in launched.stderr


def test_one_launched_process_is_an_ordinary_one(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", FRANCE, "--model", str(twin("llama")), "--max-tokens", "2", "--no-stream"]
    assert main(command) == 0
    assert launch(*command, count=1).stdout == capsys.readouterr().out


# Losses


class Lossy:
    """A model that loses a rank at its n-th pass."""

    def __init__(self, model: Any, passes: int) -> None:
        self.model, self.passes = model, passes
        self.architecture, self.info = model.architecture, model.info
        self.new_cache, self.embeddings = model.new_cache, model.embeddings

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.passes -= 1
        if self.passes < 0:
            raise RankLostError("Rank 1 has ended.")
        return self.model.forward(*arguments, **options)


@pytest.mark.parametrize(
    "settings", [POSTERIOR, {**LINEAGE, "paths": 2}, BRANCHES, {"use_mcts": True, "max_tokens": 8}]
)
@pytest.mark.parametrize("passes", [0, 1, 4])
def test_what_was_generated_before_a_loss_is_kept(settings: dict[str, Any], passes: int) -> None:
    loaded = tempo_mlx.load(str(twin("llama")), device="cpu")
    whole = tempo_mlx.generate(loaded, FRANCE, **settings)
    lossy: LoadedModel = replace(loaded, model=Lossy(loaded.model, passes))
    decoding = stream(lossy, FRANCE, **settings)
    kept = list(decoding)
    run = decoding.run()
    assert isinstance(decoding.failure, RankLostError)
    assert run.finish_reason == "cancelled" and len(run.steps) == len(kept) < len(whole.steps)
    assert tempo_mlx.Run.from_json(run.to_json()) == run
    for ours, theirs in zip(run.steps, whole.steps, strict=False):
        assert [token.id for token in ours.tokens] == [token.id for token in theirs.tokens]
    with pytest.raises(RankLostError):
        tempo_mlx.generate(replace(loaded, model=Lossy(loaded.model, passes)), FRANCE, **settings)


def generating(out: Path) -> list[str]:
    return [*TEMPO, "generate", FRANCE, "--model", SMOLLM2, "--max-tokens", "300", "--min-steps", "300",
            "--format", "jsonl", "--rank-timeout", "6", "--json-output-file", str(out)]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "Rank 1 has ended"), (signal.SIGSTOP, "Rank 1 gave no sign of life for 6 seconds")],
)
def test_a_lost_rank_ends_the_others_and_the_text_is_kept(
    number: signal.Signals, words: str, tmp_path: Path
) -> None:
    with ranks(3, *generating(tmp_path / "run.json")) as processes:
        assert processes[0].stdout is not None
        first = json.loads(processes[0].stdout.readline())
        processes[1].send_signal(number)
        since = time.monotonic()
        outputs = [process.communicate(timeout=120) for process in processes]
        seconds = time.monotonic() - since
    assert seconds < patient(15)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["finish_reason"] == "cancelled" and 1 <= len(run["steps"]) < 300
    assert [token["id"] for token in run["steps"][0]["tokens"]] == [
        token["id"] for token in first["data"]["tokens"]
    ]
    said = "".join(err for _, err in outputs)
    assert re.findall(r"^Error: (.*)$", said, re.M) == [f"{words}; start all ranks again."]
    assert (processes[0].returncode, processes[2].returncode) == (1, 1)


def test_a_batch_whose_rank_0_was_killed_goes_on_to_the_same_lines(tmp_path: Path) -> None:
    prompts, whole, out = tmp_path / "prompts.jsonl", tmp_path / "whole.jsonl", tmp_path / "runs.jsonl"
    lines: list[Any] = [{"prompt": f"Number {i} is", "max_tokens": 3 + 17 * (i % 3)} for i in range(14)]
    lines[3]["threshold"] = 7  # fails
    prompts.write_text("\n".join(map(json.dumps, lines)))
    command = ["batch", str(prompts), "--model", str(twin("llama")), "--out"]
    assert main([*command, str(whole)]) == 1
    spread = [*TEMPO, *command, str(out), "--data-parallel"]
    with ranks(2, *spread) as processes:
        while not out.exists() or out.read_text().count("\n") < 5:
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.002)
        processes[0].kill()
        _, err = processes[1].communicate(timeout=120)
    assert "Rank 0 has ended" in err and processes[1].returncode == 1
    assert 5 <= out.read_text().count("\n") < len(lines)
    with ranks(2, *spread) as processes:
        _, err = processes[0].communicate(timeout=300)
    assert processes[0].returncode == 1, err  # the line that fails fails again
    assert out.read_text() == whole.read_text()


def test_a_batch_is_spread_over_ranks_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text('"Hello"')
    command = [
        "batch",
        str(tmp_path / "prompts.jsonl"),
        "--out",
        str(tmp_path / "runs.jsonl"),
        "--data-parallel",
    ]
    assert main(command) == 2
    assert "mlx.launch" in capsys.readouterr().err


def test_a_server_of_two_ranks_answers_and_ends_when_it_is_no_longer_whole(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    serve = [*TEMPO, "serve", "--model", str(twin("llama")), "--port", str(port)]
    with (
        ranks(2, *serve) as processes,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        for _ in until_ready(client, processes):
            time.sleep(0.05)
        asked = {"prompt": FRANCE, **POSTERIOR}
        loaded = tempo_mlx.load(str(twin("llama")), device="cpu")
        ours = tempo_mlx.generate(loaded, FRANCE, **POSTERIOR).to_dict()
        theirs = client.post("/generate", json=asked).json()
        assert largest_difference(ours["steps"], theirs["steps"]) < 1e-4
        processes[1].kill()  # while nobody asks for anything
        _, err = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 1
    assert len(re.findall(r"^Error: Rank 1 has ended", err, re.M)) == 1


def until_ready(client: httpx.Client, processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    end = time.monotonic() + patient(60)
    while time.monotonic() < end:
        assert processes[0].poll() is None, processes[0].communicate()
        try:
            if client.get("/health").json()["status"] == "ok":
                return
        except httpx.TransportError:
            pass  # not listening yet
        yield
    raise AssertionError("never ready")
