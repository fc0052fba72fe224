"""A GGUF file as a model: what its metadata and tensors are among Hugging Face's."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from tempo_mlx.architecture import gguf, names
from tempo_mlx.architecture.families import architecture_from_config
from tempo_mlx.architecture.gguf_tensors import Place, guesses_ahead, learned_activations, place_of
from tempo_mlx.errors import ModelError
from tempo_mlx.weights import tokenizer_gguf
from tempo_mlx.weights.contents import Contents
from tempo_mlx.weights.files import parts_of
from tempo_mlx.weights.gguf_file import GGUFFile, read_gguf
from tempo_mlx.weights.gguf_tensor import GGUFTensor
from tempo_mlx.weights.placing import Derived, reshaped
from tempo_mlx.weights.tensor import Array, ColumnsReordered, DenseTensor, Reordered, Tensor


def read_gguf_model(path: Path) -> Contents:
    """Config and tensors of a .gguf file, with all its parts. Raises: ModelError naming what is wrong with it."""
    file, paths = _read_parts(path)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    factors = {
        name: [float(each) for each in tensor.numpy()]
        for name, tensor in file.tensors.items()
        if name.startswith("rope_f") and len(tensor.shape) == 1
    }
    config = gguf.config_from_gguf(file.metadata, shapes, factors)
    architecture = architecture_from_config(config)
    _, row = gguf.row_of(file.metadata)
    block_count = file.metadata.get(f"{file.metadata['general.architecture']}.block_count", 0)
    learned = learned_activations(file.metadata, architecture)
    tensors: dict[str, Tensor] = {name: DenseTensor(numbers) for name, numbers in learned.items()}
    for stored, tensor in file.tensors.items():
        if names.IGNORED.fullmatch(stored) or guesses_ahead(stored, architecture, block_count):
            continue
        place = place_of(stored, tensor.shape, architecture, row)
        if place is None:
            raise ModelError(
                f"{path} holds the tensor {stored!r}, which a {architecture.family} model does not have."
            )
        tensors[place.name] = _ours(tensor, place)
    types = [
        each.type_name if isinstance(each, GGUFTensor) else each.kind
        for each in file.tensors.values()
        if len(each.shape) == 2
    ]
    label = max(sorted(set(types)), key=types.count).lower() if types else "float32"
    licence = file.metadata.get("general.license")
    return Contents(
        files=paths,
        config=config,
        architecture=architecture,
        quantization=label,
        licence=licence if isinstance(licence, str) else None,
        tensors=tensors,
        tokenizer=partial(tokenizer_gguf.from_gguf, file, architecture.vocab_size),
    )


def _ours(tensor: Tensor, place: Place) -> Tensor:
    """The tensor as Hugging Face has it: what the converter did, undone."""
    if place.subtract and isinstance(tensor, DenseTensor):
        return DenseTensor(tensor.data, place.subtract)
    if place.rows is not None:
        tensor = Reordered(tensor, place.rows)
    if place.columns is not None:
        tensor = ColumnsReordered(tensor, place.columns)
    if place.logarithm:
        tensor = Derived(tensor, tensor.shape, _log_of_minus, computed=True)
    return tensor if place.shape is None else reshaped(tensor, place.shape)


def _log_of_minus(whole: Array) -> Array:
    """A_log of A = -exp(A_log)."""
    return np.asarray(np.log(-whole))


def _read_parts(path: Path) -> tuple[GGUFFile, tuple[Path, ...]]:
    """The file, or what the parts of a split one come to: the first has the metadata. And where they are."""
    file = read_gguf(path)
    count = file.metadata.get("split.count", 0)
    if type(count) is not int or count < 2:  # 0: `gguf-split --merge` has joined the parts
        return file, (path,)
    paths = tuple(path.with_name(name) for name in parts_of(path.name))
    if len(paths) != count:
        raise ModelError(
            f"{path} is one of the {count} parts of a split GGUF file; give each the name it was published under, "
            f"NAME-00001-of-{count:05}.gguf and so on."
        )
    if missing := [each for each in paths if not each.is_file()]:
        raise ModelError(
            f"{path} is one of {count} parts, and {missing[0]} is missing; put it beside the others."
        )
    parts = [read_gguf(each) for each in paths]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    stated = parts[0].metadata.get("split.tensors.count", len(tensors))
    if not len(tensors) == stated == sum(len(part.tensors) for part in parts):
        raise ModelError(
            f"The {count} parts of {paths[0]} are not of one model: they hold {len(tensors)} tensors of {stated}; "
            "fetch them from one place."
        )
    return GGUFFile(paths[0], parts[0].metadata, tensors), paths
