"""LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353) adapters, as mlx-lm writes them: a directory with
adapter_config.json and adapters.safetensors.

An adapted weight is W + scale (A B)^T; DoRA scales each of its rows to the length `m` that was learned. Where weights
are computed with as plain numbers that is one weight (`numpy`); packed ones stay packed, and the adapter is applied
beside them (model/linear.py).

Shapes: in, out of a linear layer; r the adapter's rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tempo_mlx.architecture.names import from_huggingface
from tempo_mlx.arrays import Float32s
from tempo_mlx.errors import ModelError
from tempo_mlx.files import at_home
from tempo_mlx.weights import digest
from tempo_mlx.weights.json_file import read_json
from tempo_mlx.weights.safetensors_file import SafetensorsFile, read_safetensors
from tempo_mlx.weights.tensor import Array, DenseTensor, FloatType, Kind, Layout, Quantized, Rows, Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_PART = re.compile(r"(.+)\.(lora_a|lora_b|m)")


@dataclass(frozen=True)
class Adapted:
    """A weight (out, in) with an adapter. into (in, r); out_of (r, out), the scale in it; lengths (out,): DoRA's."""

    tensor: Tensor
    into: Float32s
    out_of: Float32s
    lengths: Float32s | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def kind(self) -> Kind:
        return "float32"

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def layout(self) -> Layout | None:
        """Of the weight beside which the adapter is kept."""
        return self.tensor.layout

    @property
    def float_type(self) -> FloatType:
        return self.tensor.float_type

    @property
    def group(self) -> int:
        return 1

    def numpy(self) -> Float32s:
        weight: Float32s = self.tensor.numpy() + (self.into @ self.out_of).T
        if self.lengths is not None:
            weight *= (self.lengths / np.linalg.norm(weight, axis=1))[:, None]
        return weight

    def factors(self) -> Float32s | None:
        """(out,): what DoRA multiplies each output with; None where it is LoRA."""
        if self.lengths is None:
            return None
        factors: Float32s = self.lengths / np.linalg.norm(
            self.tensor.numpy() + (self.into @ self.out_of).T, axis=1
        )
        return factors

    def raw(self) -> Array:
        return self.numpy()

    def quantized(self) -> Quantized:
        raise ModelError("An adapted weight is not quantised; read it with numpy().")

    def rows(self, rows: Rows) -> Adapted:
        lengths = None if self.lengths is None else self.lengths[rows]
        return Adapted(self.tensor.rows(rows), self.into, self.out_of[:, rows], lengths)

    def cut(self, start: int, stop: int) -> Tensor:
        if self.lengths is not None:  # of whole rows
            return DenseTensor(self.numpy()[:, start:stop])
        return Adapted(self.tensor.cut(start, stop), self.into[start:stop], self.out_of, None)


@dataclass(frozen=True)
class Adapter:
    """The parts of each adapted layer, by its name; `sha256`: of both files."""

    path: Path
    scale: float
    parts: Mapping[str, Mapping[str, Float32s]]
    sha256: str

    def on(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model's tensors with the adapter's. Raises ModelError where it was not made for such a model."""
        found = dict(tensors)
        for name, parts in self.parts.items():
            weight = tensors.get(f"{name}.weight")
            if weight is None:
                raise ModelError(
                    f"The adapter in {self.path} adapts {name}, which this model does not have; name the model that it "
                    "was made for."
                )
            into, out_of = parts["lora_a"], parts["lora_b"]
            if (*weight.shape[::-1], out_of.shape[0]) != (
                *into.shape[:1],
                *out_of.shape[1:],
                *into.shape[1:],
            ):
                raise ModelError(
                    f"The adapter in {self.path} adapts {name} of shape {(out_of.shape[-1], into.shape[0])}, and this "
                    f"model's has {weight.shape}; name the model that it was made for."
                )
            found[f"{name}.weight"] = Adapted(weight, into, np.float32(self.scale) * out_of, parts.get("m"))
        return found


def read_adapter(directory: str) -> Adapter:
    """Raises ModelError for what is no adapter, or one of another kind."""
    path = at_home(directory)
    config = read_json(path / CONFIG)
    kind = config.get("fine_tune_type", "lora") if isinstance(config, dict) else None
    if kind not in ("lora", "dora"):
        raise ModelError(
            f"The adapter in {path} is of the kind {kind!r}; LoRA and DoRA adapters of mlx-lm are read. Fuse another "
            "kind into its model with mlx_lm.fuse."
        )
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ModelError(f"{path / CONFIG} says no lora_parameters.scale; it is not one that mlx-lm wrote.")
    file = read_safetensors(path / WEIGHTS)
    parts: dict[str, dict[str, Float32s]] = {}
    for name in file.arrays:
        part = _PART.fullmatch(name)
        if part is None:
            raise ModelError(
                f"{path / WEIGHTS} holds the tensor {name!r}, which is no part of a LoRA or DoRA adapter."
            )
        parts.setdefault(from_huggingface(part[1]), {})[part[2]] = _numbers(file, name)
    wanted = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    for name, each in parts.items():
        if set(each) != wanted or each["lora_a"].ndim != 2 or each["lora_b"].ndim != 2:
            raise ModelError(
                f"The adapter in {path} must have {', '.join(sorted(wanted))} of {name}, and of linear layers only."
            )
    return Adapter(path, float(scale), parts, digest.of_files([path / CONFIG, path / WEIGHTS]))


def _numbers(file: SafetensorsFile, name: str) -> Float32s:
    kind = file.arrays[name].dtype
    if kind not in ("F32", "F16", "BF16"):
        raise ModelError(f"{file.path} holds {name!r} as {kind}; an adapter's numbers are F32, F16 or BF16.")
    numbers = DenseTensor(file.array(name)).numpy()
    if not np.isfinite(numbers).all():
        raise ModelError(
            f"{file.path} holds numbers in {name!r} that are not finite; train the adapter again."
        )
    return numbers
