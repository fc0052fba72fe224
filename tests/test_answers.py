"""Answers: texts that say the same are one, with bounds that hold; choices are scored exactly."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tempo_mlx
from tempo_mlx import asking as asking_module
from tempo_mlx.asking import begin, score_choices
from tempo_mlx.cli.ask import print_answers, show_open_ended
from tempo_mlx.cli.main import main
from tempo_mlx.decode.leaves import Path as LeafPath
from tempo_mlx.decode.leaves import Place, masses
from tempo_mlx.errors import ConfigError
from tempo_mlx.output_config import OutputConfig
from tempo_mlx.report.answers import Answer, Answers, answers_of, first_match, last_number, same_text
from tempo_mlx.report.bars import bars
from tempo_mlx.report.records import RunPath
from tempo_mlx.resolution import resolve
from tests.runs import make_run, members, step
from tests.small import LENGTH, PROMPT, all_texts, small
from tests.trees import loaded, teacher
from tests.twins import twin


@pytest.mark.parametrize(
    ("one", "other"),
    [("Canberra.", "canberra"), (" The answer ", "the  ANSWER!"), ("“Yes”", "yes"), ("Ｐａｒｉｓ", "paris")],
)
def test_texts_that_say_the_same(one: str, other: str) -> None:
    assert same_text(one) == same_text(other)


def test_what_texts_answer() -> None:
    assert same_text(" .. ") is None and same_text("3.5") != same_text("35")
    assert same_text("...5") == same_text("5.") == "5" and same_text("(.5)") == ".5"
    assert first_match(r"is (\w+)")("It is red, is it?") == "red"
    assert first_match(r"\d+")("no 12 or 13") == "12" and first_match("x")("y") is None
    for wrong in ("(", "a{99999999999999}", "(" * 5000 + ")" * 5000):
        with pytest.raises(ConfigError, match="is no regular expression"):
            first_match(wrong)


def test_a_regular_expression_that_takes_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempo_mlx.report.answers.MATCH_SECONDS", 0.05)
    slow = first_match(r"(x|xx|xxx)+y?\1z")
    assert slow("xxxyxz") == "x"
    with pytest.raises(ConfigError, match="without a repeat of what repeats"):
        slow("x" * 200)


@pytest.mark.parametrize(("text", "number"), [
    ("7 x 8 = 56.", "56"), ("1,234.50 in all", "1234.5"), ("1,00,000", "100000"), ("1,2,3", "3"), ("x = 3, 4,", "4"),
    ("none", None), ("1.0", "1"), ("100.", "100"), ("it is .25", "0.25"), ("$.50", "0.5"), ("v1.2.3", "3"),
    ("-3", "-3"), ("\u22123", "-3"), ("x=-.5", "-0.5"), ("(-3)", "-3"), ("5 - 3", "3"), ("10-20", "20"),
    ("COVID-19", "19"),
])  # fmt: skip
def test_the_last_number_is_read_as_it_is_written(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_bounds_hold_the_true_probability_of_every_answer() -> None:
    """Known for all texts there are; answers by their first letter, over runs of one leaf to many."""
    truth: dict[str | None, float] = {}
    tokenizer = small(8).tokenizer

    def first_letter(text: str) -> str | None:
        return text[:1] or None

    for text, mass in all_texts(8).items():
        key = first_letter(tokenizer.decode([token for token in text if token != 7]))
        truth[key] = truth.get(key, 0.0) + mass
    for leaves in (1, 3, 10, 100):
        run = tempo_mlx.generate(small(8), PROMPT, leaves=leaves, threshold=0.05, max_tokens=LENGTH)
        found = answers_of("?", run, first_letter)
        assert found.unseen == pytest.approx(1.0 - (run.tree or {})["found"], abs=1e-9)
        for answer in found:
            key = None if answer.text == "(no answer)" else answer.text
            assert answer.lower - 1e-6 <= truth[key] <= answer.upper + 1e-6
        assert sum(answer.lower for answer in found) + found.unseen == pytest.approx(1.0)
        if found.decided:
            assert found[0].text == max((k for k in truth if k), key=lambda k: truth[k])


def test_a_text_that_was_drawn_twice_counts_once() -> None:
    run = tempo_mlx.generate(
        small(8), PROMPT, decoder="sample", beam_width=40, threshold=0.0, max_tokens=LENGTH
    )
    assert len({path.token_ids for path in run.paths}) < len(run.paths)
    found = answers_of("?", run, same_text)
    distinct = {path.token_ids: math.exp(path.logprob) for path in run.paths}
    assert found.unseen == pytest.approx(1.0 - sum(distinct.values()), abs=1e-6)


@pytest.mark.parametrize("sampling", ["independent", "stochastic-beam"])
def test_samples_that_were_ended_before_the_first_token_answer_nothing(sampling: Any) -> None:
    found = tempo_mlx.ask(small(8), PROMPT, decoder="sample", sampling=sampling, timeout=1e-9, chat=False)
    assert len(found) == 0 and found.unseen == 1.0


def test_samples_estimate_how_probable_an_answer_is() -> None:
    settings: dict[str, Any] = {"decoder": "sample", "beam_width": 30, "threshold": 0.0, "max_tokens": LENGTH}
    drawn = tempo_mlx.generate(small(8), PROMPT, sampling="independent", **settings)
    for answer in answers_of("?", drawn, same_text):
        assert answer.estimate == pytest.approx(len(answer.texts) / 30)
    weighed = tempo_mlx.generate(small(8), PROMPT, sampling="stochastic-beam", **settings)
    found = answers_of("?", weighed, lambda text: text[:1])
    assert sum(answer.estimate or 0.0 for answer in found) == pytest.approx(
        sum((weighed.tree or {})["weights"])
    )
    assert answers_of("?", tempo_mlx.generate(small(8), PROMPT, leaves=2), same_text)[0].estimate is None


def test_choices_have_their_exact_probability() -> None:
    model = loaded()
    prompt = "Is it?"
    config = resolve({"chat": True})
    found = score_choices(model, [{"role": "user", "content": prompt}], ["yes", "no", "nothing"], config)
    ids = model.tokenizer.encode_chat([{"role": "user", "content": prompt}])[1]

    def mass(text: str) -> float:
        return math.exp(sum(teacher("llama", ids, model.tokenizer.encode(text, add_special=False))))

    by_name = {answer.text: answer.lower for answer in found}
    assert by_name["yes"] == pytest.approx(mass("yes") + mass("Yes"), rel=1e-3)
    assert by_name["nothing"] == pytest.approx(mass("nothing") + mass("Nothing"), rel=1e-3)
    assert by_name["no"] == pytest.approx(mass("no") + mass("No") - by_name["nothing"], rel=1e-3)
    assert found.unseen == pytest.approx(1.0 - sum(by_name.values()))
    with pytest.raises(ConfigError, match="different ones"):
        score_choices(model, prompt, ["yes", " yes"], config)
    assert [answer.text for answer in tempo_mlx.ask(model, prompt, choices="yes")] == ["yes"]
    with pytest.raises(ConfigError, match="choices is 4; choose text"):
        tempo_mlx.ask(model, prompt, choices=[4, 5])  # type: ignore[list-item]


def test_asking_shows_more_answers_one_by_one_and_ends_with_all() -> None:
    settings: dict[str, Any] = {
        "leaves": 12,
        "threshold": 0.05,
        "max_tokens": LENGTH,
        "min_steps": 2,
        "chat": False,
    }
    asking = begin(small(8), PROMPT, coverage=None, **settings)
    counts, unseen, lengths = [], [], []
    for answers in asking:
        lengths.append(len(asking.decoding.readings()[0].token_ids))
        counts.append(sum(len(answer.texts) for answer in answers))
        unseen.append(answers.unseen)
    assert counts == sorted(counts) and counts[-1] == 12 and unseen == sorted(unseen, reverse=True)
    assert lengths[:2] == [1, 2], "the first is shown while it grows"
    assert tempo_mlx.ask(small(8), PROMPT, coverage=None, **settings) == asking.answers()


def test_a_brief_look_goes_on_for_some_passes_after_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking_module, "ENOUGH", 3)
    settings: dict[str, Any] = {"leaves": 100, "threshold": 0.01, "max_tokens": 3, "rows": 1, "chat": False}
    asking = begin(small(8), PROMPT, coverage=None, brief=True, **settings)
    since = [asking.decoding.decoder.passes for _ in asking if asking.first_ended]
    assert asking.decoding.decoder.passes == since[0] + 3
    assert not asking.answers().open_ended and asking.answers().run.finish_reason == "cancelled"
    whole = begin(small(8), PROMPT, coverage=None, **settings)
    assert len([*whole]) > len(since) + 3 and len(whole.answers().run.paths) > len(asking.answers().run.paths)


def test_an_own_function_says_what_an_answer_is() -> None:
    settings: dict[str, Any] = {"leaves": 9, "max_tokens": LENGTH, "coverage": None, "chat": False}
    found = tempo_mlx.ask(small(8), PROMPT, by=lambda text: str(len(text)), **settings)
    assert {answer.text for answer in found} <= {"0", "1", "2", "3", "4"}
    for wrong in (
        {"by": "colour"},
        {"by": None},
        {"by": "number", "answer_regex": "x"},
        {"answer_regex": 3},
        {"decoder": "superposed"},
        {"config": resolve({"decoder": "enumerate"}), "leaves": 3},
        {"config": resolve({"decoder": "enumerate"}), "choices": ["yes", "no"]},
    ):
        with pytest.raises(ConfigError):
            tempo_mlx.ask(small(8), PROMPT, **wrong)  # type: ignore[arg-type]


def answers(*masses: float) -> Answers:
    unseen = 1.0 - sum(masses)
    found = [Answer(f"answer {at}", mass, mass + unseen) for at, mass in enumerate(masses)]
    return Answers("?", tuple(found), unseen)


def test_bars() -> None:
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=True, color_system=None)
    console.print(bars(answers(0.71, 0.18, 0.04, 0.003, 0.001), 60))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines == [
        "answer 0        71% ██████████████▎",
        "answer 1        18% ███▋",
        "answer 2         4% ▊",
        "2 other answers <1%",
        "not looked at    7% █▍",
    ]


def test_what_is_decided() -> None:
    assert answers(0.6, 0.2).decided and not answers(0.4, 0.2).decided and not answers().decided
    assert "60%" in repr(answers(0.6, 0.2)) and "20% not looked at" in repr(answers(0.6, 0.2))
    assert "answer 0" in answers(0.6)._repr_html_()


def test_the_command_asks_and_leaves_other_decoders_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["ask", "Hello", "-m", str(twin("llama")), "-n", "5"]
    assert main([*base, "--format", "json", "--leaves", "3"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert len({text["text"].strip() for answer in value["answers"] for text in answer["texts"]}) == 3
    assert value["run"]["decoder"] == "enumerate" and 0.0 <= value["not_looked_at"] <= 1.0
    assert main([*base, "--choices", "yes,no", "--format", "json"]) == 0
    assert {answer["text"] for answer in json.loads(capsys.readouterr().out)["answers"]} == {"yes", "no"}
    for other, decoder in (
        (["--branches", "2"], "tree"),
        (["-t", "0.5"], "superposed"),
        (["--view", "phrases"], "superposed"),
    ):
        assert main([*base, *other, "--json-output-file", str(tmp_path / "run.json")]) == 0
        capsys.readouterr()
        assert tempo_mlx.Run.load(tmp_path / "run.json").decoder == decoder


@pytest.mark.parametrize("more", [
    ["--vote", "majority"], ["--verify-with", "true"], ["--answer-number"], ["--answer-regex", "x"],
    ["--json-output-file", "run.json"], ["--output-dir", "."], ["--view", "phrases"], ["--format", "html"],
    ["--temperature", "0.5"], ["--leaves", "4"], ["--decoder", "enumerate"], ["--logit-bias", "5=1"],
])  # fmt: skip
def test_choices_go_with_nothing_that_is_about_texts_or_a_run(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "Hello", "-m", "no-such-model", "--choices", "yes,no", *more]) == 2
    assert "choices are" in capsys.readouterr().err


def test_choices_go_with_settings_that_change_no_score() -> None:
    model = loaded()
    plain = tempo_mlx.ask(model, "Hello", choices=["yes", "no"])
    assert (
        tempo_mlx.ask(model, "Hello", choices=["yes", "no"], max_tokens=4, seed=3, temperature=1.0) == plain
    )
    other = tempo_mlx.ask(model, "Hello", choices=["yes", "no"], system="Be brief.")
    assert other.unseen != plain.unseen
    with pytest.raises(ConfigError, match="which top_p does not change"):
        tempo_mlx.ask(model, "Hello", choices=["yes", "no"], top_p=0.5)


def test_an_open_ended_question_gets_what_the_model_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where each text is one of very many, a list of them answers nothing; asked for, it is given all the same."""
    file = tmp_path / "run.json"
    base = [
        "ask",
        "Hello",
        "-m",
        str(twin("llama")),
        "-n",
        "5",
        "--rows",
        "1",
        "--json-output-file",
        str(file),
    ]
    said = tempo_mlx.generate(
        tempo_mlx.load(twin("llama")), "Hello", decoder="plain", temperature=0.0, chat=True, max_tokens=5
    )
    assert main(base) == 0
    out, err = capsys.readouterr()
    run = tempo_mlx.Run.load(file)
    assert out == said.final_text.strip() + "\n" and run.tree is not None and 0.0 < run.tree["found"] < 0.01
    assert "stopped early" in err and len(run.paths) < 16
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200, color_system=None)
    few = answers_of("Hello", run, same_text)
    show_open_ended(few, console, quiet=False)
    assert "--leaves" in shown.getvalue() and f"{math.exp(few.texts[0].log_mass):.1g}" in shown.getvalue()

    assert main([*base, "--leaves", "20"]) == 0
    assert capsys.readouterr().out == out, "it says the same, however many were looked at"
    many = answers_of("Hello", tempo_mlx.Run.load(file), same_text)
    assert many.open_ended and len(many.run.paths) >= 20
    assert main([*base, "--leaves", "20", "--answer-regex", "."]) == 0
    come_to = answers_of("Hello", tempo_mlx.Run.load(file), first_match("."))
    assert come_to.open_ended and come_to.best is not None
    assert capsys.readouterr().out == come_to.best.text + "\n", "who says what texts come to is told that"
    print_answers(many, OutputConfig(), console)
    listed = [line for line in shown.getvalue().splitlines() if re.match(r" *\d+\. ", line)]
    assert len(listed) == len(many.texts) and out.split()[-1] in listed[0]


def test_a_text_so_long_that_its_probability_is_no_float_has_been_found() -> None:
    """Or a long answer would be looked for again and again, and shown as one of 0%."""
    root = Place(-1, 0.0, 0, 0)
    path = LeafPath((0.0, 0, -1, 0), 1, Place(1, -900.0, 1, 0, root, number=0), "leaf")
    run = make_run(
        [step(0, members({1: 0.5}, 3))],
        decoder="enumerate",
        paths=(RunPath((1,), "an essay", -900.0, True),),
        tree=vars(masses([path])),
        finish_reason="cancelled",
    )
    found = answers_of("?", run, same_text)
    assert found.open_ended and found.unseen == 1.0
    shown = io.StringIO()
    show_open_ended(found, Console(file=shown, force_terminal=True, width=200), quiet=False)
    assert "1e-391" in shown.getvalue()


def test_a_text_stands_once_whatever_blanks_are_around_it() -> None:
    """What is said first comes first though another is more probable; a page is sent what a terminal shows."""
    texts = [
        (" a b", -6.0),
        ("a b\n", -7.0),
        ("c", -5.5),
        ("c ", -9.0),
        ("if x:\n  y", -8.0),
        ("if x:\n y", -8.0),
    ]
    paths = tuple(RunPath((at,), text, logprob, True) for at, (text, logprob) in enumerate(texts))
    run = make_run(
        [step(0, members({1: 0.5, 2: 0.4}, 3))], decoder="enumerate", paths=paths, tree={"found": 0.008}
    )
    found = answers_of("?", run, same_text)
    assert [text.text for text in found.texts] == [" a b", "c", "if x:\n  y", "if x:\n y"]
    value = found.to_dict()
    assert [text["text"] for text in value["texts"]] == [text.text for text in found.texts]
    assert math.exp(value["texts"][0]["logprob"]) == pytest.approx(math.exp(-6.0) + math.exp(-7.0))
    assert [len(answer["texts"]) for answer in value["answers"]] == [1, 1, 2]
    for answer, listed in zip(found, value["answers"], strict=True):
        assert sum(math.exp(text["logprob"]) for text in listed["texts"]) == pytest.approx(answer.lower)
    closed = answers_of("?", dataclasses.replace(run, tree={"found": 0.5}), same_text)
    assert not closed.open_ended and closed.to_dict()["texts"] is None


def test_the_server_answers() -> None:
    pytest.importorskip("fastapi")
    from tests.serving import serving

    with serving(twin("llama")) as served:
        body: dict[str, Any] = {"prompt": "Hello", "max_tokens": 4, "leaves": 3}
        value = served.post("/ask", body).json()
        mine = tempo_mlx.ask(loaded(), "Hello", max_tokens=4, leaves=3)
        assert [answer["text"] for answer in value["answers"]] == [answer.text for answer in mine]
        assert value["not_looked_at"] == pytest.approx(mine.unseen, abs=1e-5)
        scored = served.post("/ask", {"prompt": "Hello", "choices": ["yes", "no"]}).json()
        assert {answer["text"] for answer in scored["answers"]} == {"yes", "no"} and scored["run"] is None
        one = served.post("/ask", {"prompt": "Hello", "choices": "yes"}).json()
        assert [answer["text"] for answer in one["answers"]] == ["yes"]
        for wrong in (
            {"answer_regex": "("},
            {"answer_regex": "a{99999999999999}"},
            {"by": "colour"},
            {"choices": ["yes", "no"], "by": "number"},
            {"choices": ["yes", "no"], "temperature": 0.5},
            {"decoder": "superposed"},
            {"colour": 1},
        ):
            assert served.post("/ask", {**body, **wrong}).status_code == 422, wrong
