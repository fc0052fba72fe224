"""One decoding to be done: what it begins with, when it is over, and the run that becomes of it.

Whoever drives a decoder (api.Stream, sessions.EditableRun) asks here, so that both mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tempo_mlx.config import GenerateConfig, as_dict
from tempo_mlx.decode.constraint import check_grammar, make_constraint
from tempo_mlx.decode.control import Observer
from tempo_mlx.decode.decoder import Decoder, DecoderSpec, Reading, Setup
from tempo_mlx.decode.forced import RunsForced
from tempo_mlx.decode.functions import Functions, described
from tempo_mlx.decode.padding import Padded, PaddedChooser, paying
from tempo_mlx.decode.prefill import Interrupt
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.decode.settled import removal_window
from tempo_mlx.decode.width import kept_costs, with_measured_width
from tempo_mlx.errors import ConfigError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.model.forward import Chooser, Model
from tempo_mlx.report.build import build_run
from tempo_mlx.report.reader import Reader
from tempo_mlx.report.records import RunPath, RunPrompt, RunRule
from tempo_mlx.report.run import Run
from tempo_mlx.report.stops import Stops, StopWatch


@dataclass(frozen=True)
class Task:
    """functions, own: of the caller's, in place of what the settings say. observer: is shown what is chosen from.
    Raises ConfigError where functions or an observer cannot be.
    """

    loaded: LoadedModel
    prompt: RunPrompt
    config: GenerateConfig
    functions: Functions = field(default_factory=Functions)
    own: DecoderSpec | None = None
    observer: Observer | None = None

    def __post_init__(self) -> None:
        self.functions.check(self.spec, DECODERS.values())
        check_grammar(self.config)
        if self.observer is not None and self.config.early_exit:
            raise ConfigError(
                "early_exit does not go with log-probabilities, which are the whole model's; leave one of them out."
            )

    @property
    def spec(self) -> DecoderSpec:
        return self.own or DECODERS[self.config.decoder]

    @property
    def answers(self) -> Reader:
        """How its texts are read."""
        return Reader(self.loaded.tokenizer, self.config, self.prompt.text)

    @property
    def opened(self) -> bool:
        """Whether the prompt ends inside a block of reasoning."""
        return self.answers.opened

    @property
    def thinks(self) -> bool:
        """Whether reasoning is told from the answer."""
        return self.answers.thinks

    def measured(self) -> Task:
        """With a number for a width that is to be measured."""
        pads = self.loaded.chooser is not None
        return replace(self, config=with_measured_width(self.config, self.loaded.model, pads=pads))

    def start(self, model: Model, interrupted: Interrupt, cache: Any | None = None) -> Decoder:
        """Begin. model: what runs the rows, the loaded one or one around it. Raises PromptError, Interrupted."""
        tokenizer, config = self.loaded.tokenizer, self.config
        guide = self.answers.guide
        stops = Stops(tokenizer, config.stop) if config.stop and not self.spec.lattice else None
        constraint = make_constraint(config, tokenizer)
        ids, eos = self.prompt.token_ids, tokenizer.eos_ids
        if constraint is not None and self.spec.lattice and model is self.loaded.model:
            context = min(model.architecture.max_position_embeddings, len(ids) + config.max_tokens)
            model = RunsForced(model, constraint, len(ids), context)
        model, chooser = self.on_device(model)
        return self.spec.start(
            Setup(
                model,
                ids,
                config,
                eos,
                cache,
                interrupted,
                guide,
                stops,
                self.functions,
                constraint,
                self.observer,
                self.answers.said,
                chooser,
            )
        )

    def on_device(self, model: Model) -> tuple[Model, Chooser | None]:
        """The loaded model as one that chooses on its device, and pads rows where the costs kept of it say that this
        pays; any other as it is.
        """
        chooser = self.loaded.chooser if model is self.loaded.model else None
        if chooser is None or model.architecture.recurrent:  # a state cannot be taken back
            return model, chooser
        rows = paying(kept_costs(model))
        return (Padded(model, rows), PaddedChooser(chooser, rows)) if rows else (model, chooser)

    def watch(self) -> StopWatch:
        """What says that a lattice has come to a stop string; texts of a tree end on their own."""
        stops = Stops(self.loaded.tokenizer, self.config.stop if self.spec.lattice else ())
        return StopWatch(stops, None if self.functions.prune is not None else removal_window(self.config))

    def ending(self, decoder: Decoder, watch: StopWatch) -> str | None:
        """Why nothing can follow its steps, if so. watch: this decoding's."""
        if decoder.finished or watch(decoder.steps):
            return "stop"
        context = self.loaded.model.architecture.max_position_embeddings
        return "length" if len(self.prompt.token_ids) + decoder.length >= context else None

    def assemble(
        self,
        decoder: Decoder | None,
        *,
        readings: Sequence[Reading] = (),
        finish_reason: str,
        timing: Mapping[str, float],
        early_exit: Mapping[str, Any] | None = None,
    ) -> Run:
        """The run so far; reasoning is kept apart where it was asked for."""
        tokenizer = self.loaded.tokenizer
        answers = [self.answers.read(reading.token_ids) for reading in readings]
        run = build_run(
            [] if decoder is None else decoder.recorded(),
            prompt=self.prompt,
            model_info=self.loaded.model.info,
            config=self.functions.in_force(as_dict(self.config)),
            tokenizer=tokenizer,
            decoder=self.config.decoder,
            finish_reason=finish_reason,
            timing=timing,
            early_exit=early_exit,
            paths=[
                RunPath(reading.token_ids, answer, reading.log_prob, exact=True)
                for reading, (_, answer) in zip(readings, answers, strict=True)
            ],
            tree=None if decoder is None else decoder.statistics(tokenizer.token_text),
            custom=self.custom(),
        )
        if not self.thinks:
            return run
        alone = answers and not self.spec.lattice
        reasoning, answer = answers[0] if alone else self.answers.split(run.final_text)
        return replace(run, reasoning=reasoning, final_text=answer)

    def custom(self) -> dict[str, RunRule] | None:
        """For the run's file: what of the caller's own decided; None where nothing did."""
        given = self.functions.given()
        if self.own is not None:
            given["decoder"] = self.own.start
        return {name: RunRule(*described(function)) for name, function in given.items()} or None
