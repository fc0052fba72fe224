"""Open a model from wherever it is, and give its weights under one set of names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tempo_mlx.architecture import names
from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.errors import ModelError
from tempo_mlx.weights import digest, download
from tempo_mlx.weights.adapter import read_adapter
from tempo_mlx.weights.contents import Contents
from tempo_mlx.weights.directory import read_directory
from tempo_mlx.weights.gguf_model import read_gguf_model
from tempo_mlx.weights.placing import placed
from tempo_mlx.weights.precision import Stored
from tempo_mlx.weights.tensor import Tensor
from tempo_mlx.weights.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, its header checked: every tensor the architecture needs is there, in the right shape.

    `config` is its Hugging Face config (for GGUF: the one it would have); `path` a directory or a .gguf file.
    """

    id: str
    path: Path
    contents: Contents
    tensors: Mapping[str, Tensor]  # those the model needs, in Hugging Face's Llama names
    revision: str | None = None
    adapter: str | None = None  # SHA-256 of the adapter in `tensors`

    @property
    def config(self) -> Mapping[str, Any]:
        return self.contents.config

    @property
    def architecture(self) -> Architecture:
        return self.contents.architecture

    @property
    def quantization(self) -> str:
        return self.contents.quantization

    @property
    def licence(self) -> str | None:
        return self.contents.licence

    def names(self) -> list[str]:
        """The tensors the model needs, in Hugging Face's Llama names."""
        return list(self.tensors)

    def tensor(self, name: str) -> Tensor:
        """One weight, memory-mapped; nothing is converted before it is asked for."""
        if name not in self.tensors:
            raise ModelError(f"{self.path} holds no tensor {name!r}.")
        return self.tensors[name]

    def published(self) -> Mapping[str, Tensor]:
        """The tensors as the family's Hugging Face checkpoints hold them: Phi-3's projections fused."""
        tied = {"lm_head.weight"} if self.architecture.tie_word_embeddings else set()
        return {name: tensor for name, tensor in self.contents.tensors.items() if name not in tied}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the weights. Raises: ModelError saying what is wrong with it."""
        return self.contents.tokenizer()

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a run file records: id, sha256 or revision, family, quantization, and adapter where there is one."""
        mark = (
            {"revision": self.revision} if self.revision else {"sha256": digest.of_files(self.contents.files)}
        )
        own = {"id": self.id, **mark, "family": self.architecture.family, "quantization": self.quantization}
        return own if self.adapter is None else {**own, "adapter": self.adapter}

    @cached_property
    def stored(self) -> Stored:
        """What decides in which numbers it is computed."""
        return Stored.of(self.tensors.values(), self.architecture)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, packed where they can be."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """How many numbers the model has; a tied head counts once."""
        return sum(int(np.prod(tensor.shape)) for tensor in self.tensors.values())


def open_checkpoint(
    model: str, *, progress: download.Progress | None = None, adapter: str | None = None
) -> Checkpoint:
    """Open a model by registered name, .gguf path, directory, or Hugging Face repo id (fetched if need be).

    adapter: the directory of one that is to be applied (adapter.py).
    progress: called with (bytes so far, bytes in all or None) while something is fetched.
    Raises: ModelError, or DownloadError, with what to do.
    """
    path, revision = download.locate(model, progress=progress)
    contents = read_directory(path) if path.is_dir() else read_gguf_model(path)
    if adapter is None:
        return Checkpoint(model, path, contents, _complete(contents, path), revision)
    read = read_adapter(adapter)
    contents = replace(contents, tensors=read.on(contents.tensors))
    return Checkpoint(model, path, contents, _complete(contents, path), revision, read.sha256)


def _complete(contents: Contents, path: Path) -> dict[str, Tensor]:
    """The tensors the architecture needs, under our names, fused ones split and experts stacked; missing, misshapen or
    surplus ones are errors."""
    a = contents.architecture
    have = placed(contents.tensors, a, path)
    needed = names.expected_shapes(a)
    if a.tie_word_embeddings:
        have.pop("lm_head.weight", None)
    if missing := [name for name in needed if name not in have]:
        raise ModelError(
            f"{path} lacks {len(missing)} of the model's tensors (first {missing[0]!r}); see that all its weight files "
            "are there."
        )
    if surplus := sorted(set(have) - set(needed)):
        raise ModelError(
            f"{path} holds the tensor {surplus[0]!r}, which a {a.family} model of its config does not have."
        )
    for name, shape in needed.items():
        if have[name].shape != shape:
            raise ModelError(
                f"Tensor {name!r} in {path} has shape {have[name].shape}; the config implies {shape}."
            )
    return {name: have[name] for name in needed}
