"""GGUF files of hybrids, latents and Gemmas as llama.cpp's converter writes them, against transformers.

test_llama_cpp.py has llama.cpp read the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tempo_mlx.architecture.families import architecture_from_config  # noqa: E402
from tempo_mlx.architecture.gguf import config_from_gguf, names_of, row_of  # noqa: E402
from tempo_mlx.architecture.gguf_tensors import place_of  # noqa: E402
from tempo_mlx.errors import ModelError  # noqa: E402
from tempo_mlx.model.mlx_backend import build  # noqa: E402
from tempo_mlx.weights import open_checkpoint  # noqa: E402
from tempo_mlx.weights.convert import convert  # noqa: E402
from tempo_mlx.weights.gguf_file import read_gguf  # noqa: E402
from tempo_mlx.weights.gguf_tensor import GGUFTensor  # noqa: E402
from tempo_mlx.weights.tensor import ColumnsReordered, DenseTensor, PackedTensor  # noqa: E402
from tests.converted import CONVERTED, converted_twin  # noqa: E402
from tests.twins import reference, twin  # noqa: E402

TOKENS = np.random.default_rng(0).integers(256, size=40)  # past every window, and where YaRN scales queries


@pytest.mark.parametrize("name", CONVERTED)
def test_logits_are_those_of_transformers(name: str) -> None:
    model = build(open_checkpoint(str(converted_twin(name))), "auto", "float32")
    with torch.inference_mode():
        wanted = reference(name)(torch.tensor(TOKENS)[None], use_cache=False).logits[0].numpy()
    assert wanted.std() > 0.5
    got = np.array(model.forward(TOKENS, np.arange(len(TOKENS)), None, model.new_cache()).logits)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CONVERTED if name != "gguf-falcon_h1"])
def test_weights_are_those_of_the_directory(name: str) -> None:
    """What the logits of so few tokens might not show. Falcon-H1's multipliers stay in the weights of its files."""
    ours, theirs = open_checkpoint(str(converted_twin(name))), open_checkpoint(str(twin(name)))
    assert sorted(ours.names()) == sorted(theirs.names())
    for tensor in ours.names():
        np.testing.assert_allclose(
            ours.tensor(tensor).numpy(), theirs.tensor(tensor).numpy(), rtol=0, atol=5e-7, err_msg=tensor
        )
    assert ours.architecture.layers == theirs.architecture.layers


@pytest.mark.parametrize(
    "name", ["gguf-gemma4-e", "gguf-gemma4-moe", "gguf-qwen3_5_moe", "gguf-deepseek_v3", "gguf-gemma3n"]
)
def test_it_can_be_written_as_a_directory(name: str, tmp_path: Path) -> None:
    ours = open_checkpoint(str(convert(str(converted_twin(name)), tmp_path / "directory")))
    theirs = open_checkpoint(str(converted_twin(name)))
    assert ours.architecture == theirs.architecture
    for tensor in theirs.names():
        np.testing.assert_array_equal(
            ours.tensor(tensor).numpy(), theirs.tensor(tensor).numpy(), err_msg=tensor
        )


def test_a_family_is_listed_under_every_name_that_its_files_have() -> None:
    for name, architecture in CONVERTED.items():
        family = open_checkpoint(str(twin(name))).architecture.family
        read = open_checkpoint(str(converted_twin(name))).architecture.family
        assert architecture in names_of(read)
        assert (
            architecture in names_of(family) or name == "gguf-mistral3"
        )  # Mistral Small, computed as a Llama


def test_layers_that_guess_ahead_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "ahead.gguf"

    def more(writer: Any) -> None:
        writer.add_uint32("qwen35.nextn_predict_layers", 1)
        for name, tensor in read_gguf(converted_twin("gguf-qwen3_5")).tensors.items():
            if name.startswith("blk.3."):
                writer.add_tensor(name.replace("blk.3.", "blk.4."), np.array(tensor.numpy()))
        writer.add_tensor("blk.4.nextn.enorm.weight", np.zeros(64, np.float32))

    _copy("gguf-qwen3_5", path, {"qwen35.block_count": 5}, more)
    ours, theirs = open_checkpoint(str(path)), open_checkpoint(str(twin("gguf-qwen3_5")))
    assert ours.architecture.layers == theirs.architecture.layers


def test_a_latent_in_one_tensor_as_files_of_2024_have_it(tmp_path: Path) -> None:
    name, path = "gguf-deepseek_v2-lite", tmp_path / "old.gguf"
    theirs = open_checkpoint(str(twin(name)))
    keys = {
        "key_length_mla": None,
        "value_length_mla": None,
        "key_length": 24,
        "value_length": 12,
        "head_count_kv": 4,
    }
    changes: dict[str, Any] = {f"deepseek2.attention.{key}": value for key, value in keys.items()}
    changes |= {f"blk.{layer}.attn_{part}_b.weight": None for layer in range(4) for part in "kv"}

    def more(writer: Any) -> None:
        for layer in range(4):
            whole = theirs.tensor(f"model.layers.{layer}.self_attn.kv_b_proj.weight").numpy()
            writer.add_tensor(f"blk.{layer}.attn_kv_b.weight", np.array(whole))

    _copy(name, path, changes, more)
    ours = open_checkpoint(str(path))
    assert ours.architecture.layers == theirs.architecture.layers
    for tensor in theirs.names():
        np.testing.assert_array_equal(ours.tensor(tensor).numpy(), theirs.tensor(tensor).numpy())


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gguf-granite4-h", {"granitehybrid.rope.scaling.finetuned": True}, "granitehybrid.expert_count"),
        ("gguf-llama4", {"llama4.attention.sliding_window": 0}, "sliding_window = 0"),
        ("gguf-apertus", {"xielu.beta": [0.25] * 4}, "xielu.beta"),
        ("gguf-apertus", {"xielu.alpha_p": [0.25] * 3}, "xielu.alpha_p"),
        ("gguf-falcon_h1", {"output.weight": None}, "output.weight"),
        ("gguf-bamba", {"granitehybrid.attention.scale": 0.5}, "attention scale"),
        ("gguf-deepseek_v3", {"deepseek2.attention.temperature_scale": 0.1}, "temperature_scale"),
        ("gguf-ministral3", {"mistral3.attention.temperature_length": 999}, "temperature_scale"),
        ("gguf-qwen3_5_moe", {"qwen35moe.expert_gating_func": 2}, "expert_gating_func 2"),
        ("gguf-mistral4", {"mistral4.expert_gating_func": 2}, "expert_gating_func 2"),
        ("gguf-gemma4-e", {"rope_freqs.weight": None}, "rope_freqs"),
        (
            "gguf-exaone4-windows",
            {"exaone4.attention.sliding_window_pattern": [True]},
            "1 values for 4 layers",
        ),
        ("gguf-qwen3_5", {"qwen35.ssm.state_size": "16"}, "ssm.state_size"),
        ("gguf-qwen3_5", {"qwen35.ssm.group_count": 3}, "3 key heads"),
        ("gguf-nemotron_h_moe", {"nemotron_h_moe.moe_latent_size": 8}, "moe_latent_size"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "odd.gguf"
    _copy(name, path, changes)
    with pytest.raises(ModelError, match=said):
        open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("name", "changes", "tensors", "key", "value"),
    [
        ("gguf-llama4", {"llama4.expert_count": 128}, {}, "use_qk_norm", False),
        ("gguf-llama4", {"llama4.attention.sliding_window": 8192}, {}, "attention_chunk_size", 8192),
        ("gguf-stablelm", {"stablelm.use_parallel_residual": True}, {}, "use_parallel_residual", False),
        ("gguf-stablelm", {}, {"blk.0.attn_q_norm.weight": (4, 16)}, "qk_layernorm", True),
        ("gguf-olmo3", {"olmo2.rope.freq_base_swa": 5e5}, {}, "rope_local_base_freq", 5e5),
        ("gguf-olmo3", {"olmo2.attention.sliding_window": 0}, {}, "model_type", "olmo2"),
        ("gguf-phi", {"phi2.rope.dimension_count": 16}, {}, "partial_rotary_factor", 1.0),
    ],
)
def test_what_a_file_of_such_a_kind_says(
    name: str, changes: dict[str, Any], tensors: dict[str, tuple[int, ...]], key: str, value: Any
) -> None:
    """Of models whose twins would be large, and as llama.cpp takes what files say of them."""
    file = read_gguf(converted_twin(name))
    shapes = {each: tensor.shape for each, tensor in file.tensors.items()} | tensors
    assert config_from_gguf({**file.metadata, **changes}, shapes, {})[key] == value


def test_a_file_may_name_its_recurrent_layers() -> None:
    file = read_gguf(converted_twin("gguf-qwen3_5"))
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    metadata = {**file.metadata, "qwen35.attention.recurrent_layers": np.array([True, True, False, True])}
    kinds = config_from_gguf(metadata, shapes, {})["layer_types"]
    assert kinds == ["linear_attention", "linear_attention", "full_attention", "linear_attention"]


@pytest.mark.parametrize("name", CONVERTED)
def test_no_number_of_a_header_does_more_than_refuse_the_file(name: str) -> None:
    file = read_gguf(converted_twin(name))
    shapes = {each: tensor.shape for each, tensor in file.tensors.items()} | {
        "blk.0": (1,),
        "blk.7.x": (1, 2),
    }
    factors = {"rope_freqs.weight": [1.0] * 16} if "gemma4" in name else {}
    odd = (
        None,
        0,
        -1,
        3,
        2**31 - 1,
        2**63,
        0.3,
        float("nan"),
        "x",
        True,
        np.zeros(0),
        np.array([0, 7]),
        np.arange(4.0),
    )
    refused = 0
    for key in file.metadata:
        if not key.startswith(f"{CONVERTED[name]}."):
            continue
        for value in odd:
            metadata = {**file.metadata, key: value}
            if value is None:
                del metadata[key]
            try:
                architecture = architecture_from_config(config_from_gguf(metadata, shapes, factors))
                for stored, shape in shapes.items():
                    place_of(stored, shape, architecture, row_of(metadata)[1])
            except ModelError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 50


def _copy(
    name: str, path: Path, changes: dict[str, Any], more: Callable[[Any], None] = lambda writer: None
) -> None:
    """The converted twin with other metadata; None: without the key, or the tensor, of this name."""
    from tests.ggufs import write

    source = read_gguf(converted_twin(name))
    writer = gguf.GGUFWriter(path, CONVERTED[name])
    for key, value in {**source.metadata, **changes}.items():
        if key.startswith((CONVERTED[name], "xielu.")) and value is not None:
            value = value.tolist() if isinstance(value, np.ndarray) else value
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array,
                   str: writer.add_string}[type(value)]  # fmt: skip
            add(key, value)
    for tensor, each in source.tensors.items():
        if tensor not in changes:
            writer.add_tensor(tensor, np.array(each.numpy()))
    more(writer)
    write(writer)


# Packed weights


def _packed(shape: tuple[int, ...], kind: str = "Q8_0") -> GGUFTensor:
    weight = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return GGUFTensor(gguf.quantize(weight, gguf.GGMLQuantizationType[kind]), kind, shape[-1])


def test_columns_that_stay_together_stay_packed() -> None:
    """Qwen3.5's out_proj: value heads of 128 columns, four groups each."""
    tensor = _packed((8, 256))
    order = np.concatenate([np.arange(128, 256), np.arange(128)])
    reordered = ColumnsReordered(tensor, order)
    assert (reordered.kind, reordered.group, reordered.nbytes) == ("mlx_quantized", 32, tensor.nbytes)
    packed, scales, biases, layout = reordered.quantized()
    wanted = tensor.numpy()[:, order]
    np.testing.assert_array_equal(reordered.numpy(), wanted)
    np.testing.assert_allclose(PackedTensor(packed, scales, biases, layout).numpy(), wanted, atol=1e-6)
    np.testing.assert_array_equal(reordered.rows(slice(2, 4)).numpy(), wanted[2:4])
    np.testing.assert_array_equal(reordered.cut(32, 64).numpy(), wanted[:, 32:64])


def test_columns_that_are_torn_apart_become_dense() -> None:
    tensor = _packed((8, 64))
    order = np.arange(64).reshape(4, 16)[[0, 2, 1, 3]].reshape(-1)
    reordered = ColumnsReordered(tensor, order)
    assert (reordered.kind, reordered.group, reordered.nbytes) == ("float32", 1, 8 * 64 * 4)
    np.testing.assert_array_equal(reordered.raw(), tensor.numpy()[:, order])
    with pytest.raises(ModelError, match="not quantised"):
        reordered.quantized()
    dense = DenseTensor(tensor.numpy().astype(np.float16))
    np.testing.assert_array_equal(ColumnsReordered(dense, order).raw(), dense.data[:, order])


def test_gates_and_inputs_of_stacked_experts_stay_packed(tmp_path: Path) -> None:
    """Gemma 4 26B-A4B has them in one tensor, which would take 100 GB dequantised."""
    name, path = "gguf-gemma4-moe", tmp_path / "packed.gguf"
    source = read_gguf(converted_twin(name)).tensors
    fused = {each for each in source if "ffn_gate_up_exps" in each}

    def more(writer: Any) -> None:
        for each in fused:
            blocks = gguf.quantize(np.array(source[each].numpy()), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(each, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    _copy(name, path, dict.fromkeys(fused), more)
    tensor = open_checkpoint(str(path)).tensor("model.layers.0.experts.up_proj.weight")
    assert (tensor.kind, tensor.shape) == ("mlx_quantized", (8, 32, 64))
    whole = open_checkpoint(str(converted_twin(name))).tensor("model.layers.0.experts.up_proj.weight")
    np.testing.assert_allclose(tensor.numpy(), whole.numpy(), atol=0.02)
    np.testing.assert_allclose(PackedTensor(*tensor.quantized()).numpy(), tensor.numpy(), atol=1e-6)
