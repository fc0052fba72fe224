"""The reference: the same contract in PyTorch, written to be read and compared with (CPU and CUDA).

Nothing is fused or reordered here, but attention on CUDA (torch_layers.py); weights keep Hugging Face's layout. Letters
as in transformer.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from tempo_mlx.architecture.architecture import Architecture, Layer
from tempo_mlx.architecture.names import norm_names
from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.errors import BackendError
from tempo_mlx.model import torch_layers as layers
from tempo_mlx.model.failures import told_failures
from tempo_mlx.model.forward import Attention, Forward, Logits
from tempo_mlx.model.lineage import Lineage
from tempo_mlx.model.torch_layers import ACTIVATIONS, Pass
from tempo_mlx.model.torch_recurrent import Weights, linear, recurrent
from tempo_mlx.model.visibility import causal_bias
from tempo_mlx.weights import Checkpoint

Key = int | tuple[int, str]  # a layer, or one of two things that a layer keeps


class TorchCache:
    """Per layer, what it keeps of each slot, (S, ...) each: keys and values, or what a state is made of. Rows are added
    in `room` for twice as many, so that a step does not copy what was there."""

    def __init__(self) -> None:
        self.positions: Ints = np.empty(0, np.int64)
        self.parts: dict[Key, tuple[torch.Tensor, ...]] = {}
        self.room: dict[Key, tuple[torch.Tensor, ...]] = {}  # of which `parts` are the beginnings
        self.lineage = Lineage()

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for parts in self.parts.values() for tensor in parts)

    def append(self, key: Key, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Add the newest rows (L, ...) and return all slots'."""
        before = self.parts.get(key) or tuple(row[:0] for row in rows)
        first, last = len(before[0]), len(before[0]) + len(rows[0])
        room = self.room.get(key)
        if room is None or len(room[0]) < last:
            room = tuple(row.new_empty(2 * last, *row.shape[1:]) for row in rows)
            for wide, old in zip(room, before, strict=True):
                wide[:first] = old
            self.room[key] = room
        for wide, row in zip(room, rows, strict=True):
            wide[first:last] = row
        self.parts[key] = tuple(wide[:last] for wide in room)
        return self.parts[key]

    @contextmanager
    def growing(self) -> Iterator[None]:
        """A pass that adds rows, or none at all where it is broken off."""
        before = len(self)
        try:
            yield
        except BaseException:
            self.truncate(before)
            raise

    def keep(self, indices: Ints) -> None:
        for key, parts in self.parts.items():
            index = torch.as_tensor(indices, device=parts[0].device)
            self.parts[key] = tuple(tensor[index] for tensor in parts)
        self.room = {}
        self.positions = self.positions[indices]
        self.lineage.keep(indices)

    def truncate(self, length: int) -> None:
        self.keep(np.arange(min(length, len(self))))

    def settle(self, length: int) -> None:
        """Nothing: every state is made anew in every pass."""

    def copy(self) -> TorchCache:
        other = TorchCache()
        other.positions, other.lineage = self.positions.copy(), self.lineage.copy()
        other.parts = dict(self.parts)  # their room stays with this one: where there is none, more is made
        return other


class TorchTransformer:
    """One model for every family, straight from the checkpoint's tensors."""

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: str) -> None:
        if device in ("gpu", "mps") or (device == "cuda" and not torch.cuda.is_available()):
            raise BackendError(
                f"The torch backend runs on cpu and cuda here, not on '{device}'; choose another --device."
            )
        self.architecture: Architecture = checkpoint.architecture
        use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if use_cuda else "cpu")
        self.fused = use_cuda
        self.dtype = getattr(torch, "float32" if dtype == "auto" else dtype)
        self.weights = {
            name: torch.tensor(checkpoint.tensor(name).numpy(), dtype=self.dtype, device=self.device)
            for name in checkpoint.names()
        }
        self.layers: list[Weights] = [
            {name[len(start) :]: self.weights[name] for name in self.weights if name.startswith(start)}
            for start in (f"model.layers.{index}." for index in range(len(self.architecture.layers)))
        ]
        self.info = {
            **checkpoint.identity, "dtype": str(self.dtype).removeprefix("torch."), "quantization": None,
            "backend": "torch", "device": self.device.type,
        }  # fmt: skip

    def new_cache(self) -> TorchCache:
        return TorchCache()

    def embeddings(self, tokens: Sequence[int]) -> Float32s:
        """(n, E): the input embeddings of `tokens`."""
        return self._numpy(self.weights["model.embed_tokens.weight"][list(tokens)])

    @told_failures()
    @torch.inference_mode()
    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: TorchCache,
        *,
        parents: Float32s | None = None,
        logits: Logits = "all",
        attention: Attention = False,
    ) -> Forward:
        """Run L rows and append them to the cache. See `model.forward` for the contract."""
        a = self.architecture
        new = np.asarray(positions, np.int64)
        with cache.growing():
            cache.positions = np.concatenate([cache.positions, new])
            cache.lineage.append(len(new), parents)
            bias = causal_bias(len(new), len(cache)) if bias is None else bias
            rows = Pass(a, new, bias, cache, self.device, self.fused and not attention)
            ids = torch.as_tensor(np.asarray(tokens, np.int64), device=self.device)
            x = self.weights["model.embed_tokens.weight"][ids] * torch.tensor(
                a.embedding_scale, dtype=self.dtype
            )
            if a.embedding_norm:
                x = layers.normed(a, x, None)
            own = self._own_embeddings(ids, x)  # (L, layers, width) or None
            x = self._streams(x)
            masses = []
            for index, layer in enumerate(a.layers):
                x, mass = self._layer(index, layer, x, None if own is None else own[:, index], rows)
                if mass is not None:
                    masses.append(mass if attention == "rows" else mass.mean(dim=0))
            out = None
            if logits != "none":
                out = self._numpy(self._logits(self._one_stream(x), logits))
            return Forward(out, self._numpy(torch.stack(masses)) if attention and masses else None)

    def _logits(self, x: torch.Tensor, which: Logits) -> torch.Tensor:
        a = self.architecture
        y = self._norm(x if which == "all" else x[-1:], "model.norm")
        head = "model.embed_tokens" if a.tie_word_embeddings else "lm_head"
        y = linear(y, self.weights, head).float() * a.logits_scale  # (L, V)
        if a.final_logit_softcapping is not None:
            y = torch.tanh(y / a.final_logit_softcapping) * a.final_logit_softcapping
        return y

    def _layer(
        self, index: int, layer: Layer, x: torch.Tensor, own: torch.Tensor | None, rows: Pass
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        a, weights = self.architecture, self.layers[index]
        predicted = None
        if a.altup is not None:
            predicted = self._predict(x, weights)
            x = predicted[a.altup.active]
        places = norm_names(a, layer)

        def norm(place: str, y: torch.Tensor) -> torch.Tensor:
            name = places.get(place)
            return (
                y
                if name is None
                else layers.normed(a, y, weights.get(f"{name}.weight"), weights.get(f"{name}.bias"))
            )

        y = norm("before_attention", x)
        mixed, mass = self._mixed(index, layer, y, weights, rows)
        if a.norm_placement.startswith("parallel"):
            second = y if a.norm_placement == "parallel" else norm("before_mlp", x)
            return x + mixed + self._fed(layer, second, x, weights), mass
        if layer.attention is not None or layer.recurrent is not None:
            after = norm("after_attention", mixed)
            if a.altup is not None:
                x = (x + after + self._laurel(y, weights)) / 2**0.5
            else:
                x = x + after * a.residual_scale
        if layer.mlp is not None or layer.experts is not None:
            y = self._fed(layer, norm("before_mlp", x), x, weights)
            x = x + norm("after_mlp", y) * a.residual_scale
        if predicted is not None:
            return self._correct(predicted, x, own, weights), mass
        if own is not None:
            x = x + self._from_own(x, own, weights)
        return (x * weights["layer_scalar"] if a.layer_scalar else x), mass

    def _mixed(
        self, index: int, layer: Layer, x: torch.Tensor, weights: Weights, rows: Pass
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What attention and the recurrent part make of x (L, E), and the attention mass."""
        y, mass = torch.zeros_like(x), None
        if layer.attention is not None:
            y, mass = layers.attention(layer.attention, x, weights, index, rows)
        if layer.recurrent is not None:
            eps = self.architecture.norm_eps
            y = y + recurrent(layer.recurrent, x, weights, index, rows.cache, eps)
        return y, mass

    def _fed(self, layer: Layer, x: torch.Tensor, before: torch.Tensor, weights: Weights) -> torch.Tensor:
        """What MLP and experts make of x (L, E); `before`: x before its norm."""
        a = self.architecture
        y = torch.zeros_like(x) if layer.mlp is None else layers.mlp(layer.mlp, x, weights)
        if layer.experts is None:
            return y
        if not layer.experts.own_norm:
            return y + layers.experts(layer.experts, x, weights, a, x)
        y = layers.normed(a, y, weights["post_feedforward_layernorm_1.weight"])
        given = layers.normed(a, before, weights["pre_feedforward_layernorm_2.weight"])
        found = layers.experts(layer.experts, given, weights, a, before)
        return y + layers.normed(a, found, weights["post_feedforward_layernorm_2.weight"])

    # Gemma 3n and 4: an embedding of the token for each layer, and several streams of which a layer computes one

    def _own_embeddings(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        a = self.architecture
        if not a.per_layer_input:
            return None
        shape = (len(ids), len(a.layers), a.per_layer_input)
        found = self.weights["model.embed_tokens_per_layer.weight"][ids] * math.sqrt(a.per_layer_input)
        projected = linear(x, self.weights, "model.per_layer_model_projection") / math.sqrt(a.hidden_size)
        projected = self._norm(projected.view(shape), "model.per_layer_projection_norm")
        return (projected + found.view(shape)) * math.sqrt(0.5)

    def _from_own(self, x: torch.Tensor, own: torch.Tensor, weights: Weights) -> torch.Tensor:
        a = self.architecture
        act = next(layer.mlp.hidden_act for layer in a.layers if layer.mlp is not None)
        y = ACTIVATIONS[act](linear(x, weights, "per_layer_input_gate")) * own
        y = linear(y, weights, "per_layer_projection")
        return layers.normed(a, y, weights["post_per_layer_input_norm.weight"])

    def _streams(self, x: torch.Tensor) -> torch.Tensor:
        altup = self.architecture.altup
        if altup is None:
            return x
        others = [linear(x, self.weights, f"model.altup_projections.{i}") for i in range(altup.inputs - 1)]
        return torch.stack([x, *(_as_large(y, x) for y in others)])

    def _one_stream(self, x: torch.Tensor) -> torch.Tensor:
        altup = self.architecture.altup
        if altup is None:
            return x
        others = [
            linear(x[i + 1], self.weights, f"model.altup_unembed_projections.{i}")
            for i in range(altup.inputs - 1)
        ]
        return torch.stack([x[0], *(_as_large(y, x[0]) for y in others)]).mean(dim=0)

    def _predict(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        """x (inputs, L, E): what each stream would be after the layer."""
        altup = self.architecture.altup
        assert altup is not None
        mixing = linear(self._modalities(x[altup.active], weights), weights, "altup.prediction_coefs")
        mixing = mixing.view(-1, altup.inputs, altup.inputs)  # (L, to, from)
        return x + torch.einsum("ltf,fle->tle", mixing, x)

    def _modalities(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        a = self.architecture
        routed = layers.normed(a, x, weights["altup.router_norm.weight"]) * a.hidden_size**-1.0
        return torch.tanh(linear(routed, weights, "altup.modality_router"))

    def _correct(
        self, predicted: torch.Tensor, x: torch.Tensor, own: torch.Tensor | None, weights: Weights
    ) -> torch.Tensor:
        altup = self.architecture.altup
        assert altup is not None and own is not None
        scale = linear(self._modalities(x, weights), weights, "altup.correction_coefs") + 1.0  # (L, inputs)
        streams = predicted + (x - predicted[altup.active]) * scale.T[..., None]
        first = streams[altup.active]
        if altup.correct_scale:
            first = first * weights["altup.correct_output_scale"]
        return torch.cat([streams[:1], streams[1:] + self._from_own(first, own, weights)])

    def _laurel(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        y = linear(linear(x, weights, "laurel.linear_left"), weights, "laurel.linear_right")
        return x + layers.normed(self.architecture, y, weights["laurel.post_laurel_norm.weight"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        found = self.weights.get(f"{name}.weight"), self.weights.get(f"{name}.bias")
        return layers.normed(self.architecture, x, *found)

    @staticmethod
    def _numpy(x: torch.Tensor) -> Float32s:
        result: Float32s = x.float().cpu().numpy()
        return result


def _as_large(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x scaled to the root mean square of `like`, row by row."""
    wanted = like.pow(2).mean(-1, keepdim=True).sqrt()
    return x * wanted / x.pow(2).mean(-1, keepdim=True).clamp(min=1e-5).sqrt()
