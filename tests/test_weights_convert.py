"""convert: what is written is what was read, or what MLX makes of it, and mlx-lm and transformers can open it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from tempo_mlx.errors import ConfigError, ModelError, OutputError
from tempo_mlx.mlx import mx, nn
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.weights import convert as convert_module
from tempo_mlx.weights import open_checkpoint
from tempo_mlx.weights.convert import Dtype, convert
from tempo_mlx.weights.tensor import DenseTensor, Layout, float32_to_bfloat16
from tests.ggufs import gguf_twin
from tests.twin_table import TWINS
from tests.twins import reference, twin

PROMPT = [5, 17, 42, 99, 3, 250, 118]


def logits_of(path: Path) -> np.ndarray:
    model = build(open_checkpoint(str(path)), "auto", "float32")
    result = model.forward(PROMPT, np.arange(len(PROMPT)), None, model.new_cache()).logits
    assert result is not None
    return result


def mlx_lm(module: str = "mlx_lm") -> Any:
    """The package, or a skip with the reason: it is in the extra [bench], and needs Python 3.11."""
    return pytest.importorskip(module, reason="mlx-lm is not installed; it needs Python 3.11")


def mlx_lm_logits(path: Path) -> np.ndarray:
    model, _ = mlx_lm("mlx_lm.utils").load_model(path)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([PROMPT]))[0])


@pytest.mark.parametrize("name", TWINS)
def test_a_copy_is_bit_identical_and_means_the_same(name: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = convert(
        str(twin(name)), tmp_path / "copy", progress=lambda done, total: seen.append((done, total))
    )
    ours, source = open_checkpoint(str(path)), open_checkpoint(str(twin(name)))
    assert ours.architecture == source.architecture
    for tensor in source.names():
        np.testing.assert_array_equal(ours.tensor(tensor).numpy(), source.tensor(tensor).numpy())
    assert ours.tokenizer().encode("the <|im_end|>") == source.tokenizer().encode("the <|im_end|>")
    assert ours.tokenizer().eos_ids == source.tokenizer().eos_ids
    assert seen[-1][0] == seen[-1][1] == sum(source.tensor(each).nbytes for each in source.names())


# Not Phi-4's longrope: mlx-lm takes the factors of long texts for short ones too.
@pytest.mark.parametrize("name", ["llama", "llama3", "llama-linear", "qwen2", "qwen3", "gemma2", "gemma3", "phi3",
                                  "smollm3", "olmo2", "granite"])  # fmt: skip
def test_mlx_lm_computes_the_same_from_what_we_write(name: str, tmp_path: Path) -> None:
    source = gguf_twin(name) if name in ("llama", "llama3", "phi3", "granite") else twin(name)
    path = convert(str(source), tmp_path / "copy")
    np.testing.assert_allclose(mlx_lm_logits(path), logits_of(twin(name)), atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "llama3"])
def test_transformers_computes_the_same_from_what_we_write(name: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = convert(str(gguf_twin("llama") if name == "llama" else twin(name)), tmp_path / "copy")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs, wanted = (each(torch.tensor([PROMPT])).logits for each in (model, reference(name)))
    torch.testing.assert_close(theirs, wanted, atol=1e-5, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer("the cat")["input_ids"] == open_checkpoint(str(path)).tokenizer().encode("the cat")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_quantised_weights_are_those_of_mlx(bits: int, dtype: Any, tmp_path: Path) -> None:
    path = convert(str(twin("llama")), tmp_path / "q", bits=bits, group_size=32, dtype=dtype)
    ours, source = open_checkpoint(str(path)), open_checkpoint(str(twin("llama")))
    assert ours.quantization == f"mlx {bits}-bit, group 32"
    for name in source.names():
        dense = source.tensor(name).numpy()
        tensor = ours.tensor(name)
        if dense.ndim == 1:
            assert tensor.kind == (dtype or "float32")
            continue
        layer = nn.Linear(dense.shape[1], dense.shape[0], bias=False)
        layer.weight = mx.array(dense).astype(getattr(mx, dtype or "float32"))
        theirs = nn.QuantizedLinear.from_linear(layer, 32, bits)
        packed, scales, biases, layout = tensor.quantized()
        assert layout == Layout(bits, 32)
        np.testing.assert_array_equal(packed, np.array(theirs.weight))
        for mine, other in ((scales, theirs.scales), (biases, theirs.biases)):
            np.testing.assert_array_equal(
                mine, np.array(other.view(mx.uint16) if dtype == "bfloat16" else other)
            )


def test_quantised_text_is_mlx_lms_own(tmp_path: Path) -> None:
    mlx_lm().convert(str(twin("llama")), str(tmp_path / "theirs"), quantize=True, q_bits=4, q_group_size=32)
    ours = convert(str(twin("llama")), tmp_path / "ours", bits=4, group_size=32)
    np.testing.assert_array_equal(mlx_lm_logits(ours), mlx_lm_logits(tmp_path / "theirs"))
    np.testing.assert_array_equal(logits_of(ours), logits_of(tmp_path / "theirs"))  # and we read theirs
    np.testing.assert_allclose(mlx_lm_logits(ours), logits_of(ours), atol=2e-4)


def test_a_type_alone_makes_everything_dense(tmp_path: Path) -> None:
    quantised = convert(str(twin("llama")), tmp_path / "q", bits=8, group_size=32)
    for dtype in get_args(Dtype):
        path = convert(str(quantised), tmp_path / dtype, dtype=dtype)
        checkpoint, source = open_checkpoint(str(path)), open_checkpoint(str(quantised))
        assert checkpoint.quantization == dtype
        assert json.loads((path / "config.json").read_text())["torch_dtype"] == dtype
        for name in source.names():
            wide = source.tensor(name).numpy()
            kept = float32_to_bfloat16(wide) if dtype == "bfloat16" else wide.astype(dtype)
            np.testing.assert_array_equal(checkpoint.tensor(name).raw(), kept)


def test_transformers_loads_the_type_that_was_written(tmp_path: Path) -> None:
    """Its own word for the type wins over the older one that mlx-lm reads."""
    assert json.loads((twin("llama") / "config.json").read_text())["dtype"] == "float32"
    path = convert(str(twin("llama")), tmp_path / "half", dtype="bfloat16")
    config = pytest.importorskip("transformers").AutoConfig.from_pretrained(path)
    assert str(config.dtype) == "torch.bfloat16"


def test_what_is_quantised_already_is_copied(tmp_path: Path) -> None:
    first = convert(str(twin("llama")), tmp_path / "a", bits=6, group_size=32, dtype="bfloat16")
    second = convert(str(first), tmp_path / "b")
    for file in ("model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


@pytest.mark.parametrize(
    ("family", "name", "quantised"),
    [
        ("ernie4_5_moe", "model.layers.1.mlp.moe_statics.e_score_correction_bias", False),
        ("cohere", "model.layers.0.self_attn.q_norm.weight", False),
        ("cohere", "model.layers.0.self_attn.q_proj.weight", True),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w1.weight", True),
        ("llama", "model.embed_tokens.weight", True),
    ],
)
def test_matrices_are_quantised_and_no_biases_and_norms_of_several_rows(
    family: str, name: str, quantised: bool
) -> None:
    a = open_checkpoint(str(twin(family))).architecture
    plan = convert_module._plan(name, DenseTensor(np.ones((4, 64), np.float32)), 4, 32, None, a)
    assert (plan.layout is not None) == quantised


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe"])
def test_stacked_experts_are_not_left_dense_in_silence(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="convert it without --quantize"):
        convert(str(twin(name)), tmp_path / "q", bits=4, group_size=32)
    assert open_checkpoint(str(convert(str(twin(name)), tmp_path / "copy"))).architecture.family == name


def test_whatever_a_tokenizer_came_as_comes_along(tmp_path: Path) -> None:
    source = Path(shutil.copytree(twin("llama"), tmp_path / "source"))
    (source / "tokenizer.json").unlink()
    words = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    (source / "qwen.tiktoken").write_bytes(b"\n".join(words))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    found = [
        open_checkpoint(str(each)).tokenizer() for each in (source, convert(str(source), tmp_path / "copy"))
    ]
    assert found[0].encode("the cat") == found[1].encode("the cat")
    assert found[0].chat_templates == found[1].chat_templates and "tool_use" in found[1].chat_templates


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "_SHARD_BYTES", 100_000)
    path = convert(str(twin("llama")), tmp_path / "shards")
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((path / file).stat().st_size < 120_000 for file in files)
    np.testing.assert_array_equal(logits_of(path), logits_of(twin("llama")))
    np.testing.assert_allclose(mlx_lm_logits(path), logits_of(path), atol=2e-4)


@pytest.mark.slow
def test_the_embedded_model_comes_through_without_loss(tmp_path: Path) -> None:
    """GGUF Q4_1 and Q8_0 in MLX's layout: the same numbers, and the same text from mlx-lm."""
    path = convert("smollm2-135m", tmp_path / "smollm2")
    ours, source = open_checkpoint(str(path)), open_checkpoint("smollm2-135m")
    assert ours.quantization == "mlx 4-bit, group 32"
    assert ours.architecture == source.architecture
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert size < 1.05 * source.path.stat().st_size
    for name in source.names()[::40]:
        np.testing.assert_allclose(ours.tensor(name).numpy(), source.tensor(name).numpy(), rtol=0, atol=2e-6)
    tokenizer = ours.tokenizer()
    for text in ("The capital of France is 1234 <|im_end|>", "naïve 😀\n\n  x"):
        assert tokenizer.encode(text) == source.tokenizer().encode(text)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat(messages) == source.tokenizer().chat(messages)
    theirs, their_tokenizer = mlx_lm().load(str(path))
    theirs.set_dtype(mx.float32)
    ids = source.tokenizer().encode("The capital of France is")
    assert their_tokenizer.encode("The capital of France is") == ids
    mine = build(source, "auto", "float32")
    got = mine.forward(ids, np.arange(len(ids)), None, mine.new_cache(), logits="last").logits
    wanted = np.array(theirs(mx.array([ids]))[0, -1:])
    np.testing.assert_allclose(got, wanted, atol=1e-2)  # packed products round differently
    assert int(np.argmax(got)) == int(np.argmax(wanted))


# ---- what can go wrong


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="7 bits"):
        convert(str(twin("llama")), tmp_path / "x", bits=7)
    with pytest.raises(ConfigError, match="groups of 48"):
        convert(str(twin("llama")), tmp_path / "x", bits=4, group_size=48)
    with pytest.raises(ModelError, match="no model"):
        convert("no-such-model", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        convert(str(twin("llama")), tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), ValueError])
def test_a_conversion_that_is_stopped_leaves_nothing(error: Any, tmp_path: Path) -> None:
    def stop(done: int, total: int | None) -> None:
        assert list(tmp_path.glob("out")) == []  # not under its name before it is whole
        if done > 50_000:
            raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else error) as caught:
        convert(str(twin("llama")), tmp_path / "out", progress=stop)
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        convert(str(twin("llama")), tmp_path / "file" / "out")


def test_files_that_run_code_are_not_copied(tmp_path: Path) -> None:
    source = Path(shutil.copytree(twin("llama"), tmp_path / "source"))
    for name in ("modeling_evil.py", "pytorch_model.bin", "README.md"):
        (source / name).write_text("x")
    path = convert(str(source), tmp_path / "copy")
    assert (path / "README.md").exists()
    assert not (path / "modeling_evil.py").exists() and not (path / "pytorch_model.bin").exists()


@pytest.mark.slow
def test_memory_holds_little_more_than_one_tensor(tmp_path: Path) -> None:
    """In a process of its own: the peak over what the imports take stays under 1.3 x the larger side (540 MB)."""
    script = """
import resource, sys
from pathlib import Path
from tempo_mlx.weights import open_checkpoint
from tempo_mlx.weights.convert import convert
from tempo_mlx.weights.tensor import Layout

def peak():
    status = Path("/proc/self/status")
    if status.exists():  # Linux passes ru_maxrss on from the parent process
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

open_checkpoint("smollm2-135m").tokenizer()
before = peak()
convert("smollm2-135m", Path(sys.argv[1]), dtype="float32")
print(peak() - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    grown = int(run.stdout)
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert written > 530_000_000
    assert grown < 1.3 * written
