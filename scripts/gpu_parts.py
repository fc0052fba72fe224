"""What scripts/gpu_check.py checks. Each part returns a sentence and what goes into the report, or raises Failed."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_models import random_gguf, random_model

PROMPT = "The three most important things about numbers are that"
DECODERS: dict[str, dict[str, Any]] = {
    "superposed": {"threshold": 0.03},
    "superposed, pruned": {"threshold": 0.03, "pruning_signal": "posterior", "posterior_threshold": 0.2},
    "superposed, pruned by attention": {"threshold": 0.03, "attention_threshold": 0.02},
    "tree": {"decoder": "tree", "branches": 3},
    "mcts": {"decoder": "mcts", "mcts_simulations": 4, "max_tokens": 6},
    "beam": {"decoder": "beam"},
    "diverse-beam": {"decoder": "diverse-beam"},
    "sample": {"decoder": "sample"},
    "enumerate": {"decoder": "enumerate", "max_tokens": 6},
    "plain": {"decoder": "plain", "temperature": 0.0},
}


class Failed(Exception):
    """A part found something wrong; the sentence says what."""


class Bench:
    """What the parts are given: the models, and where to write."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out = Path(options.out)
        self.rehearse: bool = options.rehearse
        self.shape = "tiny" if options.rehearse else "1b"
        self.dtype = "bfloat16" if options.rehearse else "auto"  # on a GPU `auto` has to come to the same

    def small(self) -> str:
        """A tiny random model, whose passes the CPU repeats in no time."""
        return str(random_model(self.out / "models" / "tiny", "tiny"))

    def large(self) -> str:
        return str(random_model(self.out / "models" / self.shape, self.shape))

    def packed(self) -> str:
        given: str | None = self.options.model
        return given or str(random_gguf(self.out / "models" / f"{self.shape}.gguf", self.shape))

    def default(self) -> str:
        """The model tempo-mlx runs by default, where it is on this disk; else the tiny one."""
        from tempo_mlx.weights.registry import PACKAGED

        if self.options.default:
            return str(self.options.default)
        found = next(iter(PACKAGED.values()))
        return found.name if found.path.exists() and not self.rehearse else self.small()

    def load(self, model: str, **settings: Any) -> Any:
        from tempo_mlx.load_config import LoadConfig
        from tempo_mlx.loading import load_model

        return load_model(LoadConfig(model=model, **settings))


Found = tuple[str, dict[str, Any]]


def check_device(bench: Bench) -> Found:
    """MLX sees the GPU; the attention kernel is used on Metal after its check, and left alone everywhere else."""
    from importlib import metadata

    from tempo_mlx.mlx import mx
    from tempo_mlx.model import device
    from tempo_mlx.model.kernel_check import self_check, use_kernel

    loaded = bench.load(bench.small(), dtype=bench.dtype)
    info = {
        "device": {key: str(value) for key, value in mx.device_info().items()},
        "default": str(mx.default_device()), "metal": mx.metal.is_available(), "cuda": mx.cuda.is_available(),
        "mlx": metadata.version("mlx"), "model": dict(loaded.model.info),
    }  # fmt: skip
    heads = (8, 2, 64)
    check = self_check(heads, mx.bfloat16)
    info["kernel"] = check.message
    if not device.on_gpu():
        raise Failed(f"MLX computes on {mx.default_device()}, not on a GPU.")
    if mx.metal.is_available() and not (check.ok and use_kernel(heads, mx.bfloat16)):
        raise Failed(f"The attention kernel is not used on this Metal device: {check.message}")
    if not mx.metal.is_available() and use_kernel(heads, mx.bfloat16):
        raise Failed("The attention kernel, which is Metal's, would be used without Metal.")
    if not bench.rehearse and loaded.model.info["dtype"] != "bfloat16":
        raise Failed(f"dtype auto is {loaded.model.info['dtype']} on a GPU, not the checkpoint's bfloat16.")
    a = mx.random.normal((64, 4096), key=mx.random.key(0))
    exact = mx.matmul(a, a.T, stream=mx.cpu)
    error = float(mx.abs(a @ a.T - exact).max() / mx.abs(exact).max())
    info["float32 product, relative error"] = error
    if not error < 1e-5:
        raise Failed(
            f"Float32 products are off by {error:.1e}, as in TF32; MLX_ENABLE_TF32=0 did not reach MLX."
        )
    name = info["device"].get("device_name") or info["device"].get("architecture")
    kernel = "checked and used" if use_kernel(heads, mx.bfloat16) else "left alone, as there is no Metal"
    return f"{name}, MLX {info['mlx']}; attention kernel {kernel}; float32 off by {error:.0e}", info


def check_decoders(bench: Bench) -> Found:
    """One run of each decoder, generated and verified here, in float32 and in the dtype `auto` gives."""
    from tempo_mlx import generate
    from tempo_mlx.report.verify import verify

    told: dict[str, Any] = {}
    wrong = []
    for dtype in ("float32", bench.dtype):
        loaded = bench.load(bench.default(), dtype=dtype)
        for name, settings in DECODERS.items():
            start = time.perf_counter()
            try:
                run = generate(loaded, PROMPT, **{"max_tokens": 24, "seed": 1, **settings})
                found = verify(run, loaded)
                row = {
                    "ok": found.ok, "difference": found.max_difference, "tolerance": found.tolerance,
                    "findings": list(found.findings)[:3], "steps": found.steps,
                    "widest": max(len(step.tokens) for step in run.steps),
                }  # fmt: skip
            except Exception as error:  # whatever it is, the next decoder is tried
                row = {"ok": False, "findings": [f"{type(error).__name__}: {error}"]}
            row["seconds"] = round(time.perf_counter() - start, 2)
            told[f"{dtype}: {name}"] = row
            if not row["ok"]:
                wrong.append(f"{dtype}: {name}: {row['findings'][:1]}")
    if wrong:
        raise Failed(f"{len(wrong)} of {len(told)} runs are not what they say: {'; '.join(wrong)}", told)
    worst = max(row["difference"] for name, row in told.items() if name.startswith("float32"))
    return f"{len(told)} runs verified, float32 within {worst:.1e}", told


def check_parity(bench: Bench) -> Found:
    """Greedy text on the GPU, and the CPU's logits for it: in float32, and in the dtype `auto` gives."""
    from tempo_mlx import generate

    model = bench.default()
    told: dict[str, Any] = {}
    texts, logits = {}, {}
    for dtype in ("float32", bench.dtype):
        loaded = bench.load(model, dtype=dtype)
        run = generate(loaded, PROMPT, decoder="plain", temperature=0.0, max_tokens=40)
        texts[dtype] = [*run.prompt.token_ids, *(step.tokens[0].id for step in run.steps)]
        logits[dtype] = all_logits(loaded.model, texts[dtype])
    exact = bench.load(model, device="cpu", dtype="float32").model
    for dtype, ids in texts.items():
        expected = all_logits(exact, ids)
        first = len(run.prompt.token_ids) - 1
        chosen = np.array(ids[first + 1 :])
        rows = expected[first:-1]
        best = rows.argmax(axis=1)
        gaps = [float(row.max() - row[token]) for row, token in zip(rows, chosen, strict=True)]
        told[dtype] = {
            "logit difference": float(np.abs(logits[dtype] - expected).max()),
            "logit deviation": float(expected.std()),
            "tokens": len(chosen), "other choices": int((best != chosen).sum()),
            "largest gap of another choice": max(gaps),
        }  # fmt: skip
    row = told["float32"]
    if row["logit difference"] > 2e-3 or row["largest gap of another choice"] > 2e-3:
        raise Failed(f"Float32 on the GPU is not the CPU's: {row}", told)
    half = told[bench.dtype]
    if half["largest gap of another choice"] > 0.1 * half["logit deviation"]:
        raise Failed(f"{bench.dtype} chooses tokens that the CPU's float32 finds clearly worse: {half}", told)
    return (
        f"float32 within {row['logit difference']:.1e} and {row['other choices']} of {row['tokens']} tokens others; "
        f"{bench.dtype}: {half['logit difference']:.2f}, {half['other choices']} others"
    ), told


def all_logits(model: Any, ids: list[int]) -> np.ndarray:
    out = model.forward(ids, range(len(ids)), None, model.new_cache())
    return np.array(out.logits)


def check_census(bench: Bench) -> Found:
    """What a step of 1 to 16 rows takes, dispatches and costs Python to describe; beside mlx-lm where that is."""
    from tempo_mlx.bench.census import described, operations
    from tempo_mlx.bench.machine import read_bandwidth
    from tempo_mlx.bench.steps import weight_bytes
    from tempo_mlx.decode.width import measure

    loaded = bench.load(bench.large(), dtype=bench.dtype)
    model = loaded.model
    floor = weight_bytes(model) / read_bandwidth()
    costs = measure(model)
    told: dict[str, Any] = {
        "milliseconds by rows": {rows: round(1e3 * cost, 3) for rows, cost in costs.items()},
        "milliseconds to read the weights": round(1e3 * floor, 3),
        "plain, tokens a second": decoding_speed(loaded),
        "plain from whole distributions": decoding_speed(loaded, whole=True),
        "superposed, steps a second": decoding_speed(loaded, **DECODERS["superposed"]),
        "superposed from whole distributions": decoding_speed(loaded, whole=True, **DECODERS["superposed"]),
    }
    for rows, attention in ((1, False), (8, False), (8, True)):
        cache = model.new_cache()
        model.forward(list(range(40)), range(40), None, cache, logits="none")
        start = time.perf_counter()
        pending = described(model, cache, rows, attention, width=rows)
        seconds = time.perf_counter() - start
        told[f"{rows} rows{', attention mass' if attention else ''}"] = {
            "milliseconds of Python": round(1e3 * seconds, 3),
            "operations": operations(pending).total(), "by name": dict(operations(pending).most_common(12)),
        }  # fmt: skip
    try:
        told["mlx-lm"] = beside_mlx_lm(bench, loaded)
    except ImportError as error:
        told["mlx-lm"] = str(error)
    one, eight = costs[1], costs[8]
    beside = told["mlx-lm"]
    more = (
        f"; mlx-lm's {beside['milliseconds of a row']} ms, plain {beside['tokens a second']}/s"
        if isinstance(beside, dict)
        else ""
    )
    return (
        f"1 row {1e3 * one:.2f} ms (weights alone {1e3 * floor:.2f}), 8 rows {eight / one:.2f} times, 16 rows "
        f"{costs[16] / one:.2f}; {told['1 rows']['operations']} operations a step; plain "
        f"{told['plain, tokens a second']}/s (chosen here {told['plain from whole distributions']}), superposed "
        f"{told['superposed, steps a second']}/s ({told['superposed from whole distributions']}){more}"
    ), told


def decoding_speed(loaded: Any, *, whole: bool = False, **settings: Any) -> float:
    """Steps a second, the second run of two, of plain greedy decoding or by other settings.

    whole: every distribution comes back, as where somebody looks at them.
    """
    from tempo_mlx.api import Stream
    from tempo_mlx.report.records import RunPrompt
    from tempo_mlx.resolution import resolve
    from tempo_mlx.task import Task

    count = 64
    given = {**(settings or DECODERS["plain"]), "max_tokens": count, "min_steps": count}
    prompt = RunPrompt(PROMPT, tuple(loaded.tokenizer.encode(PROMPT)))
    task = Task(loaded, prompt, resolve(given), observer=(lambda rows: None) if whole else None)
    for _ in range(2):
        run = Stream(task).complete()
    return round(len(run.steps) / run.timing["decode_seconds"], 1)


def beside_mlx_lm(bench: Bench, loaded: Any) -> dict[str, Any]:
    from mlx_lm.generate import generate_step

    from tempo_mlx.bench.contenders import MlxLm, Ours
    from tempo_mlx.bench.timing import interleaved, stopwatch
    from tempo_mlx.mlx import mx

    other, ours = MlxLm(Path(bench.large())), Ours("tempo-mlx", loaded.model)
    ids = list(range(40))
    cases = {
        each.name: partial(stopwatch, partial(each.rows, each.start(ids)[0], [5])) for each in (ours, other)
    }
    timings = interleaved(cases, 5, repeats=4)
    tokens = 64
    for _ in range(2):
        start = time.perf_counter()
        made = [token for token, _ in generate_step(mx.array(ids), other.model, max_tokens=tokens)]
        seconds = time.perf_counter() - start
    return {
        "milliseconds of a row": round(1e3 * timings["mlx-lm"].quartile, 3),
        "ours beside it": round(1e3 * timings["tempo-mlx"].quartile, 3),
        "tokens a second": round(len(made) / seconds, 1),
    }


def check_packed(bench: Bench) -> Found:
    """A GGUF model stays packed where `auto` says so; what it takes, and a run of it that is verified."""
    from tempo_mlx import generate
    from tempo_mlx.decode.width import measure
    from tempo_mlx.mlx import mx
    from tempo_mlx.report.verify import verify

    path = bench.packed()
    mx.reset_peak_memory()
    start = time.perf_counter()
    loaded = bench.load(path, dtype=bench.dtype)
    seconds = time.perf_counter() - start
    size = Path(path).stat().st_size
    told: dict[str, Any] = {
        **{key: loaded.model.info[key] for key in ("id", "dtype", "quantization")},
        "file, GB": round(size / 1e9, 3), "in memory, GB": round(mx.get_active_memory() / 1e9, 3),
        "peak while loading, GB": round(mx.get_peak_memory() / 1e9, 3), "load, seconds": round(seconds, 1),
    }  # fmt: skip
    costs = measure(loaded.model)
    told["milliseconds by rows"] = {rows: round(1e3 * cost, 3) for rows, cost in costs.items()}
    told["plain, tokens a second"] = decoding_speed(loaded)
    wrong = []
    for name in ("superposed", "plain"):
        run = generate(loaded, PROMPT, **{"max_tokens": 24, **DECODERS[name]})
        found = verify(run, loaded)
        told[name] = {
            "ok": found.ok,
            "difference": found.max_difference,
            "tolerance": found.tolerance,
            "text": run.final_text,
        }
        wrong += [] if found.ok else [f"{name}: {found.findings[:1]}"]
    if wrong:
        raise Failed(f"Runs of the packed model are not what they say: {'; '.join(wrong)}", told)
    if told["quantization"] is None and told["in memory, GB"] > 1.6:
        raise Failed(
            f"The model was unpacked: {told['in memory, GB']} GB from a file of {told['file, GB']}.", told
        )
    return (
        f"{told['quantization'] or 'unpacked'} in {told['dtype']}, {told['in memory, GB']} GB of a file of "
        f"{told['file, GB']}; 1 row {1e3 * costs[1]:.2f} ms, 8 rows {costs[8] / costs[1]:.2f} times; two runs verified"
    ), told


def check_torch(bench: Bench) -> Found:
    """The torch backend and transformers on the same weights and device, in turns with MLX: 1 row and 8 rows."""
    import torch

    from tempo_mlx.bench.contenders import Ours, Transformers
    from tempo_mlx.bench.timing import interleaved, stopwatch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = bench.large()
    ours = bench.load(path, dtype=bench.dtype).model
    dtype = str(ours.info["dtype"])
    reference = bench.load(path, backend="torch", device=device, dtype=dtype).model
    field = [Ours("MLX", ours), Ours("torch", reference), Transformers(Path(path), dtype)]
    ids = list(range(40))
    states = {each.name: {k: each.start(ids, copies=k) for k in (1, 8)} for each in field}
    expected = states["MLX"][1][1]
    told: dict[str, Any] = {
        "logit differences from MLX": {
            name: float(np.abs(state[1][1] - expected).max()) for name, state in states.items()
        },
        "logit deviation": float(expected.std()),
    }
    cases: dict[str, Callable[[], float]] = {
        f"{each.name}, {k} rows": partial(
            stopwatch, partial(each.rows, states[each.name][k][0], list(range(7, 7 + k)))
        )
        for each in field
        for k in (1, 8)
    }
    timings = {name: timing.quartile for name, timing in interleaved(cases, 5, repeats=4).items()}
    told["milliseconds"] = {name: round(1e3 * seconds, 3) for name, seconds in timings.items()}
    if max(told["logit differences from MLX"].values()) > 0.25 * told["logit deviation"]:
        raise Failed(f"torch and MLX differ on {device}: {told['logit differences from MLX']}", told)
    return f"on {device}: " + ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in timings.items()), told


def check_doctor(bench: Bench) -> Found:
    """`tempo-mlx doctor --report`, exit code 0."""
    from tempo_mlx.cli.main import main

    path = bench.out / "doctor.json"
    code = main(["doctor", "--model", bench.default(), "--report", str(path)])
    told = json.loads(path.read_text())
    if code:
        raise Failed(f"doctor ended with exit code {code}: {told['kernel']}", told)
    return f"exit code 0; {next(iter(told['kernel'].values()))}", told


PARTS: dict[str, tuple[Callable[[Bench], Found], int]] = {  # and seconds it may take
    "device": (check_device, 50),
    "decoders": (check_decoders, 80),
    "parity": (check_parity, 50),
    "packed": (check_packed, 70),
    "census": (check_census, 60),
    "torch": (check_torch, 60),
    "doctor": (check_doctor, 60),
}
