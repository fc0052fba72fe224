"""Open a model from wherever it is, and give its weights under one set of names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempo_mlx.architecture import names
from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.architecture.families import architecture_from_config, text_config
from tempo_mlx.architecture.gguf import INTERLEAVED_ROPE, config_from_gguf, name_from_gguf
from tempo_mlx.errors import ModelError
from tempo_mlx.weights import digest, download, tokenizer_files, tokenizer_gguf
from tempo_mlx.weights.gguf_file import GGUFFile, read_gguf
from tempo_mlx.weights.json_file import read_json
from tempo_mlx.weights.safetensors_file import SafetensorsFile, read_safetensors
from tempo_mlx.weights.tensor import AffineTensor, DenseTensor, Tensor
from tempo_mlx.weights.tokenizer import Tokenizer

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, its header checked: every tensor the architecture needs is there, in the right shape.

    `config` is its Hugging Face config (for GGUF: the one it would have); `path` a directory or a .gguf file.
    """

    id: str
    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    quantization: str
    revision: str | None = None
    licence: str | None = None
    _tensors: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict, repr=False)
    _stored: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict, repr=False)

    def names(self) -> list[str]:
        """The tensors the model needs, in Hugging Face's Llama names."""
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        """One weight, memory-mapped; nothing is converted before it is asked for."""
        if name not in self._tensors:
            raise ModelError(f"{self.path} holds no tensor {name!r}.")
        return self._tensors[name]()

    def stored(self) -> Mapping[str, Callable[[], Tensor]]:
        """The tensors as the family's Hugging Face checkpoints hold them: Phi-3's projections fused."""
        tied = {"lm_head.weight"} if self.architecture.tie_word_embeddings else set()
        return {name: tensor for name, tensor in self._stored.items() if name not in tied}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the weights. Raises: ModelError saying what is wrong with it."""
        if self.path.is_dir():
            return tokenizer_files.from_directory(self.path, self.config, self.architecture.vocab_size)
        return tokenizer_gguf.from_gguf(self.path, self.architecture.vocab_size)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a run file records: id, sha256 or revision, family, quantization."""
        mark = {"revision": self.revision} if self.revision else {"sha256": digest.of_model(self.path)}
        return {"id": self.id, **mark, "family": self.architecture.family, "quantization": self.quantization}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the weights in the form they are stored in."""
        return sum(self.tensor(name).nbytes for name in self._tensors)

    @cached_property
    def parameters(self) -> int:
        """How many numbers the model has; a tied head counts once."""
        return sum(int(np.prod(self.tensor(name).shape)) for name in self._tensors)


def open_checkpoint(model: str, *, progress: download.Progress | None = None) -> Checkpoint:
    """Open a model by registered name, .gguf path, directory, or Hugging Face repo id (fetched if need be).

    progress: called with (bytes so far, bytes in all or None) while something is fetched.
    Raises: ModelError, or DownloadError, with what to do.
    """
    path, revision = download.locate(model, progress=progress)
    if path.is_dir():
        return _open_directory(model, path, revision)
    return _open_gguf(model, path, revision)


def _open_gguf(model: str, path: Path, revision: str | None) -> Checkpoint:
    file = read_gguf(path)
    if file.metadata.get("split.count", 1) != 1:
        raise ModelError(
            f"{path} is one part of a split GGUF file; join the parts with llama.cpp's gguf-split."
        )
    tensor_shapes = {name: info.shape for name, info in file.tensors.items()}
    factors = {
        name: [float(each) for each in file.tensor(name).numpy()]
        for name, shape in tensor_shapes.items()
        if name.startswith("rope_f") and len(shape) == 1
    }
    config = config_from_gguf(file.metadata, tensor_shapes, factors)
    architecture = architecture_from_config(config)
    interleaved = file.metadata["general.architecture"] in INTERLEAVED_ROPE
    getters: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for stored, info in file.tensors.items():
        if names.IGNORED.fullmatch(stored):
            continue
        name = name_from_gguf(stored, architecture)
        if name is None:
            raise ModelError(
                f"{path} holds the tensor {stored!r}, which a {architecture.family} model does not have."
            )
        rows = _unpermute(name, architecture) if interleaved else None
        subtract = architecture.norm_offset if name.endswith("norm.weight") else 0.0
        shapes[name] = info.shape
        getters[name] = partial(_gguf_tensor, file, stored, rows, subtract)
    types = [info.type_name for stored, info in file.tensors.items() if len(info.shape) == 2]
    quantization = max(sorted(set(types)), key=types.count) if types else "F32"
    tensors = _complete(getters, shapes, architecture, path)
    licence = file.metadata.get("general.license")
    return Checkpoint(
        id=model,
        path=path,
        config=config,
        architecture=architecture,
        quantization=quantization.lower(),
        revision=revision,
        licence=licence if isinstance(licence, str) else None,
        _tensors=tensors,
        _stored=getters,
    )


def _gguf_tensor(file: GGUFFile, name: str, rows: NDArray[np.intp] | None, subtract: float) -> Tensor:
    tensor = file.tensor(name)
    if subtract and isinstance(tensor, DenseTensor):
        return DenseTensor(tensor.data, subtract)
    return tensor if rows is None else tensor.rows(rows)


def _rows_of(whole: Callable[[], Tensor], rows: slice) -> Tensor:
    return whole().rows(rows)


def _unpermute(name: str, a: Architecture) -> NDArray[np.intp] | None:
    """Row order that turns llama.cpp's neighbouring rotary pairs back into Hugging Face's halves, if any."""
    heads = {".q_proj.": a.num_attention_heads, ".k_proj.": a.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            order = np.arange(count * a.head_dim).reshape(count, a.head_dim // 2, 2)
            return np.asarray(order.swapaxes(1, 2).reshape(-1), np.intp)
    return None


def _open_directory(model: str, path: Path, revision: str | None) -> Checkpoint:
    config = dict(text_config(read_json(path / "config.json")))
    architecture = architecture_from_config(config)
    quantization = _quantization(config)
    files = _weight_files(path)
    stored = {name: file for file in files for name in file.arrays}
    if len(stored) != sum(len(file.arrays) for file in files):
        raise ModelError(f"Two weight files in {path} hold tensors of the same name; fetch the model again.")
    getters: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for raw, file in stored.items():
        if names.IGNORED.fullmatch(raw) or (raw.endswith((".scales", ".biases"))):
            continue
        name = names.from_huggingface(raw)
        if name in shapes:
            raise ModelError(f"{path} holds the tensor {name!r} under two names; fetch the model again.")
        layout = _layout(raw, file, stored, quantization)
        shapes[name] = _logical_shape(raw, file, stored, layout, path)
        getters[name] = partial(_stored_tensor, raw, file, stored, layout)
    tensors = _complete(getters, shapes, architecture, path)
    return Checkpoint(
        id=model,
        path=path,
        config=config,
        architecture=architecture,
        quantization=_quantization_name(quantization, stored),
        revision=revision,
        licence=_licence(path),
        _tensors=tensors,
        _stored=getters,
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


def _weight_files(path: Path) -> list[SafetensorsFile]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        table = read_json(index, 64 << 20)
        places = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(n, str) for n in places.values()):
            raise ModelError(f"{index} has no table of weights (weight_map); fetch the model again.")
        files = sorted(set(places.values()))
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in files):
            raise ModelError(f"{index} names weight files outside its own directory; the model is refused.")
        opened = [read_safetensors(path / name) for name in files]
        found = {name for file in opened for name in file.arrays}
        if missing := sorted(set(places) - found):
            raise ModelError(
                f"The weight files in {path} lack the tensor {missing[0]!r}; fetch the model again."
            )
        return opened
    files = sorted(each.name for each in path.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{path} holds no .safetensors weights; tempo-mlx reads safetensors and GGUF, no pickled files."
        )
    return [read_safetensors(path / name) for name in files]


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


def _logical_shape(
    raw: str, file: SafetensorsFile, stored: Mapping[str, SafetensorsFile], layout: Layout | None, path: Path
) -> tuple[int, ...]:
    array = file.arrays[raw]
    if layout is None:
        if array.dtype not in _FLOATS:
            raise ModelError(
                f"Tensor {raw!r} in {path} has type {array.dtype}; float32, float16 or bfloat16 is needed."
            )
        return array.shape
    stem = raw.removesuffix(".weight")
    groups = {part: stored.get(f"{stem}.{part}") for part in ("scales", "biases")}
    if array.dtype != "U32" or len(array.shape) != 2 or array.shape[1] * 32 % layout.bits:
        raise ModelError(
            f"Tensor {raw!r} in {path} is not packed for {layout.bits} bits; fetch the model again."
        )
    rows, columns = array.shape[0], array.shape[1] * 32 // layout.bits
    for part, holder in groups.items():
        entry = None if holder is None else holder.arrays[f"{stem}.{part}"]
        if entry is None or entry.dtype not in _FLOATS or entry.shape != (rows, columns // layout.group_size):
            raise ModelError(
                f"The {part} of the quantised {stem} in {path} are missing or of the wrong shape."
            )
    if columns % layout.group_size:
        raise ModelError(f"{stem} in {path} does not fill its groups of {layout.group_size}.")
    return rows, columns


def _stored_tensor(
    raw: str, file: SafetensorsFile, stored: Mapping[str, SafetensorsFile], layout: Layout | None
) -> Tensor:
    if layout is None:
        return DenseTensor(file.array(raw))
    stem = raw.removesuffix(".weight")
    scales, biases = (stored[f"{stem}.{part}"].array(f"{stem}.{part}") for part in ("scales", "biases"))
    return AffineTensor(file.array(raw), scales, biases, layout.bits, layout.group_size)


def _quantization_name(table: Mapping[str, Any] | None, stored: Mapping[str, SafetensorsFile]) -> str:
    if table is not None:
        return f"mlx {table['bits']}-bit, group {table['group_size']}"
    kinds = [file.arrays[name].dtype for name, file in stored.items()]
    most = max(sorted(set(kinds)), key=kinds.count)
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(most, most)


def _complete(
    getters: Mapping[str, Callable[[], Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    a: Architecture,
    path: Path,
) -> dict[str, Callable[[], Tensor]]:
    """The tensors the architecture needs, fused ones split; missing, misshapen or surplus ones are errors."""
    have, sizes = dict(getters), dict(shapes)
    for fused in list(getters):
        parts = names.fused_parts(fused, a)
        if parts is None:
            continue
        whole = have.pop(fused)
        width = sizes.pop(fused)
        if width[0] != max(rows.stop for rows in parts.values()):
            raise ModelError(
                f"The fused tensor {fused!r} in {path} has shape {width}; fetch the model again."
            )
        for part, rows in parts.items():
            have[part] = partial(_rows_of, whole, rows)
            sizes[part] = (rows.stop - rows.start, *width[1:])
    needed = names.expected_shapes(a)
    if a.tie_word_embeddings:
        have.pop("lm_head.weight", None)
    if missing := [name for name in needed if name not in have]:
        raise ModelError(
            f"{path} lacks {len(missing)} of the model's tensors (first {missing[0]!r}); fetch it again."
        )
    if surplus := sorted(set(have) - set(needed)):
        raise ModelError(
            f"{path} holds the tensor {surplus[0]!r}, which a {a.family} model of its config does not have."
        )
    for name, shape in needed.items():
        if sizes[name] != shape:
            raise ModelError(
                f"Tensor {name!r} in {path} has shape {sizes[name]}; the config implies {shape}."
            )
    return {name: have[name] for name in needed}
