"""How a configuration follows from what was given: presets, shortcuts, and what one setting implies about another.

Shortcuts are further spellings, most of them the original tool's, that set one of the settings; a `GenerateConfig`
never holds one. Run files of version 0.1.0 do, and `upgrade` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tempo_mlx.config import SELECTIONS, USES, GenerateConfig, unused
from tempo_mlx.errors import ConfigError
from tempo_mlx.settings import Checked, canonical, met, row, settings_of

PRESETS: Mapping[str, Mapping[str, object]] = {
    "lineage": {},
    "original": {"attend": "all", "combine": "last", "pruning_signal": "attention"},
    "branches": {"decoder": "tree"},
    "plain": {"decoder": "plain"},
}

# Defaults that a decoder has of its own.
OWN: Mapping[str, Mapping[str, object]] = {"enumerate": {"merge_length": 10}}

# Of answers in a conversation, and of a question: an answer is a short text, and the rare ones are asked for too.
ANSWER_TOKENS = 512
ASKED: Mapping[str, Any] = {
    "decoder": "enumerate", "leaves": 16, "coverage": 0.95, "threshold": 0.001, "max_tokens": ANSWER_TOKENS,
}  # fmt: skip
# Where a program tests the texts: of eight diverse beams more pass than of eight leaves (docs/tasks.md).
VERIFIED: Mapping[str, Any] = {"decoder": "diverse-beam", "beam_width": 8}

# Flags of the original: ACCEPTED name what always holds here, REFUSED what does not exist here (and why).
ACCEPTED = ("--no-lci-dynamic-threshold", "--no-use-lci-dynamic-threshold", "--no-preserve-isolated-tokens")
REFUSED: Mapping[str, str] = {
    "--use-lci-dynamic-threshold": "has no counterpart; move the threshold with --dynamic-threshold",
    "--disable-kv-cache": "would change nothing but the speed, since cached rows are exact; leave it out",
    "--disable-kv-cache-consistency": "is not needed, since cache and lattice always agree; leave it out",
    "--use-cprofile": "is not built in; use --profile, or python -m cProfile -m tempo_mlx",
}


@dataclass(frozen=True)
class Switch:
    """What a shortcut sets: `setting` to `on`, unless it is given; switched off, to `off`.

    exactly: nothing but `on` will do, and switched off it says nothing.
    """

    setting: str
    on: object
    off: object = None
    exactly: bool = False


SWITCHES: Mapping[str, Switch] = {
    "default_mode": Switch("decoder", "plain", exactly=True),
    "use_mcts": Switch("decoder", "mcts", exactly=True),
    "dynamic_threshold": Switch("final_threshold", 1.0),
    "use_relu": Switch("relu_activation_point", 0.5),
    "use_pruning": Switch("pruning_strategy", "hybrid"),
    "use_retroactive_pruning": Switch("pruning_signal", "posterior"),
    "relative_attention": Switch("relative_threshold", 0.5, off=0.0),
    "sigmoid_threshold": Switch("sigmoid_steepness", 10.0, off=0.0),
}


def _shortcut(name: str, help: str, *aliases: str) -> Any:
    """A row in the group and with the audience of what it sets."""
    switch = SWITCHES[name]
    target = settings_of(GenerateConfig)[switch.setting]
    same = f"{help} The same as {target.flag} {switch.on}"
    if not switch.exactly:
        off = "none" if switch.off is None else switch.off
        same += f", where that is not given; --no-{name.replace('_', '-')} sets it to {off}"
    return row(
        None, target.row.group, same + ".", target.row.audience, aliases=aliases, default_text="not given"
    )


@dataclass(frozen=True)
class Shortcuts(Checked):
    """Settings that set others; `resolve` replaces them."""

    preset: Literal["lineage", "original", "branches", "plain"] | None = row(
        None, "Presets", "A group of defaults at once; single settings override it.", default_text="lineage"
    )
    default_mode: bool | None = _shortcut("default_mode", "Ordinary decoding, no TEMPO.")
    use_mcts: bool | None = _shortcut("use_mcts", "Monte Carlo tree search.")
    dynamic_threshold: bool | None = _shortcut("dynamic_threshold", "Move the threshold.")
    use_relu: bool | None = _shortcut("use_relu", "A ramp instead of a Bezier curve.")
    use_pruning: bool | None = _shortcut("use_pruning", "Drop candidates before they join the set.")
    use_retroactive_pruning: bool | None = _shortcut(
        "use_retroactive_pruning", "Remove members of earlier sets.", "--use-retroactive-removal"
    )
    relative_attention: bool | None = _shortcut(
        "relative_attention", "Hold attention against the mean of its set, too.", "--use-relative-attention"
    )
    sigmoid_threshold: bool | None = _shortcut(
        "sigmoid_threshold", "Decide by a sigmoid.", "--use-sigmoid-threshold"
    )


_KNOWN = {**settings_of(GenerateConfig), **settings_of(Shortcuts)}


def resolve(explicit: Mapping[str, object], ambient: Mapping[str, object] | None = None) -> GenerateConfig:
    """The configuration that follows from the settings a user gave.

    explicit: settings and shortcuts by name; one that the decoder in force cannot use is an error.
    ambient: weaker ones (the environment); they are dropped where the decoder, or another setting, leaves
    them without effect.

    Raises ConfigError with one sentence that names the setting and the remedy.
    """
    given, weak = canonical(explicit, _KNOWN), canonical(ambient or {}, _KNOWN)
    named = [source.pop("preset", None) for source in (given, weak)]
    preset = PRESETS[str(named[0] or named[1] or "lineage")]
    switched_on = [(source, _switch(source)) for source in (given, weak)]
    for source in (weak, given):
        source.update(_implied(source, {**preset, **weak, **given}))
        source.update(_selection(source, {**preset, **weak, **given}))
    for source, switches in switched_on:
        for switch in switches:
            value = {**preset, **weak, **given}.get(switch.setting, _default(switch.setting))
            source.setdefault(switch.setting, switch.on if value == switch.off else value)
    values: dict[str, Any] = {**preset, **weak, **given}
    values = {**OWN.get(str(values.get("decoder")), {}), **values}
    for name in [name for name in values if name not in given and _idle(name, values)]:
        del values[name]
    for name, value in values.items():
        asks = value != _default(name)  # a default asks for nothing
        if asks and (problem := _idle(name, values)):
            raise ConfigError(_rivals(name, explicit) or problem)
    return GenerateConfig(**values)


def _idle(name: str, values: Mapping[str, Any]) -> str | None:
    """Why a setting has no effect among `values`; a moving threshold, too, has none where no set is formed by it."""
    selection, target = (values.get(other, _default(other)) for other in ("selection", "dynamic_target"))
    if name == "final_threshold" and selection != "threshold" and target == "selection":
        return (
            f"final_threshold has no effect with selection {selection}; choose --selection threshold, or "
            "--dynamic-target pruning, or leave it out."
        )
    return unused(name, values)


def _rivals(name: str, explicit: Mapping[str, object]) -> str | None:
    """That no decoder takes a setting and another given one, where neither was told which decoder to take."""
    settings = settings_of(GenerateConfig)
    able = settings[name].row.decoders
    if able is None or "decoder" in explicit:
        return None
    for other in (other for other in explicit if other in settings):
        row = settings[other].row
        if "decoder" in row.implies and not {*able} & {*(row.decoders or ())}:
            return f"{name} and {other} are for different decoders; leave one of them out."
    return None


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config` of a run file of any version under today's names."""
    values = dict(config)
    for switch in _switch(values, strict=False):
        values.setdefault(switch.setting, switch.on)
    if "logit_bias" not in values:  # of version 0.1.0, where these were selections and nothing else
        for selection, (setting, _) in SELECTIONS.items():
            if values.get("selection") != selection:
                values.pop(setting, None)
    return values


def _switch(values: dict[str, Any], *, strict: bool = True) -> list[Switch]:
    """Take the shortcuts out of `values`, do what those say that are off or exact, and return the others: that are on.

    strict: one that contradicts the setting is an error; else it wins.
    """
    switched_on = []
    for name, switch in SWITCHES.items():
        on = values.get(name)
        if on is not None and not isinstance(on, bool):
            continue  # of a file that came from anywhere; whoever reads it will refuse the name
        values.pop(name, None)
        if on and not switch.exactly:
            switched_on.append(switch)
        elif on or (on is False and not switch.exactly):
            target = switch.on if on else switch.off
            value = values.get(switch.setting, target)
            if strict and value not in ((target,) if on else (target, switch.on)):
                raise ConfigError(
                    f"{switch.setting} is {value}, which {name} contradicts ({target}); keep one of them."
                )
            values[switch.setting] = target
    return switched_on


def _implied(source: Mapping[str, object], in_force: Mapping[str, Any]) -> dict[str, object]:
    """What the settings of `source` imply about others that it does not name and that are not so already."""
    settings = settings_of(GenerateConfig)
    found: dict[str, list[tuple[object, ...]]] = {}
    for name, value in source.items():
        row = settings[name].row
        for other in row.implies if value is not False else ():
            allowed: tuple[object, ...] = (
                row.decoders if other == "decoder" else (row.needs or {})[other]
            ) or ()
            if other not in source and not met(
                settings[other], in_force.get(other, _default(other)), allowed
            ):
                found.setdefault(other, []).append(allowed or (True,))
    common = {other: [v for v in sets[0] if all(v in each for each in sets)] for other, sets in found.items()}
    return {other: values[0] for other, values in common.items() if values}


def _selection(source: Mapping[str, object], in_force: Mapping[str, Any]) -> dict[str, object]:
    """Where sets are formed, the first of top_p, top_k and min_p forms them, unless told what does; others truncate."""
    said = {"selection", "threshold"} & source.keys()
    if said or "selection" not in USES[in_force.get("decoder", _default("decoder"))]:
        return {}
    named = {setting: selection for selection, (setting, _) in SELECTIONS.items()}
    first = next((name for name in source if name in named and source[name] is not None), None)
    return {} if first is None else {"selection": named[first]}


def _default(name: str) -> Any:
    return settings_of(GenerateConfig)[name].default
