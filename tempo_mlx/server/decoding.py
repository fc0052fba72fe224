"""One request's decoding in the worker: from a prompt to `start`, `step` ... and `run`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tempo_mlx.api import Stream
from tempo_mlx.asking import score_choices, way_of
from tempo_mlx.config import GenerateConfig, as_dict
from tempo_mlx.decode.prefill import Interrupt
from tempo_mlx.decode.step import Step
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.answers import answers_of
from tempo_mlx.report.records import RunPrompt
from tempo_mlx.server.events import Output, StepEvents, phrase_records, stats_of
from tempo_mlx.task import Task


def generate(
    loaded: LoadedModel,
    prompt: RunPrompt,
    config: GenerateConfig,
    payload: dict[str, Any],
    id: str,
    interrupted: Interrupt,
) -> Iterator[Output]:
    """The outputs of /generate."""
    task = Task(loaded, prompt, config)
    stream = Stream(task, interrupted)
    yield start(id, loaded, prompt, config)
    events = StepEvents(task, texts=stream.readings)
    for step in stream:
        yield events.event(step, *costs(stream, step))
    run = stream.run()
    if stream.failure is not None:
        raise stream.failure
    yield Output("phrases", {"phrases": phrase_records(run.phrases)})
    yield Output("run", run.to_dict(), last=True)


def ask(
    loaded: LoadedModel,
    prompt: RunPrompt,
    config: GenerateConfig,
    payload: dict[str, Any],
    id: str,
    interrupted: Interrupt,
) -> Iterator[Output]:
    """The outputs of /ask: a step a pass, and the answers whenever there are more; at last with the run."""
    question = payload["prompt"] if payload["messages"] is None else payload["messages"][-1]["content"]
    if payload["choices"]:
        found = score_choices(loaded, prompt, payload["choices"], config, question, interrupted)
    else:
        stream = Stream(Task(loaded, prompt, config), interrupted)
        by, known = way_of(payload["by"], payload["answer_regex"]), 0
        for step in stream:
            stats = stats_of(step, *costs(stream, step))
            yield Output("step", {"step": step.step}, step=step.step, stats=stats)
            if (count := len(stream.readings())) > known:
                known = count
                so_far = answers_of(question, stream.run(), by).to_dict()
                yield Output("found", {**so_far, "run": None})
        if stream.failure is not None:
            raise stream.failure
        found = answers_of(question, stream.run(), by)
    yield Output("answers", found.to_dict(), last=True)


def costs(stream: Stream, step: Step) -> tuple[int, float | None]:
    """The cache's slots, and of the first step the seconds that the prompt took."""
    assert stream.decoder is not None
    prefill = stream.timing()["prefill_seconds"] if step.step == 0 else None
    return stream.decoder.slots, prefill


def start(id: str, loaded: LoadedModel, prompt: RunPrompt, config: GenerateConfig) -> Output:
    tokens = [loaded.tokenizer.token_text(token) for token in prompt.token_ids]
    data = {
        "request_id": id,
        "model": dict(loaded.model.info),
        "decoder": config.decoder,
        "config": as_dict(config),
        "prompt": {"text": prompt.text, "token_ids": list(prompt.token_ids), "tokens": tokens},
    }
    return Output("start", data)
