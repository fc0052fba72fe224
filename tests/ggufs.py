"""GGUF files for tests: byte by byte, for those that lie, and from twins, the way llama.cpp's converter writes them."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.twin_table import VOCABULARY
from tests.twins import SPECIAL, reference, twin

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)

ARCHITECTURES = {
    "llama": "llama", "llama3": "llama", "llama-tied": "llama", "llama-linear": "llama", "qwen2": "qwen2",
    "qwen2-yarn": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3", "phi3": "phi3", "phi4": "phi3",
    "smollm3": "smollm3", "olmo2": "olmo2", "granite": "granite",
}  # fmt: skip


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, shape: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's header; `shape` in ggml's order, fastest first."""
    return (
        text(name)
        + struct.pack("<I", len(shape))
        + b"".join(struct.pack("<Q", each) for each in shape)
        + struct.pack("<IQ", kind, offset)
    )


def file_bytes(
    entries: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int | None = None,
    keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file with these parts; the counts tell the truth unless given."""
    header = magic + struct.pack("<I", version)
    header += struct.pack("<Q", len(infos) if tensors is None else tensors & (2**64 - 1))
    header += struct.pack("<Q", len(entries) if keys is None else keys & (2**64 - 1))
    header += b"".join(entries) + b"".join(infos)
    return header + b"\0" * (-len(header) % alignment) + data


def small_file() -> bytes:
    """A valid file with every kind of metadata and two tensors."""
    entries = [
        entry("general.architecture", STRING, text("llama")),
        entry("a.u8", U8, b"\1"), entry("a.i8", I8, b"\xff"), entry("a.u16", U16, b"\1\0"),
        entry("a.i16", I16, b"\1\0"), entry("a.u32", U32, b"\1\0\0\0"), entry("a.i32", I32, b"\1\0\0\0"),
        entry("a.f32", F32, struct.pack("<f", 0.5)), entry("a.bool", BOOL, b"\1"),
        entry("a.u64", U64, struct.pack("<Q", 7)), entry("a.i64", I64, struct.pack("<q", -7)),
        entry("a.f64", F64, struct.pack("<d", 2.5)),
        entry("a.names", ARRAY, struct.pack("<IQ", STRING, 3) + text("one") + text("") + text("drei")),
        entry("a.numbers", ARRAY, struct.pack("<IQ", I32, 2) + struct.pack("<ii", 4, -5)),
    ]  # fmt: skip
    infos = [info("x", (4, 2)), info("y", (32, 3), 2, 32)]
    data = np.arange(8, dtype="<f4").tobytes() + bytes(range(54)) + b"\0" * 10
    return file_bytes(entries, infos, data)


def _metadata(name: str, config: Any) -> dict[str, Any]:
    """What convert_hf_to_gguf.py writes for this config."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    stated = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim, "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }  # fmt: skip
    if rope["rope_type"] in ("linear", "yarn"):
        stated |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        stated["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if name.startswith(("gemma", "phi3")):
        stated["attention.sliding_window"] = config.sliding_window
    if name == "gemma2":
        stated["attn_logit_softcapping"] = config.attn_logit_softcapping
        stated["final_logit_softcapping"] = config.final_logit_softcapping
    if name == "phi4":
        stated["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    if name == "granite":
        stated |= {
            "attention.scale": config.attention_multiplier, "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling,
        }  # fmt: skip
    return stated


def _factors(name: str, config: Any) -> dict[str, np.ndarray]:
    rope = config.rope_parameters
    if name == "phi4":
        return {
            f"rope_factors_{each}.weight": np.array(rope[f"{each}_factor"], np.float32)
            for each in ("short", "long")
        }
    if name != "llama3":
        return {}
    plain = 1.0 / rope["rope_theta"] ** (np.arange(0, 16, 2) / 16)
    scaled = reference(name).model.rotary_emb.original_inv_freq.numpy()
    return {"rope_freqs.weight": (plain / scaled).astype(np.float32)}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape))


@cache
def gguf_twin(name: str) -> Path:
    """The twin `name` as a float32 .gguf file, with its byte-level tokenizer."""
    path = twin(name) / f"{name}.gguf"
    model, architecture = reference(name), ARCHITECTURES[name]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in _metadata(name, model.config).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    add_byte_level_tokenizer(writer, twin(name))
    kind = {each: arch for arch, each in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    for factors, values in _factors(name, model.config).items():
        writer.add_tensor(factors, values)
    for hf_name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if architecture in ("llama", "smollm3", "granite"):
            if ".q_proj." in hf_name:
                weight = permute(weight, model.config.num_attention_heads)
            if ".k_proj." in hf_name:
                weight = permute(weight, model.config.num_key_value_heads)
        if architecture.startswith("gemma") and hf_name.endswith("norm.weight"):
            weight = weight + 1
        writer.add_tensor(table.get_name(hf_name, (".weight", ".bias")), weight)
    write(writer)
    return path


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_byte_level_tokenizer(writer: gguf.GGUFWriter, directory: Path, rows: int = 0) -> None:
    """rows: of the embedding; llama.cpp wants as many tokens, the last of them padding."""
    import json

    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    padding = [f"[PAD{index}]" for index in range(len(tokens), rows)]
    writer.add_token_list([*tokens, *padding])
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens] + [5] * len(padding))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)


@cache
def sentencepiece_model() -> Any:
    """A SentencePiece BPE of 420 pieces with byte fallback, trained here, as Llama's and Gemma's were."""
    import sentencepiece

    corpus = [
        "the cat sat on the mat and the dog sat on the log", "once upon a time in a distant galaxy",
        "the capital of france is paris and the capital of spain is madrid", "how are you doing today",
        "numbers 1 2 3 4 5 6 7 8 9 0, and punctuation: hello, world! (yes?) no.", "naïve café  déjà vu",
        "def main():\n    return 42", "The quick brown fox jumps over the lazy dog",
    ]  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 3), model_writer=model, vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, split_digits=True, hard_vocab_limit=False, minloglevel=2, num_threads=1,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
    )  # fmt: skip
    return model.getvalue()


def pieces(model: bytes) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece model, as GGUF wants them."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = [processor.id_to_piece(index) for index in range(len(processor))]
    scores = [processor.get_score(index) for index in range(len(processor))]
    types = []
    for index, token in enumerate(tokens):
        if processor.is_unknown(index):
            types.append(2)
        elif processor.is_control(index):
            types.append(3)
        elif processor.is_byte(index):
            types.append(6)
        elif token in ("<start_of_turn>", "<end_of_turn>"):
            types.append(4)
        else:
            types.append(1)
    return tokens, scores, types


def add_sentencepiece_tokenizer(writer: gguf.GGUFWriter, *, space_prefix: bool) -> int:
    """Write the vocabulary of `sentencepiece_model`, and return how many tokens it has."""
    tokens, scores, types = pieces(sentencepiece_model())
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(space_prefix)
    return len(tokens)


# twin -> llama.cpp's architecture, for those written by `modern_twin`
MODERN = {
    "gguf-seed_oss": "seed_oss", "gguf-arcee": "arcee", "gguf-gemma": "gemma", "gguf-glm4": "glm4",
    "gguf-ernie4_5": "ernie4_5", "gguf-starcoder2": "starcoder2", "gguf-hunyuan": "hunyuan-dense",
    "gguf-nemotron": "nemotron", "gguf-olmo": "olmo", "gguf-cohere": "command-r", "gguf-cohere2": "cohere2",
    "gguf-qwen2_moe": "qwen2moe", "gguf-qwen3_moe": "qwen3moe", "gguf-olmoe": "olmoe",
    "gguf-granitemoe": "granitemoe", "gguf-mixtral": "llama", "gguf-gpt_oss": "gpt-oss", "gguf-glm4_moe": "glm4moe",
    "gguf-lfm2": "lfm2", "gguf-lfm2_moe": "lfm2moe",
}  # fmt: skip
_PERMUTED = ("arcee", "olmo", "granitemoe", "llama")
# our names of a layer's parts -> llama.cpp's
_PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "router": "ffn_gate_inp",
    "experts.gate_proj": "ffn_gate_exps", "experts.up_proj": "ffn_up_exps",
    "experts.down_proj": "ffn_down_exps", "mlp.row_gate": "ffn_gate_inp_shexp",
    "conv.conv": "shortconv.conv", "conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj",
}  # fmt: skip
_OWN_PARTS = {
    "seed_oss": {"post_attention_layernorm": "post_attention_norm"},
    "gpt-oss": {"post_attention_layernorm": "post_attention_norm"},
    "glm4moe": {"post_attention_layernorm": "post_attention_norm"},
    "glm4": {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
             "post_feedforward_layernorm": "post_ffw_norm"},
}  # fmt: skip


def _modern_metadata(architecture: str, config: Any) -> dict[str, Any]:
    """What convert_hf_to_gguf.py writes for these."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    stated: dict[str, Any] = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim, "attention.value_length": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }  # fmt: skip
    plain = architecture in ("starcoder2", "nemotron", "olmo", "command-r", "cohere2")
    eps = next(
        getattr(config, key) for key in ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon")
        if hasattr(config, key)
    ) if architecture != "olmo" else 1e-5  # fmt: skip
    stated[f"attention.layer_norm_{'' if plain else 'rms_'}epsilon"] = float(eps)
    own: dict[str, tuple[str, ...]] = {
        "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
        "expert_used_count": ("num_experts_per_tok",), "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
        "expert_shared_count": ("n_shared_experts",), "leading_dense_block_count": (
            "first_k_dense_replace", "num_dense_layers"),
        "expert_weights_scale": ("routed_scaling_factor",) if architecture == "glm4moe" else (),
        "expert_weights_norm": ("norm_topk_prob",) if architecture == "glm4moe" else (),
        "attention.sliding_window": ("sliding_window",), "shortconv.l_cache": ("conv_L_cache",),
        "logit_scale": ("logit_scale", "logits_scaling"), "embedding_scale": ("embedding_multiplier",),
        "residual_scale": ("residual_multiplier",), "attention.scale": ("attention_multiplier",),
        "attention.clamp_kqv": ("clip_qkv",),
    }  # fmt: skip
    for key, names in own.items():
        for name in names:
            if getattr(config, name, None) is not None:
                stated[key] = getattr(config, name)
    if architecture in ("glm4moe", "lfm2moe"):
        stated["expert_gating_func"] = 2
    if architecture == "gpt-oss":
        stated |= {"expert_feed_forward_length": config.intermediate_size, "rope.scaling.type": "yarn",
                   "rope.scaling.factor": float(rope["factor"]),
                   "rope.scaling.original_context_length": rope["original_max_position_embeddings"]}  # fmt: skip
    if architecture.startswith("lfm2"):
        kinds = config.layer_types
        stated["attention.head_count_kv"] = [
            config.num_key_value_heads if each == "full_attention" else 0 for each in kinds
        ]
    if architecture in ("llama", "granitemoe", "olmoe"):
        stated.pop("attention.sliding_window", None)
    return stated


@cache
def modern_twin(name: str) -> Path:
    """A twin of MODERN as a float32 .gguf file."""
    from tempo_mlx.weights import open_checkpoint

    architecture, config = MODERN[name], reference(name).config
    path = twin(name) / f"{name}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in _modern_metadata(architecture, config).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}[type(value)]  # fmt: skip
        add(f"{architecture}.{key}", value)
    add_byte_level_tokenizer(writer, twin(name), VOCABULARY)
    source = open_checkpoint(str(twin(name)))
    sparse = {
        each.rpartition(".router.weight")[0] for each in source.names() if each.endswith(".router.weight")
    }
    for ours in source.names():
        weight = np.array(source.tensor(ours).numpy())
        if architecture in ("gemma", "nemotron") and ours.endswith("norm.weight"):
            weight = weight + 1
        if architecture in _PERMUTED and (".q_proj." in ours or ".k_proj." in ours):
            weight = permute(
                weight, config.num_attention_heads if ".q_proj." in ours else config.num_key_value_heads
            )
        for stored, array in _modern_tensor(architecture, ours, weight, sparse, source).items():
            writer.add_tensor(stored, np.ascontiguousarray(array))
    write(writer)
    return path


def _modern_tensor(
    architecture: str, ours: str, weight: Any, sparse: set[str], source: Any
) -> dict[str, Any]:
    stem, _, kind = ours.rpartition(".")
    last = "token_embd_norm" if architecture.startswith("lfm2") else "output_norm"
    top = {"model.embed_tokens": "token_embd", "model.norm": last, "lm_head": "output"}
    if stem in top:
        return {f"{top[stem]}.{kind}": weight}
    _, _, index, rest = ours.split(".", 3)
    if rest == "self_attn.sinks":
        return {f"blk.{index}.attn_sinks.weight": weight}
    if rest == "router.correction":
        return {f"blk.{index}.exp_probs_b.bias": weight}
    part = rest.rpartition(".")[0]
    if architecture == "glm4" and part in ("mlp.gate_proj", "mlp.up_proj"):
        up = source.tensor(ours.replace("gate_proj", "up_proj")).numpy()
        return {f"blk.{index}.ffn_up.weight": np.concatenate([weight, up])} if "gate" in part else {}
    stored = {**_PARTS, **_OWN_PARTS.get(architecture, {})}[part]
    if part.startswith("mlp.") and part != "mlp.row_gate" and f"model.layers.{index}" in sparse:
        stored += "_shexp"
    if part == "conv.conv":
        weight = weight[:, 0]
    return {f"blk.{index}.{stored}.{kind}": weight}
