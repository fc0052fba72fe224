"""The reference: the same contract in PyTorch, written to be read and compared with (CPU and CUDA).

Nothing is fused or reordered here; weights keep Hugging Face's layout. Letters as in transformer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tempo_mlx.architecture.architecture import Architecture, Layer, Rope
from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.errors import BackendError
from tempo_mlx.model.forward import Attention, Forward, Logits
from tempo_mlx.model.rope import angles
from tempo_mlx.model.visibility import causal_bias, window_bias
from tempo_mlx.weights import Checkpoint

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


class TorchCache:
    """Per layer, keys and values (K, S, D), concatenated as they come."""

    def __init__(self) -> None:
        self.positions: Ints = np.empty(0, np.int64)
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in [*self.keys.values(), *self.values.values()])

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer in self.keys:
            keys = torch.cat([self.keys[layer], keys], dim=1)
            values = torch.cat([self.values[layer], values], dim=1)
        self.keys[layer], self.values[layer] = keys, values
        return keys, values

    def keep(self, indices: Ints) -> None:
        for layer in self.keys:
            index = torch.as_tensor(indices, device=self.keys[layer].device)
            self.keys[layer] = self.keys[layer][:, index]
            self.values[layer] = self.values[layer][:, index]
        self.positions = self.positions[indices]

    def truncate(self, length: int) -> None:
        self.keep(np.arange(min(length, len(self))))

    def copy(self) -> TorchCache:
        other = TorchCache()
        other.positions = self.positions.copy()
        other.keys, other.values = dict(self.keys), dict(self.values)
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
        self.dtype = getattr(torch, "float32" if dtype == "auto" else dtype)
        self.weights = {
            name: torch.tensor(checkpoint.tensor(name).numpy(), dtype=self.dtype, device=self.device)
            for name in checkpoint.names()
        }
        self.info = {
            **checkpoint.identity, "dtype": str(self.dtype).removeprefix("torch."), "quantization": None,
            "backend": "torch", "device": self.device.type,
        }  # fmt: skip

    def new_cache(self) -> TorchCache:
        return TorchCache()

    def embeddings(self, tokens: Sequence[int]) -> Float32s:
        """(n, E): the input embeddings of `tokens`."""
        return self._numpy(self.weights["model.embed_tokens.weight"][list(tokens)])

    @torch.inference_mode()
    def forward(
        self,
        tokens: Sequence[int] | Ints,
        positions: Sequence[int] | Ints,
        bias: Float32s | None,
        cache: TorchCache,
        *,
        logits: Logits = "all",
        attention: Attention = False,
    ) -> Forward:
        """Run L rows and append them to the cache. See `model.forward` for the contract."""
        a = self.architecture
        new = np.asarray(positions, np.int64)
        cache.positions = np.concatenate([cache.positions, new])
        dense = causal_bias(len(new), len(cache)) if bias is None else bias
        ids = torch.as_tensor(np.asarray(tokens, np.int64), device=self.device)
        x = self.weights["model.embed_tokens.weight"][ids] * torch.tensor(
            a.embedding_scale, dtype=self.dtype
        )  # (L, E)
        masses = []
        for index, layer in enumerate(a.layers):
            x, mass = self._block(index, layer, x, new, dense, cache)
            masses.append(mass if attention == "rows" else mass.mean(dim=0))
        out = None
        if logits != "none":
            x = self._norm(x if logits == "all" else x[-1:], "model.norm")
            head = "model.embed_tokens" if a.tie_word_embeddings else "lm_head"
            y = self._linear(x, head).float() * a.logits_scale  # (L, V)
            if a.final_logit_softcapping is not None:
                y = torch.tanh(y / a.final_logit_softcapping) * a.final_logit_softcapping
            out = self._numpy(y)
        return Forward(out, self._numpy(torch.stack(masses)) if attention else None)

    def _block(
        self,
        index: int,
        layer: Layer,
        x: torch.Tensor,
        positions: Ints,
        bias: Float32s,
        cache: TorchCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a, prefix = self.architecture, f"model.layers.{index}"
        before, after = a.norm_placement in ("pre", "sandwich"), a.norm_placement in ("post", "sandwich")
        y = self._norm(x, f"{prefix}.input_layernorm") if before else x
        y, mass = self._attention(index, layer, y, positions, bias, cache)
        y = self._norm(y, f"{prefix}.post_attention_layernorm") if after else y
        x = x + y * a.residual_scale
        second = "post_attention_layernorm" if a.norm_placement == "pre" else "pre_feedforward_layernorm"
        y = self._norm(x, f"{prefix}.{second}") if before else x
        gate = ACTIVATIONS[a.hidden_act](self._linear(y, f"{prefix}.mlp.gate_proj"))
        y = self._linear(gate * self._linear(y, f"{prefix}.mlp.up_proj"), f"{prefix}.mlp.down_proj")
        y = self._norm(y, f"{prefix}.post_feedforward_layernorm") if after else y
        return x + y * a.residual_scale, mass

    def _attention(
        self,
        index: int,
        layer: Layer,
        x: torch.Tensor,
        positions: Ints,
        bias: Float32s,
        cache: TorchCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a, name = self.architecture, f"model.layers.{index}.self_attn"
        q, k, v = (self._linear(x, f"{name}.{part}_proj") for part in "qkv")
        if a.qk_norm == "projection":
            q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
        q, k, v = (t.view(len(x), -1, a.head_dim) for t in (q, k, v))  # (L, heads, D)
        if a.qk_norm == "head":
            q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
        if layer.rope is not None:
            q, k = (self._rotate(t, a.ropes[layer.rope], positions, cache) for t in (q, k))
        keys, values = cache.append(index, k.transpose(0, 1), v.transpose(0, 1))  # (K, S, D)
        keys, values = (
            t.repeat_interleave(a.num_attention_heads // a.num_key_value_heads, 0) for t in (keys, values)
        )
        scores = q.transpose(0, 1) @ keys.transpose(1, 2) * a.scale  # (H, L, S)
        if a.attention_logit_softcapping is not None:
            scores = torch.tanh(scores / a.attention_logit_softcapping) * a.attention_logit_softcapping
        seen = window_bias(bias, positions, cache.positions, layer.sliding_window)
        weights = torch.softmax((scores + torch.as_tensor(seen, device=self.device)).float(), dim=-1)
        out = (weights.to(self.dtype) @ values).transpose(0, 1).reshape(len(x), -1)
        return self._linear(out, f"{name}.o_proj"), weights.mean(dim=0)

    def _rotate(self, x: torch.Tensor, rope: Rope, positions: Ints, cache: TorchCache) -> torch.Tensor:
        """x (L, heads, D): dims (i, i + rotated / 2) turned by the angle of the row's position."""
        turn, factor = angles(rope, positions, int(cache.positions.max()) + 1)
        angle = torch.from_numpy(turn).to(self.device)[:, None]  # (L, 1, rotated / 2)
        cos, sin = torch.cos(angle) * factor, torch.sin(angle) * factor
        half = turn.shape[1]
        y = x.float()
        first, second, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.architecture.rms_norm_eps)
        return (y * (self.weights[f"{name}.weight"].float() + self.architecture.norm_offset)).to(x.dtype)

    @staticmethod
    def _numpy(x: torch.Tensor) -> Float32s:
        result: Float32s = x.float().cpu().numpy()
        return result
