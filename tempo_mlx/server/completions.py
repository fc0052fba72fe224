"""OpenAI-style completions in the worker: runs read as plain texts, with log-probabilities.

The outputs are neutral: `begin`, `delta` (a piece of text with its tokens), `end` (every choice whole). openai.py
writes them in OpenAI's shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tempo_mlx.api import Stream
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode import thinking
from tempo_mlx.decode.paths import Chosen, is_read, trace
from tempo_mlx.decode.prefill import Interrupt
from tempo_mlx.decode.settled import SettledReading, removal_window
from tempo_mlx.decode.step import Member
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.records import RunPrompt
from tempo_mlx.report.run import Run
from tempo_mlx.report.stops import Stops, TextStream
from tempo_mlx.report.text import JointText
from tempo_mlx.server.decoding import costs
from tempo_mlx.server.events import Output, stats_of
from tempo_mlx.server.observe import Rivals
from tempo_mlx.task import Task
from tempo_mlx.weights import Tokenizer


def complete(
    loaded: LoadedModel,
    prompt: RunPrompt,
    config: GenerateConfig,
    payload: dict[str, Any],
    id: str,
    interrupted: Interrupt,
) -> Iterator[Output]:
    """payload: `logprobs`, None or how many alternatives to report for each token; `n`, how many choices."""
    tokenizer, count = loaded.tokenizer, payload["logprobs"]
    rivals = None if count is None else Rivals(len(prompt.token_ids) - 1, max(count, 1))
    stream = Stream(Task(loaded, prompt, config, observer=rivals), interrupted)
    yield Output("begin", {"prompt_tokens": len(prompt.token_ids)})
    growing = stream.task.spec.lattice
    reading: SettledReading[Member] = SettledReading(removal_window(config))
    text = TextStream(tokenizer, config.stop)
    splitter = thinking.Splitter(stream.task.opened, tokenizer.reasoning)
    parts = Parts(splitter if stream.task.thinks else None)
    scores = Scores(tokenizer, rivals, len(prompt.token_ids), count)
    joint, sent = JointText(tokenizer), list[dict[str, Any]]()
    for step in stream:
        chosen = [c for c in reading.add(step) if is_read(c.member)] if growing else []
        tokens = scores.entries(chosen, joint)
        sent += tokens
        data = {**parts.add(text.add(c.member.id for c in chosen)), "tokens": tokens}
        yield Output("delta", data, step=step.step, stats=stats_of(step, *costs(stream, step)))
    run = stream.run()
    if stream.failure is not None:
        raise stream.failure
    if growing:
        tail = scores.entries(reading.tail, joint)
        choices = [choice(run, run.final_text, run.finish_reason == "stop", len(run.steps), sent + tail)]
    else:
        stops, choices = Stops(tokenizer, config.stop), []
        for path in run.paths[: payload["n"]]:
            ids = path.token_ids
            ended = ids[-1] in tokenizer.eos_ids or stops(reversed(ids))
            tokens = scores.entries(trace(stream.steps, ids), JointText(tokenizer))
            choices.append(choice(run, path.text, ended, len(ids), tokens))
    usage = {"prompt_tokens": len(prompt.token_ids), "completion_tokens": sum(c["count"] for c in choices)}
    end = {
        "choices": choices or [choice(run, "", False, 0, [])],
        "rest": {**parts.rest(run), "tokens": tail} if growing else None,
        "usage": usage,
    }
    yield Output("end", end, last=True)


def choice(run: Run, text: str, ended: bool, count: int, tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """count: of all tokens; `tokens`: those of the text, with their scores where asked for."""
    reason = "stop" if ended else "length"
    return {
        "text": text, "reasoning": run.reasoning, "finish_reason": reason, "count": count, "tokens": tokens,
    }  # fmt: skip


class Parts:
    """What was sent of the reasoning and of the answer."""

    def __init__(self, splitter: thinking.Splitter | None) -> None:
        self._splitter = splitter
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
    """The log-probabilities of tokens and of their rivals, from the row of the token before each."""

    tokenizer: Tokenizer
    rivals: Rivals | None  # None: nobody asked for them
    prompt_length: int
    count: int

    def entries(self, path: Sequence[Chosen[Member]], joint: JointText) -> list[dict[str, Any]]:
        """Of the tokens that are read. joint: the text before them."""
        return [] if self.rivals is None else [
            self.entry(chosen, self.rivals, joint) for chosen in path if is_read(chosen.member)
        ]  # fmt: skip

    def entry(self, chosen: Chosen[Member], rivals: Rivals, joint: JointText) -> dict[str, Any]:
        """`said`: how long the token's text is, and that of bytes before it which no character came of."""
        ids, log_probs = rivals.top[self.prompt_length - 1 if chosen.parent is None else chosen.parent]
        top = zip(ids.tolist()[: self.count], log_probs.tolist()[: self.count], strict=True)
        token = self.tokenizer.token_bytes(chosen.member.id)
        return {
            "bytes": list(token),
            "said": [len(text) for text in joint.add(chosen.member.id)],
            "logprob": chosen.logprob,
            "top": [[list(self.tokenizer.token_bytes(i)), max(p, -9999.0)] for i, p in top],
        }
