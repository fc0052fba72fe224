"""The Python API: `load` a model, `stream` steps or `generate` a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tempo_mlx.config import GenerateConfig, LoadConfig, as_dict
from tempo_mlx.decode import thinking
from tempo_mlx.decode.decoder import Decoder, DecoderSpec, Reading, Setup
from tempo_mlx.decode.functions import Functions, Prune, Select, described
from tempo_mlx.decode.mcts import Value
from tempo_mlx.decode.prefill import Interrupt, Interrupted, never
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.decode.schedules import Schedule
from tempo_mlx.decode.score import read_paths
from tempo_mlx.decode.settled import removal_window
from tempo_mlx.decode.step import Step
from tempo_mlx.decode.width import with_measured_width
from tempo_mlx.errors import ConfigError, RankLostError
from tempo_mlx.exits import open_exits
from tempo_mlx.loading import LoadedModel, load_model
from tempo_mlx.model.forward import Model
from tempo_mlx.report.build import build_run
from tempo_mlx.report.records import RunPath, RunPrompt, RunRule
from tempo_mlx.report.run import Run
from tempo_mlx.report.stops import Stops, StopWatch, cut_at_stop
from tempo_mlx.resolution import resolve
from tempo_mlx.weights import Tokenizer

Prompt = str | Sequence[int] | RunPrompt


def load(model: str | None = None, **settings: Any) -> LoadedModel:
    """Load a model: a name, a Hugging Face repo id, a directory or a .gguf file; settings of `LoadConfig`.

    Raises ModelError, DownloadError, BackendError, MemoryLimitError, ConfigError.
    """
    return load_model(LoadConfig(**settings if model is None else {"model": model, **settings}))


def generate(loaded: LoadedModel, prompt: Prompt, **settings: Any) -> Run:
    """Decode to the end. The same as draining `stream(...)` and taking its `run()`.

    Raises what `stream` does, and RankLostError (under mlx.launch); a stream's `run()` then still has what there was.
    """
    return stream(loaded, prompt, **settings).complete()


def stream(
    loaded: LoadedModel,
    prompt: Prompt,
    config: GenerateConfig | None = None,
    *,
    decoder: str | DecoderSpec | None = None,
    prune: Prune | None = None,
    select: Select | None = None,
    schedule: Schedule | None = None,
    value: Value | None = None,
    interrupted: Interrupt = never,
    cache: Any | None = None,
    **settings: Any,
) -> Stream:
    """Start a decoding that yields one `Step` at a time.

    prompt: text, token ids, or both. config: a resolved configuration (a run's own, say), or settings by name.
    decoder: the setting, or one of your own (docs/extend.md). prune, select, schedule, value: functions in place of
    what the settings say, see `Functions`; the run's file names them. interrupted: called between steps and between
    chunks of the prompt; a reason ("cancelled", "timeout") ends the run, which keeps what it has. cache: one that
    holds a beginning of the prompt, not all of it; it is used up.

    Raises ConfigError for a setting or function that is unknown, out of range, or without effect; PromptError.
    """
    spec = decoder if isinstance(decoder, DecoderSpec) else None
    if decoder is not None:
        settings["decoder"] = decoder if spec is None else spec.name
    resolved = resolve(settings) if config is None else config
    if spec is not None and resolved.decoder != spec.name:
        raise ConfigError(
            f"config is for the {resolved.decoder} decoder, and decoder is a {spec.name}; give one of them."
        )
    functions = Functions(prune, select, schedule, value)
    return Stream(
        loaded, prompt, resolved, interrupted=interrupted, cache=cache, functions=functions, spec=spec
    )


class Stream(Iterator[Step]):
    """A decoding under way: iterate for steps; `run()` gives what there is so far, at any time.

    `cancel()` ends it from another thread or a signal handler; the prompt is run when the first step is asked
    for. `failure`: the loss of a rank that ended it (finish_reason "cancelled").
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompt: Prompt,
        config: GenerateConfig,
        *,
        interrupted: Interrupt = never,
        cache: Any | None = None,
        functions: Functions | None = None,
        spec: DecoderSpec | None = None,
    ) -> None:
        self.loaded = loaded
        self.spec = spec or DECODERS[config.decoder]
        self.functions = functions or Functions()
        self.functions.check(self.spec, DECODERS.values())
        self.config = with_measured_width(config, loaded.model)
        self.prompt = encode_prompt(loaded, prompt, config)
        self.exits = open_exits(loaded.model, self.config, self.prompt.token_ids)
        self.finish_reason: str | None = None
        self.failure: RankLostError | None = None
        self.decoder: Decoder | None = None
        self._watch = stop_watch(loaded.tokenizer, self.config, self.spec, self.functions)
        self.cancellation = Cancellation(config.timeout, interrupted)
        self.started = self.cancellation.started
        self.prefilled = self.ended = self.started
        self.cache = cache

    @property
    def steps(self) -> list[Step]:
        return self.decoder.steps if self.decoder is not None else []

    def cancel(self) -> None:
        """End the run at the next step or chunk of the prompt; what was generated is kept."""
        self.cancellation.cancelled = True

    def __next__(self) -> Step:
        if self.finish_reason is None:
            self.finish_reason = self._reason_to_stop()
        if self.finish_reason is not None:
            self._settle()
            raise StopIteration
        try:
            if self.decoder is None:
                self.decoder = self._start()
                self.prefilled = time.perf_counter()
            step = self.decoder.advance()
        except Interrupted as stop:
            self.finish_reason = str(stop)
            raise StopIteration from None
        except RankLostError as lost:
            self.finish_reason, self.failure = "cancelled", lost
            raise StopIteration from None
        finally:
            self.ended = time.perf_counter()
        return step

    def complete(self) -> Run:
        """The run to its end. Raises RankLostError; `run` then still has what there was."""
        for _ in self:
            pass
        run = self.run()
        if self.failure is not None:
            raise self.failure
        return run

    def run(self) -> Run:
        """The run so far, complete in itself; a run that has not ended counts as cancelled."""
        if self.decoder is not None:
            self.decoder.note_evidence()
        try:
            self._settle()
            readings = self.readings()
        except RankLostError as lost:
            self.failure = lost
            readings = self.readings()
        return assemble(
            self.loaded,
            self.prompt,
            self.config,
            self.decoder,
            readings=readings,
            finish_reason=self.finish_reason or self._reason_to_stop() or "cancelled",
            timing=self.timing(),
            early_exit=self.exits.report() if self.exits is not None else None,
            functions=self.functions,
            spec=self.spec,
        )

    def readings(self) -> list[Reading]:
        """The texts so far with their exact log-probabilities, best first; of a lattice those of `paths`."""
        decoder = self.decoder
        if decoder is None or not self.steps or not self.spec.lattice:
            return [] if decoder is None else decoder.readings()
        if not self.config.paths or self.failure is not None:
            return []
        cache = decoder.cache if self.exits is None else self.exits.inside(decoder.cache)
        return read_paths(self.loaded.model, self.prompt.token_ids, self.steps, self.config, cache)

    def timing(self) -> Mapping[str, float]:
        """Seconds of the prompt and of the steps, and logical steps per second."""
        decode = self.ended - self.prefilled if self.steps else 0.0
        return {
            "prefill_seconds": self.prefilled - self.started,
            "decode_seconds": decode,
            "tokens_per_second": len(self.steps) / decode if decode > 0 else 0.0,
            **(self.exits.timing() if self.exits is not None else {}),
        }

    def _settle(self) -> None:
        """Catch up what left the model early, which is part of what the run takes."""
        if (
            self.failure is None
            and self.exits is not None
            and self.decoder is not None
            and not self.exits.finished(self.decoder.cache)
        ):
            self.exits.finish(self.decoder.cache)
            self.ended = time.perf_counter()

    def _start(self) -> Decoder:
        model: Any = self.loaded.model if self.exits is None else self.exits
        cache = self.cache
        if cache is not None and self.exits is not None:
            cache = self.exits.cache_around(cache)
        setup = make_setup(
            self.loaded, self.prompt, self.config, model, self.cancellation, cache, self.functions, self.spec
        )
        return self.spec.start(setup)

    def _reason_to_stop(self) -> str | None:
        """Why no further step follows, if so."""
        if self.decoder is not None and self.steps:
            limit = self.config.max_cache_tokens
            if reason := ending(self.decoder, self._watch):
                return reason
            if len(self.steps) >= self.config.max_tokens:
                return "length"
            if limit is not None and len(self.decoder.cache) + len(self.steps[-1].tokens) > limit:
                return "memory"
        return self.cancellation()


class Cancellation:
    """Why a run ends early, if so: an `Interrupt` with the run's time limit and `Stream.cancel` in it.

    It knows neither the run nor its decoder, which know it: so their memory is free as soon as nobody holds them.
    """

    def __init__(self, timeout: float | None, outside: Interrupt) -> None:
        """timeout: seconds from now. outside: the caller's own reasons."""
        self.started = time.perf_counter()
        self.cancelled = False
        self._timeout, self._outside = timeout, outside

    def __call__(self) -> str | None:
        if self.cancelled:
            return "cancelled"
        if self._timeout is not None and time.perf_counter() - self.started > self._timeout:
            return "timeout"
        return self._outside()


def make_setup(
    loaded: LoadedModel,
    prompt: RunPrompt,
    config: GenerateConfig,
    model: Model,
    interrupted: Interrupt,
    cache: Any | None = None,
    functions: Functions | None = None,
    spec: DecoderSpec | None = None,
) -> Setup:
    """What a decoder of this prompt is begun with. model: what runs its rows, the loaded one or one around it."""
    tokenizer = loaded.tokenizer
    lattice = (spec or DECODERS[config.decoder]).lattice
    guide = None
    if config.thinking_budget is not None:
        guide = thinking.Budget(tokenizer, config.thinking_budget, thinking.is_open(prompt.text))
    stops = Stops(tokenizer, config.stop) if config.stop and not lattice else None
    return Setup(
        model,
        prompt.token_ids,
        config,
        tokenizer.eos_ids,
        cache,
        interrupted,
        guide,
        stops,
        functions or Functions(),
    )


def ending(decoder: Decoder, watch: StopWatch) -> str | None:
    """Why nothing can follow the steps so far, if so."""
    if decoder.finished or watch(decoder.steps):
        return "stop"
    full = decoder.prompt_length + len(decoder.steps) >= decoder.model.architecture.max_position_embeddings
    return "length" if full else None


def stop_watch(
    tokenizer: Tokenizer, config: GenerateConfig, spec: DecoderSpec, functions: Functions | None = None
) -> StopWatch:
    """What says that a lattice has come to a stop string; texts of a tree end on their own."""
    own_rule = functions is not None and functions.prune is not None
    return StopWatch(
        Stops(tokenizer, config.stop if spec.lattice else ()), None if own_rule else removal_window(config)
    )


def assemble(
    loaded: LoadedModel,
    prompt: RunPrompt,
    config: GenerateConfig,
    decoder: Decoder | None,
    *,
    readings: Sequence[Reading] = (),
    finish_reason: str,
    timing: Mapping[str, float],
    early_exit: Mapping[str, Any] | None = None,
    functions: Functions | None = None,
    spec: DecoderSpec | None = None,
) -> Run:
    """The run of a decoding, whoever drove it; reasoning is kept apart where it was asked for."""
    tokenizer, own = loaded.tokenizer, functions or Functions()
    thinks, opened = config.enable_thinking, thinking.is_open(prompt.text)
    texts = []
    for reading in readings:
        ids = reading.token_ids
        shown = ids[:-1] if ids[-1] in tokenizer.eos_ids else ids
        texts.append(cut_at_stop(tokenizer.decode(shown, continues=True), config.stop))
    answers = [thinking.split(text, opened) for text in texts] if thinks else [(None, text) for text in texts]
    run = build_run(
        [] if decoder is None else decoder.steps,
        prompt=prompt,
        model_info=loaded.model.info,
        config=own.in_force(as_dict(config)),
        tokenizer=tokenizer,
        decoder=config.decoder,
        finish_reason=finish_reason,
        timing=timing,
        early_exit=early_exit,
        paths=[
            RunPath(reading.token_ids, answer, reading.log_prob, exact=True)
            for reading, (_, answer) in zip(readings, answers, strict=True)
        ],
        tree=None if decoder is None else decoder.statistics(tokenizer.token_text),
        custom=custom(own, spec),
    )
    if not thinks:
        return run
    alone = answers and not DECODERS[config.decoder].lattice
    reasoning, answer = answers[0] if alone else thinking.split(run.final_text, opened)
    return replace(run, reasoning=reasoning, final_text=answer)


def custom(functions: Functions, spec: DecoderSpec | None) -> dict[str, RunRule] | None:
    """For the run's file: what of the caller's own decided; None where nothing did."""
    given = functions.given()
    if spec is not None and spec is not DECODERS.get(spec.name):
        given["decoder"] = spec.start
    return {name: RunRule(*described(function)) for name, function in given.items()} or None


def encode_prompt(loaded: LoadedModel, prompt: Prompt, config: GenerateConfig) -> RunPrompt:
    """The prompt's token ids, a text's under the model's chat template where `config.chat`."""
    tokenizer = loaded.tokenizer
    if isinstance(prompt, RunPrompt):
        return prompt
    if not isinstance(prompt, str):
        return RunPrompt(tokenizer.decode(list(prompt)), tuple(int(i) for i in prompt))
    if not config.chat:
        return RunPrompt(prompt, tuple(tokenizer.encode(prompt)))
    return encode_chat(loaded, [{"role": "user", "content": prompt}], config)


def encode_chat(
    loaded: LoadedModel, messages: Sequence[Mapping[str, str]], config: GenerateConfig
) -> RunPrompt:
    """The token ids of a conversation that the model is to continue; `config.system` goes before it."""
    tokenizer, system = loaded.tokenizer, config.system
    switch = tokenizer.chat_template_knows_thinking
    if config.enable_thinking and not switch:
        system = thinking.system_message(system)
    first = [] if system is None else [{"role": "system", "content": system}]
    text = tokenizer.chat([*first, *messages], enable_thinking=config.enable_thinking if switch else None)
    return RunPrompt(text, tuple(tokenizer.encode(text, add_special=False)))
