"""Layers that keep a state, for the reference: every row's state anew from the first, in every pass.

What a cache holds of a row is what its state is made of, not the state: so removing a row is leaving it out. A row's
state is made of the states of the rows it continues (lineage.py), each with its weight.

Letters: S slots, L new rows, C channels, W kernel width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from tempo_mlx.architecture.architecture import DeltaNet, Mamba2, Recurrent, ShortConv
from tempo_mlx.model.lineage import Lineage

if TYPE_CHECKING:
    from tempo_mlx.model.torch_backend import TorchCache

Weights = Mapping[str, torch.Tensor]  # of one layer, by their names in it
Step = Callable[[int, torch.Tensor], torch.Tensor]


def recurrent(
    part: Recurrent, x: torch.Tensor, weights: Weights, index: int, cache: TorchCache, eps: float
) -> torch.Tensor:
    """x (L, E), the newest rows -> (L, E)."""
    if isinstance(part, ShortConv):
        return short_conv(part, x, weights, index, cache)
    if isinstance(part, DeltaNet):
        return delta_net(part, x, weights, index, cache, eps)
    return mamba2(part, x, weights, index, cache, eps)


def scan(lineage: Lineage, start: torch.Tensor, step: Step) -> list[torch.Tensor]:
    """The state of every slot: `step` of the slot and of the mean state of those it continues."""
    states: list[torch.Tensor] = []
    for slot in range(len(lineage)):
        slots, shares = lineage.of(slot)
        before = start
        for above, share in zip(slots.tolist(), shares.tolist(), strict=True):
            before = before + states[above] * share
        states.append(step(slot, before))
    return states


def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cache: TorchCache
) -> torch.Tensor:
    """Depthwise over what each row continues. x (S, C) of all slots, weight (C, 1, W) -> (S, C)."""
    width = weight.shape[-1]
    start = torch.zeros(width, x.shape[1], dtype=x.dtype, device=x.device)  # newest first

    def shift(slot: int, window: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[slot][None], window[:-1]])

    windows = torch.stack(scan(cache.lineage, start, shift))  # (S, W, C)
    y = (windows * weight[:, 0].T.flip(0)).sum(dim=1)
    return y if bias is None else y + bias


def linear(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def short_conv(
    part: ShortConv, x: torch.Tensor, weights: Weights, index: int, cache: TorchCache
) -> torch.Tensor:
    before, after, mixed = linear(x, weights, "conv.in_proj").chunk(3, dim=-1)
    (inputs,) = cache.append(index, before * mixed)
    y = convolution(inputs, weights["conv.conv.weight"], weights.get("conv.conv.bias"), cache)
    return linear(after * y[-len(x) :], weights, "conv.out_proj")


def delta_net(
    part: DeltaNet, x: torch.Tensor, weights: Weights, index: int, cache: TorchCache, eps: float
) -> torch.Tensor:
    rows = len(x)
    mixed = linear(x, weights, "linear_attn.in_proj_qkv")
    (inputs,) = cache.append((index, "conv"), mixed)
    y = torch.nn.functional.silu(
        convolution(inputs, weights["linear_attn.conv1d.weight"], None, cache)[-rows:]
    )
    keys = part.key_heads * part.key_dim
    query, key, value = torch.split(y, [keys, keys, part.value_heads * part.value_dim], dim=-1)
    share = part.value_heads // part.key_heads
    query = _unit(query.view(rows, part.key_heads, -1)).repeat_interleave(share, 1) * part.key_dim**-0.5
    key = _unit(key.view(rows, part.key_heads, -1)).repeat_interleave(share, 1)
    value = value.view(rows, part.value_heads, part.value_dim)
    beta = linear(x, weights, "linear_attn.in_proj_b").sigmoid()
    step = linear(x, weights, "linear_attn.in_proj_a").float() + weights["linear_attn.dt_bias"]
    decay = torch.exp(-weights["linear_attn.A_log"].float().exp() * torch.nn.functional.softplus(step))
    key, value, beta, decay = cache.append((index, "state"), key.float(), value.float(), beta.float(), decay)

    def advance(slot: int, state: torch.Tensor) -> torch.Tensor:  # (H, key_dim, value_dim)
        state = state * decay[slot][:, None, None]
        known = (state * key[slot][:, :, None]).sum(dim=1)
        change = (value[slot] - known) * beta[slot][:, None]
        return state + key[slot][:, :, None] * change[:, None, :]

    start = torch.zeros(part.value_heads, part.key_dim, part.value_dim, device=x.device)
    states = torch.stack(scan(cache.lineage, start, advance)[-rows:])
    out = (states * query.float()[..., None]).sum(dim=2)  # (L, H, value_dim)
    out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + eps) * weights["linear_attn.norm.weight"]
    gate = linear(x, weights, "linear_attn.in_proj_z").view(rows, part.value_heads, -1)
    return linear(
        (out * torch.nn.functional.silu(gate.float())).flatten(1).to(x.dtype), weights, "linear_attn.out_proj"
    )


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).sum(dim=-1, keepdim=True) + 1e-6)


def mamba2(
    part: Mamba2, x: torch.Tensor, weights: Weights, index: int, cache: TorchCache, eps: float
) -> torch.Tensor:
    rows, wide = len(x), part.groups * part.state
    before, *inner, after = part.scales
    projected = linear(x * before, weights, "mamba.in_proj")
    sizes = [part.inner, part.inner, wide, wide, part.heads]
    scale = torch.cat([torch.full((n,), s) for n, s in zip(sizes, inner, strict=True)]).to(projected)
    gate, mixed, step = torch.split(projected * scale, [part.inner, part.channels, part.heads], dim=-1)
    (inputs,) = cache.append((index, "conv"), mixed)
    y = convolution(inputs, weights["mamba.conv1d.weight"], weights.get("mamba.conv1d.bias"), cache)
    inputs, b, c = torch.split(torch.nn.functional.silu(y[-rows:]).float(), [part.inner, wide, wide], dim=-1)
    inputs = inputs.view(rows, part.heads, part.head_dim)
    share = part.heads // part.groups
    b, c = (t.view(rows, part.groups, part.state).repeat_interleave(share, 1) for t in (b, c))
    delta = torch.nn.functional.softplus(step.float() + weights["mamba.dt_bias"]).clamp(*part.time_step_limit)
    decay = torch.exp(-weights["mamba.A_log"].float().exp() * delta)  # (L, H)
    added = (inputs * delta[..., None])[..., None] * b[:, :, None, :]  # (L, H, head_dim, state)
    decay, added = cache.append((index, "state"), decay, added)

    def advance(slot: int, state: torch.Tensor) -> torch.Tensor:
        return state * decay[slot][:, None, None] + added[slot]

    start = torch.zeros(part.heads, part.head_dim, part.state, device=x.device)
    states = torch.stack(scan(cache.lineage, start, advance)[-rows:])
    out = (states * c[:, :, None, :]).sum(dim=-1) + inputs * weights["mamba.D"][:, None]
    return (
        linear(
            _gated(part, out.flatten(1), gate.float(), weights, eps).to(x.dtype), weights, "mamba.out_proj"
        )
        * after
    )


def _gated(part: Mamba2, y: torch.Tensor, gate: torch.Tensor, weights: Weights, eps: float) -> torch.Tensor:
    gate = torch.nn.functional.silu(gate)
    if part.norm is None:
        return y * gate
    if part.norm == "gated":
        y = y * gate
    parts = y.view(len(y), part.groups, -1)
    y = (parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)).flatten(1) * weights[
        "mamba.norm.weight"
    ]
    return y if part.norm == "gated" else y * gate
