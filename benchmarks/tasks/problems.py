"""The problems, and what solves them. Data sets are given by path, known by their sha256, and never kept."""

from __future__ import annotations

import doctest
import gzip
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempo_mlx.report.answers import EDGES, last_number, same_text
from tempo_mlx.sandbox import Limits, run

# The files that results are of: OpenAI's HumanEval.jsonl.gz (MIT), and the test split of GSM8K (MIT).
SHA256 = {
    "humaneval": "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    "gsm8k": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
QUESTIONS = Path(__file__).parent / "questions.jsonl"
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\nassert", "\n@", "\nfrom ", "\nimport ", "\n```")
TUNING = 8  # every eighth problem is also for tuning, which the page says


@dataclass(frozen=True)
class Problem:
    """solves: whether a text is right. passes: whether it does what the problem itself shows, where it shows that.
    answer: what two texts that say the same have in common."""

    id: str
    prompt: str
    solves: Callable[[str], bool]
    passes: Callable[[str], bool] | None
    answer: Callable[[str], str | None]


@dataclass(frozen=True)
class Task:
    """settings: of every arm. tuning: whether some of the problems are also for that."""

    name: str
    problems: list[Problem]
    settings: dict[str, Any]
    tuning: bool = True

    def split(self, tuning: bool) -> list[Problem]:
        if not tuning:
            return self.problems
        return self.problems[TUNING - 1 :: TUNING] if self.tuning else []


def read_task(name: str, data: Path | None) -> Task:
    if name == "questions":
        lines = QUESTIONS.read_text("utf-8").splitlines()
        settings = {"chat": True, "max_tokens": 24}
        return Task(name, [question(json.loads(line)) for line in lines], settings, tuning=False)
    if data is None:
        sys.exit(f"{name} needs its file: --data PATH (sha256 {SHA256[name]}).")
    content = data.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        sys.exit(f"{data} has sha256 {found}; the results are of {SHA256[name]}.")
    text = (gzip.decompress(content) if data.suffix == ".gz" else content).decode("utf-8")
    entries = [json.loads(line) for line in text.splitlines()]
    if name == "humaneval":
        return Task(name, [program(entry) for entry in entries], {"max_tokens": 160, "stop": STOPS})
    first = [sum_(f"gsm8k-{at:04d}", entry) for at, entry in enumerate(entries[:100])]
    return Task(name, first, {"max_tokens": 160, "stop": ("\n",)}, tuning=False)


def program(entry: dict[str, Any]) -> Problem:
    """A function to be completed; solved where the hidden tests pass, shown by the examples of its docstring."""
    prompt, name = entry["prompt"], entry["entry_point"]

    def solves(text: str) -> bool:
        return runs(f"{prompt}{text}\n\n{entry['test']}\n\ncheck({name})\n")

    shown = doctest.DocTestParser().get_examples(prompt)
    checks = "\n".join(f"run({each.source!r}, {each.want!r})" for each in shown)

    def passes(text: str) -> bool:
        return runs(f"{prompt}{text}\n\n{EXAMPLES}\n{checks}\n")

    return Problem(entry["task_id"], prompt, solves, passes if shown else None, lambda text: text.strip())


# As doctest compares, but without it: a program may print what it likes.
EXAMPLES = """
import ast
def run(source, want):
    try:
        said = eval(source)
    except SyntaxError:
        exec(source, globals())
        return
    try:
        assert said == ast.literal_eval(want.strip())
    except (ValueError, SyntaxError):
        assert repr(said) == want.strip()
"""


def runs(code: str) -> bool:
    return run([sys.executable, "-I", "-"], code, limits=Limits(seconds=5.0)).ok


# Of our own. A model that was made for programs else writes more than there is room for.
WORKED = (
    "Question: A box holds 12 pencils. Ada buys 5 boxes and gives 18 pencils away. How many pencils "
    "has she left?\n"
    "Answer: She buys 5 * 12 = 60 pencils. She has 60 - 18 = 42 left. The answer is 42.\n\n"
    "Question: A train leaves with 240 people. A third of them leave at the first stop, and 25 people"
    " come in. How many people are in the train then?\n"
    "Answer: At the first stop 240 / 3 = 80 people leave, so 240 - 80 = 160 stay. With those who come"
    " in there are 160 + 25 = 185. The answer is 185.\n\n"
    "Question: Tom earns $14 an hour and $3 more for every hour on Sundays. Last week he worked 20 "
    "hours, 6 of them on Sunday. How much did he earn?\n"
    "Answer: For 20 hours he earns 20 * 14 = $280. For the hours on Sunday he gets 6 * 3 = $18 more. "
    "Together that is 280 + 18 = $298. The answer is 298.\n\n"
)


def sum_(id: str, entry: dict[str, str]) -> Problem:
    right = entry["answer"].rsplit("####", 1)[1].strip().replace(",", "")
    prompt = f"{WORKED}Question: {entry['question']}\nAnswer:"
    return Problem(id, prompt, lambda text: last_number(text) == right, None, last_number)


def question(entry: dict[str, Any]) -> Problem:
    """Right where the answer has all words of one that is right, and only few others."""
    accepted = [words_of(answer) for answer in entry["answers"]]

    def solves(text: str) -> bool:
        words = words_of(text)
        return any(has(words, right) for right in accepted)

    prompt = f"{entry['question']} Answer with as few words as possible."
    return Problem(entry["id"], prompt, solves, None, same_text)


def words_of(text: str) -> list[str]:
    return [word.strip(EDGES) for word in (same_text(text) or "").replace("-", " ").split()]


def has(words: list[str], right: list[str]) -> bool:
    spans = [words[at : at + len(right)] for at in range(len(words) - len(right) + 1)]
    return right in spans and len(words) <= len(right) + 8
