"""What a run claims before anything is computed: which model, which settings, who decided. Read, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.constraint import Constraint, make_constraint
from tempo_mlx.decode.control import Control, Processor
from tempo_mlx.decode.decoder import DecoderSpec
from tempo_mlx.decode.functions import PROCESSORS, REPLACED, Functions, described
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.errors import ConfigError, ModelError, RunFileError
from tempo_mlx.loading import LoadedModel, require_loaded
from tempo_mlx.model.forward import Model
from tempo_mlx.report.checks import check_vocabulary
from tempo_mlx.report.reader import Reader
from tempo_mlx.report.records import PINNED, RunRule
from tempo_mlx.report.run import Run
from tempo_mlx.resolution import resolve, upgrade
from tempo_mlx.settings import settings_of, shown

# Settings that files of version 0.1.0 do not have, or that meant something else then (resolution.upgrade).
LATER = frozenset(
    {"carry", "template_variables", "branch_entropy", "leaves", "coverage", "rows", "max_passes", "warmup"}
    | {"confidence_window", "sampling", "leaf_order"}
) | {name for name, setting in settings_of(GenerateConfig).items() if setting.row.group == "Control"}


@dataclass(frozen=True)
class Claims:
    """A run file, and what is needed to hold it to what it says. own: what functions of the caller's own decided;
    processors: those of them that are at hand.
    """

    run: Run
    loaded: LoadedModel
    config: GenerateConfig
    own: frozenset[str]
    processors: tuple[Processor, ...] = ()

    @property
    def functions(self) -> Functions:
        """Those that can be asked again."""
        return Functions(logits_processors=self.processors or None)

    @cached_property
    def constraint(self) -> Constraint | None:
        return make_constraint(self.config, self.loaded.tokenizer)

    @cached_property
    def control(self) -> Control:
        """What changed the distributions that the run chose from."""
        ids = self.run.prompt.token_ids
        return Control(self.config, ids, self.eos_ids, self.constraint, self.processors)

    @property
    def spec(self) -> DecoderSpec:
        return DECODERS[self.run.decoder]

    @property
    def answers(self) -> Reader:
        """How its texts are read."""
        return Reader(self.loaded.tokenizer, self.config, self.run.prompt.text)

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.loaded.tokenizer.eos_ids

    def excluded(self, length: int) -> frozenset[int]:
        """Tokens that must not follow a text of so many tokens."""
        return self.eos_ids if length < self.config.min_steps else frozenset()

    @property
    def last_was_run(self) -> bool:
        """A run's last set need not be run; a member of it, or of an earlier set, may have gone by what it shows."""
        newest = len(self.run.steps) - 1
        return any(token.removed_after == newest for step in self.run.steps for token in step.tokens)

    def is_early(self, step: int) -> bool:
        """Whether exactness is not promised of this step: rows that decided it, or that they see, left the model early
        and the run does not say `lossless`."""
        if self.config.lossless or not self.config.early_exit:
            return False
        steps = (
            self.run.steps[: step + 1]
            if self.config.exit_kv == "propagate"
            else self.run.steps[step : step + 1]
        )
        return any(each.exit_layer is not None for each in steps)


def read_claims(run: Run, loaded: LoadedModel, processors: Sequence[Processor] = ()) -> Claims:
    """Raises ModelError where `loaded` is not the run's model, RunFileError for what no run can say, ConfigError where
    `loaded` is no model, and where `processors` are not the run's.
    """
    require_loaded(loaded)
    if not isinstance(run, Run):
        raise RunFileError(f"{shown(run)} is no run; give what generate returned, or Run.load(path).")
    check_model(run, loaded.model)
    check_processors(run, processors)
    return Claims(run, loaded, read_config(run), frozenset(run.custom or ()), tuple(processors))


def check_processors(run: Run, processors: Sequence[Processor]) -> None:
    """Raises ConfigError unless they are those that the run names."""
    said = (run.custom or {}).get(PROCESSORS)
    found = RunRule(*described(processors)) if processors else None
    if said == found:
        return
    if said is None:
        raise ConfigError("The run was made without logits_processors; leave them out.")
    raise ConfigError(
        f"The run's logits went through functions, {said.name} (sha256 {str(said.sha256)[:12]}), which its file does "
        "not hold; give the same: verify(run, model, logits_processors=[...])."
    )


def read_config(run: Run) -> GenerateConfig:
    """The run's settings, with defaults where functions decided. Raises RunFileError."""
    settings, values = settings_of(GenerateConfig), upgrade(run.config)
    if unknown := sorted(set(values) - set(settings)):
        raise RunFileError(f"The run's config holds {unknown[0]}, which is not a setting.")
    if lacking := [name for name in settings if name not in values and name not in LATER]:
        raise RunFileError(f"The run file lacks config.{lacking[0]}.")
    for name in run.custom or ():
        for setting in REPLACED.get(name, ()):
            if values[setting] is None:
                values[setting] = settings[setting].default
    try:
        config = resolve(values)
    except ConfigError as error:
        raise RunFileError(f"The run's config cannot have been in force: {error}") from None
    width = settings["max_parallel_tokens"]
    if config.max_parallel_tokens == "auto" and config.decoder in (width.row.decoders or ()):
        raise RunFileError(
            "The run's config.max_parallel_tokens is auto; a run says the number that was measured."
        )
    return replace(config, timeout=None)


def require_settings(run: Run) -> None:
    """RunFileError where the run's settings alone do not say how to decode it again, or to go on."""
    own = {name: rule for name, rule in (run.custom or {}).items() if name != PINNED}
    if own:
        names = ", ".join(f"{name} {rule.name}" for name, rule in own.items())
        raise RunFileError(
            f"The run was made with functions of its own ({names}), which its file does not hold; decode it again from "
            "Python with them, or verify its numbers without --rerun."
        )


def decode_settings(run: Run) -> GenerateConfig:
    """What to decode a run again with. Raises RunFileError where its file does not say."""
    require_settings(run)
    return read_config(run)


def _adapter(sha256: object) -> str:
    return "no adapter" if sha256 is None else f"the adapter {str(sha256)[:12]}"


def check_model(run: Run, model: Model) -> None:
    """Raises ModelError, and RunFileError for tokens that the model does not have."""
    recorded_bits, bits = run.model.get("kv_bits"), model.info.get("kv_bits")
    if recorded_bits != bits:
        flag = f"with --kv-bits {recorded_bits}" if recorded_bits else "without --kv-bits"
        raise ModelError(
            f"The run was made with kv_bits {recorded_bits or 'off'}, and this model was loaded with {bits or 'off'}; "
            f"load it as it was for the run, {flag}."
        )
    if (said := run.model.get("adapter")) != (own := model.info.get("adapter")):
        raise ModelError(
            f"The run was made with {_adapter(said)}, and this model has {_adapter(own)}; load it as it was for the "
            "run, with its --adapter or without one."
        )
    for name in ("sha256", "revision"):
        recorded, present = run.model.get(name), model.info.get(name)
        if recorded is not None and present is not None and recorded != present:
            raise ModelError(
                f"The run was made with other weights ({name} {str(recorded)[:12]}) than this model's "
                f"({str(present)[:12]}); name the run's own model, {run.model.get('id')}."
            )
    check_vocabulary(run, model.architecture.vocab_size)
    if run.prompt_length + len(run.steps) > model.architecture.max_position_embeddings:
        raise RunFileError(
            f"The run has {run.prompt_length + len(run.steps)} positions, but the model's context is "
            f"{model.architecture.max_position_embeddings}."
        )
