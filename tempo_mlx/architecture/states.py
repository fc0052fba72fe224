"""From a config's values to the recurrent part of a layer; and how much a cache keeps of such layers."""

from __future__ import annotations

from typing import Any

from tempo_mlx.architecture.architecture import Architecture, DeltaNet, Mamba2, ShortConv
from tempo_mlx.architecture.config import Config

JOURNAL = 256  # rows after which the base moves on, where it can
CHECKPOINTS = 4
HELD_BYTES = 512 * 2**20  # of states that are held beside the newest rows'


def bytes_of_states(a: Architecture, slots: int, width: int) -> int:
    """What a cache of so many slots, run in sets of `width`, holds at most: the newest rows' states and those that
    replays begin from, older ones as far as there is room, and the journal (model/states.py)."""
    parts = [layer.recurrent for layer in a.layers if layer.recurrent is not None]
    state, row = 4 * sum(part.numbers for part in parts), 4 * sum(part.inputs for part in parts)
    needed = state * (2 * width + CHECKPOINTS)
    return needed + min(HELD_BYTES, state * slots) + row * min(slots, 2 * JOURNAL)


def _require_silu(values: Config) -> None:
    """The activation of convolutions and gates, where configs name one for it or share the MLPs'."""
    values.one_of("mamba_hidden_act" if "mamba_hidden_act" in values else "hidden_act", ("silu", "swish"))


def delta_net(values: Config) -> DeltaNet:
    _require_silu(values)
    return DeltaNet(
        key_heads=values.integer("linear_num_key_heads"),
        value_heads=values.integer("linear_num_value_heads"),
        key_dim=values.integer("linear_key_head_dim"),
        value_dim=values.integer("linear_value_head_dim"),
        kernel=values.integer("linear_conv_kernel_dim"),
    )


def short_conv(values: Config) -> ShortConv:
    kernel = values.integer("conv_L_cache")
    return ShortConv(values.integer("hidden_size"), kernel, values.flag("conv_bias"))


def mamba2(values: Config) -> Mamba2:
    """Under the names of Granite, Bamba and Falcon (mamba_d_head), or of Nemotron and Mamba itself."""
    _require_silu(values)
    long = "mamba_d_head" in values or "mamba_n_heads" in values

    def of(ours: str, theirs: str) -> int:
        return values.integer(ours if long else theirs)

    heads = of("mamba_n_heads", "mamba_num_heads" if "mamba_num_heads" in values else "num_heads")
    head_dim = (
        mamba_head_dim(values, heads) if long
        else values.integer("mamba_head_dim" if "mamba_head_dim" in values else "head_dim")
    )  # fmt: skip
    norm: Any = "gated"
    scales: tuple[float, ...] = (1.0,) * 7
    if "mamba_rms_norm" in values:
        before = values.flag("mamba_norm_before_gate", True)
        norm = None if not values.flag("mamba_rms_norm") else "norm_first" if before else "gated"
        inner = values.numbers("ssm_multipliers", 5)
        scales = (values.number("ssm_in_multiplier"), *inner, values.number("ssm_out_multiplier"))
    return Mamba2(
        heads=heads,
        head_dim=head_dim,
        state=of("mamba_d_state", "ssm_state_size" if "ssm_state_size" in values else "state_size"),
        groups=of("mamba_n_groups", "n_groups"),
        kernel=of("mamba_d_conv", "conv_kernel"),
        conv_bias=values.flag("mamba_conv_bias" if long else "use_conv_bias", True),
        bias=values.flag("mamba_proj_bias" if long else "use_bias"),
        norm=norm,
        time_step_limit=_limits(values),
        scales=scales,
    )


def mamba_head_dim(values: Config, heads: int) -> int:
    if values.values.get("mamba_d_head") not in (None, "auto"):
        return values.integer("mamba_d_head")
    if "mamba_d_ssm" in values:
        return values.integer("mamba_d_ssm") // heads
    return values.integer("mamba_expand") * values.integer("hidden_size") // heads


def _limits(values: Config) -> tuple[float, float]:
    stated = values.values.get("time_step_limit")
    if not isinstance(stated, (list, tuple)) or len(stated) != 2:
        return 0.0, float("inf")
    numbers = [float("inf") if isinstance(each, dict) else each for each in stated]
    if not all(type(each) in (int, float) and each >= 0 for each in numbers):
        raise values.fail("time_step_limit", "a least and a most time step")
    return float(numbers[0]), float(numbers[1])
