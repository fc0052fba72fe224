"""The settings: what they are called, what they allow, and what follows from what. No tensor library.

`LoadConfig` says which model runs where, `GenerateConfig` everything that changes a run, `OutputConfig` what
the command line reads, shows and saves. `GenerateConfig` holds resolved values only, so that
`GenerateConfig(**run.config)` reproduces a run; `resolve` makes one from what a user gave explicitly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from tempo_mlx.errors import ConfigError
from tempo_mlx.settings import Checked, Setting, canonical, row, settings_of

Decoder = Literal["superposed", "tree", "mcts", "beam", "diverse-beam", "sample", "plain"]

SUPERPOSED = ("superposed",)
EXITING = ("superposed", "plain", "tree")  # decoders whose passes may leave the model early
SELECTING = ("superposed", "mcts", "sample")  # decoders that form a set of candidates by `selection`
DEFAULT_MODEL = "smollm2-135m"


def _input(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Input", help, **rest)


def _set(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Selection", help, decoders=rest.pop("decoders", SUPERPOSED), **rest)


def _schedule(default: object, help: str, **needs: tuple[object, ...]) -> Any:
    needs = {"dynamic_threshold": (), **needs}
    return row(default, "Schedule", help, minimum=0, maximum=1, decoders=SUPERPOSED, needs=needs)


def _pruning(default: object, help: str, *strategies: str, **rest: Any) -> Any:
    needs = {"use_pruning": (), **({"pruning_strategy": strategies} if strategies else {})}
    return row(default, "Pruning before append", help, decoders=SUPERPOSED, needs=needs, **rest)


def _retro(default: object, help: str, *signals: str, **rest: Any) -> Any:
    needs = {"use_retroactive_pruning": (), **({"pruning_signal": signals} if signals else {})}
    needs.update(rest.pop("needs", {}))
    return row(default, "Retroactive pruning", help, decoders=SUPERPOSED, needs=needs, **rest)


def _search(default: object, help: str, *decoders: str, **rest: Any) -> Any:
    return row(default, "Search", help, decoders=decoders, **rest)


def _exit(
    default: object, help: str, needs: Mapping[str, tuple[object, ...]] | None = None, **rest: Any
) -> Any:
    return row(
        default, "Early exit", help, decoders=EXITING, needs={"early_exit": (), **(needs or {})}, **rest
    )


def _output(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Output", help, **rest)


def _diagnostics(default: object, help: str, **rest: Any) -> Any:
    return row(default, "Diagnostics", help, **rest)


# fmt: off
@dataclass(frozen=True)
class LoadConfig(Checked):
    """Which model, computed by what, in how much memory."""

    model: str = _input(
        DEFAULT_MODEL,
        "Model: a name from `tempo-mlx models`, a Hugging Face repo id, a directory, or a .gguf file.",
        environment=("MODEL_PATH",),
    )
    backend: Literal["mlx", "torch"] = _input("mlx", "What computes: MLX, or the torch reference.")
    device: Literal["auto", "cpu", "gpu", "cuda", "mps"] = _input(
        "auto", "Where it computes; mps is another name for gpu.", environment=("DEVICE",),
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = _input(
        "auto", "Number format of the weights; auto is float32 on the CPU, the checkpoint's own on a GPU.",
    )
    kv_bits: Literal[4, 8] | None = row(
        None, "Limits", "Store the KV cache quantised to so many bits.", default_text="off",
    )
    max_memory_gb: float | None = row(
        None, "Limits", "Memory in GB that weights, cache and rows may use; checked before loading.",
        above=0, maximum=1e6,
    )
    rank_timeout: float = row(
        30.0, "Limits", "Under mlx.launch: a rank without a sign of life for so many seconds ends the run.",
        minimum=3, maximum=86400,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "mps":
            object.__setattr__(self, "device", "gpu")
        if not self.model.strip():
            raise ConfigError("model is empty; name a model, for example " + DEFAULT_MODEL + ".")


@dataclass(frozen=True)
class GenerateConfig(Checked):
    """Everything that changes a run. Ranges and combinations are checked at construction."""

    chat: bool = _input(False, "Apply the model's chat template to the prompt.", aliases=("/--raw",))
    system: str | None = _input(None, "System message of the chat template.", needs={"chat": ()})
    enable_thinking: bool = _input(
        False, "Deep-thinking mode; implies --chat. Reasoning is kept apart from the answer, on stderr.",
        decoders=("plain", "superposed", "tree"),
    )
    thinking_budget: int | None = _input(
        None, "Close the reasoning after so many steps.", minimum=1, maximum=1_000_000,
        decoders=("plain", "superposed", "tree"), needs={"enable_thinking": ()},
    )

    max_tokens: int = row(100, "Lengths", "Logical steps to generate.", minimum=1, maximum=1_000_000)
    min_steps: int = row(0, "Lengths", "Steps before the text may end.", minimum=0, maximum=1_000_000)
    stop: tuple[str, ...] = row((), "Lengths", "Stop when this text appears; may be given several times.")
    seed: int = row(42, "Lengths", "Seed of everything random.", minimum=0, maximum=2**63 - 1)
    temperature: float = row(
        1.0, "Lengths", "Divides the logits; 0 keeps the best token only.", minimum=0, maximum=100,
        decoders=("superposed", "tree", "mcts", "sample", "plain"),
    )

    threshold: float = _set(
        0.1, "Keep every token whose probability is at least this; the best is always kept.", minimum=0,
        maximum=1, aliases=("--selection-threshold",), decoders=("superposed", "tree", "mcts", "sample"),
        needs={"selection": ("threshold",)},
    )
    max_parallel_tokens: int | Literal["auto"] = _set(
        8, "Most tokens in a set; auto chooses by the device's measured cost of rows.", minimum=1,
        maximum=256, decoders=("superposed", "mcts"),
    )
    selection: Literal["threshold", "min-p", "top-p", "top-k"] = _set(
        "threshold", "How a set is formed.", decoders=SELECTING,
    )
    min_p: float = _set(
        0.1, "min-p: keep tokens with at least this share of the best one's probability.", minimum=0,
        maximum=1, decoders=SELECTING, needs={"selection": ("min-p",)},
    )
    top_p: float = _set(
        0.9, "top-p: keep the fewest tokens that together have this probability.", above=0, maximum=1,
        decoders=SELECTING, needs={"selection": ("top-p",)},
    )
    top_k: int = _set(
        8, "top-k: keep so many tokens.", minimum=1, maximum=1_000_000, decoders=SELECTING,
        needs={"selection": ("top-k",)},
    )
    combine: Literal["mix", "last", "mean", "product", "max"] = _set(
        "mix", "How a set's logits rows become one next-token distribution.",
    )
    attend: Literal["lineage", "all", "weighted", "best"] = _set(
        "lineage", "How strongly a new row sees the members of earlier sets; all is the original's rule.",
    )
    allow_intraset_token_visibility: bool = _set(
        False, "Let members of a set attend to each other; implies --attend weighted.",
        aliases=("/--isolate",),
    )
    custom_rope: bool = _set(
        True, "Members of a set share one position; off gives each its own (an ablation).",
        aliases=("--use-custom-rope",),
    )

    dynamic_threshold: bool = row(
        False, "Schedule", "Move the threshold to its final value in the course of the run.",
        decoders=SUPERPOSED,
    )
    dynamic_target: Literal["selection", "pruning", "both"] = row(
        "selection", "Schedule", "Which threshold moves.", decoders=SUPERPOSED,
        needs={"dynamic_threshold": ()},
    )
    final_threshold: float = _schedule(1.0, "Threshold at the end of the run.")
    bezier_p1: float = _schedule(0.2, "First inner control value of the Bezier curve.", use_relu=(False,))
    bezier_p2: float = _schedule(0.8, "Second inner control value of the Bezier curve.", use_relu=(False,))
    use_relu: bool = row(
        False, "Schedule", "A ramp that starts at the activation point instead of a Bezier curve.",
        decoders=SUPERPOSED, needs={"dynamic_threshold": ()},
    )
    relu_activation_point: float = _schedule(
        0.5, "Where the ramp starts, as a share of the run.", use_relu=(),
    )

    use_pruning: bool = row(
        False, "Pruning before append", "Drop candidates before they join the set.", decoders=SUPERPOSED,
    )
    pruning_strategy: Literal["coherence", "diversity", "hybrid"] = _pruning(
        "hybrid",
        "coherence: keep what the context's attention supports; diversity: keep the best of each cluster of "
        "embeddings; hybrid: diversity, then coherence.",
    )
    coherence_threshold: float = _pruning(
        0.7, "Least support a candidate needs, relative to the best supported.", "coherence", "hybrid",
        minimum=0, maximum=1,
    )
    diversity_clusters: int = _pruning(
        3, "Number of clusters.", "diversity", "hybrid", minimum=1, maximum=256,
    )

    use_retroactive_pruning: bool = row(
        False, "Retroactive pruning", "Let what came later remove members of earlier sets.",
        decoders=SUPERPOSED, aliases=("--use-retroactive-removal",),
    )
    pruning_signal: Literal["posterior", "attention", "probability", "random"] = _retro(
        "posterior", "What decides: posterior is the measured best; probability and random are for ablation.",
    )
    posterior_threshold: float = _retro(
        0.1, "Members whose score is under this go (signals posterior, probability and random).",
        "posterior", "probability", "random", minimum=0, maximum=1,
    )
    relative_posterior: bool = _retro(
        False, "Hold the score against the threshold times the largest of its set.", "posterior",
        "probability", "random",
    )
    attention_threshold: float = _retro(
        0.01, "Members that receive less attention go; given alone it switches pruning by attention on.",
        "attention", minimum=0, maximum=1,
    )
    relative_attention: bool = _retro(
        True, "Hold attention against the mean of its set.", "attention",
        aliases=("--use-relative-attention",),
    )
    relative_threshold: float = _retro(
        0.5, "Share of its set's mean attention a member needs.", "attention", minimum=0, maximum=1,
        needs={"relative_attention": ()},
    )
    pruning_window: int = _retro(8, "Sets to look back.", minimum=1, maximum=1_000_000)
    num_layers_to_use: int | None = _retro(
        None, "Use the attention of the last so many layers.", "attention", minimum=1, maximum=1024,
        default_text="all",
    )
    multi_scale_attention: bool = _retro(
        True, "Weigh the layers' attention, later ones more.", "attention",
        aliases=("--use-multi-scale-attention",),
    )
    sigmoid_threshold: bool = _retro(
        True, "Decide by a sigmoid around the threshold.", "attention", aliases=("--use-sigmoid-threshold",),
    )
    sigmoid_steepness: float = _retro(
        10.0, "Steepness of the sigmoid.", "attention", above=0, maximum=1e6, needs={"sigmoid_threshold": ()},
    )
    complete_removal_mode: Literal["keep_token", "keep_unattended", "remove_position"] = _retro(
        "keep_token", "What happens when a whole set would go.",
    )

    decoder: Decoder = row("superposed", "Search", "What a step appends, and who sees whom.")
    beam_width: int = _search(
        5, "Beams, or samples.", "beam", "diverse-beam", "sample", minimum=1, maximum=256,
    )
    diversity_strength: float = _search(
        1.0, "Penalty for a token other beams chose at this step.", "diverse-beam", minimum=0, maximum=1e6,
    )
    mcts_simulations: int = _search(10, "Simulations a step.", "mcts", minimum=0, maximum=100_000)
    mcts_c_puct: float = _search(1.0, "Weight of exploration.", "mcts", minimum=0, maximum=1e6)
    mcts_depth: int = _search(5, "Length of a rollout.", "mcts", minimum=1, maximum=10_000)
    branches: int = _search(
        5, "Exact tree decoding: so many distinct continuations. Selects --decoder tree.", "tree", minimum=1,
        maximum=256, default_text="off (5 under --decoder tree)",
    )
    branch_choice: Literal["best", "sample"] = _search("best", "Which child a branch keeps.", "tree")
    branch_diversity: float = _search(
        0.0, "Penalty, in nats, for a child that follows the same token in another branch.", "tree", minimum=0,
        maximum=1e6,
    )
    best_of: int = _search(
        0, "Follow so many branches, and give those that are probable and say what no other does (a pair of tokens is "
        "worth branch_diversity).", "tree", minimum=0, maximum=256, default_text="as many as branches",
    )
    merge_length: int = _search(
        3, "Branches whose last so many tokens agree are merged; 0: never.", "tree", minimum=0,
        maximum=1_000_000,
    )
    paths: int = _search(
        0, "Also read so many coherent paths off the lattice, with exact log-probabilities.", "superposed",
        minimum=0, maximum=256,
    )
    path_distance: float = _search(
        0.2, "Least edit distance between paths, as a share of their length.", "superposed", minimum=0,
        maximum=1, needs={"paths": ()},
    )

    early_exit: bool = row(
        False, "Early exit", "Let passes leave the model at a layer that is calibrated to agree with the last.",
        decoders=EXITING,
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
    )
    exit_kv: Literal["exact", "propagate"] = _exit(
        "exact", "What later rows see of a pass that left: what they would have (it is caught up), or its last state.",
        needs={"lossless": (False,)},
    )
    exit_lookup: bool = _exit(
        True, "Run passes ahead where the text reads as it did before, with what followed then; it is used if right.",
    )
    lossless: bool = _exit(
        False, "Draft with the exits and check with the whole model: the output of full decoding, whatever it takes.",
    )

    max_cache_tokens: int | None = row(
        None, "Limits", "Stop when the cache would hold more slots.", minimum=1, maximum=2**31 - 1,
    )
    timeout: float | None = row(None, "Limits", "Stop after so many seconds.", above=0, maximum=1e9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.best_of < self.branches:
            raise ConfigError(
                f"best_of is {self.best_of}, fewer than the {self.branches} branches wanted; ask for at least as many."
            )
        layers, thresholds = self.exit_layers, self.confidence_thresholds
        if layers and thresholds and len(layers) != len(thresholds):
            raise ConfigError(
                f"There are {len(layers)} exit_layers and {len(thresholds)} confidence_thresholds; give one threshold "
                "for each layer, or none."
            )
        if len(set(layers)) != len(layers):
            raise ConfigError("exit_layers names a layer twice; name each once.")
        by_attention = (self.use_retroactive_pruning and self.pruning_signal == "attention") or (
            self.use_pruning and self.pruning_strategy != "diversity"
        )
        if self.early_exit and self.decoder == "superposed" and by_attention:
            raise ConfigError(
                "early_exit has nothing to skip where the attention of every layer decides what is pruned; leave "
                "one of them out, or choose --pruning-signal posterior."
            )
        if self.min_steps > self.max_tokens:
            raise ConfigError(
                f"min_steps is {self.min_steps}, more than max_tokens ({self.max_tokens}); lower it."
            )
        if any(not text for text in self.stop):
            raise ConfigError("stop holds an empty text, which would end every run at once; leave it out.")
        if self.allow_intraset_token_visibility and self.attend in ("lineage", "best"):
            raise ConfigError(
                f"allow_intraset_token_visibility does not combine with attend {self.attend}, under which "
                "members never see their siblings; choose attend weighted or all."
            )
        if self.enable_thinking and not self.chat:
            raise ConfigError("enable_thinking needs the chat template; leave out --raw (chat=False).")
        screens = self.use_pruning and self.pruning_strategy != "diversity"  # by a threshold
        prunes = screens or self.use_retroactive_pruning
        if self.dynamic_threshold and self.dynamic_target != "selection" and not prunes:
            raise ConfigError(
                f"dynamic_target {self.dynamic_target} moves a pruning threshold, but nothing is pruned by one; "
                "add --use-retroactive-pruning, or --use-pruning with a strategy other than diversity."
            )


@dataclass(frozen=True)
class OutputConfig(Checked):
    """What only the command line knows: where the prompt comes from, what is shown and what is saved."""

    prompt: str | None = _input(None, "The prompt, the same as the argument; - reads standard input.")
    prompt_file: str | None = _input(None, "Read the prompt from this file.")
    format: Literal["text", "json", "jsonl", "html"] = _output(
        "text", "What is printed; jsonl: one line a step.",
    )
    output_json: bool = _output(
        False, "The same as --format json, unless --json-output-file says where to save it.",
    )
    json_output_file: str | None = _output(None, "Save the run to this file.")
    output_dir: str | None = _output(None, "Save the run to a new file in this directory.")
    show_token_ids: bool = _output(False, "Show token ids beside the tokens.")
    show_probabilities: bool = _output(False, "Show probabilities beside the tokens.")
    color: bool = _output(True, "Colour tokens by probability on a terminal.")
    stream: bool = _output(True, "Print while decoding.")
    quiet: bool = _output(False, "Print the text only, and no status.")
    verbose: bool = _diagnostics(False, "Say on stderr what is being done.")
    debug_mode: bool = _diagnostics(False, "Like --verbose, for every step, and show tracebacks.")
    profile: bool = _diagnostics(False, "Print how much time each phase took.")
    profile_output: str | None = _diagnostics(None, "Save the time table to this file, as JSON.")


@dataclass(frozen=True)
class Shortcuts(Checked):
    """Settings that set others; `resolve` replaces them, so a `GenerateConfig` never holds one."""

    preset: Literal["lineage", "original", "branches", "plain"] | None = row(
        None, "Presets", "A group of defaults at once; single settings override it.", default_text="lineage",
    )
    default_mode: bool = row(False, "Presets", "Ordinary decoding, no TEMPO: the same as --decoder plain.")
    use_mcts: bool = row(False, "Search", "The same as --decoder mcts.")


# fmt: on


PRESETS: Mapping[str, Mapping[str, object]] = {
    "lineage": {},
    "original": {
        "attend": "all",
        "combine": "last",
        "use_retroactive_pruning": True,
        "pruning_signal": "attention",
    },
    "branches": {"decoder": "tree"},
    "plain": {"decoder": "plain"},
}

# Flags of the original: ACCEPTED name what always holds here, REFUSED what does not exist here (and why).
ACCEPTED = ("--no-lci-dynamic-threshold", "--no-use-lci-dynamic-threshold", "--no-preserve-isolated-tokens")
REFUSED: Mapping[str, str] = {
    "--use-lci-dynamic-threshold": "has no counterpart; move the threshold with --dynamic-threshold",
    "--disable-kv-cache": "would change nothing but the speed, since cached rows are exact; leave it out",
    "--disable-kv-cache-consistency": "is not needed, since cache and lattice always agree; leave it out",
    "--use-cprofile": "is not built in; use --profile, or python -m cProfile -m tempo_mlx",
}

CONFIGS: tuple[type, ...] = (LoadConfig, GenerateConfig, Shortcuts, OutputConfig)
_KNOWN = {**settings_of(GenerateConfig), **settings_of(Shortcuts)}


def resolve(explicit: Mapping[str, object], ambient: Mapping[str, object] | None = None) -> GenerateConfig:
    """The configuration that follows from the settings a user gave.

    explicit: settings and shortcuts by name; one that the decoder in force cannot use is an error.
    ambient: weaker ones (the environment); they are dropped where the decoder, or another setting, leaves
    them without effect.

    Raises ConfigError with one sentence that names the setting and the remedy.
    """
    given = canonical(explicit, _KNOWN)
    weak = canonical(ambient or {}, _KNOWN)
    _name_decoder(given)
    if "decoder" not in given:
        _name_decoder(weak)
    _imply(given, weak)
    preset = given.get("preset") or weak.get("preset") or "lineage"
    values: dict[str, Any] = {**PRESETS[str(preset)], **weak, **given}
    for name in settings_of(Shortcuts):
        values.pop(name, None)
    for name in [name for name in values if name not in given and _unused(name, values)]:
        del values[name]
    for name, value in values.items():
        asks = value != settings_of(GenerateConfig)[name].default  # a default asks for nothing
        problem = _unused(name, values) if asks else None
        if problem:
            raise ConfigError(problem)
    return GenerateConfig(**values)


def _name_decoder(given: dict[str, object]) -> None:
    """Replace the aliases of `decoder` by it."""
    named = {"decoder": given["decoder"]} if "decoder" in given else {}
    if given.pop("default_mode", False):
        named["default_mode"] = "plain"
    if given.pop("use_mcts", False):
        named["use_mcts"] = "mcts"
    if len(set(named.values())) > 1:
        listed = ", ".join(f"{name} ({decoder})" for name, decoder in named.items())
        raise ConfigError(f"These settings choose different decoders: {listed}; keep one of them.")
    if "branches" in given and not named:
        named["branches"] = "tree"
    if named:
        given["decoder"] = next(iter(named.values()))


def _imply(given: dict[str, object], weak: dict[str, object]) -> None:
    """Add what a given setting stands for, where nothing else was said."""
    both = {**weak, **given}
    target = given if "attention_threshold" in given else weak
    if "attention_threshold" in both:
        if "pruning_signal" not in both:
            target["pruning_signal"] = "attention"
        if "use_retroactive_pruning" not in both:
            target["use_retroactive_pruning"] = True
    filters = [name for name in ("min_p", "top_p", "top_k") if name in given]
    if len(filters) == 1 and "selection" not in both and "threshold" not in given:
        given["selection"] = filters[0].replace("_", "-")
    if given.get("enable_thinking") or (weak.get("enable_thinking") and "chat" not in given):
        given.setdefault("chat", True)
    if both.get("allow_intraset_token_visibility") and "attend" not in both:
        preset = PRESETS[str(both.get("preset") or "lineage")]
        if "attend" not in preset:
            given["attend"] = "weighted"


def _unused(name: str, values: Mapping[str, Any]) -> str | None:
    """Why setting `name` has no effect among `values` (others at their defaults), in a sentence."""
    settings = settings_of(GenerateConfig)
    row = settings[name].row
    decoder = values.get("decoder", settings["decoder"].default)
    if row.decoders is not None and decoder not in row.decoders:
        choices = " or ".join(row.decoders)
        return (
            f"{name} has no effect with the {decoder} decoder; leave it out, or choose --decoder {choices}."
        )
    for other, allowed in (row.needs or {}).items():
        decoders = settings[other].row.decoders
        if decoders is not None and decoder not in decoders:
            continue
        value = values.get(other, settings[other].default)
        if value not in allowed if allowed else not value:
            return f"{name} has no effect {_missing(settings[other], value, allowed)}."
    return None


def _missing(other: Setting, value: object, allowed: tuple[object, ...]) -> str:
    if not allowed:
        return f"without {other.name}; add {other.flag}, or leave it out"
    if allowed in ((False,), (None,)):
        return f"beside {other.name}; leave one of them out"
    return f"with {other.name} {value}; choose {other.flag} {' or '.join(map(str, allowed))}, or leave it out"


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values for JSON: tuples become lists."""
    pairs = ((f.name, getattr(config, f.name)) for f in fields(config))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}
