"""Several ranks on this machine, in processes of their own: MLX's ring over loopback, as mlx.launch sets it up."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tempo_mlx.ranks.processes import Local

ROOT = Path(__file__).parent.parent
TEMPO = ("-m", "tempo_mlx")


def free_ports(count: int) -> list[int]:
    """So many ports in a row that nobody listens on; not of the range that outgoing connections are given."""
    while True:
        first = random.randrange(10_000, 32_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return list(range(first, first + count))


@contextlib.contextmanager
def ranks(count: int, *arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """`python *arguments` on so many ranks; none is left in the end, and none may have to be killed then."""
    with tempfile.TemporaryDirectory() as empty:
        hosts = Path(empty, "hosts.json")
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
        shared = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_HOSTFILE": str(hosts)}
        processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=empty,
                env={**shared, "MLX_RANK": str(rank)},
            )
            for rank in range(count)
        ]
        left = []
        try:
            yield processes
            for rank, process in enumerate(processes):
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    left.append(rank)
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        assert not left, f"ranks {left} would have stayed"


def run_cases(count: int, cases: Sequence[Any], packed: Sequence[str], home: Path) -> dict[str, Any]:
    """What `answer` says, of so many ranks; calibrations of early exit lie in `home`."""
    questions, answers = home / f"cases-{count}.json", home / f"answers-{count}.json"
    questions.write_text(json.dumps([cases, packed]))
    code = "import sys; from tests.ranked import answer; answer(*sys.argv[1:])"
    with ranks(count, "-c", code, str(questions), str(answers), str(home)) as processes:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    assert answers.exists(), "\n".join(errors)
    assert [process.returncode for process in processes] == [0] * count, "\n".join(errors)
    found: dict[str, Any] = json.loads(answers.read_text())
    return found


def answer(questions: str, answers: str, calibrations: str) -> None:
    """Rank 0 writes the runs of all cases [model, prompt, settings], what each model's ranks held in memory, and the
    logits of models whose weights stay packed."""
    import tempo_mlx
    from tempo_mlx.exits import calibration
    from tempo_mlx.ranks.model import DistributedModel

    calibration.cache_directory = lambda: Path(calibrations)
    runs: list[Any] = []
    memory: dict[str, Any] = {}
    models: dict[str, Any] = {}
    cases, packed = json.loads(Path(questions).read_text())
    for model, prompt, settings in cases:
        if model not in models:
            models[model] = tempo_mlx.load(model, device="cpu")  # where ranks other than 0 stay
        loaded = models[model]
        runs.append(tempo_mlx.generate(loaded, prompt, **settings).to_dict())
        assert isinstance(loaded.model, DistributedModel)
        memory[model] = loaded.model.memory()
    logits = [loaded.leader.run(packed_logits, model) for model in packed]
    Path(answers).write_text(json.dumps({"runs": runs, "memory": memory, "logits": logits}))


def packed_logits(local: Local | None, model: str) -> list[list[float]]:
    """Of ten tokens, by this rank and the others, or by one process."""
    from tempo_mlx.model.mlx_backend import build
    from tempo_mlx.ranks.shards import ShardReader
    from tempo_mlx.weights import open_checkpoint

    reader = None if local is None else partial(ShardReader, group=local.group)
    transformer = build(open_checkpoint(model), "cpu", "float32", packed=True, make_reader=reader)
    assert transformer.info["quantization"] is not None
    forward = transformer.forward(range(10), range(10), None, transformer.new_cache())
    assert forward.logits is not None
    return forward.logits.tolist()
