"""Whether a model fits is known before a weight is read, and what would fit is said."""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tempo_mlx.cli.main import main
from tempo_mlx.errors import MemoryLimitError
from tempo_mlx.weights import Checkpoint, open_checkpoint
from tempo_mlx.weights.memory import Limit, device_limit, estimate_memory, free_memory, require_memory
from tempo_mlx.weights.precision import Precision, choose
from tests.ggufs import F32, STRING, U32, entry, text

SHAPE = {
    "block_count": 32, "context_length": 131072, "embedding_length": 4096, "feed_forward_length": 14336,
    "attention.head_count": 32, "attention.head_count_kv": 8, "rope.dimension_count": 128, "vocab_size": 128256,
}  # fmt: skip
TYPES = {"F32": (0, 1, 4), "Q4_K": (12, 256, 144), "Q6_K": (14, 256, 210)}


@cache
def llama_8b(path: Path) -> Checkpoint:
    """A file with the header of an 8B Llama in Q4_K_M, and nothing behind it."""
    tensors = {
        "token_embd": ((128256, 4096), "Q4_K"),
        "output": ((128256, 4096), "Q6_K"),
        "output_norm": ((4096,), "F32"),
    }
    for layer in range(32):
        more = "Q6_K" if layer < 4 or layer >= 28 or layer % 3 == 0 else "Q4_K"
        for name, shape, kind in (
            ("attn_q", (4096, 4096), "Q4_K"), ("attn_k", (1024, 4096), "Q4_K"), ("attn_v", (1024, 4096), more),
            ("attn_output", (4096, 4096), "Q4_K"), ("ffn_gate", (14336, 4096), "Q4_K"),
            ("ffn_up", (14336, 4096), "Q4_K"), ("ffn_down", (4096, 14336), more), ("attn_norm", (4096,), "F32"),
            ("ffn_norm", (4096,), "F32"),
        ):  # fmt: skip
            tensors[f"blk.{layer}.{name}"] = (shape, kind)
    keys = [entry("general.architecture", STRING, text("llama"))]
    keys += [entry(f"llama.{key}", U32, struct.pack("<I", value)) for key, value in SHAPE.items()]
    keys += [entry("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5))]
    infos, end = b"", 0
    for name, (shape, kind) in tensors.items():
        number, block, size = TYPES[kind]
        dimensions = b"".join(struct.pack("<Q", each) for each in shape[::-1])
        infos += (
            text(f"{name}.weight")
            + struct.pack("<I", len(shape))
            + dimensions
            + struct.pack("<IQ", number, end)
        )
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        end += -(-count // block * size // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + infos
    with path.open("wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // 32) * 32 + end)
    return open_checkpoint(str(path))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return llama_8b(tmp_path_factory.mktemp("large") / "8b.gguf")


def test_an_8b_model_of_4_bits_takes_6_gb_on_a_gpu(large: Checkpoint) -> None:
    precision = choose("gpu", large.stored, cpu_packs=True)
    assert precision == Precision("float16", packed=True)
    packed = estimate_memory(large, dtype="float16", packed=True).weights
    assert 5.5e9 < packed < 6.1e9
    wide = estimate_memory(large, dtype="float32", packed=True).weights  # scales of 4 bytes, and biases
    assert wide == pytest.approx(packed + large.parameters / 32 * 4, rel=1e-3)
    assert estimate_memory(large, dtype="float32").weights == 4 * large.parameters


HALF = Precision("bfloat16", packed=False)
PACKED, WIDE = Precision("float16", packed=True), Precision("float32", packed=False)


@pytest.mark.parametrize(
    ("gigabytes", "precision", "options", "expected", "not_expected"),
    [
        (
            6.0,
            PACKED,
            {},
            ["--kv-bits 8", "--max-memory-gb"],
            ["dtype", "cache-tokens", "smaller model"],
        ),
        (5.9, PACKED, {"slots": 2048}, ["--max-cache-tokens 256"], ["--kv-bits"]),
        (4.6, PACKED, {}, ["an MLX 3-bit quantisation of it"], ["--kv-bits", "a smaller model"]),
        (10.0, HALF, {}, ["an 8-bit quantisation of it"], ["--kv-bits", "4-bit"]),
        (7.0, HALF, {}, ["a 4-bit quantisation of it"], ["8-bit"]),
        (2.0, PACKED, {}, ["a smaller model"], ["quantisation", "--kv-bits"]),
        (20.0, WIDE, {}, ["--dtype bfloat16"], ["quantisation", "--kv-bits"]),
    ],
)
def test_the_sentence_says_what_would_fit(
    large: Checkpoint,
    gigabytes: float,
    precision: Precision,
    options: dict[str, Any],
    expected: list[str],
    not_expected: list[str],
) -> None:
    limit = Limit(gigabytes * 1e9, "that are free", packs=precision.dtype != "float32")
    with pytest.raises(MemoryLimitError, match=f"more than the {gigabytes:.4g} GB that are free") as caught:
        require_memory(large, limit, precision, **options)
    message = str(caught.value)
    assert all(each in message for each in expected), message
    assert not any(each in message for each in not_expected), message
    if "--kv-bits 8" in expected:  # and it does
        require_memory(large, limit, precision, kv_bits=8)
    if "--max-cache-tokens 256" in expected:
        require_memory(large, limit, precision, slots=256)
    if "--dtype bfloat16" in expected:
        require_memory(large, limit, replace(precision, dtype="bfloat16"))
    require_memory(large, Limit(100e9, ""), precision, **options)


def test_the_limits_of_devices(tmp_path: Path) -> None:
    metal = device_limit(
        "gpu", {"max_recommended_working_set_size": 12_000_000_000, "memory_size": 16_000_000_000}
    )
    assert metal == Limit(12e9, "that macOS recommends the GPU to use", packs=True)
    cuda = device_limit("gpu", {"free_memory": 5_000_000_000, "total_memory": 80_000_000_000})
    assert cuda == Limit(5e9, "that are free on the GPU", packs=True, free=True)
    assert device_limit("gpu", {}) is None
    meminfo, group = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal: 9999 kB\nMemFree: 1 kB\nMemAvailable:   2000 kB\n")
    assert free_memory(meminfo, group) == 2_048_000
    group.write_text("max\n")
    assert free_memory(meminfo, group) == 2_048_000
    group.write_text("1000000\n")
    assert free_memory(meminfo, group) == 1_000_000
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 150000\nactive_file 50000\n")
    assert free_memory(meminfo, group) == 500_000  # 500,000 are taken, and 200,000 of files can go
    machine = free_memory(tmp_path / "none", group)  # not Linux
    assert machine is not None and machine > 10**8


@pytest.mark.parametrize(("packs", "needs"), [(True, "needs about 11.5"), (False, "needs about 32.")])
def test_a_model_that_does_not_fit_is_not_loaded(
    packs: bool,
    needs: str,
    large: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tempo_mlx.model.device.cpu_packs", lambda: packs)
    monkeypatch.setattr("tempo_mlx.loading.limit_of", lambda config: Limit(7e9, "of memory that are free"))
    assert main(["generate", "-m", str(large.path), "--device", "cpu", "hello"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert needs in shown.err and "more than the 7 GB of memory that are free" in shown.err


@pytest.mark.slow
def test_memory_is_wired_on_metal_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--wired", "--device", "cpu", "hello"]) == 1
    assert "--wired" in capsys.readouterr().err
