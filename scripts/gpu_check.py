"""Check tempo-mlx on this machine's GPU in one go: Metal, or CUDA with MLX's CUDA build. Within four minutes.

    python scripts/gpu_check.py --out gpu-check                   # all parts; report in gpu-check/report.json
    python scripts/gpu_check.py --out gpu-check --model x.gguf    # a real packed model in place of a random one
    python scripts/gpu_check.py --rehearse --out gpu-check        # without a GPU: small, on the CPU, by the GPU's rules
    python scripts/gpu_check.py --plan                            # what it would do here, and nothing else

Needs no network: models are random, of a real model's shape, unless given. Each part runs in a process of its own, so
that one that fails, hangs or takes the device down with it does not hide the others. Exit code 1 if any part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The three most important things about numbers are that"
SHAPES = {  # E, F, layers, H, K, V: Llama 3.2 1B's, and one for a rehearsal
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (128, 256, 2, 4, 2, 512),
}
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


# Models


def random_model(folder: Path, shape: str) -> Path:
    """A Llama of random bfloat16 weights, with enough contrast that sets are wide; made once."""
    if (folder / "config.json").exists():
        return folder
    from tempo_mlx.mlx import mx

    hidden, inner, layers, heads, groups, vocabulary = SHAPES[shape]
    dim = hidden // heads
    mx.random.seed(1)

    def weight(out: int, into: int, gain: float = 1.5) -> Any:
        made = (mx.random.normal((out, into)) * (gain * into**-0.5)).astype(mx.bfloat16)
        mx.eval(made)
        return made

    ones = mx.ones((hidden,), mx.bfloat16)
    tensors = {"model.embed_tokens.weight": weight(vocabulary, hidden, hidden**0.5)}
    tensors |= {"model.norm.weight": ones, "lm_head.weight": weight(vocabulary, hidden, 4.0)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        tensors |= {name + f"{norm}_layernorm.weight": ones for norm in ("input", "post_attention")}
        for part, out in (("q", heads), ("k", groups), ("v", groups)):
            tensors[name + f"self_attn.{part}_proj.weight"] = weight(out * dim, hidden)
        tensors[name + "self_attn.o_proj.weight"] = weight(hidden, hidden)
        tensors |= {name + f"mlp.{part}_proj.weight": weight(inner, hidden) for part in ("gate", "up")}
        tensors[name + "mlp.down_proj.weight"] = weight(hidden, inner)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "vocab_size": vocabulary, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "eos_token_id": 256, "bos_token_id": 256, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "th"]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_gguf(path: Path, shape: str) -> Path:
    """A Llama as Q4_K_M stores it, Q4_K and Q6_K, with random blocks; made once."""
    if path.exists():
        return path
    import gguf

    hidden, inner, layers, heads, groups, vocabulary = SHAPES[shape]
    hidden, inner = max(hidden, 256), max(inner, 256)  # whole blocks
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path.with_suffix(".part"), "llama")
    for key, value in {
        "context_length": 4096, "embedding_length": hidden, "block_count": layers, "feed_forward_length": inner,
        "attention.head_count": heads, "attention.head_count_kv": groups, "rope.dimension_count": hidden // heads,
        "vocab_size": vocabulary,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    tokens = alphabet()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    padding = [f"[PAD{index}]" for index in range(len(tokens), vocabulary)]
    writer.add_token_list([*tokens, *padding])
    writer.add_token_types([3 if token == "<|end|>" else 1 for token in tokens] + [5] * len(padding))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(256)
    random = np.random.default_rng(2)

    def add(name: str, out: int, into: int, kind: str, gain: float = 1.5) -> None:
        blocks = random_blocks(random, out * into // 256, kind, gain * into**-0.5)
        whole = blocks.reshape(out, -1)
        writer.add_tensor(name, whole, raw_dtype=gguf.GGMLQuantizationType[kind])

    add("token_embd.weight", vocabulary, hidden, "Q4_K", hidden**0.5)
    add("output.weight", vocabulary, hidden, "Q6_K", 4.0)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        wide, narrow = hidden, hidden // heads * groups
        finer = "Q6_K" if layer % 2 else "Q4_K"
        for name, out, into, kind in (
            ("attn_q", wide, hidden, "Q4_K"), ("attn_k", narrow, hidden, "Q4_K"), ("attn_v", narrow, hidden, finer),
            ("attn_output", hidden, wide, "Q4_K"), ("ffn_gate", inner, hidden, "Q4_K"),
            ("ffn_up", inner, hidden, "Q4_K"), ("ffn_down", hidden, inner, finer),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", out, into, kind)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix(".part").rename(path)


def random_blocks(random: np.random.Generator, count: int, kind: str, deviation: float) -> np.ndarray:
    """Super-blocks of 256 weights around 0; deviation: of them, roughly."""
    if kind == "Q4_K":  # d, dmin, 12 bytes of scales, 128 of codes: d s q - dmin m
        blocks = random.integers(0, 256, (count, 144), np.uint8)
        scale = np.array([deviation / 225, 7.5 * deviation / 225], np.float16)
        blocks[:, :4] = scale.view(np.uint8)
        return blocks
    blocks = random.integers(0, 256, (count, 210), np.uint8)  # codes, 16 signed scales, d: d s (q - 32)
    blocks[:, 208:] = np.array([deviation / 1370], np.float16).view(np.uint8)
    return blocks


# Parts: each returns a sentence and what goes into the report; raises Failed


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
    }
    for rows, attention in ((1, False), (8, False), (8, True)):
        cache = model.new_cache()
        model.forward(list(range(40)), range(40), None, cache, logits="none")
        start = time.perf_counter()
        pending = described(model, cache, rows, attention)
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
        f"{told['plain, tokens a second']}/s{more}"
    ), told


def decoding_speed(loaded: Any, tokens: int = 64) -> float:
    """Tokens a second of plain greedy decoding, the second run of two."""
    from tempo_mlx import generate

    for _ in range(2):
        run = generate(loaded, PROMPT, decoder="plain", temperature=0.0, max_tokens=tokens, min_steps=tokens)
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


def run_part(name: str, bench: Bench) -> int:
    """In a process of its own: writes OUT/parts/NAME.json."""
    from tempo_mlx.model import device

    start = time.perf_counter()
    told: dict[str, Any] = {}
    ok = False
    by_gpu_rules = patch.object(device, "on_gpu", return_value=True)
    try:
        with by_gpu_rules if bench.rehearse else patch.dict(os.environ):
            sentence, told = PARTS[name][0](bench)
        ok = True
    except Failed as problem:
        sentence, *rest = problem.args
        told = rest[0] if rest else {}
    except Exception as problem:  # the report has it, and the other parts go on
        sentence = f"{type(problem).__name__}: {str(problem).splitlines()[0][:300] if str(problem) else ''}"
        told = {"traceback": traceback.format_exc().splitlines()[-25:]}
    result = {"ok": ok, "sentence": sentence, "seconds": round(time.perf_counter() - start, 1), "found": told}
    path = bench.out / "parts" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=str))
    return 0 if ok else 1


def run_all(options: argparse.Namespace, names: list[str]) -> int:
    out = Path(options.out).resolve()
    (out / "parts").mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    results: dict[str, Any] = {}
    for name in names:
        (out / "parts" / f"{name}.json").unlink(missing_ok=True)
        left = deadline - time.monotonic()
        if left < 8:
            results[name] = {
                "ok": False,
                "sentence": f"Not begun: the {options.seconds} seconds were over.",
                "seconds": 0,
            }
        else:
            results[name] = in_own_process(name, options, out, min(left, PARTS[name][1] * options.patience))
        row = results[name]
        print(
            f"{'PASS' if row['ok'] else 'FAIL'}  {name:<9} {row['seconds']:>5} s  {row['sentence']}",
            flush=True,
        )
    failed = [name for name, row in results.items() if not row["ok"]]
    report = {
        "format": "tempo-mlx/gpu-check",
        "rehearsal": options.rehearse,
        "failed": failed,
        "parts": results,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1, default=str))
    print(
        f"{len(results) - len(failed)} of {len(results)} parts passed; all that was found: {out / 'report.json'}"
    )
    return 1 if failed else 0


def in_own_process(name: str, options: argparse.Namespace, out: Path, seconds: float) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--out", str(out)]
    command += ["--rehearse"] if options.rehearse else []
    for flag in ("model", "default"):
        command += [f"--{flag}", getattr(options, flag)] if getattr(options, flag) else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    log = out / "parts" / f"{name}.log"
    with log.open("w") as file:
        try:
            code: int | str = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False,
                env={**os.environ, "PYTHONPATH": path},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = f"it was stopped after {seconds:.0f} seconds"
    took = round(time.perf_counter() - start, 1)
    written = out / "parts" / f"{name}.json"
    if written.exists():
        return {**json.loads(written.read_text()), "seconds": took}
    tail = log.read_text(errors="replace").splitlines()[-12:]
    reason = code if isinstance(code, str) else f"the process ended with code {code} and wrote nothing"
    return {
        "ok": False,
        "sentence": f"No result: {reason}; {' | '.join(tail[-2:])[:300]}",
        "seconds": took,
        "log": tail,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        default=tempfile.gettempdir() + "/tempo-gpu-check",
        help="folder for the report and random models",
    )
    parser.add_argument("--model", help="a packed GGUF file, in place of a random one")
    parser.add_argument(
        "--default", help="the model of the decoder and parity parts (default: smollm2-135m if it is here)"
    )
    parser.add_argument("--parts", help="only these, separated by commas: " + ", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=230, help="in all")
    parser.add_argument("--patience", type=float, default=1.0, help="times each part's own limit")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with small models, by the GPU's rules"
    )
    parser.add_argument("--plan", action="store_true", help="say what would be done")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.parts.split(",") if options.parts else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"{unknown[0]} is no part; they are {', '.join(PARTS)}")
    if options.part:
        return run_part(options.part, Bench(options))
    sys.path.insert(0, str(ROOT))
    from tempo_mlx.mlx import mx

    gpu = mx.metal.is_available() or mx.cuda.is_available()
    if options.plan or not (gpu or options.rehearse):
        print(
            "Would do"
            if gpu
            else "No GPU that MLX can use is here (--rehearse runs it on the CPU). On one it would do:"
        )
        for name in names:
            print(f"  {name:<9} {PARTS[name][0].__doc__}")
        return 0
    return run_all(options, names)


if __name__ == "__main__":
    sys.exit(main())
