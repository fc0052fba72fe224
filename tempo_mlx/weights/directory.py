"""A Hugging Face or mlx-lm directory: config.json, and dense or MLX-quantised safetensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tempo_mlx.architecture import names
from tempo_mlx.architecture.families import architecture_from_config, text_config
from tempo_mlx.errors import ModelError
from tempo_mlx.weights import tokenizer_files
from tempo_mlx.weights.contents import Contents
from tempo_mlx.weights.files import safetensors_of
from tempo_mlx.weights.json_file import read_json
from tempo_mlx.weights.safetensors_file import SafetensorsFile, read_safetensors
from tempo_mlx.weights.tensor import MODES, Array, DenseTensor, Layout, PackedTensor, Tensor

_BLOCKS = re.compile(r"(.+)[._]blocks")
_FLOATS = ("F32", "F16", "BF16")
_DESCRIBING = (".json", ".jinja", ".model", ".txt", ".tiktoken")  # config, tokenizer, chat template


def read_directory(path: Path) -> Contents:
    """Config and tensors of a directory. Raises: ModelError naming what is missing, or not supported."""
    weights = safetensors_of(path)
    if not weights:
        raise ModelError(
            f"{path} holds neither .safetensors weights nor a .gguf file; tempo-mlx reads no pickled files, so "
            "give a directory that has one of the two."
        )
    config = dict(text_config(read_json(path / "config.json")))
    architecture = architecture_from_config(config)
    table = _quantization(config)
    files = [read_safetensors(each) for each in weights]
    stored = {name: file for file in files for name in file.arrays}
    if len(stored) != sum(len(file.arrays) for file in files):
        raise ModelError(
            f"Two weight files in {path} hold tensors of the same name; take away the one that is not the model's."
        )
    tensors: dict[str, Tensor] = {}
    for raw, file in stored.items():
        blocks = _BLOCKS.fullmatch(raw)
        beside = raw.endswith("_scales") and f"{raw.removesuffix('_scales')}_blocks" in stored
        if names.IGNORED.fullmatch(raw) or raw.endswith((".scales", ".biases")) or beside:
            continue
        name = names.from_huggingface(raw if blocks is None else f"{blocks[1]}.weight")
        if name in tensors:
            raise ModelError(f"{path} holds the tensor {name!r} under two names; the model is refused.")
        stem = raw.removesuffix(".weight")
        if blocks is not None:
            tensors[name] = _openai_blocks(raw, file, stored)
        elif f"{stem}.scales" in stored:
            tensors[name] = _packed(raw, file, stored, _layout(stem, table, path))
        else:
            tensors[name] = _dense(raw, file)
    return Contents(
        files=(*weights, *sorted(each for each in path.iterdir() if each.suffix in _DESCRIBING)),
        config=config,
        architecture=architecture,
        quantization=_label(table, stored),
        licence=_licence(path),
        tensors=tensors,
        tokenizer=partial(tokenizer_files.from_directory, path, config, architecture.vocab_size),
    )


def _licence(path: Path) -> str | None:
    """The licence that the model card names, or the file that holds it."""
    card = path / "README.md"
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as lines:
            for line in itertools.islice(lines, 50):
                if line.startswith("license:"):
                    return line[len("license:") :].strip()[:100]
    files = sorted(file.name for file in path.glob("LICENSE*"))
    return f"see {files[0]}" if files else None


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """MLX's quantization table of a config, or None; other methods are refused, but Gpt-oss's, which is MLX's mxfp4."""
    table = config.get("quantization") or config.get("quantization_config")
    if table is None:
        return None
    if isinstance(table, dict) and table.get("quant_method") in ("mxfp4", "mxfp8"):
        return {"mode": table["quant_method"]}
    if not isinstance(table, dict) or "quant_method" in table or not {"bits", "group_size"} <= set(table):
        method = table.get("quant_method") if isinstance(table, dict) else table
        raise ModelError(
            f"The model is quantised with {str(method)[:40]!r}; of quantised safetensors only MLX's own are "
            "supported (look for an mlx-community or GGUF version of it)."
        )
    return table


def _layout(stem: str, table: Mapping[str, Any] | None, path: Path) -> Layout:
    """How the weight `stem` is quantised: as its own entry says, of which MLX's defaults fill up what is left out."""
    if table is None:
        raise ModelError(f"{path} holds quantised weights, but config.json has no quantization table.")
    own = table.get(stem)
    if own is None:
        own = table.get(names.from_huggingface(stem))
    own = own if isinstance(own, dict) else table
    mode = own.get("mode") or "affine"
    if not isinstance(mode, str) or mode not in MODES:
        raise ModelError(
            f"{stem} is quantised in the mode {str(mode)[:40]!r}, which MLX does not have; it has {', '.join(MODES)}."
        )
    sizes, defaults = MODES[mode]
    stated = {key: value for key, value in own.items() if value is not None}
    bits, group_size = stated.get("bits", defaults[0]), stated.get("group_size", defaults[1])
    if type(bits) is not int or type(group_size) is not int or (bits, group_size) not in sizes:
        raise ModelError(
            f"{stem} is quantised to {bits!r} bits in groups of {group_size!r}, which MLX does not have in mode {mode}."
        )
    return Layout(bits, group_size, mode)


def _dense(raw: str, file: SafetensorsFile) -> DenseTensor:
    kind = file.arrays[raw].dtype
    if kind not in _FLOATS:
        raise ModelError(
            f"Tensor {raw!r} in {file.path} has type {kind}; float32, float16 or bfloat16 is needed."
        )
    return DenseTensor(file.array(raw))


def _packed(
    raw: str, file: SafetensorsFile, stored: Mapping[str, SafetensorsFile], layout: Layout
) -> PackedTensor:
    array, stem = file.arrays[raw], raw.removesuffix(".weight")
    if array.dtype != "U32" or len(array.shape) not in (2, 3) or array.shape[-1] * 32 % layout.bits:
        raise ModelError(
            f"Tensor {raw!r} in {file.path} is not packed for the {layout.bits} bits that config.json states."
        )
    columns = array.shape[-1] * 32 // layout.bits
    if columns % layout.group_size:
        raise ModelError(f"{stem} in {file.path} does not fill its groups of {layout.group_size}.")
    affine, groups = layout.mode == "affine", (*array.shape[:-1], columns // layout.group_size)

    def part(kind: str) -> Array:
        holder = stored.get(f"{stem}.{kind}")
        entry = None if holder is None else holder.arrays[f"{stem}.{kind}"]
        fits = entry is not None and entry.shape == groups and entry.dtype in (_FLOATS if affine else ("U8",))
        if holder is None or not fits:
            raise ModelError(
                f"The {kind} of the quantised {stem} in {file.path} are missing or of the wrong "
                "shape for what config.json states."
            )
        return holder.array(f"{stem}.{kind}")

    return PackedTensor(file.array(raw), part("scales"), part("biases") if affine else None, layout)


def _openai_blocks(raw: str, file: SafetensorsFile, stored: Mapping[str, SafetensorsFile]) -> PackedTensor:
    """Gpt-oss' own mxfp4: bytes of two weights in blocks of 16, the first in the lower half, as MLX has them."""
    shape, other = file.arrays[raw].shape, raw.removesuffix("blocks") + "scales"
    entry = stored[other].arrays[other] if other in stored else None
    kinds = {file.arrays[raw].dtype, None if entry is None else entry.dtype}
    if entry is None or kinds != {"U8"} or len(shape) != 4 or shape[-1] != 16 or entry.shape != shape[:-1]:
        raise ModelError(
            f"{raw!r} in {file.path} is not of blocks of 16 bytes with a scale each in {other!r}; fetch it again."
        )
    packed = file.array(raw).reshape(*shape[:2], -1).view("<u4")
    return PackedTensor(packed, stored[other].array(other), None, Layout(4, 32, "mxfp4"))


def _label(table: Mapping[str, Any] | None, stored: Mapping[str, SafetensorsFile]) -> str:
    if table is None and any(map(_BLOCKS.fullmatch, stored)):
        table = {"mode": "mxfp4"}
    if table is not None:
        layout = _layout("", table, Path())
        mode = "" if layout.mode == "affine" else f" {layout.mode}"
        return f"mlx{mode} {layout.bits}-bit, group {layout.group_size}"
    kinds = [file.arrays[name].dtype for name, file in stored.items()]
    most = max(sorted(set(kinds)), key=kinds.count)
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(most, most)
