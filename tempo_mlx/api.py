"""The Python API: `load` a model, `stream` steps or `generate` a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tempo_mlx.config import GenerateConfig, LoadConfig
from tempo_mlx.decode import thinking
from tempo_mlx.decode.decoder import Decoder, DecoderSpec, Reading
from tempo_mlx.decode.functions import Functions, Prune, Select
from tempo_mlx.decode.mcts import Value
from tempo_mlx.decode.prefill import Interrupt, Interrupted, never
from tempo_mlx.decode.schedules import Schedule
from tempo_mlx.decode.score import read_paths
from tempo_mlx.decode.step import Step
from tempo_mlx.errors import ConfigError, RankLostError
from tempo_mlx.exits import open_exits
from tempo_mlx.loading import LoadedModel, load_model
from tempo_mlx.report.records import RunPrompt
from tempo_mlx.report.run import Run
from tempo_mlx.resolution import resolve
from tempo_mlx.task import Task
from tempo_mlx.token_ids import token_ids
from tempo_mlx.weights.reasoning import THINK

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
    if config is not None and settings:
        raise ConfigError(f"config says every setting already; leave out {', '.join(settings)}, or it.")
    if decoder is not None:
        settings["decoder"] = decoder if spec is None else spec.name
    resolved = resolve(settings) if config is None else config
    if resolved.decoder != settings.get("decoder", resolved.decoder):
        raise ConfigError(
            f"config is for the {resolved.decoder} decoder, and decoder is {settings['decoder']}; give one of them."
        )
    functions = Functions(prune, select, schedule, value)
    encoded = encode_prompt(loaded, prompt, resolved)
    return Stream(Task(loaded, encoded, resolved, functions, spec), interrupted, cache)


class Stream(Iterator[Step]):
    """A decoding under way: iterate for steps; `run()` gives what there is so far, at any time.

    `cancel()` ends it from another thread or a signal handler; the prompt is run when the first step is asked
    for. `failure`: the loss of a rank that ended it (finish_reason "cancelled").
    """

    def __init__(self, task: Task, interrupted: Interrupt = never, cache: Any | None = None) -> None:
        self.task, self.cache = task.measured(), cache
        self.loaded, self.prompt, self.config = task.loaded, task.prompt, self.task.config
        self.exits = open_exits(self.loaded.model, self.config, self.prompt.token_ids)
        self.finish_reason: str | None = None
        self.failure: RankLostError | None = None
        self.decoder: Decoder | None = None
        self._watch = self.task.watch()
        self.cancellation = Cancellation(self.config.timeout, interrupted)
        self.started = self.cancellation.started
        self.prefilled = self.ended = self.started

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
        return self.task.assemble(
            self.decoder,
            readings=readings,
            finish_reason=self.finish_reason or self._reason_to_stop() or "cancelled",
            timing=self.timing(),
            early_exit=self.exits.report() if self.exits is not None else None,
        )

    def readings(self) -> list[Reading]:
        """The texts so far with their exact log-probabilities, best first; of a lattice those of `paths`."""
        decoder = self.decoder
        if decoder is None or not self.steps or not self.task.spec.lattice:
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
        return self.task.start(model, self.cancellation, cache)

    def _reason_to_stop(self) -> str | None:
        """Why no further step follows, if so."""
        if self.decoder is not None and self.steps:
            limit = self.config.max_cache_tokens
            if reason := self.task.ending(self.decoder, self._watch):
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


def encode_prompt(loaded: LoadedModel, prompt: Prompt, config: GenerateConfig) -> RunPrompt:
    """The prompt's token ids, a text's under the model's chat template where `config.chat`. Raises PromptError."""
    tokenizer, vocabulary = loaded.tokenizer, loaded.model.architecture.vocab_size
    if isinstance(prompt, RunPrompt):
        return replace(prompt, token_ids=token_ids(prompt.token_ids, vocabulary))
    if not isinstance(prompt, str):
        ids = token_ids(prompt, vocabulary)
        return RunPrompt(tokenizer.decode(ids), ids)
    if not config.chat:
        return RunPrompt(prompt, tuple(tokenizer.encode(prompt)))
    return encode_chat(loaded, [{"role": "user", "content": prompt}], config)


def encode_chat(
    loaded: LoadedModel, messages: Sequence[Mapping[str, str]], config: GenerateConfig
) -> RunPrompt:
    """The token ids of a conversation that the model is to continue; `config.system` goes before it."""
    tokenizer, system = loaded.tokenizer, config.system
    switch = tokenizer.chat_template_knows_thinking
    if config.enable_thinking and not switch and tokenizer.reasoning == THINK:
        system = thinking.system_message(system)
    first = [] if system is None else [{"role": "system", "content": system}]
    variables: dict[str, Any] = {"enable_thinking": config.enable_thinking} if switch else {}
    for name, _, value in (each.partition("=") for each in config.template_variables):
        variables[name] = value
        with suppress(ValueError):  # a plain word stands for itself
            variables[name] = json.loads(value)
    text, ids = tokenizer.encode_chat([*first, *messages], **variables)
    return RunPrompt(text, tuple(ids))
