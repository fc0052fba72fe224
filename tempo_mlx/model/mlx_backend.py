"""From a checkpoint to an MLX Transformer: device, dtype, and the layout the blocks compute with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tempo_mlx.errors import BackendError
from tempo_mlx.mlx import mx
from tempo_mlx.model.cache import group_size
from tempo_mlx.model.linear import Concatenated, Embedding, Linear, QuantizedLinear, RMSNorm, fuse
from tempo_mlx.model.transformer import Block, Transformer
from tempo_mlx.weights import Checkpoint, Tensor

BUFFER_CACHE_BYTES = (
    512 * 2**20
)  # freed buffers MLX keeps for reuse; its own bound is nearly all of the memory
DEQUANTIZE_BELOW_BYTES = (
    1_500_000_000  # of bf16: products of packed weights grow with the rows, bf16 ones hardly
)


def choose_device(name: str) -> mx.DeviceType:
    """`auto` is MLX's default device; `gpu`, `mps` and `cuda` need one."""
    if name == "cpu":
        return mx.cpu
    if name == "auto":
        return mx.default_device().type
    kinds = {"gpu": mx.metal.is_available() or mx.cuda.is_available(), "mps": mx.metal.is_available(),
             "cuda": mx.cuda.is_available()}  # fmt: skip
    if not kinds[name]:
        raise BackendError(
            f"This machine has no device '{name}' that MLX can use; run with --device cpu or auto."
        )
    return mx.gpu


def choose_dtype(name: str, on_cpu: bool, checkpoint: Checkpoint) -> tuple[mx.Dtype, bool]:
    """The dtype of activations and plain weights, and whether packed weights stay packed."""
    if name != "auto":
        return getattr(mx, name), False
    if on_cpu:  # MLX's half-precision and packed CPU kernels are 5 to 40 times slower than float32
        return mx.float32, False
    kind = checkpoint.tensor("model.embed_tokens.weight").kind
    small = dequantised(checkpoint.parameters)
    return (mx.bfloat16, not small) if kind == "mlx_quantized" else (getattr(mx, kind), True)


def dequantised(parameters: float) -> bool:
    """Whether a quantised model of so many numbers is computed in 16 bits on a GPU."""
    return 2 * parameters < DEQUANTIZE_BELOW_BYTES


def build(
    checkpoint: Checkpoint,
    device: str,
    dtype: str,
    *,
    packed: bool | None = None,
    kv_bits: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    make_reader: Callable[[Checkpoint, mx.Dtype, bool], Reader] | None = None,
) -> Transformer:
    """Read every weight once, layer by layer, so that little more than the model itself is ever in memory.

    packed: whether quantised weights stay so; by default as `choose_dtype` says. kv_bits: of a quantised KV cache.
    progress: (layers read, of all). make_reader: what reads, where that is not every weight whole (sharding.py).
    """
    kind = choose_device(device)
    mx.set_default_device(mx.Device(kind))
    mx.set_cache_limit(BUFFER_CACHE_BYTES)
    float_type, stay_packed = choose_dtype(dtype, kind == mx.cpu, checkpoint)
    packed = stay_packed if packed is None else packed
    reader = (make_reader or Reader)(checkpoint, float_type, packed)
    a = reader.architecture
    if kv_bits is not None:
        group_size(a.head_dim)  # raises before anything is read
    embedding, head = reader.vocabulary()
    blocks = []
    for index in range(a.num_hidden_layers):
        weights = reader.block(index)
        mx.eval(
            [p.arrays() if isinstance(p, Linear | Concatenated) else p.weight for p in weights.values() if p]
        )
        blocks.append(Block(a, index, weights))
        if progress is not None:
            progress(index + 1, a.num_hidden_layers)
    info = {
        **checkpoint.identity,
        "dtype": str(float_type).removeprefix("mlx.core."),
        "quantization": checkpoint.quantization if packed else None,
        "kv_bits": kv_bits,
        "backend": "mlx",
        "device": "cpu" if kind == mx.cpu else ("metal" if mx.metal.is_available() else "cuda"),
    }
    norm = reader.norm("model.norm")
    return Transformer(a, embedding, blocks, norm, head, info, float_type, kv_bits)


class Reader:
    """Checkpoint tensors in the layout of the blocks: q, k, v in one weight, gate and up in one."""

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype, packed: bool) -> None:
        self.checkpoint = checkpoint
        self.architecture = checkpoint.architecture
        self.dtype = dtype
        self.packed = packed

    def array(self, tensor: Tensor) -> mx.array:
        """A plain weight as an MLX array of the model's dtype."""
        if tensor.kind == "bfloat16":
            return mx.array(tensor.raw()).view(mx.bfloat16).astype(self.dtype)
        return mx.array(tensor.raw() if tensor.kind == "float16" else tensor.numpy()).astype(self.dtype)

    def linear(self, name: str, bias: bool = False) -> Linear:
        offset = self.checkpoint.tensor(f"{name}.bias") if bias else None
        return self.make_linear(self.checkpoint.tensor(f"{name}.weight"), offset)

    def make_linear(self, tensor: Tensor, bias: Tensor | None) -> Linear:
        offset = None if bias is None else self.array(bias)
        if self.packed and tensor.kind == "mlx_quantized":
            packed, scales, biases, layout = tensor.quantized()
            scale = mx.array(scales) if biases is None else mx.array(scales).astype(self.dtype)
            zero = None if biases is None else mx.array(biases).astype(self.dtype)
            return QuantizedLinear(mx.array(packed), scale, zero, layout, offset)
        return Linear(self.array(tensor), offset)

    def vocabulary(self) -> tuple[Embedding, Linear]:
        """The embedding and the head, which may be of one weight."""
        embed = self.linear("model.embed_tokens")
        head = embed if self.architecture.tie_word_embeddings else self.linear("lm_head")
        return Embedding(embed, self.dtype), head

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.norm_weight(name), self.architecture.rms_norm_eps)

    def norm_weight(self, name: str) -> mx.array:
        weight = self.checkpoint.tensor(f"{name}.weight").numpy() + np.float32(self.architecture.norm_offset)
        return mx.array(weight).astype(self.dtype)

    def block(self, index: int) -> dict[str, Any]:
        a, prefix = self.architecture, f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        norms: dict[str, RMSNorm | None] = dict.fromkeys(
            ("query_norm", "key_norm", "before_attention", "after_attention", "before_mlp", "after_mlp")
        )
        if a.qk_norm:
            norms["query_norm"] = self.norm(f"{attention}.q_norm")
            norms["key_norm"] = self.norm(f"{attention}.k_norm")
        for role, name in NORM_NAMES[a.norm_placement].items():
            norms[role] = self.norm(f"{prefix}.{name}")
        return {
            "qkv": fuse([self.linear(f"{attention}.{part}_proj", a.qkv_bias) for part in ("q", "k", "v")]),
            "output": self.linear(f"{attention}.o_proj", a.output_bias),
            "gate_up": fuse([self.linear(f"{mlp}.{part}_proj", a.mlp_bias) for part in ("gate", "up")]),
            "down": self.linear(f"{mlp}.down_proj", a.mlp_bias),
            **norms,
        }


NORM_NAMES = {
    "pre": {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"},
    "post": {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"},
    "sandwich": {
        "before_attention": "input_layernorm",
        "after_attention": "post_attention_layernorm",
        "before_mlp": "pre_feedforward_layernorm",
        "after_mlp": "post_feedforward_layernorm",
    },
}
