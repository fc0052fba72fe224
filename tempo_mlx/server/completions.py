"""OpenAI-style completions in the worker: runs read as plain texts, with log-probabilities.

The outputs are neutral: `begin`, `delta` (a piece of text with its tokens), `end` (every choice whole). openai.py
writes them in OpenAI's shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tempo_mlx.api import Stream
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode import thinking
from tempo_mlx.decode.prefill import Interrupt
from tempo_mlx.decode.step import Member, Step
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.build import cut_at_stop
from tempo_mlx.report.records import RunPrompt
from tempo_mlx.report.run import Run
from tempo_mlx.report.text import Tokenizer, is_shown
from tempo_mlx.server.decoding import step_event
from tempo_mlx.server.events import Output, StepEvents
from tempo_mlx.server.observe import Watched
from tempo_mlx.server.reading import SettledReading, TextStream


def complete(
    loaded: LoadedModel,
    prompt: RunPrompt,
    config: GenerateConfig,
    payload: dict[str, Any],
    id: str,
    interrupted: Interrupt,
) -> Iterator[Output]:
    """payload: `logprobs`, None or how many alternatives to report for each token; `n`, how many choices."""
    count = payload["logprobs"]
    watched = None if count is None else Watched(loaded.model, max(count, 1), config.temperature)
    model = loaded if watched is None else replace(loaded, model=watched)
    stream = Stream(model, prompt, config, interrupted=interrupted)
    yield Output("begin", {"prompt_tokens": len(prompt.token_ids)})
    events = StepEvents(loaded.tokenizer)
    reading = SettledReading(config.pruning_window + 1 if config.pruning_signal else 0)
    text = TextStream(loaded.tokenizer, config.stop)
    parts = Parts(config.enable_thinking, thinking.is_open(prompt.text))
    growing = stream.spec.lattice
    scores = None if watched is None else Scores(loaded.tokenizer, watched, len(prompt.token_ids), count)
    sent = 0
    for step in stream:
        event = step_event(events, stream, step)
        chosen = reading.add(step) if growing else []
        piece = text.add(chosen)
        scored = [] if scores is None else [c for c in chosen if c.shown]
        tokens = [scores.entry(c.member.id, c.parent, c.logprob) for c in scored] if scores else []
        sent += len(tokens)
        yield Output("delta", {**parts.add(piece), "tokens": tokens}, step=step.step, stats=event.stats)
    run = stream.run()
    choices = read_choices(run, stream.steps, payload["n"], loaded, scores)
    rest = {**parts.rest(run), "tokens": choices[0]["tokens"][sent:]} if growing else None
    usage = {
        "prompt_tokens": len(prompt.token_ids),
        "completion_tokens": sum(choice["count"] for choice in choices),
    }
    yield Output("end", {"choices": choices, "rest": rest, "usage": usage}, last=True)


class Parts:
    """What was sent of the reasoning and of the answer."""

    def __init__(self, thinks: bool, opened: bool) -> None:
        self._splitter = thinking.Splitter(opened) if thinks else None
        self._reasoning = self._answer = ""

    def add(self, text: str) -> dict[str, str]:
        """A new piece of text, taken apart."""
        reasoning, answer = ("", text) if self._splitter is None else self._splitter.add(text)
        self._reasoning += reasoning
        self._answer += answer
        return {"reasoning": reasoning, "text": answer}

    def rest(self, run: Run) -> dict[str, str]:
        """What remains; nothing where it turned out otherwise than what was sent."""
        return {
            "reasoning": _after(self._reasoning, run.reasoning or ""),
            "text": _after(self._answer, run.final_text),
        }


def _after(sent: str, final: str) -> str:
    return final[len(sent) :] if final.startswith(sent) else ""


@dataclass(frozen=True)
class Scores:
    """The log-probabilities of a token and of its rivals, from the row of the token before it."""

    tokenizer: Tokenizer
    watched: Watched
    prompt_length: int
    count: int

    def entry(self, token: int, parent: int | None, logprob: float) -> dict[str, Any]:
        ids, log_probs = self.watched.top[self.prompt_length - 1 if parent is None else parent]
        top = zip(ids.tolist()[: self.count], log_probs.tolist()[: self.count], strict=True)
        return {
            "token": self.tokenizer.token_text(token),
            "logprob": max(logprob, -9999.0),
            "top": [[self.tokenizer.token_text(i), max(p, -9999.0)] for i, p in top],
        }


def read_choices(
    run: Run, steps: Sequence[Step], n: int, loaded: LoadedModel, scores: Scores | None
) -> list[dict[str, Any]]:
    """Every choice: text, reasoning, finish reason, number of tokens, and their scores where asked for."""
    if run.is_lattice:
        readings = [([token.id for token in run.best_path()], run.final_text, run.finish_reason == "stop")]
    else:
        paths = [(list(path.token_ids), path.text) for path in run.paths[:n]]
        readings = [(ids, text, ends(ids, loaded, run.config["stop"])) for ids, text in paths] or [
            ([], "", False)
        ]
    return [
        {
            "text": text,
            "reasoning": run.reasoning,
            "finish_reason": "stop" if ended else "length",
            "count": len(ids),
            "tokens": [] if scores is None else list(walk(steps, ids, scores)),
        }
        for ids, text, ended in readings
    ]


def ends(ids: Sequence[int], loaded: LoadedModel, stop: Sequence[str]) -> bool:
    """Whether a text of a tree came to its end, by a token or by a stop string."""
    text = loaded.tokenizer.decode(ids, continues=True) if stop else ""
    return ids[-1] in loaded.tokenizer.eos_ids or cut_at_stop(text, stop) != text


def walk(steps: Sequence[Step], ids: Sequence[int], scores: Scores) -> Iterator[dict[str, Any]]:
    """The tokens of one path with their scores, each under the row of the one before it; the end of text left out."""
    for member, parent in trace(steps, ids):
        if member.slot is not None and is_shown(member):
            edge = next((edge for edge in member.parents if edge.slot == parent), None)
            probability = member.probability if edge is None else edge.forward
            yield scores.entry(member.id, parent, math.log(probability) if probability > 0 else -math.inf)


def trace(steps: Sequence[Step], ids: Sequence[int]) -> list[tuple[Member, int | None]]:
    """The members that spell `ids`, each with the slot of its predecessor; as far as they can be found."""
    ways: list[list[tuple[Member, int | None]]] = [[]]
    for step, token in zip(steps, ids, strict=False):
        longer = []
        for way in ways:
            parent = way[-1][0].slot if way else None
            for member in step.tokens:
                if member.id == token and (not way or any(edge.slot == parent for edge in member.parents)):
                    longer.append([*way, (member, parent)])
        if not longer:
            break
        ways = longer
    return ways[0]
