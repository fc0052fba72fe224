"""Reasoning apart from the answer: however the text arrives, and closed when its budget is spent."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_mlx.api import generate, stream
from tempo_mlx.cli.main import main
from tempo_mlx.decode.thinking import SYSTEM_LINE, Budget, Splitter, is_open, split
from tempo_mlx.errors import ConfigError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.growing import GrowingAnswer
from tempo_mlx.report.phrases import Alternative, Phrase
from tempo_mlx.report.verify import verify
from tempo_mlx.server.events import StepEvents
from tempo_mlx.weights.reasoning import THINK, Reasoning, reasoning_of
from tests.trees import loaded, teacher
from tests.twins import twin

OPEN, CLOSE = THINK.open, THINK.close
SWITCH = "{% if enable_thinking %}{{ '<think>\\n' }}{% endif %}"


def thinker(switch: bool = True) -> LoadedModel:
    """A twin whose chat template opens the reasoning itself, or has no such switch."""
    model = loaded()
    tokenizer = copy.copy(model.tokenizer)
    tokenizer._compiled = {}
    if switch:
        tokenizer.chat_templates = {"default": f"{tokenizer.chat_templates['default']}{SWITCH}"}
    return LoadedModel(model.model, tokenizer, model.config)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("The answer.", False, (None, "The answer.")),
        ("  The answer.", False, (None, "  The answer.")),
        ("<think>\nfirst\n</think>\n\nThe answer.\n", False, ("first", "The answer.\n")),
        ("\nfirst </think>second</think>", True, ("first", "second</think>")),
        ("<think>never closed </thin", False, ("never closed </thin", "")),
        ("<think>\n\n</think>\n\nThe answer.", False, (None, "The answer.")),
        ("<thi", False, (None, "<thi")),
        ("a <think> b", False, (None, "a <think> b")),
        ("", True, (None, "")),
    ],
)  # fmt: skip
def test_a_text_is_split_at_its_tags(text: str, opened: bool, expected: tuple[str | None, str]) -> None:
    assert split(text, opened) == expected


HARMONY = reasoning_of(["<|start|>assistant<|channel|>"])
GEMMA = reasoning_of(["{{ '<|channel>thought\\n' }}"])
MAGISTRAL = reasoning_of(["[THINK]"])


@pytest.mark.parametrize(
    ("marks", "text", "expected"),
    [
        (HARMONY, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
         ("Hm.", "Yes.")),
        (HARMONY, "<|channel|>final<|message|>Yes.", (None, "Yes.")),
        (HARMONY, "<|channel|>analysis<|message|>Hm", ("Hm", "")),
        (HARMONY, "<|channel|>commentary<|message|>{}", (None, "<|channel|>commentary<|message|>{}")),
        (GEMMA, "<|channel>thought\nHm.\n<channel|>Yes.", ("Hm.", "Yes.")),
        (GEMMA, "Yes.", (None, "Yes.")),
        (MAGISTRAL, "[THINK]Hm.[/THINK]Yes.", ("Hm.", "Yes.")),
    ],
)  # fmt: skip
def test_each_model_s_own_marks(marks: Reasoning, text: str, expected: tuple[str | None, str]) -> None:
    assert split(text, False, marks) == expected
    for size in (1, 3, 7):  # as it streams
        splitter, reasoning, answer = Splitter(False, marks), "", ""
        for start in range(0, len(text), size):
            more = splitter.add(text[start : start + size])
            reasoning, answer = reasoning + more[0], answer + more[1]
        more = splitter.finish()
        assert (reasoning + more[0] or None, answer + more[1]) == expected


def test_marks_are_known_from_the_template() -> None:
    assert reasoning_of([]) is reasoning_of(["{{ '<think>' }}"]) is THINK
    assert reasoning_of(["plain", "[THINK]"]).close == "[/THINK]"
    assert HARMONY.always and not GEMMA.always and not MAGISTRAL.always


def test_reasoning_that_is_marked_unasked_is_kept_apart_in_a_chat() -> None:
    model = thinker(switch=False)
    ids = model.tokenizer.encode("<|channel|>analysis<|message|>Hm", add_special=False)
    assert HARMONY.open + "Hm" == model.tokenizer.decode(ids)
    template = model.tokenizer.chat_templates["default"]
    model.tokenizer.chat_templates = {"default": f"{template}{HARMONY.open}"}
    run = generate(model, "Why?", chat=True, max_tokens=6, decoder="plain", temperature=0)
    assert run.reasoning and run.final_text == ""
    raw = generate(model, run.prompt.token_ids, max_tokens=6, decoder="plain", temperature=0)
    assert raw.reasoning is None and raw.final_text.strip() == run.reasoning


@given(
    st.lists(st.sampled_from([OPEN, CLOSE, "<", "think", ">", "/", " ", "\n", "a", "b c"]), max_size=12),
    st.booleans(),
    st.lists(st.integers(1, 4), min_size=60, max_size=60),
)
def test_pieces_give_what_the_whole_gives_and_never_take_anything_back(
    parts: list[str], opened: bool, lengths: list[int]
) -> None:
    text = "".join(parts)
    splitter, reasoning, answer, rest = Splitter(opened), "", "", text
    for length in lengths:
        more = splitter.add(rest[:length])
        reasoning, answer, rest = reasoning + more[0], answer + more[1], rest[length:]
        assert (split(text, opened)[0] or "").startswith(reasoning)
        assert split(text, opened)[1].startswith(answer)
    for more in (splitter.add(rest), splitter.finish()):
        reasoning, answer = reasoning + more[0], answer + more[1]
    assert (reasoning or None, answer) == split(text, opened)


def test_the_budget_forces_the_closing_tag_once_and_only_inside_reasoning() -> None:
    tokenizer = loaded().tokenizer
    ids = tokenizer.encode("some long reasoning", add_special=False)[:10]
    budget = Budget(tokenizer, 10, opened=True)
    forced = []
    while (token := budget([*ids, *forced])) is not None:
        forced.append(token)
    assert tokenizer.decode(forced) == f"\n{CLOSE}\n\n"
    assert budget(ids[:9]) is None
    assert budget([*ids, *forced, 1, 2, 3]) is None
    assert Budget(tokenizer, 10, opened=False)(ids) is None  # nothing to close
    closed = tokenizer.encode(f"ok{CLOSE}", add_special=False)
    assert Budget(tokenizer, len(closed), opened=True)(closed) is None


@pytest.mark.parametrize(
    "decoder", [{"decoder": "plain"}, {"threshold": 0.03}, {"branches": 4, "threshold": 0.03}]
)
def test_reasoning_is_closed_by_its_budget_under_every_decoder(decoder: dict[str, Any]) -> None:
    model = thinker()
    run = generate(model, "Why?", enable_thinking=True, thinking_budget=6, max_tokens=26, **decoder)
    closing = model.tokenizer.encode(f"\n{CLOSE}\n\n", add_special=False)
    assert is_open(run.prompt.text)
    assert run.reasoning and CLOSE not in run.reasoning
    assert CLOSE not in run.final_text and run.final_text
    for step, token in zip(run.steps[6:], closing, strict=False):
        assert {member.id for member in step.tokens} == {token}
        assert {member.id for member in run.steps[5].tokens} != {token}
    assert verify(run, model).max_difference < 1e-4  # forced tokens have the probability they have
    for path in run.paths:
        assert path.token_ids[6 : 6 + len(closing)] == tuple(closing)
        assert CLOSE not in path.text
        assert path.logprob == pytest.approx(
            sum(teacher("llama", run.prompt.token_ids, path.token_ids)), abs=3e-3
        )


@pytest.mark.parametrize("decoder", [{"threshold": 0.03}, {"branches": 4, "threshold": 0.03}])
def test_a_stream_tells_reasoning_from_the_answer_as_both_grow(decoder: dict[str, Any]) -> None:
    settings = {"enable_thinking": True, "thinking_budget": 6, "max_tokens": 26, **decoder}
    growing = stream(thinker(), "Why?", **settings)
    events, reasoning, answer, thought = StepEvents(growing.task, texts=growing.readings), "", "", []
    for step in growing:
        told = events.event(step, 0).data
        reasoning += told["reasoning"]
        answer += "".join(phrase["text"] for phrase in told["phrases"])
        thought.append(reasoning + told["reasoning_tail"])
        assert OPEN not in thought[-1] and CLOSE not in thought[-1] + answer + told["tail"]
    run = growing.run()
    assert thought[4] and run.reasoning and run.reasoning.startswith(thought[4].strip())
    assert (reasoning + told["reasoning_tail"], answer + told["tail"]) == (run.reasoning, run.final_text)


def test_of_the_answer_forks_stay_and_of_the_reasoning_its_text() -> None:
    fork = Phrase("Yes", 0.6, (Alternative("No", 0.4, (9,)),), 4, 5)
    thoughts = replace(fork, text="Well", start=1)
    growing = GrowingAnswer(Splitter(False))
    assert growing.add([Phrase("<think>", None, (), 0, 1), thoughts]) == ("Well", [])
    assert growing.rest(" we go</think> No") == (" we go", "No")
    settled = [Phrase(" we</think>\nSo ", None, (), 2, 4), fork]
    assert growing.add(settled) == (" we", [Phrase("So ", None, (), 2, 4), fork])
    held = GrowingAnswer(Splitter(False))
    assert held.add([Phrase(" ", None, (), 0, 1)]) == ("", [])
    assert held.add([fork]) == ("", [Phrase(" ", None, (), 4, 5), fork])


def test_texts_forced_alike_are_not_merged_for_it() -> None:
    run = generate(
        thinker(),
        "Why?",
        enable_thinking=True,
        thinking_budget=5,
        max_tokens=5 + 11,
        branches=4,
        threshold=0.03,
    )
    widths = [len(step.tokens) for step in run.steps]
    assert widths[4] == 4
    assert widths[5:] == [4] * 11


def test_without_a_budget_nothing_is_forced_and_what_never_closes_is_reasoning() -> None:
    run = generate(thinker(), "Why?", enable_thinking=True, max_tokens=8, decoder="plain", temperature=0)
    free = generate(thinker(), run.prompt.token_ids, max_tokens=8, decoder="plain", temperature=0)
    assert run.reasoning == free.final_text.strip()
    assert run.final_text == ""
    assert free.reasoning is None


def test_a_template_with_a_switch_is_told_and_one_without_gets_a_system_line() -> None:
    with_switch = stream(thinker(), "Why?", enable_thinking=True).prompt.text
    assert with_switch.endswith(f"{OPEN}\n") and SYSTEM_LINE not in with_switch
    assert not stream(thinker(), "Why?", chat=True).prompt.text.endswith(f"{OPEN}\n")
    without = stream(thinker(switch=False), "Why?", enable_thinking=True, system="Be kind.").prompt.text
    assert f"{SYSTEM_LINE}\n\nBe kind." in without
    assert SYSTEM_LINE not in stream(thinker(switch=False), "Why?", chat=True).prompt.text


def test_any_variable_of_the_template_is_passed_on() -> None:
    model = thinker(switch=False)
    template = (
        "{{ messages[0].content }} {{ reasoning_effort }} {% for tool in tools %}{{ tool.name }}{% endfor %}"
    )
    model.tokenizer.chat_templates = {"default": template, "brief": "B"}
    given = ("reasoning_effort=high", 'tools=[{"name": "f"}]')
    assert stream(model, "Why?", chat=True, template_variables=given).prompt.text == "Why? high f"
    assert stream(model, "Why?", chat=True, template_variables=("template=brief",)).prompt.text == "B"
    for odd in ("reasoning_effort", "messages=[]", "a b=c"):
        with pytest.raises(ConfigError, match="is not NAME=VALUE"):
            stream(model, "Why?", chat=True, template_variables=(odd,))
    tools = {"tools": [{"name": "f"}, {"name": "g"}], "reasoning_effort": "low"}
    assert stream(model, "Why?", chat=True, template_variables=tools).prompt.text == "Why? low fg"


def test_the_command_line_passes_variables_on(tmp_path: Path) -> None:
    path = Path(shutil.copytree(twin("llama"), tmp_path / "model", ignore=shutil.ignore_patterns("*.gguf")))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{{ messages[0].content }} {{ reasoning_effort }} "
        "{% for tool in tools %}{{ tool.n + 1 }},{% endfor %}{{ flag }}"
    )
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    variables = ["reasoning_effort=high", 'tools=[{"n": 1}, {"n": 2}]', "flag=true"]
    given = [part for each in variables for part in ("--template-variable", each)]
    run = tmp_path / "run.json"
    options = ["--model", str(path), "--max-tokens", "1", "--quiet", "--json-output-file", str(run)]
    assert main(["generate", "Why?", *options, *given]) == 0
    assert json.loads(run.read_text())["prompt"]["text"] == "Why? high 2,3,True"
