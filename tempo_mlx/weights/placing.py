"""From the tensors that files hold to those the model is built of: renamed, fused ones split, experts stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tempo_mlx.architecture import names
from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.arrays import Float32s
from tempo_mlx.errors import ModelError
from tempo_mlx.weights.gguf_tensor import GGUFTensor
from tempo_mlx.weights.tensor import (
    Array,
    DenseTensor,
    FloatType,
    Kind,
    Layout,
    PackedTensor,
    Quantized,
    Rows,
    Tensor,
)

_STORED = (DenseTensor, PackedTensor, GGUFTensor)  # whose numbers lie as they do in the file


def placed(stored: Mapping[str, Tensor], a: Architecture, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint under our names. Raises ModelError for two of one name, or a fused one that is not
    of the config's size."""
    have: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for raw, tensor in stored.items():
        name = names.own_name(raw, a)
        if name is None:
            continue
        if single := names.of_expert(name):
            experts.setdefault(single[0], {})[single[1]] = tensor
            continue
        if (parts := names.fused_parts(name, tensor.shape, a)) is None:
            parts_of_it = {name: tensor}
        else:
            parts_of_it = {each: _taken(tensor, part, name, path) for each, part in parts.items()}
        for each, found in parts_of_it.items():
            if each in have:
                raise ModelError(f"{path} holds the tensor {each!r} under two names; the model is refused.")
            have[each] = found
    for name, members in experts.items():
        have[name] = Stacked(tuple(members[place] for place in sorted(members)))
    return {name: _shaped(name, tensor) for name, tensor in _from_mlx_lm(have, a).items()}


def _from_mlx_lm(have: dict[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    """What mlx-lm's converted checkpoints keep otherwise: the taps of a convolution before its one input, Qwen's norms
    with the 1 added, and the two parts of a latent's projection apart, the first of them across."""
    across = {name for name, tensor in have.items() if _is_mlx_convolution(name, tensor)}
    if across and a.family == "falcon_h1":
        raise ModelError(
            "This Falcon-H1 was converted by mlx-lm, which puts the config's multipliers into the weights; take the "
            "original, or convert it with tempo-mlx."
        )
    if a.family == "ernie4_5_moe" and not any(name.endswith(".router.correction") for name in have):
        raise ModelError(
            "This ERNIE was converted by mlx-lm, which leaves out what corrects its choice of experts; take the "
            "original, or convert it with tempo-mlx."
        )
    whole = {"self_attn.embed_q.weight", "self_attn.unembed_out.weight"}
    found: dict[str, Tensor] = {}
    for name, tensor in have.items():
        if name in across:
            channels, taps, _ = tensor.shape
            found[name] = Derived(tensor, (channels, 1, taps), _exchanged)
        elif across and a.norm_offset and name.endswith("norm.weight") and ".linear_attn." not in name:
            found[name] = Derived(tensor, tensor.shape, partial(_less, offset=a.norm_offset), True)
        elif name.endswith("self_attn.embed_q.weight"):
            other = have.get(name.replace("embed_q", "unembed_out"))
            if other is None:
                raise ModelError(
                    f"The weights have {name!r} and not the unembed_out.weight that goes with it."
                )
            heads, rank, plain = tensor.shape
            shape = (heads * (plain + other.shape[1]), rank)
            found[name.replace("embed_q", "kv_b_proj")] = Derived(
                tensor, shape, partial(_latent_parts, other), True
            )
        elif not name.endswith(tuple(whole)):
            found[name] = tensor
    return found


def _is_mlx_convolution(name: str, tensor: Tensor) -> bool:
    kind = name.endswith((".conv1d.weight", ".conv.conv.weight"))
    return kind and len(tensor.shape) == 3 and tensor.shape[-1] == 1 and tensor.shape[1] > 1


def _exchanged(whole: Array) -> Array:
    return np.ascontiguousarray(np.swapaxes(whole, 1, 2))


def _less(whole: Array, offset: float) -> Array:
    return np.asarray(whole - np.float32(offset))


def _latent_parts(other: Tensor, into: Array) -> Array:
    both = np.concatenate([np.swapaxes(into, 1, 2), other.numpy()], axis=1)
    return both.reshape(-1, both.shape[-1])


def _taken(tensor: Tensor, part: names.Part, name: str, path: Path) -> Tensor:
    size = tensor.shape[part.axis]
    last = part.index.stop if isinstance(part.index, slice) else int(part.index.max()) + 1
    if last is not None and last > size:
        raise ModelError(
            f"The fused tensor {name!r} in {path} has shape {tensor.shape}, which its config does not allow."
        )
    if part.axis == 0 and not part.transposed:
        return tensor.rows(part.index)
    across = part.axis != 1 or part.transposed
    if isinstance(part.index, slice) and isinstance(tensor, _STORED) and not across:
        return tensor.rows((slice(None), part.index))  # packed stays packed
    count = len(range(*part.index.indices(size))) if isinstance(part.index, slice) else len(part.index)
    shape = (*tensor.shape[: part.axis], count, *tensor.shape[part.axis + 1 :])
    if part.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return Derived(tensor, shape, partial(_take, part))


def _take(part: names.Part, whole: Array) -> Array:
    found = whole.swapaxes(0, part.axis)[part.index].swapaxes(0, part.axis)
    return np.ascontiguousarray(np.swapaxes(found, -1, -2) if part.transposed else found)


def _shaped(name: str, tensor: Tensor) -> Tensor:
    """ERNIE keeps what corrects the choice of experts as a row; llama.cpp stacks the ends of Gemma 3n's streams."""
    if name.endswith(".router.correction") and len(tensor.shape) == 2:
        return reshaped(tensor, (int(np.prod(tensor.shape)),))
    if name.startswith("model.altup_") and len(tensor.shape) == 3:
        return reshaped(tensor, tensor.shape[1:])
    return tensor


def reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return Derived(tensor, shape, lambda whole: whole.reshape(shape))


@dataclass(frozen=True)
class Derived:
    """What a function makes of a dense weight, when it is asked for."""

    tensor: Tensor
    shape: tuple[int, ...]
    make: Callable[[Array], Array]
    computed: bool = False  # from the numbers, and not only put elsewhere

    @property
    def kind(self) -> Kind:
        plain = self.tensor.kind != "mlx_quantized" and not self.computed
        return self.tensor.kind if plain else "float32"

    @property
    def layout(self) -> None:
        return None

    @property
    def float_type(self) -> FloatType:
        return self.tensor.float_type

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * (4 if self.kind == "float32" else 2)

    @property
    def group(self) -> int:
        return 1

    def numpy(self) -> Float32s:
        return self.make(self.tensor.numpy())

    def raw(self) -> Array:
        return self.numpy() if self.kind == "float32" else self.make(self.tensor.raw())

    def quantized(self) -> Quantized:
        raise ModelError("A dense weight is not quantised; read it with raw() or numpy().")

    def rows(self, rows: Rows) -> Tensor:
        return DenseTensor(self.raw()[rows])

    def cut(self, start: int, stop: int) -> Tensor:
        return DenseTensor(self.raw()[:, start:stop])


@dataclass(frozen=True)
class Stacked:
    """One weight for each expert, (n, out, in), of tensors of one kind."""

    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = {tensor.shape for tensor in self.tensors}
        return (len(self.tensors), *min(shapes)) if len(shapes) == 1 else (len(self.tensors),)

    @property
    def kind(self) -> Kind:
        """That of all; float32 where they are of several, or quantised in several ways."""
        kinds = {tensor.kind for tensor in self.tensors}
        kind = kinds.pop() if len(kinds) == 1 else "float32"
        return "float32" if kind == "mlx_quantized" and self.layout is None else kind

    @property
    def layout(self) -> Layout | None:
        layouts = {tensor.layout for tensor in self.tensors}
        return layouts.pop() if len(layouts) == 1 else None

    @property
    def float_type(self) -> FloatType:
        return self.tensors[0].float_type

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def group(self) -> int:
        return max(tensor.group for tensor in self.tensors)

    def numpy(self) -> Float32s:
        return np.stack([tensor.numpy() for tensor in self.tensors])

    def raw(self) -> Array:
        return self.numpy() if self.kind == "float32" else np.stack([tensor.raw() for tensor in self.tensors])

    def quantized(self) -> Quantized:
        parts = [tensor.quantized() for tensor in self.tensors]
        if self.layout is None:
            raise ModelError("Experts that are quantised in different ways are not one packed weight.")
        packed = np.stack([part[0] for part in parts])
        scales = np.stack([part[1] for part in parts])
        biases = [part[2] for part in parts if part[2] is not None]
        return packed, scales, np.stack(biases) if biases else None, self.layout

    def rows(self, rows: Rows) -> Tensor:
        return Stacked(
            self.tensors[rows] if isinstance(rows, slice) else tuple(self.tensors[at] for at in rows)
        )

    def cut(self, start: int, stop: int) -> Tensor:
        return Stacked(tuple(tensor.rows(slice(start, stop)) for tensor in self.tensors))
