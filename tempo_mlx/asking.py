"""`ask`: the answers that a model holds to a question, and how probable each is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tempo_mlx.api import Prompt, Stream, encode_prompt, is_messages, stream
from tempo_mlx.config import GenerateConfig
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.decode.score import score_sequences
from tempo_mlx.errors import ConfigError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.answers import Answer, Answers, By, answers_of, first_match, last_number, same_text
from tempo_mlx.resolution import resolve

# Unless they are given: an answer is a short text, and the rare ones are asked for too.
ASKED: Mapping[str, Any] = {
    "decoder": "enumerate", "leaves": 16, "coverage": 0.95, "threshold": 0.001, "max_tokens": 512,
}  # fmt: skip
WAYS: Mapping[str, By] = {"text": same_text, "number": last_number}


class Asking(Iterator[Answers]):
    """A question under way: iterate for the answers so far, whenever there are more; `answers()` at any time."""

    def __init__(self, decoding: Stream, question: str, by: By) -> None:
        self.decoding, self.question, self.by = decoding, question, by
        self.seen = 0

    def __next__(self) -> Answers:
        for _ in self.decoding:
            count = len(self.decoding.readings())
            if count > self.seen:
                self.seen = count
                return self.answers()
        raise StopIteration

    def answers(self) -> Answers:
        return answers_of(self.question, self.decoding.run(), self.by)


def ask(
    loaded: LoadedModel,
    question: Prompt,
    *,
    choices: Sequence[str] | None = None,
    by: str | Callable[[str], str | None] = "text",
    regex: str | None = None,
    config: GenerateConfig | None = None,
    **settings: Any,
) -> Answers:
    """The answers to a question with bounds of their probabilities, the most probable first.

    The question goes through the model's chat template where it has one (`chat=False`: never). Texts that say the same
    are one answer: by "text" (but for case and punctuation), by "number" (the last one), by what a regular expression
    finds, or by a function of your own. choices: score these answers exactly instead, in one pass. settings: those of
    `generate`; leaves, coverage, max_passes and timeout say when to stop.

    Raises ConfigError, PromptError.
    """
    if choices is not None:
        return score_choices(loaded, question, choices, config or resolve(asked(loaded, settings, True)))
    asking = begin(loaded, question, by=by, regex=regex, config=config, **settings)
    for _ in asking.decoding:
        pass
    return asking.answers()


def begin(
    loaded: LoadedModel,
    question: Prompt,
    *,
    by: str | Callable[[str], str | None] = "text",
    regex: str | None = None,
    config: GenerateConfig | None = None,
    interrupted: Callable[[], str | None] | None = None,
    **settings: Any,
) -> Asking:
    """The same as `ask`, answer by answer."""
    way = way_of(by, regex)
    resolved = config or resolve(asked(loaded, settings, False))
    if DECODERS[resolved.decoder].lattice:
        raise ConfigError(
            f"The {resolved.decoder} decoder gives no texts to take answers from; choose --decoder enumerate."
        )
    more: dict[str, Any] = {} if interrupted is None else {"interrupted": interrupted}
    decoding = stream(loaded, question, resolved, **more)
    return Asking(decoding, question_of(question), way)


def way_of(by: str | Callable[[str], str | None], regex: str | None) -> By:
    """Raises ConfigError."""
    if regex is not None:
        if by != "text":
            raise ConfigError("by and regex both say what an answer is; leave one of them out.")
        return first_match(regex)
    if not isinstance(by, str):
        return by
    if by not in WAYS:
        raise ConfigError(f"by is {by!r}; give {', '.join(WAYS)}, or a function of a text.")
    return WAYS[by]


def asked(loaded: LoadedModel, settings: Mapping[str, Any], scored: bool) -> dict[str, Any]:
    """Settings with the defaults of a question, as far as the decoder in force has them."""
    chat = {"chat": loaded.tokenizer.has_chat_template}
    if scored or settings.get("decoder", "enumerate") != "enumerate" or "branches" in settings:
        return {**chat, **settings}
    without = {"threshold"} if settings.get("selection", "threshold") != "threshold" else set()
    return {**chat, **{name: value for name, value in ASKED.items() if name not in without}, **settings}


def question_of(question: Prompt) -> str:
    if isinstance(question, str):
        return question
    if is_messages(question):
        return str(question[-1]["content"])  # type: ignore[index,call-overload,unused-ignore]
    return ""


def score_choices(
    loaded: LoadedModel, question: Prompt, choices: Sequence[str], config: GenerateConfig
) -> Answers:
    """The probability that the answer begins with each choice, as given or with another first letter's case.

    All are scored in one pass on the prompt they share. Of a choice that others begin with, theirs is taken off.
    """
    names = [choice.strip() for choice in choices]
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"choices are {list(choices)}; give different ones that are not empty.")
    prompt = encode_prompt(loaded, question, config)
    spelled = spellings(loaded, names, blank=not config.chat)
    sequences = sorted({ids for each in spelled.values() for ids in each}, key=len)
    scores = score_sequences(loaded.model, prompt.token_ids, sequences)
    mass = {ids: math.exp(float(found.sum())) for ids, found in zip(sequences, scores, strict=True)}
    inclusive = dict(mass)
    for ids in sequences:
        above = [one for one in sequences if len(one) < len(ids) and ids[: len(one)] == one]
        if above:
            mass[max(above, key=len)] -= inclusive[ids]
    found = {name: sum(max(mass[ids], 0.0) for ids in spelled[name]) for name in names}
    unseen = max(1.0 - sum(found.values()), 0.0)
    answers = [Answer(name, share, min(share + unseen, 1.0)) for name, share in found.items()]
    answers.sort(key=lambda answer: -answer.lower)
    return Answers(question_of(question), tuple(answers), unseen)


def spellings(loaded: LoadedModel, names: Sequence[str], blank: bool) -> dict[str, list[tuple[int, ...]]]:
    """Different token sequences of each choice, none of two; with a blank before it where the prompt is continued."""
    found: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
    taken: set[tuple[int, ...]] = set()
    cased = [(name, name[0].swapcase() + name[1:]) for name in names]
    for name, text in (*((name, name) for name in names), *cased):
        ids = tuple(loaded.tokenizer.encode(f" {text}" if blank else text, add_special=False))
        if ids and ids not in taken:
            taken.add(ids)
            found[name].append(ids)
    return found
