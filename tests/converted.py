"""Twins as .gguf files, tensor by tensor what llama.cpp's converter makes of a Hugging Face directory.

Nothing here is read with our own code: names are those of the gguf package's table, the changes those of llama.cpp's
conversion/*.py, and test_llama_cpp.py has llama.cpp read the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from tests.converted_metadata import metadata_of
from tests.ggufs import add_byte_level_tokenizer, permute, write
from tests.twin_table import GGUF_TWINS, SIZES, VOCABULARY
from tests.twins import reference, twin

# twin -> llama.cpp's architecture
CONVERTED = {
    "gguf-exaone4": "exaone4", "gguf-exaone4-windows": "exaone4", "gguf-mistral3": "mistral3",
    "gguf-ministral3": "mistral3", "gguf-deepseek_v2": "deepseek2", "gguf-deepseek_v2-lite": "deepseek2",
    "gguf-deepseek_v3": "deepseek2", "gguf-glm4_moe_lite": "deepseek2", "gguf-youtu": "deepseek2",
    "gguf-mistral4": "mistral4", "gguf-qwen3_next": "qwen3next", "gguf-qwen3_5": "qwen35",
    "gguf-qwen3_5_moe": "qwen35moe", "gguf-granite4-h": "granitehybrid", "gguf-granite4-h-dense": "granitehybrid",
    "gguf-nemotron_h": "nemotron_h", "gguf-nemotron_h_moe": "nemotron_h_moe", "gguf-gemma3n": "gemma3n",
    "gguf-gemma4-e": "gemma4", "gguf-gemma4-moe": "gemma4", "gguf-llama4": "llama4", "gguf-olmo3": "olmo2",
    "gguf-phimoe": "phimoe", "gguf-phi": "phi2", "gguf-gpt_neox": "gptneox", "gguf-gpt_neox-serial": "gptneox",
    "gguf-stablelm": "stablelm", "gguf-stablelm-parallel": "stablelm", "gguf-ernie4_5_moe": "ernie4_5-moe",
    "gguf-apertus": "apertus", "gguf-falcon_h1": "falcon-h1", "gguf-bamba": "granitehybrid", "gguf-glm": "chatglm",
    "gguf-glm-fused": "chatglm",
}  # fmt: skip


def _changed(
    name: str, weight: np.ndarray, architecture: str, config: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's tensor as modify_tensors of the architecture's class yields it."""
    if name.endswith(".A_log"):
        weight = -np.exp(weight)
    if name.endswith("conv1d.weight"):
        weight = weight[:, 0]
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    name = re.sub(r"backbone(.*)mixer\.experts", r"model\1mlp.experts", name)
    if name.endswith(".dt_bias"):
        name = name.replace(".dt_bias", ".dt.bias" if architecture == "nemotron_h_moe" else ".dt_proj.bias")
    if architecture.startswith("qwen3"):
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            weight = weight + 1
        if architecture != "qwen3next" and "linear_attn." in name:
            weight = _tiled(name, weight, config)
    if architecture == "falcon-h1":
        weight = _multiplied(name, weight, config)
    if architecture == "llama4" and re.search(r"experts\.(gate_up|down)_proj$", name):
        weight = weight.swapaxes(1, 2)
    if architecture == "gptneox" and "query_key_value" in name:
        parts = weight.reshape(config.num_attention_heads, 3, -1, *weight.shape[1:])
        weight = parts.swapaxes(0, 1).reshape(weight.shape)
    if architecture.startswith(("granite", "nemotron", "falcon")):
        if name.endswith((".A_log", ".D")):
            weight = weight[:, None]
        if re.search(r"(mamba|mixer)\.norm\.weight$", name):
            weight = weight.reshape(2, -1)
    if architecture.startswith(("granite", "nemotron", "mistral3")) and re.search(
        r"[qk]_proj\.weight$", name
    ):
        query = "q_proj" in name
        weight = permute(weight, config.num_attention_heads if query else config.num_key_value_heads)
    if name.endswith(("correct_output_scale", "layer_scalar")):
        name = f"{name}.weight"
    if "in_proj_qkvz" in name:
        yield from _unmixed(name, weight, config)
    elif name.endswith("kv_b_proj.weight"):
        parts = weight.reshape(config.num_attention_heads, -1, weight.shape[-1])
        yield name.replace("kv_b", "k_b"), parts[:, : config.qk_nope_head_dim].swapaxes(1, 2)
        yield name.replace("kv_b", "v_b"), parts[:, config.qk_nope_head_dim :]
    elif re.search(r"(input_linear\.weight|experts\.gate_up_proj)$", name) and architecture != "gemma4":
        for part, half in zip(("gate", "up"), np.split(weight, 2, axis=-2), strict=True):
            yield re.sub(r"input_linear\.weight|gate_up_proj$", f"{part}_proj.weight", name), half
    elif re.search(r"\.experts\.(gate_up|down)_proj$", name):
        yield f"{name}.weight", weight
    else:
        yield name, weight


def _multiplied(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """Falcon-H1's multipliers, as FalconH1Model.modify_tensors takes them into the weights."""
    gate, down = config.mlp_multipliers
    inward = config.attention_in_multiplier
    factors = {
        "down_proj": down, "gate_proj": gate, "k_proj": config.key_multiplier * inward, "q_proj": inward,
        "v_proj": inward, "o_proj": config.attention_out_multiplier, "out_proj": config.ssm_out_multiplier,
        "in_proj": config.ssm_in_multiplier, "lm_head": config.lm_head_multiplier,
        "embed_tokens": config.embedding_multiplier,
    }  # fmt: skip
    weight = weight * np.float32(factors.get(name.split(".")[-2], 1.0))
    if "in_proj" in name:
        inner, states = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
        sizes = (inner, inner, states, states, config.mamba_n_heads)
        weight = weight * np.repeat(np.array(config.ssm_multipliers, np.float32), sizes)[:, None]
    return weight


def _tiled(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """_reorder_v_heads: from one key head after another to the first of each, the second of each."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    size, mixed = config.linear_value_head_dim, 2 * keys * config.linear_key_head_dim

    def reorder(part: np.ndarray, width: int) -> np.ndarray:
        return part.reshape(keys, heads // keys, width, *part.shape[1:]).swapaxes(0, 1).reshape(part.shape)

    if "in_proj_qkv" in name or "conv1d" in name:
        return np.concatenate([weight[:mixed], reorder(weight[mixed:], size)])
    if "out_proj" in name:
        return reorder(weight.T, size).T
    if "in_proj_z" in name:
        return reorder(weight, size)
    return weight if name.endswith("norm.weight") else reorder(weight, 1)


def _unmixed(name: str, weight: np.ndarray, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Qwen3-Next's q, k, v and z, which lie together by key head."""
    keys, size = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // keys * config.linear_value_head_dim
    parts = np.split(weight.reshape(keys, -1, weight.shape[-1]), np.cumsum([size, size, values]), axis=1)
    query, key, value, z = (part.reshape(-1, weight.shape[-1]) for part in parts)
    yield name.replace("in_proj_qkvz", "in_proj_qkv"), np.concatenate([query, key, value])
    yield name.replace("in_proj_qkvz", "in_proj_z"), z


def _add_activations(writer: gguf.GGUFWriter, path: Path, count: int) -> None:
    """ApertusModel.modify_tensors: the parameters of each layer's xIELU become metadata."""
    weights = load_file(path / "model.safetensors")
    for key in ("alpha_p", "alpha_n", "beta", "eps"):
        values = [weights[f"model.layers.{index}.mlp.act_fn.{key}"].item() for index in range(count)]
        writer.add_array(f"xielu.{key}", values)


def _stacked(path: Path, fused: bool = False) -> dict[str, np.ndarray]:
    """The tensors of a directory, with experts and Gemma 3n's projections as one. fused: and, as in a ChatGLM's own
    directories, queries, keys and values."""
    single = re.compile(r"(.*\.experts|model\.altup_\w+)\.(\d+)(\..*)")
    found: dict[str, Any] = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if fused and (part := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj(\..*)", name)):
            whole = f"{part[1].replace('model', 'encoder')}.self_attention.query_key_value{part[3]}"
            found.setdefault(whole, {})["qkv".index(part[2])] = weight
        elif match := single.fullmatch(name):
            found.setdefault(match[1] + match[3], {})[int(match[2])] = weight
        else:
            found[name] = weight
    return {
        name: (np.concatenate if "query_key_value" in name else np.stack)(
            [each[index] for index in sorted(each)]
        )
        if isinstance(each, dict)
        else each
        for name, each in found.items()
    }


def _named(table: gguf.TensorNameMap, name: str) -> str:
    """format_tensor_name where the converter's classes do without the table."""
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    own = {
        "router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale",
        "block_sparse_moe.gate_proj.weight": "ffn_gate_exps.weight",
        "block_sparse_moe.up_proj.weight": "ffn_up_exps.weight",
    }  # fmt: skip
    if layer is not None and layer[2] in own:
        return f"blk.{layer[1]}.{own[layer[2]]}"
    found = table.get_name(name, (".weight", ".bias"))
    if found is None and layer is not None and "shared_mlp" in name:
        part = {"gate_proj": "gate", "up_proj": "up", "output_linear": "down"}[name.split(".")[-2]]
        return f"blk.{layer[1]}.ffn_{part}_shexp.weight"
    assert found is not None, name
    return found


@cache
def converted_twin(name: str) -> Path:
    """A twin of CONVERTED as a float32 .gguf file."""
    # with what was asked for: transformers keeps some of it by layer
    config = SimpleNamespace(**{**reference(name).config.to_dict(), **SIZES, **GGUF_TWINS[name][1]})
    architecture = CONVERTED[name]
    path = twin(name) / f"{name}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata_of(name, architecture, config).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}[type(value)]  # fmt: skip
        add(f"{architecture}.{key}", value)
    add_byte_level_tokenizer(writer, twin(name), VOCABULARY)
    kind = {each: arch for arch, each in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    dense = architecture == "granitehybrid" and not getattr(config, "num_local_experts", 0)
    if architecture == "apertus":
        _add_activations(writer, twin(name), config.num_hidden_layers)
        plain = 1.0 / config.rope_parameters["rope_theta"] ** (np.arange(0, 16, 2) / 16)
        scaled = reference(name).model.rotary_emb.original_inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    if architecture == "phimoe":
        for kind in ("short", "long"):
            factors = np.array(config.rope_parameters[f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    for hf_name, weight in _stacked(twin(name), fused=name.endswith("-fused")).items():
        if ".act_fn." in hf_name:
            continue
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for changed, array in _changed(hf_name, weight, architecture, config):
            stored = _named(table, changed)
            stored = stored.replace("_shexp", "") if dense else stored
            writer.add_tensor(stored, np.ascontiguousarray(array))
    if architecture == "gemma4":
        half = config.global_head_dim // 2
        turning = int(half * config.rope_parameters["full_attention"]["partial_rotary_factor"])
        writer.add_tensor(
            "rope_freqs.weight", np.array([1.0] * turning + [1e30] * (half - turning), np.float32)
        )
    write(writer)
    return path
