"""Write a model as a directory that mlx-lm and transformers read, tensor by tensor.

Memory holds one tensor at a time. The directory appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tempo_mlx.architecture import names
from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.errors import ConfigError, ModelError, OutputError
from tempo_mlx.mlx import mx
from tempo_mlx.weights.checkpoint import Checkpoint, open_checkpoint
from tempo_mlx.weights.download import Progress
from tempo_mlx.weights.tensor import Array, DenseTensor, Layout, Tensor, float32_to_bfloat16

Dtype = Literal["float32", "float16", "bfloat16"]
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

_SHARD_BYTES = 5 << 30
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32"}
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}
# What a tokenizer or a reader needs, copied as it is.
_COPIED = (
    "tokenizer.json", "tokenizer.model", "tekken.json", "*.tiktoken", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "chat_template.json", "generation_config.json",
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How to write the tensor `name`. layout: of a quantised one. copied: its layout is the
    source's, and so are its numbers. dtype: of the numbers, or of scales and biases."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    dtype: str
    layout: Layout | None = None
    copied: bool = False

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> safetensors dtype and shape of what is written."""
        if self.layout is None:
            return {self.name: (_NAMES[self.dtype], self.shape)}
        *rows, columns = self.shape
        stem, affine = self.name.removesuffix(".weight"), self.layout.mode == "affine"
        groups = (_NAMES[self.dtype] if affine else "U8", (*rows, columns // self.layout.group_size))
        entries = {self.name: ("U32", (*rows, columns * self.layout.bits // 32)), f"{stem}.scales": groups}
        return entries | ({f"{stem}.biases": groups} if affine else {})

    @property
    def nbytes(self) -> int:
        return sum(_WIDTHS[dtype] * int(np.prod(shape)) for dtype, shape in self.entries().values())


def convert(
    model: str,
    destination: Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    dtype: Dtype | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `model` to the new directory `destination`.

    Without bits and dtype, every number stays what it is: GGUF's blocks become MLX's layout where it holds them exactly
    (docs/models.md), else float32. dtype alone: everything dense, in this type. bits: matrices quantised as
    mlx.nn.quantize does, the rest in dtype.
    progress: called with (bytes written, bytes in all).
    Raises: ConfigError, ModelError, DownloadError, OutputError (the destination exists or cannot be written).
    """
    if bits is not None and bits not in BITS:
        raise ConfigError(f"Cannot quantise to {bits} bits; choose one of {', '.join(map(str, BITS))}.")
    if bits is not None and group_size not in GROUP_SIZES:
        raise ConfigError(
            f"Cannot quantise in groups of {group_size}; choose one of {', '.join(map(str, GROUP_SIZES))}."
        )
    if destination.exists():
        raise OutputError(f"{destination} exists already; give a directory that does not.")
    checkpoint = open_checkpoint(model)
    a = checkpoint.architecture
    plans = [
        _plan(name, tensor, bits, group_size, dtype, a) for name, tensor in checkpoint.published().items()
    ]
    work = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
        _write_weights(plans, work, progress)
        _write_config(checkpoint, plans, work, dtype)
        _write_tokenizer(checkpoint, work)
        open_checkpoint(str(work)).tokenizer()  # nothing that we could not read ourselves gets the name
        work.chmod(0o755)
        work.rename(destination)
    except OSError as error:
        raise OutputError(f"Cannot write {destination}: {error.strerror or error}.") from None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return destination


def _plan(
    name: str, source: Tensor, bits: int | None, group_size: int, dtype: Dtype | None, a: Architecture
) -> Plan:
    shape, ours = source.shape, names.own_name(name, a) or name
    if source.kind == "mlx_quantized" and bits is None and dtype is None:
        _, scales, _, layout = source.rows(slice(0, 1)).quantized()
        kind = DenseTensor(scales).kind if layout.mode == "affine" else "bfloat16"
        return Plan(name, source, shape, kind, layout, copied=True)
    own: str = "bfloat16" if source.kind == "mlx_quantized" else source.kind
    chosen = dtype or own
    if bits is not None and len(shape) == 3 and ".experts." in ours:
        raise ModelError(
            f"The files stack this model's experts ({name}), which convert does not quantise; take a copy that is "
            "quantised already, of mlx-community or as GGUF, or convert it without --quantize."
        )
    # as mlx_lm.convert: every Linear and Embedding whose rows divide into groups; biases and norms may have rows too
    matrix = len(shape) == 2 and ours.endswith(".weight") and not ours.endswith("norm.weight")
    if bits is not None and matrix and shape[1] % group_size == 0:
        return Plan(name, source, shape, chosen, Layout(bits, group_size))
    return Plan(name, source, shape, chosen)


def _arrays(plan: Plan) -> Iterator[Array]:
    """What `plan` writes, in the order of its entries."""
    tensor = plan.tensor
    if plan.copied:
        packed, scales, biases, _ = tensor.quantized()
        if biases is not None and DenseTensor(scales).kind != plan.dtype:
            raise ModelError(
                f"The scales of {plan.name} do not fit {plan.dtype}; convert with a dtype of float32."
            )
        yield from (each for each in (packed, scales, biases) if each is not None)
        return
    if plan.layout is None:
        yield _dense(tensor, plan.dtype)
        return
    dense = mx.array(_dense(tensor, plan.dtype))
    if plan.dtype == "bfloat16":
        dense = dense.view(mx.bfloat16)
    weight, *parts = mx.quantize(dense, group_size=plan.layout.group_size, bits=plan.layout.bits)
    yield np.array(weight)
    for part in parts:
        yield np.array(part.view(mx.uint16) if plan.dtype == "bfloat16" else part)


def _dense(tensor: Tensor, dtype: str) -> Array:
    """The numbers in `dtype`, untouched where they are in it already; bfloat16 as uint16."""
    if tensor.kind == dtype:
        return tensor.raw()
    wide = tensor.numpy()
    return float32_to_bfloat16(wide) if dtype == "bfloat16" else wide.astype(dtype)


def _write_weights(plans: list[Plan], directory: Path, progress: Progress | None) -> None:
    shards: list[list[Plan]] = [[]]
    for plan in plans:
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + plan.nbytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(plan)
    total, done = sum(plan.nbytes for plan in plans), 0
    places: dict[str, str] = {}
    for index, shard in enumerate(shards):
        name = (
            f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
            if len(shards) > 1
            else "model.safetensors"
        )
        with (directory / name).open("wb") as file:
            file.write(_header(shard))
            for plan in shard:
                for array in _arrays(plan):
                    file.write(np.ascontiguousarray(array).data)
                done += plan.nbytes
                if progress is not None:
                    progress(done, total)
                places |= dict.fromkeys(plan.entries(), name)
            file.flush()
            os.fsync(file.fileno())
        mx.clear_cache()
    table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    _write_json(directory / "model.safetensors.index.json", table)


def _header(plans: list[Plan]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for plan in plans:
        for name, (dtype, shape) in plan.entries().items():
            start, end = end, end + _WIDTHS[dtype] * int(np.prod(shape))
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    return len(text).to_bytes(8, "little") + text


def _write_config(checkpoint: Checkpoint, plans: list[Plan], directory: Path, dtype: str | None) -> None:
    config = _with_classic_rope(checkpoint.config)
    for key in ("quantization", "quantization_config", "_name_or_path", "torch_dtype", "dtype"):
        config.pop(key, None)
    dense = Counter(plan.dtype for plan in plans if len(plan.shape) == 2)
    config["torch_dtype"] = dtype or dense.most_common(1)[0][0]
    layouts = {plan.name.removesuffix(".weight"): plan.layout for plan in plans if plan.layout is not None}
    if layouts:
        common = Counter(layouts.values()).most_common(1)[0][0]
        table: dict[str, Any] = asdict(common)
        table |= {stem: asdict(layout) for stem, layout in layouts.items() if layout != common}
        config |= {"quantization": table, "quantization_config": table}
    _write_json(directory / "config.json", dict(sorted(config.items())))


def _with_classic_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with rope_theta and rope_scaling, which every reader knows, for transformers 5's rope_parameters."""
    classic = dict(config)
    stated = dict(classic.pop("rope_parameters", None) or {})
    local = stated.get("sliding_attention")
    full = dict(stated.get("full_attention") or ({} if local else stated))
    if local:
        classic["rope_local_base_freq"] = local["rope_theta"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in full:
            classic[key] = full.pop(key)
    scaling = {**full, **(classic.get("rope_scaling") or {})}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        classic["rope_scaling"] = {**scaling, "rope_type": kind, "type": kind}
        if kind == "longrope" and "original_max_position_embeddings" in classic:
            original = classic["original_max_position_embeddings"]
            classic["rope_scaling"].setdefault("original_max_position_embeddings", original)
    return classic


def _write_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    if checkpoint.path.is_dir():
        for file in (each for pattern in _COPIED for each in checkpoint.path.glob(pattern)):
            copy = directory / file.relative_to(checkpoint.path)
            if file.is_file():
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
        return
    tokenizer = checkpoint.tokenizer()
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    if tokenizer.chat_templates:
        named = [{"name": name, "template": text} for name, text in tokenizer.chat_templates.items()]
        settings["chat_template"] = tokenizer.chat_templates.get("default") if len(named) == 1 else named
    _write_json(directory / "tokenizer_config.json", settings)
    generation = {"eos_token_id": sorted(tokenizer.eos_ids), "bos_token_id": tokenizer.bos_id}
    _write_json(directory / "generation_config.json", generation)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
