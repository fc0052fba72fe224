"""Attention, MLP and experts of the reference, as functions of one layer's weights.

Nothing is fused or reordered here, but attention on CUDA where nobody asks for its shares. Letters as in
transformer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch

from tempo_mlx.architecture.architecture import Architecture, Attention, Experts, Mlp
from tempo_mlx.arrays import Float32s, Ints
from tempo_mlx.model.rope import angles
from tempo_mlx.model.torch_recurrent import Weights, linear
from tempo_mlx.model.visibility import window_bias

if TYPE_CHECKING:
    from tempo_mlx.model.torch_backend import TorchCache

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
}


@dataclass(frozen=True)
class Pass:
    """What a pass knows of its L rows: positions (L,) and the additive bias (L, S). fused: attention in one operation,
    which gives no shares."""

    architecture: Architecture
    positions: Ints
    bias: Float32s
    cache: TorchCache
    device: torch.device
    fused: bool
    biases: dict[tuple[int | None, int | None], torch.Tensor] = field(default_factory=dict)
    turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def bias_of(self, part: Attention) -> torch.Tensor:
        """(L, S), on the device: made once for the layers that see equally far."""
        key = part.sliding_window, part.attention_chunk
        if key not in self.biases:
            bias = window_bias(self.bias, self.positions, self.cache.positions, *key)
            self.biases[key] = torch.as_tensor(bias, device=self.device)
        return self.biases[key]

    def turn_of(self, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine (L, 1, rotated / 2) of one kind of rotation, made once."""
        if kind not in self.turns:
            rope = self.architecture.ropes[kind]
            turn, factor = angles(rope, self.positions, int(self.cache.positions.max()) + 1)
            angle = torch.from_numpy(turn).to(self.device)[:, None]
            self.turns[kind] = torch.cos(angle) * factor, torch.sin(angle) * factor
        return self.turns[kind]


def normed(
    a: Architecture, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm or LayerNorm over the last axis; without weights where there are none."""
    y = x.float()
    if a.norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + a.norm_eps)
    if weight is not None:
        y = y * (weight.float() + a.norm_offset)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def attention(
    part: Attention, x: torch.Tensor, weights: Weights, index: int, rows: Pass
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (L, E) -> (L, E) and the attention mass (L, S), mean over heads; None where the pass is fused."""
    cache = rows.cache
    if part.latent is not None:
        query, keys, values, gate = *latent(part, x, weights, index, rows), None
    else:
        query, gate = queries(part, x * part.input_scale, weights, rows)
        if part.kv_from is None:
            keys, values = cache.append(index, *keys_and_values(part, x * part.input_scale, weights, rows))
        else:
            keys, values = cache.parts[part.kv_from]
    if part.query_scaling is not None:
        s = part.query_scaling
        grown = 1 + s.beta * torch.log1p(
            torch.floor((torch.from_numpy(rows.positions) + s.offset).float() / s.period)
        )
        query = query * grown.to(query)[:, None, None]
    mass = None
    if rows.fused and part.softcap is None and not part.sinks:
        q, k, v = (t.transpose(0, 1)[None] for t in (query, keys, values))
        bias = rows.bias_of(part).to(query.dtype)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=part.scale, enable_gqa=True
        )
        out = mixed[0].transpose(0, 1).flatten(1)
    else:
        shares = shares_of(part, query, keys, weights, rows)
        wide = values.repeat_interleave(part.num_attention_heads // values.shape[1], 1)  # (S, H, D)
        out, mass = torch.einsum("hls,shd->lhd", shares.to(x.dtype), wide).flatten(1), shares.mean(dim=0)
    if gate is not None:
        out = out * torch.sigmoid(gate)
    return linear(out, weights, "self_attn.o_proj") * part.output_scale, mass


def shares_of(
    part: Attention, query: torch.Tensor, keys: torch.Tensor, weights: Weights, rows: Pass
) -> torch.Tensor:
    """What each head of each row gives to each slot, (H, L, S), from queries (L, H, D) and keys (S, K, D)."""
    keys = keys.repeat_interleave(part.num_attention_heads // keys.shape[1], 1)
    scores = torch.einsum("lhd,shd->hls", query.float(), keys.float()) * part.scale
    if part.softcap is not None:
        scores = torch.tanh(scores / part.softcap) * part.softcap
    scores = scores + rows.bias_of(part)
    if part.sinks:
        sink = weights["self_attn.sinks"].float()[:, None, None].expand(-1, len(query), 1)
        return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    return torch.softmax(scores, dim=-1)


def queries(
    part: Attention, x: torch.Tensor, weights: Weights, rows: Pass
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(L, H, D), and what gates the output (L, H D)."""
    y, gate = linear(x, weights, "self_attn.q_proj"), None
    if part.gated:
        y, wide = y.view(len(x), part.num_attention_heads, 2 * part.head_dim).chunk(2, dim=-1)
        y, gate = y.flatten(1), wide.flatten(1)
    return _heads(part, y, weights.get("self_attn.q_norm.weight"), rows), gate


def keys_and_values(
    part: Attention, x: torch.Tensor, weights: Weights, rows: Pass
) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, K, D) each."""
    key = linear(x, weights, "self_attn.k_proj")
    value = key if part.keys_are_values else linear(x, weights, "self_attn.v_proj")
    if part.clip_qkv is not None:
        value = value.clamp(-part.clip_qkv, part.clip_qkv)
    value = value.view(len(x), -1, part.head_dim)
    if part.value_norm:
        value = normed(rows.architecture, value, None)
    return _heads(part, key * part.key_scale, weights.get("self_attn.k_norm.weight"), rows), value


def _heads(part: Attention, y: torch.Tensor, weight: torch.Tensor | None, rows: Pass) -> torch.Tensor:
    """Queries or keys (L, heads D) as heads, normed and rotated as the layer does."""
    a = rows.architecture
    if part.qk_norm == "projection":
        y = normed(a, y, weight)
    if part.clip_qkv is not None:
        y = y.clamp(-part.clip_qkv, part.clip_qkv)
    y = y.view(len(y), -1, part.head_dim)
    norms = part.qk_norm in ("head", "heads", "plain")
    if norms and not part.norm_after_rope:
        y = normed(a, y, weight)
    if part.rope is not None:
        y = rotated(y, part.rope, rows)
    return normed(a, y, weight) if norms and part.norm_after_rope else y


def rotated(x: torch.Tensor, kind: int, rows: Pass) -> torch.Tensor:
    """x (L, heads, D): pairs turned by the angle of the row's position."""
    cos, sin = rows.turn_of(kind)
    half = cos.shape[-1]
    y, rest = x.float()[..., : 2 * half], x.float()[..., 2 * half :]
    if rows.architecture.ropes[kind].interleaved:
        first, second = y[..., ::2], y[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    else:
        first, second = y[..., :half], y[..., half:]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1).to(x.dtype)


def latent(
    part: Attention, x: torch.Tensor, weights: Weights, index: int, rows: Pass
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (L, H, nope + rope), and keys and values of all slots, made of the latent each time."""
    sizes = part.latent
    assert sizes is not None and part.rope is not None
    if sizes.q_lora_rank is None:
        query = linear(x, weights, "self_attn.q_proj")
    else:
        small = linear(x, weights, "self_attn.q_a_proj")
        small = _latent_norm(small, weights["self_attn.q_a_layernorm.weight"])
        query = linear(small, weights, "self_attn.q_b_proj")
    query = query.view(len(x), part.num_attention_heads, -1)
    plain, turning = torch.split(query, [sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=-1)
    query = torch.cat([plain, rotated(turning, part.rope, rows)], dim=-1)
    both = linear(x, weights, "self_attn.kv_a_proj_with_mqa")
    small, turning = torch.split(both, [sizes.kv_lora_rank, sizes.qk_rope_head_dim], dim=-1)
    small = _latent_norm(small, weights["self_attn.kv_a_layernorm.weight"])
    small, turning = rows.cache.append(index, small, rotated(turning[:, None], part.rope, rows))
    wide = linear(small, weights, "self_attn.kv_b_proj").view(len(small), part.num_attention_heads, -1)
    key, value = torch.split(wide, [sizes.qk_nope_head_dim, sizes.v_head_dim], dim=-1)
    return query, torch.cat([key, turning.expand(-1, key.shape[1], -1)], dim=-1), value


def _latent_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()).to(x.dtype)


def mlp(part: Mlp, x: torch.Tensor, weights: Weights) -> torch.Tensor:
    up = linear(x, weights, "mlp.up_proj")
    if part.gated:
        gate = linear(x, weights, "mlp.gate_proj") * part.gate_scale
        if part.sparsity:
            cut = gate.mean(-1, keepdim=True) + gate.std(
                -1, keepdim=True, unbiased=False
            ) * NormalDist().inv_cdf(part.sparsity)
            gate = torch.relu(gate - cut)
        up = ACTIVATIONS[part.hidden_act](gate) * up
    elif part.hidden_act == "xielu":
        up = xielu(up, weights["mlp.act_fn.alpha_p"], weights["mlp.act_fn.alpha_n"])
    else:
        up = ACTIVATIONS[part.hidden_act](up)
    y = linear(up, weights, "mlp.down_proj") * part.output_scale
    return y * torch.sigmoid(linear(x, weights, "mlp.row_gate")) if part.row_gate else y


def xielu(x: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """Source: arXiv 2411.13010."""
    p, n = torch.nn.functional.softplus(positive), beta + torch.nn.functional.softplus(negative)
    below = torch.expm1(torch.clamp(x, max=-1e-6)) - x
    return torch.where(x > 0, p * x * x + beta * x, n * below + beta * x)


def experts(
    part: Experts, x: torch.Tensor, weights: Weights, a: Architecture, seen: torch.Tensor
) -> torch.Tensor:
    """x (L, E) -> (L, E); the router sees `seen` (L, E), which is x but in Gemma 4."""
    chosen, shares = route(part, seen, weights, a)
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for place, share in zip(chosen[row].tolist(), shares[row], strict=True):
            given = x[row] * share if part.input_scaled else x[row]
            y = _expert(part, given, weights, place)
            out[row] += y if part.input_scaled else y * share
    return out


def _expert(part: Experts, x: torch.Tensor, weights: Weights, place: int) -> torch.Tensor:
    def of(name: str, y: torch.Tensor) -> torch.Tensor:
        bias = weights[f"experts.{name}.bias"][place] if part.bias else None
        return torch.nn.functional.linear(y, weights[f"experts.{name}.weight"][place], bias)

    up = of("up_proj", x)
    if not part.gated:
        return of("down_proj", ACTIVATIONS[part.hidden_act](up))
    gate = of("gate_proj", x)
    if part.limit is not None:  # gpt-oss
        gate, up = gate.clamp(max=part.limit), up.clamp(-part.limit, part.limit)
        return of("down_proj", (up + 1) * gate * torch.sigmoid(gate * part.alpha))
    return of("down_proj", ACTIVATIONS[part.hidden_act](gate) * up)


def route(
    part: Experts, x: torch.Tensor, weights: Weights, a: Architecture
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each row (L, active), best first, and their weights. Ties go to the lower number."""
    if part.own_norm:
        x = normed(a, x, None) * weights["router.scale"] * a.hidden_size**-0.5
    scores = torch.nn.functional.linear(
        x.float(), weights["router.weight"].float(), weights.get("router.bias")
    )
    if part.router == "sparsemixer":
        return sparsemixer(scores, part.jitter)
    if part.router == "chosen":
        chosen = best(scores, part.active)
        return chosen, torch.softmax(scores.gather(1, chosen), dim=-1)
    shares = torch.sigmoid(scores) if part.router == "sigmoid" else torch.softmax(scores, dim=-1)
    ranking = shares + weights["router.correction"] if part.correction else shares
    if part.groups > 1:
        grouped = ranking.view(len(x), part.groups, -1)
        good = grouped.topk(part.group_top, dim=-1).values.sum(dim=-1)  # (L, groups)
        open_groups = torch.zeros_like(good).scatter(1, best(good, part.groups_active), 1.0)
        closed = open_groups.repeat_interleave(grouped.shape[-1], 1) == 0
        ranking = ranking.masked_fill(closed, -math.inf)
    chosen = best(ranking, part.active)
    shares = shares.gather(1, chosen)
    if part.normalised:
        shares = shares / (shares.sum(dim=-1, keepdim=True) + 1e-20)
    shares = shares * part.scale
    return chosen, shares * weights["router.per_expert_scale"][chosen] if part.own_norm else shares


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :count]


def sparsemixer(scores: torch.Tensor, jitter: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Phi-3.5-MoE's choice of two; source: arXiv 2409.12136."""
    chosen, shares, left = [], [], scores
    for _ in range(2):
        top = left.max(dim=-1, keepdim=True).values
        near = (top - scores) / scores.abs().clamp(min=top) <= 2 * jitter
        place = best(left, 1)
        chosen.append(place)
        shares.append(torch.softmax(left.masked_fill(~near, -math.inf), dim=-1).gather(1, place))
        left = left.scatter(1, place, -math.inf)
    return torch.cat(chosen, dim=1), torch.cat(shares, dim=1)
