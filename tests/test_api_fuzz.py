"""Calls from anywhere: whatever Python code hands to the API, it gets an answer or a sentence, and no process dies.

`pytest tests/test_api_fuzz.py --hypothesis-profile=thorough` makes 20,000 of them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import tempo_mlx
from tempo_mlx.batch import make_line, read_items
from tempo_mlx.config import GenerateConfig
from tempo_mlx.errors import TempoError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.verify import verify
from tempo_mlx.resolution import resolve
from tempo_mlx.sessions.conversation import Conversation
from tempo_mlx.settings import settings_of
from tests.test_run_fuzz import ODD
from tests.twin_table import VOCABULARY
from tests.twins import twin

OBJECTS: tuple[Any, ...] = (
    *ODD, b"bytes", bytearray(b"x"), float("nan"), float("inf"), 1 + 2j, object(), len, Path("x"), range(3), {1, 2},
    np.array([1, 2]), np.array([[1, 2]]), np.array(["a"]), np.float32(0.5), np.int64(7), np.bool_(True), iter([1, 2]),
    type, "\0", "Hello", [1, "a"], [1.5], [True], [-1], [VOCABULARY], (1, 2, 3),
)  # fmt: skip
MESSAGES: tuple[Any, ...] = (
    {"role": "user", "content": "Hello"}, {"role": "system", "content": ""}, {"role": 3, "content": "x"},
    {"role": "user"}, {"content": None}, {"role": "tool", "content": "\ud83d"}, {},
    {"role": "", "content": "x", "name": object()}, "user", None, 3, ["role", "content"],
)  # fmt: skip
# An error of their own, of the caller's code, would be the caller's.
CALLABLES = tuple(lambda *_, value=value: value for value in OBJECTS)
FUNCTIONS = (
    "decoder",
    "prune",
    "select",
    "schedule",
    "value",
    "logits_processors",
    "interrupted",
    "cache",
    "config",
)


@cache
def model() -> LoadedModel:
    return tempo_mlx.load(str(twin("llama")))


@cache
def run() -> tempo_mlx.Run:
    return tempo_mlx.generate(model(), "Hello", max_tokens=2)


# Calls with one argument. A text or a number where a file is wanted would be one, or a descriptor of this process.
OTHERS: dict[str, Callable[[Any], object]] = {
    "load": lambda value: None if isinstance(value, str) else tempo_mlx.load(value),
    "Session": tempo_mlx.Session,
    "Conversation": Conversation,
    "config": lambda value: tempo_mlx.generate(model(), "Hello", value),
    "generate": lambda value: tempo_mlx.generate(value, "Hello"),
    "score": lambda value: tempo_mlx.score(value, "Hello", ["a"]),
    "verify": lambda value: verify(value, model()),
    "verify with": lambda value: verify(run(), value),
    "from_json": tempo_mlx.Run.from_json,
    "Run.load": tempo_mlx.Run.load,
    "Run.save": lambda value: None if is_name(value) else run().save(value),
    "Conversation.load": lambda value: Conversation.load(model(), value),
    "Conversation.save": lambda value: None if is_name(value) else Conversation(model()).save(value),
    "keep": lambda value: Conversation(model()).keep(run(), value),
    **{
        f"load({name})": lambda value, name=name: LoadConfig(**{name: value})  # type: ignore[misc]
        for name in settings_of(LoadConfig)
    },
}


def is_name(value: Any) -> bool:
    """Of a file that would be written."""
    return isinstance(value, str | Path) and value not in ("\0", "\ud83d")


def after(calls: int) -> Callable[[], str | None]:
    """Interrupts what would go on: settings may ask for a million steps."""
    left = iter(range(calls))
    return lambda: None if next(left, None) is not None else "cancelled"


objects = st.sampled_from(OBJECTS)
names = st.sampled_from(sorted(settings_of(GenerateConfig)))
ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4)
prompts = st.one_of(ids, st.text(max_size=8), st.lists(st.sampled_from(MESSAGES), max_size=3), objects,
                    st.lists(objects, max_size=3), st.builds(np.array, ids))  # fmt: skip


@st.composite
def values(draw: Any, name: str) -> Any:
    """Of a setting: as often one that may be in force as one from outside."""
    setting = settings_of(GenerateConfig)[name]
    fitting: list[st.SearchStrategy[Any]] = [
        st.just(setting.default),
        st.sampled_from([0, 1, 2, 3, 0.5, 0.02, "a"]),
    ]
    if setting.choices:
        fitting.append(st.sampled_from(setting.choices))
    if setting.kind is bool:
        fitting.append(st.booleans())
    return draw(objects if draw(st.booleans()) else st.one_of(fitting))


@st.composite
def keywords(draw: Any) -> dict[str, Any]:
    """Some settings, few of which go together, and now and then a function, or a name that is none."""
    chosen = draw(st.lists(names, max_size=3, unique=True))
    given = {name: draw(values(name)) for name in chosen}
    if not draw(st.integers(0, 4)):
        name = draw(st.sampled_from((*FUNCTIONS, "nothing", "max-tokens", "")))
        value = draw(st.sampled_from((*(o for o in OBJECTS if not callable(o)), *CALLABLES)))
        given[name] = [value] if draw(st.booleans()) else value
    return {"max_tokens": 3, "interrupted": after(12), **given}


def ends_in_a_sentence(call: Callable[..., object], *arguments: Any, **keywords: Any) -> object:
    """What the call returned; None where it raised one of ours, with one sentence or a few."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return call(*arguments, **keywords)
        except TempoError as error:
            assert 0 < len(str(error)) < 1000 and "\n" not in str(error), str(error)
    return None


def examples(least: int) -> Any:
    return settings(
        max_examples=max(least, settings().max_examples // 5), phases=[Phase.generate], database=None
    )


@pytest.mark.slow
@given(prompt=prompts, given_=keywords(), kept=st.booleans())
@examples(100)
def test_generate(prompt: Any, given_: dict[str, Any], kept: bool) -> None:
    """And what it gives is a run that can be written, read and found exact."""
    whole = tempo_mlx.Session(model()).generate if kept else partial(tempo_mlx.generate, model())
    run = ends_in_a_sentence(whole, prompt, **given_)
    if isinstance(run, tempo_mlx.Run) and not run.custom:
        assert tempo_mlx.Run.from_json(run.to_json()) == run
        result = verify(run, model())
        assert result.ok, (run.config, result.findings)


@given(prompt=prompts, continuations=st.one_of(st.lists(prompts, max_size=3), objects), given_=keywords())
@examples(50)
def test_score(prompt: Any, continuations: Any, given_: dict[str, Any]) -> None:
    del given_["interrupted"], given_["max_tokens"]
    ends_in_a_sentence(tempo_mlx.score, model(), prompt, continuations, **given_)


@given(
    messages=st.one_of(st.lists(st.sampled_from(MESSAGES), max_size=3), objects), first=keywords(), second=keywords(),
    questions=st.lists(st.one_of(st.text(max_size=8), objects), max_size=2), other=objects,
)  # fmt: skip
@examples(50)
def test_conversation(
    tmp_path_factory: pytest.TempPathFactory,
    messages: Any,
    first: dict[str, Any],
    second: dict[str, Any],
    questions: list[Any],
    other: Any,
) -> None:
    """And it can be saved and gone on with, whatever was said."""
    del first["interrupted"]
    talk = ends_in_a_sentence(Conversation, model(), messages=messages, **first)
    if not isinstance(talk, Conversation):
        return
    for question in questions:
        ends_in_a_sentence(talk.ask, question, **second)
    ends_in_a_sentence(talk.again, **second)
    ends_in_a_sentence(talk.keep, other)
    file = tmp_path_factory.getbasetemp() / "talk.json"
    talk.save(file)
    assert Conversation.load(model(), file).messages == talk.messages


@st.composite
def lines(draw: Any) -> bytes:
    """Of a batch's input: some JSON, some bytes."""
    if not draw(st.integers(0, 3)):
        return draw(st.binary(max_size=12)).replace(b"\n", b"")  # type: ignore[no-any-return]
    value = draw(st.sampled_from(ODD))
    if draw(st.booleans()):
        named = {name: draw(st.sampled_from(ODD)) for name in draw(st.lists(names, max_size=2))}
        value = {"prompt": draw(st.one_of(st.text(max_size=8), st.sampled_from(ODD))), **named}
    return json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@given(content=st.lists(lines(), max_size=3).map(b"\n".join))
@examples(50)
def test_lines_of_a_batch(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "prompts.jsonl"
    file.write_bytes(content)
    items = ends_in_a_sentence(read_items, file, lambda given: resolve({"max_tokens": 3, **given}))
    for item in items if isinstance(items, list) else ():
        line, _ = make_line(model(), item, after(12))
        assert line is None or json.loads(line.encode())["format"].startswith("tempo-mlx/")


@given(name=st.sampled_from(sorted(OTHERS)), value=objects)
@examples(100)
def test_everything_else_that_takes_something(name: str, value: Any) -> None:
    ends_in_a_sentence(OTHERS[name], value)
