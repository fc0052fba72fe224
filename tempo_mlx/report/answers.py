"""Answers: what texts say, each with the probability that the model gives it, as far as that is known.

Texts that say the same are one answer. Of an enumeration an answer is at least as probable as its texts together, and
at most that and all that was not looked at.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from tempo_mlx.errors import ConfigError, OutputError
from tempo_mlx.report.notebook import escaped, percent
from tempo_mlx.report.run import Run
from tempo_mlx.report.texts import ListedText, as_seen, listed
from tempo_mlx.settings import shown as quoted

if TYPE_CHECKING:
    import pandas

By = Callable[[str], str | None]  # what a text answers; None: nothing
NO_ANSWER = "(no answer)"
MATCH_SECONDS = 1.0  # that a user's regular expression may take on a text
OPEN_ENDED = 0.01  # of all texts: under this none of those found is an answer
# A sign follows no word, as the dash of 10-20 does; commas set thousands apart; .5 is a number.
NUMBER = re.compile(
    r"(?:(?<![\w)])[-\u2212])?(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
)
EDGES = " \t\n\r\"'`*_.,;:!?()[]“”‘’…"  # what may stand around an answer and says nothing
BEFORE = re.compile(rf"^(?:(?!(?<!\.)\.\d)[{re.escape(EDGES)}])+")  # but for the point of .5


@dataclass(frozen=True)
class Answer:
    """text: as its most probable text has it. lower, upper: of its probability. texts: places in the run's `paths`.

    estimate: of its probability in what samples were drawn from, without bias; None of what was not drawn.
    """

    text: str
    lower: float
    upper: float
    texts: tuple[int, ...] = ()
    estimate: float | None = None


@dataclass(frozen=True, repr=False)
class Answers(Sequence[Answer]):
    """The answers to a question, the most probable first. unseen: the probability of all texts not looked at.

    run: whose texts they are; None where given choices were scored.
    """

    question: str
    answers: tuple[Answer, ...]
    unseen: float
    run: Run | None = field(default=None, compare=False)

    def __getitem__(self, index: Any) -> Any:
        return self.answers[index]

    def __len__(self) -> int:
        return len(self.answers)

    def __iter__(self) -> Iterator[Answer]:
        return iter(self.answers)

    @property
    def best(self) -> Answer | None:
        return self.answers[0] if self.answers else None

    @property
    def decided(self) -> bool:
        """Whether nothing that was not looked at can change which answer is the most probable."""
        rival = self.answers[1].lower if len(self.answers) > 1 else 0.0
        return bool(self.answers) and self.answers[0].lower >= rival + self.unseen

    @property
    def open_ended(self) -> bool:
        """Whether the texts found are so few of all that the model may say that no list of them answers anything."""
        found = (self.run.tree or {}).get("found") if self.run is not None else None
        return found is not None and 0.0 < found < OPEN_ENDED

    @property
    def texts(self) -> list[ListedText]:
        """All texts, each once: what the model says where it takes the most probable token each time, then the others.

        Of an open-ended question they are what there is to show.
        """
        if self.run is None or not self.run.paths:
            return []
        said = as_seen(self.run.paths[0].text)
        return sorted(self.run.texts, key=lambda text: as_seen(text.text) != said)

    def texts_of(self, answer: Answer) -> list[ListedText]:
        """Those that give this answer, each once, the most probable first."""
        return [] if self.run is None else listed([self.run.paths[at] for at in answer.texts])

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the texts of each answer, and in their order where the question is open-ended."""
        return {
            "question": self.question,
            "answers": [
                {
                    "text": answer.text,
                    "lower": answer.lower,
                    "upper": answer.upper,
                    "estimate": answer.estimate,
                    "texts": _records(self.texts_of(answer)),
                }
                for answer in self.answers
            ],
            "not_looked_at": self.unseen,
            "decided": self.decided,
            "open_ended": self.open_ended,
            "texts": _records(self.texts) if self.open_ended else None,
            "run": None if self.run is None else self.run.to_dict(),
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each answer. Raises OutputError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise OutputError("Answers.to_dataframe() needs pandas: pip install pandas.") from error
        rows = [
            {"answer": a.text, "lower": a.lower, "upper": a.upper, "texts": len(a.texts)}
            for a in self.answers
        ]
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        listed = ", ".join(f"{a.text[:40]!r} {a.lower:.0%}" for a in self.answers[:3])
        return f"<Answers: {listed or 'none'}; {self.unseen:.0%} not looked at>"

    def _repr_html_(self) -> str:
        """What a notebook shows: a bar for each answer, which opens its texts."""
        rows = []
        for answer in self.answers:
            texts = "".join(
                f"<li>{percent(float(np.exp(text.log_mass)))} {escaped(text.text)}</li>"
                for text in self.texts_of(answer)
            )
            bar = (
                f'<div style="display:flex;gap:.6em"><span style="flex:0 0 16em;overflow:hidden;white-space:nowrap;'
                f'text-overflow:ellipsis">{escaped(answer.text)}</span>{_bar(answer.lower, self.unseen)}</div>'
            )
            rows.append(f"<details><summary>{bar}</summary><ul>{texts}</ul></details>" if texts else bar)
        rest = f'<div style="opacity:.6">not looked at {percent(self.unseen)}</div>'
        title = f'<div style="opacity:.6">{html.escape(self.question)}</div>'
        return f"<div>{title}{''.join(rows)}{rest}</div>"


def _records(texts: Sequence[ListedText]) -> list[dict[str, Any]]:
    return [{"text": text.text, "logprob": text.log_mass} for text in texts]


def _bar(share: float, unseen: float) -> str:
    width = "flex:0 0 {:.1f}em;height:1em;background:{}"
    known = f'<span style="{width.format(20 * share, "#4a90d9")}"></span>'
    maybe = (
        f'<span style="{width.format(20 * unseen, "color-mix(in srgb, #4a90d9 18%, transparent)")}"></span>'
    )
    return f"<span>{percent(share)}</span>{known}{maybe}"


def answers_of(question: str, run: Run, by: By) -> Answers:
    """The answers that the texts of a run give, each of which is exact."""
    together: dict[str | None, list[int]] = {}
    for at, path in enumerate(run.paths):
        together.setdefault(by(path.text), []).append(at)
    masses = np.exp([path.logprob for path in run.paths])
    first = {path.token_ids: at for at, path in reversed(list(enumerate(run.paths)))}
    masses[[at for at, path in enumerate(run.paths) if first[path.token_ids] != at]] = 0.0  # drawn twice
    if run.finish_reason not in ("stop", "length") and not (run.tree or {}).get("found"):
        masses[:] = 0.0  # texts that have not ended answer nothing yet
    unseen = min(max(1.0 - float(masses.sum()), 0.0), 1.0)
    weights = None
    if run.decoder == "sample" and run.paths:
        weights = (run.tree or {}).get("weights") or [1.0 / len(run.paths)] * len(run.paths)
    found = []
    for key, places in together.items():
        lower = float(masses[places].sum())
        best = max(places, key=lambda at: run.paths[at].logprob)
        text = NO_ANSWER if key is None else shown(key, run.paths[best].text)
        estimate = None if weights is None else float(np.sum([weights[at] for at in places]))
        found.append(Answer(text, lower, min(lower + unseen, 1.0), tuple(places), estimate))
    ranked = sorted(found, key=lambda answer: (-answer.lower, answer.texts))
    return Answers(question, tuple(ranked), unseen, run)


def shown(key: str, text: str) -> str:
    """An answer as the text has it, where it is all of it."""
    return text.strip() if same_text(text) == key else key


def same_text(text: str) -> str | None:
    """Texts that differ in nothing but case, blanks and what stands around them say the same."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return BEFORE.sub("", " ".join(words).rstrip(EDGES)) or None


def last_number(text: str) -> str | None:
    """The last number of a text, as it would be written plainly."""
    found = NUMBER.findall(text)
    if not found:
        return None
    number = re.sub(r"^(-?)\.", r"\g<1>0.", found[-1].replace(",", "").replace("\u2212", "-"))
    return re.sub(r"\.?0+$", "", number) if "." in number else number


def first_match(pattern: str) -> By:
    """What a regular expression finds first: its first group, or all of it.

    Raises ConfigError, also where it takes too long on a text: those of repeats within repeats may take for ever.
    """
    try:
        compiled = regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError, TypeError) as error:
        raise ConfigError(f"{quoted(pattern)} is no regular expression: {error}; correct it.") from error

    def answer(text: str) -> str | None:
        try:
            match = compiled.search(text, timeout=MATCH_SECONDS)
        except TimeoutError:
            raise ConfigError(
                f"{quoted(pattern)} takes more than {MATCH_SECONDS} s on one text; write it without a repeat of what "
                "repeats."
            ) from None
        if match is None:
            return None
        said = match.group(1) if compiled.groups and match.group(1) is not None else match.group(0)
        return str(said).strip() or None

    return answer
