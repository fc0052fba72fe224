"""The Python API: `load` a model, `stream` steps or `generate` a run, `score` texts. docs/python.md shows all of it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeGuard

from tempo_mlx import blas
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode import score as scoring
from tempo_mlx.decode import thinking
from tempo_mlx.decode.control import Processor
from tempo_mlx.decode.decoder import Decoder, DecoderSpec, Reading
from tempo_mlx.decode.functions import Functions, Prune, Select
from tempo_mlx.decode.mcts import Value
from tempo_mlx.decode.prefill import Interrupt, Interrupted, never
from tempo_mlx.decode.schedules import Schedule
from tempo_mlx.decode.step import Step
from tempo_mlx.errors import ComputeError, ConfigError, PromptError
from tempo_mlx.exits import open_exits
from tempo_mlx.keywords import DecoderName, GenerateSettings, LoadSettings
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.loading import LoadedModel, load_model, require_loaded
from tempo_mlx.report.checks import FINISH_REASONS
from tempo_mlx.report.records import RunPrompt
from tempo_mlx.report.run import Run
from tempo_mlx.report.text import JointText, inline_set
from tempo_mlx.resolution import resolve
from tempo_mlx.settings import canonical, settings_of, shown
from tempo_mlx.strict import copy_json
from tempo_mlx.task import Task
from tempo_mlx.token_ids import listed, token_ids
from tempo_mlx.weights import Tokenizer
from tempo_mlx.weights.reasoning import THINK

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[int] | Sequence[Message] | RunPrompt


class DecodingKeywords(GenerateSettings, total=False):
    """Keywords of `generate` and `stream`."""

    decoder: DecoderName | DecoderSpec | None
    prune: Prune | None
    select: Select | None
    schedule: Schedule | None
    value: Value | None
    logits_processors: Sequence[Processor] | None
    interrupted: Interrupt
    cache: Any | None


def load(model: str | os.PathLike[str] | None = None, **settings: Unpack[LoadSettings]) -> LoadedModel:
    """Load a model: a name, a Hugging Face repo id, a directory or a .gguf file; settings of `LoadConfig`.

    Warns where MLX computes on a slow BLAS. Raises ModelError, DownloadError, BackendError, MemoryLimitError,
    ConfigError.
    """
    given: dict[str, Any] = {**settings}
    if model is not None:
        given["model"] = os.fspath(model) if isinstance(model, os.PathLike) else model
    config = LoadConfig(**canonical(given, settings_of(LoadConfig)))
    if config.backend == "mlx" and (note := blas.slow()):
        warnings.warn(note, stacklevel=2)
    return load_model(config)


def generate(
    loaded: LoadedModel,
    prompt: Prompt,
    config: GenerateConfig | None = None,
    **settings: Unpack[DecodingKeywords],
) -> Run:
    """Decode to the end. The same as draining `stream(...)` and taking its `run()`.

    Raises what `stream` does, and ComputeError (memory ran out, numbers are not finite, a rank was lost); a stream's
    `run()` then still has what there was.
    """
    return stream(loaded, prompt, config, **settings).complete()


def score(
    loaded: LoadedModel,
    prompt: Prompt,
    continuations: Sequence[str | Sequence[int]],
    **settings: Unpack[GenerateSettings],
) -> list[scoring.Score]:
    """The exact log-probabilities of each continuation (text, or token ids) of a prompt, in the order given.

    A text is tokenized together with a prompt that is text where the prompt's tokens stay the same, else on its own.
    The model is not asked whether the text ends there. settings: those of `generate` that change distributions (bias,
    penalties, grammars, truncation); the numbers are at temperature 1. Raises PromptError, ConfigError, ComputeError.
    """
    require_loaded(loaded)
    config = resolve({"decoder": "plain", **settings}) if settings else None
    if not isinstance(prompt, str):
        prompt = encode_prompt(loaded, prompt, GenerateConfig(chat=is_messages(prompt))).token_ids
    return scoring.score(loaded, prompt, continuations, config)


def stream(
    loaded: LoadedModel,
    prompt: Prompt,
    config: GenerateConfig | None = None,
    *,
    decoder: DecoderName | DecoderSpec | None = None,
    prune: Prune | None = None,
    select: Select | None = None,
    schedule: Schedule | None = None,
    value: Value | None = None,
    logits_processors: Sequence[Processor] | None = None,
    interrupted: Interrupt = never,
    cache: Any | None = None,
    **settings: Unpack[GenerateSettings],
) -> Stream:
    """Start a decoding that yields one `Step` at a time.

    prompt: text, token ids, or messages, which imply `chat`. config: a resolved configuration (a run's own, say), in
    place of settings by name. decoder: the setting, or one of your own (docs/extend.md). prune, select, schedule,
    value, logits_processors: functions of your own, see `Functions`; the run's file names them. interrupted: called
    between steps and between chunks of the prompt; a reason ("cancelled", "timeout") ends the run, which keeps what it
    has. cache: one that holds a beginning of the prompt, not all of it; it is used up.

    Raises ConfigError for a setting or function that is unknown, out of range, or without effect; PromptError.
    """
    require_loaded(loaded)
    spec = decoder if isinstance(decoder, DecoderSpec) else None
    given: dict[str, Any] = {**settings}
    if config is not None:
        check_config(config, given)
    if decoder is not None:
        given["decoder"] = decoder if spec is None else spec.name
    if is_messages(prompt) and "raw" not in given:
        given.setdefault("chat", True)
    resolved = resolve(given) if config is None else config
    if resolved.decoder != given.get("decoder", resolved.decoder):
        raise ConfigError(
            f"config is for the {resolved.decoder} decoder, and decoder is {given['decoder']}; give one of them."
        )
    functions = Functions(prune, select, schedule, value, logits_processors)
    if not callable(interrupted):
        raise ConfigError(f"interrupted is {shown(interrupted)}; give a function, or leave it out.")
    encoded = encode_prompt(loaded, prompt, resolved)
    if cache is not None:
        check_cache(loaded, cache, encoded)
    return Stream(Task(loaded, encoded, resolved, functions, spec), interrupted, cache)


class Stream(Iterator[Step], AsyncIterator[Step]):
    """A decoding under way: iterate for steps (`for`, or `async for`); `run()` gives what there is so far, at any time.

    `cancel()` ends it from another thread or a signal handler; the prompt is run when the first step is asked for. One
    thread at a time may ask for steps; streams of several threads take turns at their model. `failure`: what ended it
    before its time (finish_reason "cancelled").
    """

    def __init__(self, task: Task, interrupted: Interrupt = never, cache: Any | None = None) -> None:
        self.loaded, self.prompt = task.loaded, task.prompt
        with self.loaded.lock:
            self.task = task.measured()
            self.config = self.task.config
            self.cache = self.loaded.cache_for(self.prompt.token_ids) if cache is None else cache
            self.exits = open_exits(self.loaded.model, self.config, self.prompt.token_ids)
        self.finish_reason: str | None = None
        self.failure: ComputeError | None = None
        self.decoder: Decoder | None = None
        self._watch = self.task.watch()
        self._joint = JointText(self.loaded.tokenizer)
        self.cancellation = Cancellation(self.config.timeout, interrupted)
        self.started = self.cancellation.started
        self.prefilled = self.ended = self.started

    @property
    def steps(self) -> list[Step]:
        return self.decoder.steps if self.decoder is not None else []

    def cancel(self) -> None:
        """End the run at the next step or chunk of the prompt; what was generated is kept."""
        self.cancellation.cancelled = True

    async def __anext__(self) -> Step:
        """The next step, made in another thread, so that the event loop goes on."""
        try:
            step = await asyncio.to_thread(next, self, None)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if step is None:
            raise StopAsyncIteration
        return step

    def __next__(self) -> Step:
        with self.loaded.lock:
            return self._advance()

    def _advance(self) -> Step:
        if self.finish_reason is None:
            self.finish_reason = self._reason_to_stop()
        if self.finish_reason is not None:
            self._settle()
            raise StopIteration
        step = None
        try:
            if self.decoder is None:
                self.decoder = self._start()
                self.prefilled = time.perf_counter()
            step = self.decoder.advance()
        except Interrupted as stop:
            self.finish_reason = str(stop)
            raise StopIteration from None
        except ComputeError as lost:
            self.finish_reason, self.failure = "cancelled", lost
            raise StopIteration from None
        finally:
            self.ended = time.perf_counter()
            if step is None and self.finish_reason is None:  # a step half done cannot be gone on with
                self.finish_reason = "cancelled"
        self._write(step)
        return step

    def _write(self, step: Step) -> None:
        """Give a step its texts, and earlier ones theirs anew that lost a member by it.

        The most probable member continues the text of those before it, so that a character of several tokens is whole.
        """
        for member in step.tokens:
            member.text = self.loaded.tokenizer.token_text(member.id)
        best = step.tokens[0]
        if best.slot is not None:
            best.text = "".join(self._joint.add(best.id))
        removed = set(step.removed)
        for earlier in reversed(self.steps):
            slots = {member.slot for member in earlier.tokens}
            if earlier is step or slots & removed:
                earlier.text = inline_set(earlier.tokens, [member.text for member in earlier.tokens])
            removed -= slots
            if not removed:
                break

    def complete(self) -> Run:
        """The run to its end. Raises ComputeError; `run` then still has what there was."""
        for _ in self:
            pass
        run = self.run()
        if self.failure is not None:
            raise self.failure
        return run

    def run(self) -> Run:
        """The run so far, complete in itself; a run that has not ended counts as cancelled."""
        with self.loaded.lock:
            return self._run()

    def _run(self) -> Run:
        if self.decoder is not None:
            self.decoder.note_evidence()
        try:
            self._settle()
            readings = self.readings()
        except ComputeError as lost:
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
        ids, control = self.prompt.token_ids, decoder.control
        return scoring.read_paths(self.loaded.model, ids, self.steps, self.config, cache, control)

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
            if self.decoder.full:
                return "length"
            if limit is not None and self.decoder.slots_next > limit:
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
        reason = self._outside()
        if reason is not None and not (isinstance(reason, str) and reason in FINISH_REASONS):
            raise ConfigError(
                f"The function interrupted returned {shown(reason)}; it must return None to go on, or why not: "
                f"{', '.join(FINISH_REASONS)}."
            )
        return reason


def check_config(config: object, settings: Mapping[str, object]) -> None:
    """Raises ConfigError for anything but a whole configuration, and for settings beside it."""
    if not isinstance(config, GenerateConfig):
        raise ConfigError(
            f"config is {shown(config)}; give a tempo_mlx.GenerateConfig, or settings by name, as in max_tokens=20 "
            "or **a_dict."
        )
    if settings:
        raise ConfigError(f"config says every setting already; leave out {', '.join(settings)}, or it.")


def check_cache(loaded: LoadedModel, cache: object, prompt: RunPrompt) -> None:
    """Raises ConfigError for anything but a cache of the model's with less than the prompt in it."""
    made = loaded.model.new_cache()
    if not isinstance(cache, type(made)) or len(cache) >= max(1, len(prompt.token_ids)):
        raise ConfigError(
            f"cache is {shown(cache)}; give one of this model that holds a beginning of the prompt, or leave it out."
        )


def is_messages(prompt: Prompt) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether a prompt is a conversation."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)


def encode_prompt(loaded: LoadedModel, prompt: Prompt, config: GenerateConfig) -> RunPrompt:
    """The prompt's token ids; of messages, and of a text where `config.chat`, under the model's chat template.

    Raises PromptError for what is none of those; ConfigError for messages without `config.chat`.
    """
    tokenizer, vocabulary = loaded.tokenizer, loaded.model.architecture.vocab_size
    if isinstance(prompt, RunPrompt):
        return replace(prompt, token_ids=token_ids(prompt.token_ids, vocabulary))
    if is_messages(prompt):
        if not config.chat:
            raise ConfigError(
                "Messages go through the chat template; leave out chat=False (a config says chat=True), or give a text."
            )
        return encode_chat(tokenizer, checked_messages(prompt), config)
    if not isinstance(prompt, str):
        ids = token_ids(prompt, vocabulary)
        return RunPrompt(tokenizer.decode(ids), ids)
    if not config.chat:
        return RunPrompt(prompt, tuple(tokenizer.encode(prompt)))
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}], config)


def checked_messages(messages: object) -> list[Message]:
    """Copies. Raises PromptError for a message without role or content, or with what no template could write."""
    checked = listed(messages)
    if checked is None:
        raise PromptError(f"messages is {shown(messages)}; give a list of them.")
    for number, message in enumerate(checked, 1):
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise PromptError(
                f"Message {number} is {shown(message)}; give it a role and a content, both text, as in "
                '{"role": "user", "content": "Hello"}.'
            )
    return [copy_json(message, PromptError, f"message {number}") for number, message in enumerate(checked, 1)]


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], config: GenerateConfig) -> RunPrompt:
    """The token ids of a conversation that the model is to continue; `config.system` goes before it.

    A last message of the assistant is the beginning of the answer.
    """
    system = config.system
    switch = tokenizer.chat_template_knows_thinking
    if config.enable_thinking and not switch and tokenizer.reasoning == THINK:
        system = thinking.system_message(system)
    first = [] if system is None else [{"role": "system", "content": system}]
    variables: dict[str, Any] = {"enable_thinking": config.enable_thinking} if switch else {}
    for name, _, value in (each.partition("=") for each in config.template_variables):
        variables[name] = value
        with suppress(ValueError):  # a plain word stands for itself
            variables[name] = json.loads(value)
    begun = ""
    if messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        messages, begun = messages[:-1], messages[-1]["content"]
    text, ids = tokenizer.encode_chat([*first, *messages], begun, **variables)
    return RunPrompt(text, tuple(ids))
