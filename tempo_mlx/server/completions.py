"""OpenAI-style completions in the worker: runs read as plain texts, with log-probabilities.

The outputs are neutral: `begin`, `delta` (a piece of text with its tokens), `end` (every choice whole). openai.py
writes them in OpenAI's shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tempo_mlx.api import Stream
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode import thinking
from tempo_mlx.decode.constraint import check_grammar
from tempo_mlx.decode.paths import Chosen, is_read, trace
from tempo_mlx.decode.prefill import Interrupt
from tempo_mlx.decode.score import score_prompt
from tempo_mlx.decode.settled import SettledReading, removal_window
from tempo_mlx.decode.step import Member
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.records import RunPath, RunPrompt
from tempo_mlx.report.run import Run
from tempo_mlx.report.stops import Stops, TextStream, cut_at_stop, stop_in
from tempo_mlx.report.text import JointText
from tempo_mlx.server.decoding import costs
from tempo_mlx.server.errors import ApiError
from tempo_mlx.server.events import Output, phrase_records, stats_of
from tempo_mlx.server.observe import Rivals
from tempo_mlx.server.tool_calls import Style, Tools, Withheld, calls_in, forced_grammar, style_of
from tempo_mlx.sessions.arena import Top, top_tokens
from tempo_mlx.task import Task
from tempo_mlx.weights import Tokenizer
from tempo_mlx.weights.infilling import infilling_ends


def complete(
    loaded: LoadedModel,
    prompt: RunPrompt,
    config: GenerateConfig,
    payload: dict[str, Any],
    id: str,
    interrupted: Interrupt,
) -> Iterator[Output]:
    """payload: `logprobs`, None or how many alternatives to report for each token; `n`, how many choices; `echo`, with
    the prompt before each; `score_only`, nothing but it; `phrases`, of a lattice; `lattice`, the run file; `tools` that
    may be called, by name, and the `call` of one of those that there must be.
    """
    tokenizer, count, tools = loaded.tokenizer, payload["logprobs"], payload["tools"]
    style = style_of(tokenizer.chat_templates.values())
    if payload["call"]:
        config = with_call(config, style, {name: tools[name] for name in payload["call"]})
    if payload["suffix"]:
        config = replace(config, stop=(*config.stop, *infilling_ends(tokenizer)))
    yield Output("begin", {"prompt_tokens": len(prompt.token_ids)})
    echoed, cache = list[dict[str, Any]](), None
    if payload["echo"] and count is not None:
        cache = loaded.model.new_cache()
        echoed = echo_of(loaded, prompt.token_ids, cache, count, interrupted)
    echo = prompt.text if payload["echo"] else ""
    if payload["score_only"]:
        yield ended(prompt, [choice(None, echo, False, 0, echoed)], None)
        return
    rivals = None if count is None else Rivals(len(prompt.token_ids) - 1, max(count, 1))
    stream = Stream(Task(loaded, prompt, config, observer=rivals), interrupted, cache)
    growing, reading = stream.task.spec.lattice, SettledReading[Member](removal_window(config))
    text = TextStream(tokenizer, config.stop)
    splitter = thinking.Splitter(stream.task.opened, tokenizer.reasoning)
    parts = Parts(splitter if stream.task.thinks else None, Withheld(style) if tools else None)
    scores = Scores(tokenizer, rivals, len(prompt.token_ids), count)
    joint, sent, ids = JointText(tokenizer), list[dict[str, Any]](), list[int]()
    if growing and echo:
        yield Output("delta", {"reasoning": "", "text": echo, "tokens": echoed})
    for step in stream:
        chosen = [c for c in reading.add(step) if is_read(c.member)] if growing else []
        tokens = scores.entries(chosen, joint)
        sent += tokens
        ids += [c.member.id for c in chosen]
        data = {**parts.add(text.add(c.member.id for c in chosen)), "tokens": tokens}
        yield Output("delta", data, step=step.step, stats=stats_of(step, *costs(stream, step)))
    run = stream.run()
    if stream.failure is not None:
        raise stream.failure
    reader = Answer(stream.task, style, tools)
    if growing:
        tail = scores.entries(reading.tail, joint)
        ids += [c.member.id for c in reading.tail if is_read(c.member)]
        said = reader.said(ids, (run.reasoning, run.final_text))
        stop = stop_in(tokenizer.decode(ids, continues=True), config.stop)
        one = choice(said, echo, run.finish_reason == "stop", len(run.steps), echoed + sent + tail, stop)
        choices, rest = [one], {**parts.rest(said), "tokens": tail, "calls": one["calls"]}
    else:
        choices, rest = branches(stream, run.paths[: payload["n"]], reader, scores, (echo, echoed)), None
        choices = choices or [choice(None, echo, False, 0, echoed)]
    choices[0] |= beside(stream.task, run, payload)
    yield ended(prompt, choices, rest)


def beside(task: Task, run: Run, payload: dict[str, Any]) -> dict[str, Any]:
    """What is told with the first choice: the phrases of a lattice, and the run file, where they are asked for."""
    found: dict[str, Any] = {"run": run.to_dict()} if payload["lattice"] else {}
    if payload["phrases"] and task.spec.lattice and task.config.decoder != "plain":
        found["phrases"] = phrase_records(run.phrases)
    return found


def branches(
    stream: Stream,
    paths: Sequence[RunPath],
    reader: Answer,
    scores: Scores,
    before: tuple[str, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """The choices of a tree. before: what is echoed, and its tokens."""
    tokenizer, (echo, echoed), choices = stream.loaded.tokenizer, before, list[dict[str, Any]]()
    stops = Stops(tokenizer, stream.config.stop)
    for path in paths:
        last = path.token_ids[-1] in tokenizer.eos_ids or stops(reversed(path.token_ids))
        tokens = scores.entries(trace(stream.steps, path.token_ids), JointText(tokenizer))
        said = reader.said(path.token_ids, stream.task.answers.read(path.token_ids))
        choices.append(choice(said, echo, last, len(path.token_ids), echoed + tokens))
    return choices


def ended(prompt: RunPrompt, choices: list[dict[str, Any]], rest: dict[str, Any] | None) -> Output:
    """rest: what of the one choice was not sent yet; None where nothing was."""
    counts = {"prompt_tokens": len(prompt.token_ids), "completion_tokens": sum(c["count"] for c in choices)}
    return Output("end", {"choices": choices, "rest": rest, "usage": counts}, last=True)


def choice(
    said: Said | None,
    echo: str,
    ended: bool,
    count: int,
    tokens: list[dict[str, Any]],
    stop: str | None = None,
) -> dict[str, Any]:
    """count: of all tokens; `tokens`: those of the text, with their scores where asked for. stop: the stop string that
    ended it; told of the reading of a lattice only.
    """
    said = said or Said(None, "", [])
    reason = "tool_calls" if said.calls else "stop" if ended else "length"
    return {
        "text": echo + said.text, "reasoning": said.reasoning, "calls": said.calls, "finish_reason": reason,
        "count": count, "tokens": tokens, "stop": stop,
    }  # fmt: skip


def with_call(config: GenerateConfig, style: Style, tools: Tools) -> GenerateConfig:
    """Under a grammar of one call. Raises ApiError, ConfigError."""
    grammar = forced_grammar(style, tools)
    if grammar is None:
        raise ApiError(
            400, "invalid_value", "tool_choice cannot ask for a call of this model, whose calls are not plain JSON; "
            "let it be auto.", "tool_choice",
        )  # fmt: skip
    config = replace(config, grammar=grammar)
    check_grammar(config)
    return config


def echo_of(
    loaded: LoadedModel, ids: Sequence[int], cache: Any, count: int, interrupted: Interrupt
) -> list[dict[str, Any]]:
    """The prompt's tokens with the model's own log-probabilities (temperature 1); the first has none."""
    tokenizer, joint = loaded.tokenizer, JointText(loaded.tokenizer)
    tokens = [{**entry(tokenizer, ids[0], joint), "logprob": None, "top": None}]
    if ids[0] == tokenizer.bos_id:
        tokens[0]["said"] = [0, 0]  # it stands before the text
    for chosen, rows in score_prompt(loaded.model, ids, cache, interrupted):
        for token, row in zip(chosen.tolist(), rows, strict=True):
            top = rivals_of(tokenizer, top_tokens(row, max(count, 1)), count)
            tokens.append({**entry(tokenizer, token, joint), "logprob": float(row[token]), "top": top})
    return tokens


@dataclass(frozen=True)
class Said:
    """A text taken apart."""

    reasoning: str | None
    text: str
    calls: list[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """Reads whole texts."""

    task: Task
    style: Style
    tools: Tools

    def said(self, ids: Sequence[int], read: tuple[str | None, str]) -> Said:
        """read: reasoning and answer, as the run has them. Calls may stand within what looks like reasoning."""
        if not self.tools:
            return Said(*read, [])
        tokenizer = self.task.loaded.tokenizer
        shown = ids[:-1] if ids and ids[-1] in tokenizer.eos_ids else ids
        whole = cut_at_stop(tokenizer.decode(shown, continues=True), self.task.config.stop)
        rest, calls = calls_in(whole, self.style, self.tools)
        return Said(*self.task.answers.split(rest), calls)


class Parts:
    """What was sent of the reasoning and of the answer."""

    def __init__(self, splitter: thinking.Splitter | None, withheld: Withheld | None) -> None:
        """withheld: what keeps calls back, where there may be some."""
        self._splitter, self._withheld = splitter, withheld
        self._reasoning = self._answer = ""

    def add(self, text: str) -> dict[str, str]:
        """A new piece of text, taken apart."""
        text = text if self._withheld is None else self._withheld.add(text)
        reasoning, answer = ("", text) if self._splitter is None else self._splitter.add(text)
        self._reasoning += reasoning
        self._answer += answer
        return {"reasoning": reasoning, "text": answer}

    def rest(self, said: Said) -> dict[str, str]:
        """What remains; nothing where it turned out otherwise than what was sent."""
        return {
            "reasoning": _after(self._reasoning, said.reasoning or ""),
            "text": _after(self._answer, said.text),
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
        top = rivals.top[self.prompt_length - 1 if chosen.parent is None else chosen.parent]
        return {
            **entry(self.tokenizer, chosen.member.id, joint),
            "logprob": chosen.logprob,
            "top": rivals_of(self.tokenizer, top, self.count),
        }


def entry(tokenizer: Tokenizer, token: int, joint: JointText) -> dict[str, Any]:
    """`said`: how long the token's text is, and that of bytes before it which no character came of."""
    return {"bytes": list(tokenizer.token_bytes(token)), "said": [len(text) for text in joint.add(token)]}


def rivals_of(tokenizer: Tokenizer, top: Top, count: int) -> list[Any]:
    """The `count` most probable tokens, as bytes with their log-probabilities."""
    ids, log_probs = top
    best = zip(ids.tolist()[:count], log_probs.tolist()[:count], strict=True)
    return [[list(tokenizer.token_bytes(token)), max(log_prob, -9999.0)] for token, log_prob in best]
