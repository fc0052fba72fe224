"""A GGUF file as a model: what its metadata and tensors are among Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tempo_mlx.architecture import gguf, names
from tempo_mlx.architecture.families import architecture_from_config
from tempo_mlx.errors import ModelError
from tempo_mlx.weights.contents import Contents
from tempo_mlx.weights.gguf_file import read_gguf
from tempo_mlx.weights.tensor import DenseTensor, GGUFTensor, Reordered, Tensor


def read_gguf_model(path: Path) -> Contents:
    """Config and tensors of a .gguf file. Raises: ModelError naming what is missing, or not supported."""
    file = read_gguf(path)
    if file.metadata.get("split.count", 1) != 1:
        raise ModelError(
            f"{path} is one part of a split GGUF file; join the parts with llama.cpp's gguf-split."
        )
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    factors = {
        name: [float(each) for each in tensor.numpy()]
        for name, tensor in file.tensors.items()
        if name.startswith("rope_f") and len(tensor.shape) == 1
    }
    config = gguf.config_from_gguf(file.metadata, shapes, factors)
    architecture = architecture_from_config(config)
    kind = file.metadata["general.architecture"]
    tensors: dict[str, Tensor] = {}
    for stored, tensor in file.tensors.items():
        if names.IGNORED.fullmatch(stored):
            continue
        name = gguf.name_from_gguf(stored, architecture)
        if name is None:
            raise ModelError(
                f"{path} holds the tensor {stored!r}, which a {architecture.family} model does not have."
            )
        heads = gguf.interleaved_heads(name, kind, architecture)
        if heads is not None:
            order = np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
            tensor = Reordered(tensor, order)
        if architecture.norm_offset and name.endswith("norm.weight") and isinstance(tensor, DenseTensor):
            tensor = DenseTensor(tensor.data, architecture.norm_offset)
        tensors[name] = tensor
    types = [
        each.type_name if isinstance(each, GGUFTensor) else each.kind
        for each in file.tensors.values()
        if len(each.shape) == 2
    ]
    label = max(sorted(set(types)), key=types.count).lower() if types else "float32"
    licence = file.metadata.get("general.license")
    return Contents(config, architecture, label, licence if isinstance(licence, str) else None, tensors)
