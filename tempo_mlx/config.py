"""The settings of a run: what they are called, what they allow, who needs them, and what fits together.

`GenerateConfig` holds resolved values only, so that `GenerateConfig(**run.config)` reproduces a run;
tempo_mlx/resolution.py makes one from what a user gave. Which model runs where is tempo_mlx/load_config.py, what
the command line reads, shows and saves tempo_mlx/output_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from tempo_mlx.errors import ConfigError
from tempo_mlx.settings import Audience, Checked, row, settings_of, without_effect

# Every decoder, and what it uses of the settings that not all do. A new one needs a line here, and rows below where
# it brings settings of its own.
USES: Mapping[str, frozenset[str]] = {
    "superposed": frozenset({"temperature", "threshold", "selection", "width", "sets", "thinking", "exits"}),
    "tree": frozenset(
        {"text", "temperature", "threshold", "branches", "merging", "gate", "thinking", "exits"}
    ),
    "enumerate": frozenset({"text", "threshold", "selection", "merging", "gate", "leaves"}),
    "mcts": frozenset({"text", "temperature", "threshold", "selection", "width", "mcts"}),
    "beam": frozenset({"text", "beams"}),
    "diverse-beam": frozenset({"text", "beams", "diversity"}),
    "sample": frozenset({"text", "temperature", "threshold", "selection", "beams", "sampling"}),
    "plain": frozenset({"text", "temperature", "thinking", "exits"}),
}
# Settings of which one at most says what texts may be.
GRAMMARS = ("json_schema", "regex", "choices", "grammar")
# What forms a set, and the setting that says how much where that is not given.
SELECTIONS: Mapping[str, tuple[str, float]] = {
    "min-p": ("min_p", 0.1), "top-p": ("top_p", 0.9), "top-k": ("top_k", 8),
}  # fmt: skip


def _using(what: str) -> tuple[str, ...]:
    """The decoders that use it."""
    return tuple(name for name, used in USES.items() if what in used)


def _input(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Input", help, **rest)


def _set(default: object, help: str, what: str = "sets", **rest: Any) -> Any:
    return row(default, "Selection", help, decoders=_using(what), **rest)


def _schedule(default: object, help: str, audience: Audience = "ablation", **rest: Any) -> Any:
    """Where it moves, a threshold is a number from 0 to 1, and so are its curve's control values."""
    return row(default, "Schedule", help, audience, decoders=_using("sets"), **rest)


def _pruning(default: object, help: str, *strategies: str, **rest: Any) -> Any:
    needs = {"pruning_strategy": strategies} if strategies else None
    return row(default, "Pruning before append", help, "study", decoders=_using("sets"), needs=needs, **rest)


def _retro(default: object, help: str, audience: Audience, *signals: str, **rest: Any) -> Any:
    needs = {"pruning_signal": signals}
    return row(
        default, "Retroactive pruning", help, audience, decoders=_using("sets"), **{"needs": needs, **rest}
    )


def _search(default: object, help: str, what: str, audience: Audience = "study", **rest: Any) -> Any:
    return row(default, "Search", help, audience, decoders=_using(what), **rest)


def _control(default: object, help: str, audience: Audience = "everyday", **rest: Any) -> Any:
    return row(default, "Control", help, audience, **{"default_text": "off", **rest})


def _text(default: object, help: str, audience: Audience = "everyday", **rest: Any) -> Any:
    """Of decoders whose rows each follow one text; given alone, of the plain one."""
    decoders = ("plain", *(name for name in _using("text") if name != "plain"))
    return _control(default, help, audience, decoders=decoders, **{"implies": ("decoder",), **rest})


def _window(penalty: str) -> Any:
    needs, bounds = {penalty: ()}, {"minimum": 1, "maximum": 1_000_000}
    return _text(
        20, "How many tokens it looks back.", "study", implies=(), needs=needs, default_text=None, **bounds
    )


def _exit(default: object, help: str, audience: Audience = "study", **rest: Any) -> Any:
    needs = {"early_exit": (), **rest.pop("needs", {})}
    return row(default, "Early exit", help, audience, decoders=_using("exits"), needs=needs, **rest)


# fmt: off
@dataclass(frozen=True)
class GenerateConfig(Checked):
    """Everything that changes a run. Ranges and combinations are checked at construction."""

    chat: bool = _input(False, "Apply the model's chat template to the prompt.", aliases=("/--raw",))
    system: str | None = _input(
        None, "System message of the chat template.", needs={"chat": ()}, aliases=("-s", "--system-prompt"),
    )
    template_variables: tuple[str, ...] = _input(
        (), "Variable of the chat template, as NAME=VALUE (reasoning_effort=high, tools=[...]); may be given several "
        "times.", aliases=("--template-variable",), pairs=True, needs={"chat": ()}, implies=("chat",),
    )
    enable_thinking: bool = _input(
        False, "Deep-thinking mode; implies --chat. Reasoning is kept apart from the answer, on stderr.",
        decoders=_using("thinking"), needs={"chat": ()}, implies=("chat",),
    )
    thinking_budget: int | None = _input(
        None, "Close the reasoning after so many steps.", minimum=1, maximum=1_000_000,
        decoders=_using("thinking"), needs={"enable_thinking": ()},
    )

    max_tokens: int = row(100, "Lengths", "A text's length in tokens.", minimum=1, maximum=1_000_000, aliases=("-n",))
    min_steps: int = row(0, "Lengths", "Steps before the text may end.", "study", minimum=0, maximum=1_000_000)
    stop: tuple[str, ...] = row((), "Lengths", "Stop when this text appears; may be given several times.")
    seed: int = row(42, "Lengths", "Seed of everything random.", minimum=0, maximum=2**63 - 1)
    temperature: float = row(
        1.0, "Lengths", "Divides the logits; 0 keeps the best token only.", minimum=0, maximum=100,
        decoders=_using("temperature"), aliases=("-t", "--temp"),
    )

    threshold: float = _set(
        0.1, "Keep every token whose probability is at least this; the best is always kept.", "threshold",
        minimum=0, maximum=1, aliases=("--selection-threshold",), needs={"selection": ("threshold",)},
        implies=("selection",),
    )
    max_parallel_tokens: int | Literal["auto"] = _set(
        8, "Most tokens in a set; auto chooses by the device's measured cost of rows.", "width", minimum=1,
        maximum=256,
    )
    selection: Literal["threshold", "min-p", "top-p", "top-k"] = _set(
        "threshold", "Which tokens are kept: by --threshold, --min-p, --top-p or --top-k.", "selection",
        audience="study",
    )
    combine: Literal["mix", "last", "mean", "product", "max"] = _set(
        "mix", "How a set's logits rows become one next-token distribution.", audience="ablation",
    )
    attend: Literal["lineage", "all", "weighted", "best"] = _set(
        "lineage", "How strongly a new row sees the members of earlier sets; all is the original's rule.",
        audience="study",
    )
    carry: Literal["best", "lineage"] = _set(
        "best", "Whose state recurrent layers carry on: the likeliest parent's, or the mean of all.", audience="study",
    )
    allow_intraset_token_visibility: bool = _set(
        False, "Let members of a set attend to each other; implies --attend weighted.", audience="ablation",
        aliases=("/--isolate",), needs={"attend": ("weighted", "all")}, implies=("attend",),
    )
    custom_rope: bool = _set(
        True, "Members of a set share one position; off gives each its own.", audience="ablation",
        aliases=("--use-custom-rope",),
    )

    final_threshold: float | None = _schedule(
        None, "Move the threshold to this one in the course of the run.", "study", minimum=0, maximum=1,
        default_text="off",
    )
    dynamic_target: Literal["selection", "pruning", "both"] = _schedule(
        "selection", "Which threshold moves.", needs={"final_threshold": ()},
    )
    bezier_p1: float = _schedule(
        0.2, "First inner control value of the Bezier curve.", minimum=0, maximum=1,
        needs={"final_threshold": (), "relu_activation_point": (None,)},
    )
    bezier_p2: float = _schedule(
        0.8, "Second inner control value of the Bezier curve.", minimum=0, maximum=1,
        needs={"final_threshold": (), "relu_activation_point": (None,)},
    )
    relu_activation_point: float | None = _schedule(
        None, "Move it along a ramp that starts after this share of the run, instead of a Bezier curve.", minimum=0,
        maximum=1, needs={"final_threshold": ()}, default_text="off",
    )

    pruning_strategy: Literal["coherence", "diversity", "hybrid"] | None = _pruning(
        None,
        "Drop candidates before they join the set. coherence: keep what the context's attention supports; diversity: "
        "keep the best of each cluster of embeddings; hybrid: diversity, then coherence.",
        default_text="off",
    )
    coherence_threshold: float = _pruning(
        0.7, "Least support a candidate needs, relative to the best supported.", "coherence", "hybrid",
        minimum=0, maximum=1,
    )
    diversity_clusters: int = _pruning(3, "Number of clusters.", "diversity", "hybrid", minimum=1, maximum=256)

    pruning_signal: Literal["posterior", "attention", "probability", "random"] | None = _retro(
        None, "Let what came later remove members of earlier sets, by this: posterior is the measured best; "
        "probability and random are for ablation.", "study", needs=None, default_text="off",
    )
    posterior_threshold: float = _retro(
        0.1, "Members whose score is under this go (signals posterior, probability and random).", "study",
        "posterior", "probability", "random", minimum=0, maximum=1,
    )
    relative_posterior: bool = _retro(
        False, "Hold the score against the threshold times the largest of its set.", "ablation", "posterior",
        "probability", "random",
    )
    attention_threshold: float = _retro(
        0.01, "Members that receive less attention go; given alone it switches pruning by attention on.", "ablation",
        "attention", minimum=0, maximum=1, implies=("pruning_signal",),
    )
    relative_threshold: float = _retro(
        0.5, "Share of its set's mean attention a member needs; 0: none.", "ablation", "attention", minimum=0,
        maximum=1,
    )
    pruning_window: int = _retro(8, "Sets to look back.", "study", minimum=1, maximum=1_000_000)
    num_layers_to_use: int | None = _retro(
        None, "Use the attention of the last so many layers.", "ablation", "attention", minimum=1, maximum=1024,
        default_text="all",
    )
    multi_scale_attention: bool = _retro(
        True, "Weigh the layers' attention, later ones more.", "ablation", "attention",
        aliases=("--use-multi-scale-attention",),
    )
    sigmoid_steepness: float = _retro(
        10.0, "Decide by a sigmoid around the threshold, so steep; 0: by the threshold itself.", "ablation",
        "attention", minimum=0, maximum=1e6,
    )
    complete_removal_mode: Literal["keep_token", "keep_unattended", "remove_position"] = _retro(
        "keep_token", "What happens when a whole set would go.", "ablation",
    )

    logit_bias: tuple[str, ...] = _control(
        (), "Add to a token's logit, as ID=BIAS; may be given several times.", "study", pairs=True,
    )
    repetition_penalty: float = _text(
        1.0, "Divide the logits of tokens among the last ones, the prompt's included, by this; multiply negative ones.",
        minimum=0.01, maximum=100,
    )
    repetition_context_size: int = _window("repetition_penalty")
    presence_penalty: float = _text(
        0.0, "Subtract this from the logits of tokens among the last ones.", minimum=-100, maximum=100,
    )
    presence_context_size: int = _window("presence_penalty")
    frequency_penalty: float = _text(
        0.0, "Subtract this from the logits of tokens among the last ones, for each time they are there.",
        minimum=-100, maximum=100,
    )
    frequency_context_size: int = _window("frequency_penalty")
    top_p: float | None = _control(
        None, "Choose among the fewest tokens that together have this probability.", above=0, maximum=1,
    )
    top_k: int | None = _control(None, "Choose among so many best tokens.", minimum=1, maximum=1_000_000)
    min_p: float | None = _control(
        None, "Choose among tokens with at least this share of the best one's probability.", minimum=0, maximum=1,
    )
    typical_p: float | None = _control(
        None, "Choose among the tokens of most expected surprise that together have this probability.", "study",
        above=0, maximum=1,
    )
    eta_cutoff: float | None = _control(
        None, "Choose among tokens above this probability, or above less where the model is unsure.", "study",
        minimum=0, below=1,
    )
    json_schema: str | None = _text(
        None, "The text is JSON that this schema allows; a file, on the command line.", names_file=True,
    )
    regex: str | None = _text(None, "The text matches this regular expression, from beginning to end.")
    choices: tuple[str, ...] = _text(
        (), "The text is one of these; may be given several times, or separated by commas.", commas=True,
    )
    grammar: str | None = _text(
        None, "The text follows this grammar, in Lark's notation; a file, on the command line.", "study",
        names_file=True,
    )

    decoder: str = row("superposed", "Search", "How texts are made; docs/method.md has a table.", choices=tuple(USES))
    beam_width: int = _search(5, "So many beams, or samples.", "beams", minimum=1, maximum=256)
    sampling: Literal["independent", "arithmetic", "stochastic-beam"] = _search(
        "independent", "How several samples are drawn: each by itself; spread over the distribution, sharing rows; or "
        "without repeats, with weights that make estimates unbiased.", "sampling",
    )
    diversity_strength: float = _search(
        1.0, "Penalty for a token other beams chose at this step.", "diversity", minimum=0, maximum=1e6,
    )
    mcts_simulations: int = _search(10, "Simulations a step.", "mcts", minimum=0, maximum=100_000)
    mcts_c_puct: float = _search(1.0, "Weight of exploration.", "mcts", minimum=0, maximum=1e6)
    mcts_depth: int = _search(5, "Length of a rollout.", "mcts", minimum=1, maximum=10_000)
    branches: int = _search(
        5, "Exact tree decoding: up to so many distinct continuations. Selects --decoder tree.", "branches", "everyday",
        minimum=1, maximum=256, implies=("decoder",), default_text="off (5 under --decoder tree)",
    )
    branch_choice: Literal["best", "sample"] = _search("best", "Which child a branch keeps.", "branches")
    branch_diversity: float = _search(
        0.0, "Penalty, in nats, for a child that follows the same token in another branch.", "branches", minimum=0,
        maximum=1e6,
    )
    best_of: int = _search(
        0, "Follow so many branches, and give those that are probable and say what no other does (a pair of tokens is "
        "worth branch_diversity).", "branches", minimum=0, maximum=256, default_text="as many as branches",
    )
    branch_entropy: float = _search(
        0.0, "Least entropy of the next token, in nats, for a text to branch there.", "gate", minimum=0, maximum=100,
    )
    merge_length: int = _search(
        3, "Texts whose last so many tokens agree become one; 0: never.", "merging", minimum=0, maximum=1_000_000,
        default_text="3; 10 under --decoder enumerate",
    )
    leaves: int = _search(
        8, "Up to so many distinct texts, with exact probabilities. Selects --decoder enumerate.", "leaves", "everyday",
        minimum=1, maximum=1_000_000, implies=("decoder",), default_text="off (8 under --decoder enumerate)",
    )
    leaf_order: Literal["mass", "doubt"] = _search("mass", "Next: the likeliest text, or the closest calls.", "leaves")
    coverage: float | None = _search(None, "Stop once texts found have this probability.", "leaves", above=0, maximum=1)
    rows: int = _search(
        8, "Texts followed at once: changes how soon they are found, nothing else.", "leaves", minimum=1, maximum=256,
    )
    max_passes: int | None = _search(None, "Stop after so many passes.", "leaves", minimum=1, maximum=1_000_000)
    warmup: int = _search(
        0, "End texts less sure in a stretch than the first so many are; 0: none.", "leaves", minimum=0, maximum=999,
    )
    confidence_window: int = _search(
        32, "Length of such a stretch, in tokens.", "leaves", minimum=1, maximum=1_000_000, needs={"warmup": ()},
    )
    paths: int = _search(
        0, "Also read so many coherent paths off the lattice, with exact log-probabilities.", "sets", "everyday",
        minimum=0, maximum=256,
    )
    path_distance: float = _search(
        0.2, "Least edit distance between paths, as a share of their length.", "sets", minimum=0, maximum=1,
        needs={"paths": ()},
    )

    early_exit: bool = row(
        False, "Early exit", "Let passes leave the model at a layer that is calibrated to agree with the last.",
        decoders=_using("exits"),
    )
    exit_target_agreement: float = _exit(
        0.95, "How often a choice made early must be the whole model's.", minimum=0.5, below=1,
    )
    exit_layers: tuple[int, ...] = _exit(
        (), "Layers (counted from 0) that a pass may leave after.", minimum=0, maximum=1023,
        default_text="those that pay",
    )
    confidence_thresholds: tuple[float, ...] = _exit(
        (), "The target agreement of each of the exit layers.", needs={"exit_layers": ()}, minimum=0, below=1,
        default_text="the target agreement",
    )
    raw_confidence: bool = _exit(
        False, "Leave by the best token's probability, uncalibrated: thresholds are probabilities, not agreements.",
        "ablation",
    )
    exit_kv: Literal["exact", "propagate"] = _exit(
        "exact", "What later rows see of a pass that left: what they would have (it is caught up), or its last state.",
        "ablation", needs={"lossless": (False,)},
    )
    exit_lookup: bool = _exit(
        True, "Run passes ahead where the text reads as it did before, with what followed then; it is used if right.",
        "ablation",
    )
    lossless: bool = _exit(
        False, "Draft with the exits and check with the whole model: the output of full decoding, whatever it takes.",
        "everyday",
    )

    max_cache_tokens: int | None = row(
        None, "Limits", "Stop when the cache would hold more slots.", "study", minimum=1, maximum=2**31 - 1,
    )
    timeout: float | None = row(None, "Limits", "Stop after so many seconds.", above=0, maximum=1e9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.best_of < self.branches:
            raise ConfigError(
                f"best_of is {self.best_of}, fewer than the {self.branches} branches wanted; ask for at least as many."
            )
        self._check_exits()
        self._check_grammar()
        for entry in self.logit_bias:
            _check_bias(entry)
        setting, usual = SELECTIONS.get(self.selection, ("threshold", 0.0))
        if getattr(self, setting) is None and "selection" in USES[self.decoder]:
            object.__setattr__(self, setting, usual)
        if self.min_steps > self.max_tokens:
            raise ConfigError(f"min_steps is {self.min_steps}, more than max_tokens ({self.max_tokens}); lower it.")
        if any(not text for text in self.stop):
            raise ConfigError("stop holds an empty text, which would end every run at once; leave it out.")
        for variable in self.template_variables:
            name = variable.partition("=")[0]
            if not name.isidentifier() or name == "messages" or "=" not in variable:
                raise ConfigError(
                    f"The template variable {variable[:40]!r} is not NAME=VALUE; give it like reasoning_effort=high."
                )
        for name in ("enable_thinking", "allow_intraset_token_visibility"):
            if getattr(self, name) and (problem := unused(name, vars(self))):
                raise ConfigError(problem)
        prunes = self.pruning_signal is not None or self.pruning_strategy in ("coherence", "hybrid")  # by a threshold
        if self.final_threshold is not None and self.dynamic_target != "selection" and not prunes:
            raise ConfigError(
                f"dynamic_target {self.dynamic_target} moves a pruning threshold, but nothing is pruned by one; "
                "add --use-retroactive-pruning, or --pruning-strategy coherence or hybrid."
            )

    def _check_grammar(self) -> None:
        given = [name for name in GRAMMARS if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(f"{given[0]} and {given[1]} both say what the text may be; keep one of them.")
        for name in ("min_steps", "stop", "enable_thinking") if given else ():
            if getattr(self, name):
                raise ConfigError(
                    f"{name} contradicts {given[0]}, which says where a text begins and ends; leave one of them out."
                )
        if any(not text for text in self.choices):
            raise ConfigError("choices holds an empty text, after which nothing is left to choose; leave it out.")

    def _check_exits(self) -> None:
        layers, thresholds = self.exit_layers, self.confidence_thresholds
        if layers and thresholds and len(layers) != len(thresholds):
            raise ConfigError(
                f"There are {len(layers)} exit_layers and {len(thresholds)} confidence_thresholds; give one threshold "
                "for each layer, or none."
            )
        if len(set(layers)) != len(layers):
            raise ConfigError("exit_layers names a layer twice; name each once.")
        by_attention = self.pruning_signal == "attention" or self.pruning_strategy in ("coherence", "hybrid")
        if self.early_exit and self.decoder == "superposed" and by_attention:
            raise ConfigError(
                "early_exit has nothing to skip where the attention of every layer decides what is pruned; leave "
                "one of them out, or choose --pruning-signal posterior."
            )


# fmt: on


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values for JSON: tuples become lists."""
    pairs = ((f.name, getattr(config, f.name)) for f in fields(config))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}


def unused(name: str, values: Mapping[str, Any]) -> str | None:
    """Why setting `name` has no effect among `values` (others at their defaults), in a sentence."""
    return without_effect(settings_of(GenerateConfig), name, values)


def _check_bias(entry: str) -> None:
    token, _, bias = entry.partition("=")
    try:
        fine = token.isascii() and token.isdigit() and abs(float(bias)) <= 100
    except ValueError:
        fine = False
    if not fine:
        raise ConfigError(
            f"logit_bias holds {entry[:40]!r}; write a token's id and a number from -100 to 100, such as 464=-5."
        )
