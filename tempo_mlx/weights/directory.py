"""A Hugging Face or mlx-lm directory: config.json, and dense or MLX-quantised safetensors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
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
from tempo_mlx.weights.tensor import AffineTensor, DenseTensor, Tensor

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
        raise ModelError(f"Two weight files in {path} hold tensors of the same name; fetch the model again.")
    tensors: dict[str, Tensor] = {}
    for raw, file in stored.items():
        if names.IGNORED.fullmatch(raw) or raw.endswith((".scales", ".biases")):
            continue
        name = names.from_huggingface(raw)
        if name in tensors:
            raise ModelError(f"{path} holds the tensor {name!r} under two names; fetch the model again.")
        layout = _layout(raw, file, stored, table)
        tensors[name] = _dense(raw, file) if layout is None else _packed(raw, file, stored, layout)
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


@dataclass(frozen=True)
class Layout:
    bits: int
    group_size: int


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """MLX's quantization table of a config, or None; other methods are refused."""
    table = config.get("quantization", config.get("quantization_config"))
    if table is None:
        return None
    if not isinstance(table, dict) or not {"bits", "group_size"} <= set(table):
        method = table.get("quant_method") if isinstance(table, dict) else table
        raise ModelError(
            f"The model is quantised with {str(method)[:40]!r}; of quantised safetensors only MLX's own are "
            "supported (look for an mlx-community or GGUF version of it)."
        )
    if table.get("mode", "affine") != "affine":
        raise ModelError(f"MLX's quantization mode {str(table['mode'])[:40]!r} is not supported; affine is.")
    return table


def _layout(
    raw: str, file: SafetensorsFile, stored: Mapping[str, SafetensorsFile], table: Mapping[str, Any] | None
) -> Layout | None:
    """How the weight `raw` is quantised; None: it is dense."""
    stem = raw.removesuffix(".weight")
    if f"{stem}.scales" not in stored:
        return None
    if table is None:
        raise ModelError(f"{file.path} holds quantised weights, but config.json has no quantization table.")
    override = table.get(stem)
    if override is None:
        override = table.get(names.from_huggingface(raw).removesuffix(".weight"))
    own = override if isinstance(override, dict) else {}
    bits, group_size = own.get("bits", table["bits"]), own.get("group_size", table["group_size"])
    if (
        own.get("mode", "affine") != "affine"
        or bits not in (2, 3, 4, 5, 6, 8)
        or group_size not in (32, 64, 128)
    ):
        raise ModelError(
            f"{stem} is quantised to {bits!r} bits in groups of {group_size!r}, which MLX does not have."
        )
    return Layout(int(bits), int(group_size))


def _dense(raw: str, file: SafetensorsFile) -> DenseTensor:
    kind = file.arrays[raw].dtype
    if kind not in _FLOATS:
        raise ModelError(
            f"Tensor {raw!r} in {file.path} has type {kind}; float32, float16 or bfloat16 is needed."
        )
    return DenseTensor(file.array(raw))


def _packed(
    raw: str, file: SafetensorsFile, stored: Mapping[str, SafetensorsFile], layout: Layout
) -> AffineTensor:
    array, stem = file.arrays[raw], raw.removesuffix(".weight")
    if array.dtype != "U32" or len(array.shape) != 2 or array.shape[1] * 32 % layout.bits:
        raise ModelError(
            f"Tensor {raw!r} in {file.path} is not packed for {layout.bits} bits; fetch the model again."
        )
    rows, columns = array.shape[0], array.shape[1] * 32 // layout.bits
    if columns % layout.group_size:
        raise ModelError(f"{stem} in {file.path} does not fill its groups of {layout.group_size}.")
    parts = []
    for part in (f"{stem}.scales", f"{stem}.biases"):
        holder = stored.get(part)
        entry = None if holder is None else holder.arrays[part]
        fits = entry is not None and entry.shape == (rows, columns // layout.group_size)
        if holder is None or entry is None or entry.dtype not in _FLOATS or not fits:
            raise ModelError(
                f"{part} of {file.path} is missing or of the wrong shape; fetch the model again."
            )
        parts.append(holder.array(part))
    return AffineTensor(file.array(raw), parts[0], parts[1], layout.bits, layout.group_size)


def _label(table: Mapping[str, Any] | None, stored: Mapping[str, SafetensorsFile]) -> str:
    if table is not None:
        return f"mlx {table['bits']}-bit, group {table['group_size']}"
    kinds = [file.arrays[name].dtype for name, file in stored.items()]
    most = max(sorted(set(kinds)), key=kinds.count)
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(most, most)
