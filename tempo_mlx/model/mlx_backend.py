"""From a checkpoint to an MLX Transformer: device, dtype, and the layout the blocks compute with."""

from __future__ import annotations

from collections.abc import Callable

from tempo_mlx.architecture.architecture import Architecture
from tempo_mlx.errors import BackendError
from tempo_mlx.mlx import mx
from tempo_mlx.model import device as device_rules
from tempo_mlx.model.cache import group_size
from tempo_mlx.model.failures import told_failures
from tempo_mlx.model.pages import large_pages
from tempo_mlx.model.reader import Reader
from tempo_mlx.model.settle import settle
from tempo_mlx.model.transformer import Block, Transformer
from tempo_mlx.weights import Checkpoint
from tempo_mlx.weights.memory import estimate_memory
from tempo_mlx.weights.precision import Asked, choose
from tempo_mlx.weights.tensor import Packing

BUFFER_CACHE_BYTES = (
    512 * 2**20
)  # freed buffers MLX keeps for reuse; its own bound is nearly all of the memory


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


def choose_dtype(
    name: Asked, on_cpu: bool, checkpoint: Checkpoint, dequantize: bool = False
) -> tuple[mx.Dtype, Packing]:
    """The dtype of activations and plain weights, and which packed weights stay packed: see weights/precision.py."""
    chosen = choose(
        "cpu" if on_cpu else "gpu", checkpoint.stored, name, dequantize, cpu_packs=device_rules.cpu_packs()
    )
    return getattr(mx, chosen.dtype), chosen.packed


@told_failures()
def build(
    checkpoint: Checkpoint,
    device: str,
    dtype: Asked,
    *,
    packed: Packing | None = None,
    dequantize: bool = False,
    kv_bits: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    make_reader: Callable[[Checkpoint, mx.Dtype, Packing], Reader] | None = None,
) -> Transformer:
    """Read every weight once, layer by layer, so that little more than the model itself is ever in memory.

    packed: which quantised weights stay so; by default as `choose_dtype` says. kv_bits: of a quantised KV cache.
    progress: (layers read, of all). make_reader: what reads, where that is not every weight whole (sharding.py).
    """
    kind = choose_device(device)
    mx.set_default_device(mx.Device(kind))
    mx.set_cache_limit(0)  # while reading: what is freed is of no use to the next layer
    float_type, stay_packed = choose_dtype(dtype, device_rules.kind_of(kind) == "cpu", checkpoint, dequantize)
    packed = stay_packed if packed is None else packed
    reader = (make_reader or Reader)(checkpoint, float_type, packed)
    a = reader.architecture
    if kv_bits is not None:
        check_kv_bits(a)
    name, blocks = str(float_type).removeprefix("mlx.core."), []
    held = estimate_memory(checkpoint, dtype=name, packed=packed).weights if kind == mx.cpu else 0
    with large_pages(held + held // 8):  # and what reading takes meanwhile
        embedding, head = reader.vocabulary()
        settle(embedding, head)
        for index in range(a.num_hidden_layers):
            parts = reader.block(index)
            settle(parts)
            blocks.append(Block(a, index, parts))
            if progress is not None:
                progress(index + 1, a.num_hidden_layers)
    info = {
        **checkpoint.identity,
        "dtype": name,
        "quantization": checkpoint.quantization if packed else None,
        "kv_bits": kv_bits,
        "backend": "mlx",
        "device": "cpu" if kind == mx.cpu else ("metal" if mx.metal.is_available() else "cuda"),
    }
    norm, beside = reader.norm("model.norm"), reader.beside_layers()
    settle(norm, beside)
    mx.set_cache_limit(BUFFER_CACHE_BYTES)
    return Transformer(a, embedding, blocks, norm, head, info, float_type, kv_bits, **beside)


def wire(device: str) -> None:
    """Keep what is computed with in memory, up to what macOS recommends. Raises BackendError without Metal."""
    if choose_device(device) == mx.cpu or not mx.metal.is_available():
        raise BackendError("Memory is wired on Metal only; leave out --wired.")
    mx.set_wired_limit(int(mx.device_info(mx.gpu)["max_recommended_working_set_size"]))


def check_kv_bits(a: Architecture) -> None:
    """Raises ModelError, before anything is read, where a layer's keys cannot be quantised."""
    for layer in a.layers:
        if layer.attention is not None:
            for width in layer.attention.cached[1:]:
                if width:
                    group_size(width)
