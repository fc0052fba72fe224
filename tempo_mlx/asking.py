"""`ask`: the answers that a model holds to a question, and how probable each is."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tempo_mlx.api import Prompt, Stream, check_config, encode_prompt, is_messages, stream
from tempo_mlx.config import GenerateConfig, unused
from tempo_mlx.decode.enumeration import Enumeration
from tempo_mlx.decode.prefill import Interrupt, never
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.decode.score import score_sequences
from tempo_mlx.errors import ConfigError
from tempo_mlx.keywords import GenerateSettings
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.answers import Answer, Answers, By, answers_of, first_match, last_number, same_text
from tempo_mlx.resolution import ASKED, resolve
from tempo_mlx.settings import settings_of, shown

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack

ENOUGH = 64  # passes that a brief look goes on for other answers, once the first is whole
WAYS: Mapping[str, By] = {"text": same_text, "number": last_number}


class Asking(Iterator[Answers]):
    """A question under way: iterate for the answers so far, whenever there are more or the best has grown; `answers()`
    at any time.

    brief: end with the first answer where no list of others answers anything, else after ENOUGH more passes: of a
    talkative model hundreds can follow that find texts of no weight.
    """

    def __init__(self, decoding: Stream, question: str, by: By, brief: bool = False) -> None:
        self.decoding, self.question, self.by, self.brief = decoding, question, by, brief
        self.seen = 0, 0
        self.since = 0  # passes since the first answer was whole

    def __next__(self) -> Answers:
        if self.brief and self.first_ended and self.answers().open_ended:
            raise StopIteration
        for _ in self.decoding:
            self.since += self.first_ended
            if self.brief and self.since > ENOUGH:
                break
            readings = self.decoding.readings()
            now = len(readings), len(readings[0].token_ids) if readings else 0
            if now != self.seen:
                self.seen = now
                return self.answers()
        raise StopIteration

    @property
    def first_ended(self) -> bool:
        """Whether the text that takes the most probable token each time is whole: the first of the run's paths."""
        decoder = self.decoding.decoder
        return isinstance(decoder, Enumeration) and bool(decoder.agenda.settled)

    def answers(self) -> Answers:
        return answers_of(self.question, self.decoding.run(), self.by)


def ask(
    loaded: LoadedModel,
    question: Prompt,
    *,
    by: str | By = "text",
    answer_regex: str | None = None,
    config: GenerateConfig | None = None,
    **settings: Unpack[GenerateSettings],
) -> Answers:
    """The answers to a question with bounds of their probabilities, the most probable first.

    The question goes through the model's chat template where it has one (`chat=False`: never). Texts that say the same
    are one answer: by "text" (but for case and punctuation), by "number" (the last one), by what `answer_regex` finds,
    or by a function of your own. settings: those of `generate`; leaves, coverage, max_passes and timeout say when to
    stop. choices: score these answers exactly instead, in one pass.

    Raises ConfigError, PromptError, ComputeError.
    """
    given: dict[str, Any] = {**settings}
    if config is None and given.get("choices"):
        choices = given.pop("choices")
        resolved = resolve({**chat_of(loaded.tokenizer.has_chat_template), **given})
        check_choices(by, answer_regex, resolved, given)
        return score_choices(loaded, question, choices, resolved)
    asking = begin(loaded, question, by=by, answer_regex=answer_regex, config=config, **settings)
    for _ in asking:
        pass
    if asking.decoding.failure is not None:
        raise asking.decoding.failure
    return asking.answers()


def begin(
    loaded: LoadedModel,
    question: Prompt,
    *,
    by: str | By = "text",
    answer_regex: str | None = None,
    config: GenerateConfig | None = None,
    interrupted: Interrupt = never,
    brief: bool = False,
    **settings: Unpack[GenerateSettings],
) -> Asking:
    """The same as `ask`, answer by answer. brief: see `Asking`."""
    way = way_of(by, answer_regex)
    if config is not None:
        check_config(config, settings)
    resolved = config or resolve(asked(loaded.tokenizer.has_chat_template, {**settings}))
    if DECODERS[resolved.decoder].lattice:
        raise ConfigError(
            f"The {resolved.decoder} decoder gives no texts to take answers from; choose --decoder enumerate."
        )
    decoding = stream(loaded, question, resolved, interrupted=interrupted)
    return Asking(decoding, question_of(question), way, brief)


def way_of(by: str | By, answer_regex: str | None) -> By:
    """Raises ConfigError."""
    if answer_regex is not None:
        if by != "text":
            raise ConfigError("by and answer_regex both say what an answer is; leave one of them out.")
        return first_match(answer_regex)
    if callable(by):
        return by
    if by not in WAYS:
        raise ConfigError(f"by is {shown(by)}; give {', '.join(WAYS)}, or a function of a text.")
    return WAYS[by]


def check_choices(
    by: str | By, answer_regex: str | None, asked_for: GenerateConfig, given: Iterable[str]
) -> None:
    """Raises ConfigError where something else says what an answer is, and for settings that scores do not follow.

    asked_for: what the settings given by name come to, without an environment's. Those of the prompt count; lengths
    and limits are harmless.
    """
    if by != "text" or answer_regex is not None:
        raise ConfigError("choices are the answers themselves; leave out by and answer_regex.")
    changed = [
        name
        for name, setting in settings_of(GenerateConfig).items()
        if (setting.row.group not in ("Input", "Lengths", "Limits") or name == "temperature")
        and getattr(asked_for, name) != setting.default
    ]
    if changed:
        name = next((name for name in given if name in changed), changed[0])
        raise ConfigError(
            f"choices are scored by the model's own probabilities, which {name} does not change; leave it out."
        )


def chat_of(template: bool) -> dict[str, Any]:
    """Questions go through a chat template, where the model has one."""
    return {"chat": True} if template else {}


def asked(template: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the defaults of a question, as far as the decoder that they name uses them."""
    values = {**chat_of(template), **settings}
    if resolve({**settings}).decoder not in (GenerateConfig.decoder, "enumerate"):
        return values
    for name, value in ASKED.items():
        if name not in values and unused(name, {**ASKED, **values}) is None:
            values[name] = value
    return values


def question_of(question: Prompt) -> str:
    if isinstance(question, str):
        return question
    if is_messages(question):
        return str(question[-1]["content"])
    return ""


def score_choices(
    loaded: LoadedModel,
    question: Prompt,
    choices: Sequence[str],
    config: GenerateConfig,
    said: str | None = None,
    interrupted: Interrupt = never,
) -> Answers:
    """The probability that the answer begins with each choice, as given or with another first letter's case.

    All are scored in one pass on the prompt they share. Of a choice that others begin with, theirs is taken off. said:
    the question's text, where the prompt is encoded already. Raises ConfigError, Interrupted.
    """
    names = [choice.strip() for choice in settings_of(GenerateConfig)["choices"].check(choices)]
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"choices are {list(choices)}; give different ones that are not empty.")
    prompt = encode_prompt(loaded, question, config)
    spelled = spellings(loaded, names, blank=not config.chat)
    sequences = sorted({ids for each in spelled.values() for ids in each}, key=len)
    scores = score_sequences(loaded.model, prompt.token_ids, sequences, interrupted=interrupted)
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
    return Answers(said or question_of(question), tuple(answers), unseen)


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
