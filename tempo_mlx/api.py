"""The Python API: `load` a model, `stream` steps or `generate` a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from tempo_mlx.config import GenerateConfig, LoadConfig, as_dict, resolve
from tempo_mlx.decode import thinking
from tempo_mlx.decode.beam import make_rule
from tempo_mlx.decode.mcts import Mcts, Value
from tempo_mlx.decode.prefill import Interrupted
from tempo_mlx.decode.pruning import PruneContext, Pruned, PruneRule
from tempo_mlx.decode.score import read_paths
from tempo_mlx.decode.step import Step
from tempo_mlx.decode.tempo import Tempo
from tempo_mlx.decode.tree import Reading, Tree
from tempo_mlx.decode.width import with_measured_width
from tempo_mlx.errors import ConfigError, RankLostError
from tempo_mlx.exits import open_exits
from tempo_mlx.loading import LoadedModel, load_model
from tempo_mlx.report.build import build_run, cut_at_stop
from tempo_mlx.report.records import RunPath, RunPrompt
from tempo_mlx.report.run import Run, best_path
from tempo_mlx.weights import Tokenizer

LATTICE_DECODERS = ("superposed", "plain")

Prompt = str | Sequence[int] | RunPrompt
Prune = PruneRule | Callable[[PruneContext], Iterable[Pruned]]


class Decoder(Protocol):
    """One decoding under way: what `decode/` offers and `Stream` drives."""

    steps: list[Step]
    cache: Any

    @property
    def finished(self) -> bool: ...
    def advance(self) -> Step: ...
    def note_evidence(self) -> None: ...


def load(model: str | None = None, **settings: Any) -> LoadedModel:
    """Load a model: a name, a Hugging Face repo id, a directory or a .gguf file; settings of `LoadConfig`.

    Raises ModelError, DownloadError, BackendError, MemoryLimitError, ConfigError.
    """
    return load_model(LoadConfig(**settings if model is None else {"model": model, **settings}))


def generate(loaded: LoadedModel, prompt: Prompt, **settings: Any) -> Run:
    """Decode to the end. The same as draining `stream(...)` and taking its `run()`.

    Raises what `stream` does, and RankLostError (under mlx.launch); a stream's `run()` then still has what there was.
    """
    decoding = stream(loaded, prompt, **settings)
    for _ in decoding:
        pass
    run = decoding.run()
    if decoding.failure is not None:
        raise decoding.failure
    return run


def stream(
    loaded: LoadedModel,
    prompt: Prompt,
    config: GenerateConfig | None = None,
    *,
    prune: Prune | None = None,
    value: Value | None = None,
    interrupted: Callable[[], str | None] | None = None,
    cache: Any | None = None,
    **settings: Any,
) -> Stream:
    """Start a decoding that yields one `Step` at a time.

    prompt: text, token ids, or both. config: a resolved configuration (a run's own, say), or settings by name.
    prune: a retroactive pruning rule of your own (decode/pruning.py). value: what rates a text in the tree
    search (decode/mcts.py). interrupted: called between steps and between chunks of the prompt; a reason
    ("cancelled", "timeout") ends the run, which keeps what it has. cache: one that holds a beginning of the
    prompt, not all of it; it is used up.

    Raises ConfigError for a setting that is unknown, out of range, or without effect; PromptError.
    """
    resolved = resolve(settings) if config is None else config
    return Stream(loaded, prompt, resolved, prune, interrupted, value, cache)


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
        prune: Prune | None = None,
        interrupted: Callable[[], str | None] | None = None,
        value: Value | None = None,
        cache: Any | None = None,
    ) -> None:
        if value is not None and config.decoder != "mcts":
            raise ConfigError("A value function has no effect without the mcts decoder; leave it out.")
        self.loaded = loaded
        self.config = with_measured_width(config, loaded.model)
        self.prompt = encode_prompt(loaded, prompt, config)
        self.exits = open_exits(loaded.model, self.config, self.prompt.token_ids)
        self.finish_reason: str | None = None
        self.failure: RankLostError | None = None
        self.decoder: Decoder | None = None
        self.interruption = Interruption(config.timeout, interrupted)
        self.started = self.interruption.started
        self.prefilled = self.ended = self.started
        self._prune = prune
        self._value = value
        self._cache = cache

    @property
    def steps(self) -> list[Step]:
        return self.decoder.steps if self.decoder is not None else []

    def cancel(self) -> None:
        """End the run at the next step or chunk of the prompt; what was generated is kept."""
        self.interruption.cancelled = True

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
        run = build_run(
            self.steps,
            prompt=self.prompt,
            model_info=self.loaded.model.info,
            config=as_dict(self.config),
            tokenizer=self.loaded.tokenizer,
            decoder=self.config.decoder,
            finish_reason=self.finish_reason or self._reason_to_stop() or "cancelled",
            timing=self.timing(),
            early_exit=self.exits.report() if self.exits is not None else None,
            paths=[RunPath(r.token_ids, self._split(r)[1], r.log_prob, exact=True) for r in readings],
            tree=self.decoder.statistics(self.loaded.tokenizer.token_text)
            if isinstance(self.decoder, Mcts)
            else None,
        )
        if not self.config.enable_thinking:
            return run
        best = self._split(readings[0]) if isinstance(self.decoder, Tree) else self._split(run.final_text)
        return replace(run, reasoning=best[0], final_text=best[1])

    def readings(self) -> list[Reading]:
        """The texts so far with their exact log-probabilities, best first; of a lattice those of `paths`."""
        decoder = self.decoder
        if isinstance(decoder, Tree | Mcts):
            return decoder.readings()
        if decoder is None or not self.steps or not self.config.paths or self.failure is not None:
            return []
        cache = decoder.cache if self.exits is None else self.exits.inside(decoder.cache)
        return read_paths(self.loaded.model, self.prompt.token_ids, self.steps, self.config, cache)

    def _split(self, reading: Reading | str) -> tuple[str | None, str]:
        """(reasoning, answer) of a text; reasoning only where it was asked for."""
        tokenizer = self.loaded.tokenizer
        if isinstance(reading, Reading):
            ids = reading.token_ids
            shown = ids[:-1] if ids[-1] in tokenizer.eos_ids else ids
            reading = cut_at_stop(tokenizer.decode(shown, continues=True), self.config.stop)
        return thinking.split(reading, self._opened) if self.config.enable_thinking else (None, reading)

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
        tokenizer, config = self.loaded.tokenizer, self.config
        model: Any = self.loaded.model if self.exits is None else self.exits
        cache = self._cache
        if cache is not None and self.exits is not None:
            cache = self.exits.cache_around(cache)
        ids: Any = self.prompt.token_ids
        common: dict[str, Any] = {
            "eos_ids": tokenizer.eos_ids, "cache": cache, "interrupted": self.interruption,
        }  # fmt: skip
        if config.thinking_budget is not None:
            common["guide"] = thinking.Budget(tokenizer, config.thinking_budget, self._opened)
        if config.decoder in LATTICE_DECODERS:
            return Tempo(model, ids, config, prune=self._prune, **common)
        common["stops"] = partial(holds_stop, tokenizer, config.stop) if config.stop else None
        if config.decoder == "mcts":
            return Mcts(model, ids, config, value=self._value, **common)
        return Tree(model, ids, config, make_rule(config, len(tokenizer.eos_ids)), **common)

    @property
    def _opened(self) -> bool:
        return thinking.is_open(self.prompt.text)

    def _reason_to_stop(self) -> str | None:
        """Why no further step follows, if so."""
        if self.decoder is not None and self.steps:
            limit = self.config.max_cache_tokens
            context = self.loaded.model.architecture.max_position_embeddings
            if self.decoder.finished or self._stop_text():
                return "stop"
            if len(self.steps) >= self.config.max_tokens or self.steps[-1].position + 1 >= context:
                return "length"
            if limit is not None and len(self.decoder.cache) + len(self.steps[-1].tokens) > limit:
                return "memory"
        return self.interruption()

    def _stop_text(self) -> bool:
        """Whether the most probable reading of a lattice holds a stop string; texts of a tree end on their own."""
        if not self.config.stop or self.config.decoder not in LATTICE_DECODERS:
            return False
        reading = best_path(self.steps)
        return holds_stop(self.loaded.tokenizer, self.config.stop, [token.id for token in reading])


class Interruption:
    """Why a run ends early, if so: asked by the decoder, between its chunks and steps.

    It knows neither the run nor its decoder, which know it: so their memory is free as soon as nobody holds them.
    """

    def __init__(self, timeout: float | None, outside: Callable[[], str | None] | None) -> None:
        """timeout: seconds from now. outside: the caller's own reasons."""
        self.started = time.perf_counter()
        self.cancelled = False
        self._timeout, self._outside = timeout, outside

    def __call__(self) -> str | None:
        if self.cancelled:
            return "cancelled"
        if self._timeout is not None and time.perf_counter() - self.started > self._timeout:
            return "timeout"
        return self._outside() if self._outside is not None else None


def holds_stop(tokenizer: Tokenizer, stop: Sequence[str], token_ids: Sequence[int]) -> bool:
    """Whether the text of these tokens holds one of the strings."""
    text = tokenizer.decode(token_ids, continues=True)
    return cut_at_stop(text, stop) != text


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
