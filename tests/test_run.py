from __future__ import annotations

import copy
import errno
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tempo_mlx.decode.step import Removal, Step
from tempo_mlx.errors import OutputError, RunFileError
from tempo_mlx.report.records import RunPath, RunRule
from tempo_mlx.report.run import Run
from tempo_mlx.report.stops import cut_at_stop
from tempo_mlx.strict import adapter
from tests.runs import EOS, WORDS, make_run, members, sky_run, sky_steps, step


def test_json_is_the_identity() -> None:
    run = sky_run(tree={"simulations": 3}, reasoning="Let me think.")
    assert Run.from_json(run.to_json()) == run
    assert Run.from_json(run.to_json(indent=2).encode()) == run


@given(st.lists(st.floats(1e-300, 1.0), min_size=1, max_size=4))
def test_floats_keep_full_precision(probabilities: list[float]) -> None:
    tokens = members({index + 1: p for index, p in enumerate(probabilities)}, 3)
    run = make_run([step(0, tokens)])
    again = Run.from_json(run.to_json())
    assert [t.probability for t in again.steps[0].tokens] == probabilities
    assert again == run


def test_the_file_has_the_fields_of_the_format() -> None:
    value = json.loads(sky_run().to_json())
    assert list(value) == [
        "format", "version", "model", "versions", "decoder", "config", "prompt", "steps", "tree", "reasoning",
        "text", "final_text", "paths", "finish_reason", "timing",
    ]  # fmt: skip
    assert (value["format"], value["version"]) == ("tempo-mlx/run", 1)
    assert list(value["steps"][1]) == [
        "step", "position", "threshold", "exit_layer", "residual_probability", "tokens", "rejected",
    ]  # fmt: skip
    token = value["steps"][1]["tokens"][1]
    assert list(token) == [
        "id", "text", "probability", "slot", "weight", "parents", "removed_after", "removed_why", "attention",
        "posterior",
    ]  # fmt: skip
    assert token["parents"] == [[3, 0.5, 0.1], [4, 0.5, 0.9]]
    assert token["removed_why"] == {
        "signal": "posterior",
        "score": 0.06,
        "threshold": 0.1,
        "unattended": False,
    }
    assert value["steps"][1]["rejected"] == [{"id": 8, "text": "\n", "probability": 0.11, "why": "diversity"}]
    assert value["steps"][3]["tokens"][1]["slot"] is None
    assert value["paths"] == [
        {"token_ids": [1, 3, 5, 6], "text": " was blue today.", "logprob": -3.25, "exact": True}
    ]


def test_position_and_branch_are_written_only_where_set() -> None:
    steps = sky_steps()
    first, second = steps[0].tokens
    steps[0] = step(0, [replace(first, position=7), replace(second, branch=2)])
    value = json.loads(make_run(steps).to_json())
    first, second = value["steps"][0]["tokens"]
    assert (first["position"], second["branch"]) == (7, 2)
    assert "branch" not in first and "position" not in second
    assert Run.from_json(json.dumps(value)) == make_run(steps)


def test_rules_of_the_callers_own_are_named() -> None:
    rules = {"prune": RunRule("stale", "00ff"), "selection": RunRule("mine", None)}
    run = sky_run(custom=rules)
    value = json.loads(run.to_json())
    assert value["custom"]["prune"] == {"name": "stale", "sha256": "00ff"}
    assert Run.from_json(run.to_json()) == run and run.to_dict() == value
    assert "custom" not in json.loads(sky_run(custom={}).to_json())


def test_a_run_is_frozen_and_a_member_learns_four_things() -> None:
    run, steps = sky_run(), sky_steps()
    for frozen, name in ((run, "text"), (run.steps[0], "tokens"), (run.steps[0].tokens[0], "posterior")):
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, name, None)
    member = steps[0].tokens[0]
    for name in ("removed_after", "removed_why", "attention", "posterior"):
        setattr(member, name, None)
    for name in ("id", "probability", "slot", "weight", "parents", "position", "branch", "other"):
        with pytest.raises(FrozenInstanceError):
            setattr(member, name, None)


def test_the_decoders_steps_come_back_from_a_run() -> None:
    """With edges in slot order, whatever the file's order."""
    value = json.loads(sky_run().to_json())
    token_of(value)["parents"].reverse()
    step = Step.of(Run.from_json(json.dumps(value)).steps[1])
    assert [edge.slot for edge in step.tokens[0].parents] == [3, 4]
    step.tokens[0].posterior = 0.5
    recorded = sky_run().steps[1]
    first, *others = recorded.tokens
    assert step.record(WORDS) == replace(recorded, tokens=(replace(first, posterior=0.5), *others))


def test_a_file_that_is_wrong_all_over_takes_no_more_than_one_that_is_wrong_once() -> None:
    """Every fault kept would be some hundred bytes, of a file that says a fault in ten."""
    value = sky_run().to_dict()
    del value["format"], value["version"]
    token_of(value)["parents"] = [["x", "y", "z"]] * 1000
    value["steps"][1]["rejected"] = [{}] * 1000
    value["steps"][2]["tokens"] = ["x"] * 1000
    value["prompt"] |= {f"extra {index}": 1 for index in range(1000)}
    with pytest.raises(ValidationError) as error:
        adapter(Run).validate_python(value)
    assert error.value.error_count() < 20


def test_a_removal_may_come_without_a_reason() -> None:
    value = sky_run().to_dict()
    token_of(value, 1)["removed_why"] = None
    assert Run.from_json(json.dumps(value)).to_dict() == value


def test_a_deeply_nested_file_is_one_sentence() -> None:
    """Whether the JSON reader or the copy of its values gives up first."""
    text = sky_run().to_json()
    for depth in (100, 400, 900, 5000):
        nested = text.replace('"tree": null', '"tree": {"a": ' + "[" * depth + "]" * depth + "}")
        try:
            assert Run.from_json(nested).to_json() == nested
        except RunFileError as error:
            assert depth > 100 and "nested too deeply" in str(error)


def test_numpy_numbers_of_a_decoder_become_plain_ones() -> None:
    steps = sky_steps()
    first, second = steps[0].tokens
    odd = replace(first, probability=np.float32(0.5), slot=np.int64(4))  # type: ignore[arg-type]
    run = make_run([step(0, [odd, second]), *steps[1:]])
    assert Run.from_json(run.to_json()) == run


def test_text_final_text_and_sets() -> None:
    run = sky_run()
    assert run.text == " [was/is][ blue/ish] today[./<eos>]"
    assert run.final_text == " is blue today."
    assert [token.id for token in run.best_path()] == [2, 3, 5, 6]
    assert run.token_sets[1] == [(" blue", 0.5), ("ish", 0.125)]
    assert run.prompt_length == 3


def test_best_path_goes_along_edges_not_by_rank() -> None:
    """Per-position top-1 reads ` was blue`; the edges say ` is blue`."""
    first = members({1: 0.5, 2: 0.4}, 3)
    second = members({3: 0.9}, 5, [3, 4], t3=[0.95, 0.1])  # parents in slot order: 3 is ` is`
    assert make_run([step(0, first), step(1, second)]).final_text == " is blue"


def test_best_path_ends_the_text_only_at_the_last_step() -> None:
    first = members({1: 0.4, EOS: 0.35}, 3)
    second = members({3: 0.01}, 4, [3], t3=[0.01])
    assert make_run([step(0, first), step(1, second)]).final_text == " was blue"
    last = members({EOS: 0.9, 3: 0.1}, 4, [3], t0=[0.9], t3=[0.1])
    run = make_run([step(0, members({1: 0.4}, 3)), step(1, last)])
    assert [token.id for token in run.best_path()] == [1, EOS]
    assert run.final_text == " was"


def test_a_set_removed_whole_prints_nothing_but_links_the_path() -> None:
    steps = sky_steps()
    for token in steps[1].tokens:
        token.removed_after, token.removed_why = 2, Removal("attention", 0.0, 0.1)
    run = make_run(steps)
    assert run.text == " [was/is] today[./<eos>]"
    assert len(run.best_path()) == 4
    assert run.final_text == " is today."


def test_an_unattended_token_stays_in_text_and_paths() -> None:
    steps = sky_steps()
    for token in steps[1].tokens:
        token.removed_after = 2
        token.removed_why = Removal("attention", 0.0, 0.1, unattended=token.id == 3)
    run = make_run(steps)
    assert run.text == " [was/is] blue today[./<eos>]"
    assert run.final_text == " is blue today."


def test_split_characters_are_whole_in_the_texts() -> None:
    steps = [
        step(0, members({9: 0.9}, 3)),  # the first two bytes of the euro sign
        step(1, members({10: 0.8, 6: 0.1}, 4, [3], t10=[0.8], t6=[0.1])),
    ]
    run = make_run(steps)
    assert run.final_text == "€"
    assert run.text == "[€/.]"
    assert [token.text for token in run.steps[0].tokens] == [""]
    assert make_run(steps[:1]).final_text == "\ufffd"


def test_the_final_text_ends_before_a_stop_string() -> None:
    assert sky_run(config={"stop": ["day", " to"], "attend": "lineage"}).final_text == " is blue"
    assert cut_at_stop("abc", ()) == "abc"
    assert cut_at_stop("abcb", ("cb", "b")) == "a"


def test_tree_decoders_read_their_best_path() -> None:
    run = sky_run(decoder="tree")
    assert run.text == run.final_text == " was blue today."


def test_save_and_load(tmp_path: Path) -> None:
    run = sky_run()
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run.json"
    target.write_text("old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"Cannot write .*run\.json: No space left on device"):
        sky_run().save(target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_saving_through_a_link_keeps_the_link_and_the_mode(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "real.json").chmod(0o640)
    (tmp_path / "link.json").symlink_to("real.json")
    sky_run().save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert Run.load(tmp_path / "real.json") == sky_run()
    assert (tmp_path / "real.json").stat().st_mode & 0o777 == 0o640


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing" / "run.json", tmp_path, tmp_path / "file" / "run.json"):
        with pytest.raises(OutputError, match=r"^Cannot write"):
            sky_run().save(path)
    if Path("/dev/full").exists():
        with pytest.raises(OutputError, match="No space left"):
            sky_run().save("/dev/full")


def test_a_missing_or_foreign_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="Cannot read"):
        Run.load(tmp_path / "none.json")
    for content in (
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b'{"a": 1}',
        b"[" * 100_000,
        b"1e5",
        b'"' + b"9" * 5000,
    ):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(RunFileError, match=r"bad\.json"):
            Run.load(tmp_path / "bad.json")


Change = Callable[[dict[str, Any]], object]

CONTRADICTIONS: dict[str, tuple[Change, str]] = {
    "other format": (lambda v: v.update(format="x"), "no run file"),
    "newer version": (lambda v: v.update(version=2), "version 2"),
    "unknown decoder": (lambda v: v.update(decoder="magic"), "magic"),
    "unknown finish": (lambda v: v.update(finish_reason="tired"), "tired"),
    "unknown field": (lambda v: v.update(extra=1), "extra"),
    "unknown token field": (lambda v: token_of(v).update(extra=1), r"steps\[1\]\.tokens\[0\]\.extra"),
    "missing field": (lambda v: v.pop("text"), "lacks text"),
    "missing token field": (lambda v: token_of(v).pop("slot"), r"lacks steps\[1\]\.tokens\[0\]\.slot"),
    "text as a number": (lambda v: v.update(text=3), "text must be text"),
    "id as text": (lambda v: token_of(v).update(id="3"), "whole number"),
    "id as true": (lambda v: token_of(v).update(id=True), "whole number"),
    "negative id": (lambda v: token_of(v).update(id=-1), "whole number"),
    "probability null": (lambda v: token_of(v).update(probability=None), "probability must be a number"),
    "probability above one": (lambda v: token_of(v).update(probability=1.5), "no probability"),
    "probability too large for a float": (lambda v: token_of(v).update(probability=10**400), "finite"),
    "empty prompt": (lambda v: v["prompt"].update(token_ids=[]), "no tokens"),
    "step misnumbered": (lambda v: v["steps"][1].update(step=2), "numbered 2"),
    "step without tokens": (lambda v: v["steps"][0].update(tokens=[]), "no tokens"),
    "slot used twice": (lambda v: token_of(v).update(slot=6), "go on from 5"),
    "slot left out": (lambda v: token_of(v).update(slot=70), "go on from 5"),
    "slot without weight": (lambda v: token_of(v).update(weight=None), "slot and weight"),
    "weight without slot": (lambda v: token_of(v).update(slot=None), "slot and weight"),
    "parents at step 0": (lambda v: v["steps"][0]["tokens"][0].update(parents=[[2, 1.0, 0.5]]), "first step"),
    "parents missing": (lambda v: token_of(v).update(parents=[]), "previous step"),
    "parent twice": (lambda v: token_of(v).update(parents=[[3, 0.5, 0.1], [3, 0.5, 0.1]]), "previous step"),
    "parent two steps ago": (
        lambda v: v["steps"][2]["tokens"][0].update(parents=[[3, 1.0, 1.0]]),
        "previous step",
    ),
    "parent is a pair": (lambda v: token_of(v).update(parents=[[3, 1.0]]), "list of 3, not of 2"),
    "parents sum to less": (lambda v: token_of(v).update(parents=[[3, 0.5, 0.1], [4, 0.4, 0.9]]), "sum to 1"),
    "removed at once": (lambda v: token_of(v, 1).update(removed_after=1), "later step"),
    "removed after the end": (lambda v: token_of(v, 1).update(removed_after=4), "later step"),
    "reason without removal": (lambda v: token_of(v, 1).update(removed_after=None), "removed_why"),
    "removed without slot": (
        lambda v: v["steps"][0]["tokens"].append(
            {**v["steps"][0]["tokens"][0], "slot": None, "weight": None, "removed_after": 2}
        ),
        "without a slot",
    ),
    "tree as a list": (lambda v: v.update(tree=[]), "tree"),
    "rejected above one": (lambda v: v["steps"][1]["rejected"][0].update(probability=1.5), "no probability"),
    "probability below zero": (lambda v: token_of(v).update(probability=-0.1), "no probability"),
    "weight above one": (lambda v: token_of(v).update(weight=1.5), "no probability"),
    "P(i|j) below zero": (
        lambda v: token_of(v).update(parents=[[3, -0.5, 0.1], [4, 1.5, 0.9]]),
        "no probability",
    ),
    "P(j|i) above one": (lambda v: token_of(v)["parents"][0].__setitem__(2, 1.5), "no probability"),
    "lone surrogate": (lambda v: v.update(text="\ud800"), "Unicode"),
    "lone surrogate in the prompt": (lambda v: v["prompt"].update(text="\ud800"), "Unicode"),
    "lone surrogate in the reasoning": (lambda v: v.update(reasoning="\ud800"), "Unicode"),
    "lone surrogate in the best path": (lambda v: v.update(final_text="\ud800"), "Unicode"),
    "lone surrogate in a path": (lambda v: v["paths"][0].update(text="\ud800"), "Unicode"),
    "lone surrogate in a token": (lambda v: token_of(v).update(text="\ud800"), "Unicode"),
    "lone surrogate in a rejected token": (
        lambda v: v["steps"][1]["rejected"][0].update(text="\ud800"),
        "Unicode",
    ),
    "lone surrogate in a signal": (
        lambda v: token_of(v, 1)["removed_why"].update(signal="\ud800"),
        "Unicode",
    ),
    "lone surrogate in a reason": (
        lambda v: v["steps"][1]["rejected"][0].update(why="\ud800"),
        "Unicode",
    ),
    "lone surrogate in a rule": (
        lambda v: v.update(custom={"prune": {"name": "\ud800", "sha256": None}}),
        "Unicode",
    ),
    "lone surrogate in a setting": (lambda v: v["config"].update(stop=["\ud800"]), r"config\.stop\[0\]"),
    "lone surrogate in a setting's name": (lambda v: v["config"].update({"\ud800": 1}), "In config"),
    "lone surrogate in an unknown name": (lambda v: v.update({"\ud800": 1}), "name is not valid Unicode"),
    "lone surrogate in a rule's hash": (
        lambda v: v.update(custom={"prune": {"name": "x", "sha256": "\ud800"}}),
        "Unicode",
    ),
    "lone surrogate in a rule's place": (
        lambda v: v.update(custom={"\ud800": {}}),
        r"lacks custom\..*\.name",
    ),
    "version as true": (lambda v: v.update(version=True), "version must be a whole number from 0, not true"),
    "version as text": (lambda v: v.update(version="1"), "version must be a whole number from 0, not text"),
    "position null": (lambda v: token_of(v).update(position=None), "position must be a whole number"),
    "early exit null": (lambda v: v.update(early_exit=None), "early_exit must be a JSON object, not null"),
    "logprob as text": (lambda v: v["paths"][0].update(logprob="-1"), r"paths\[0\].logprob must be a number"),
    "exact as 1": (lambda v: v["paths"][0].update(exact=1), "exact must be true or false, not 1"),
    "tokens as an object": (
        lambda v: v["steps"][0].update(tokens={}),
        "tokens must be a list, not an object",
    ),
    "step as a list": (lambda v: v["steps"].insert(0, []), r"steps\[0\] must be a JSON object, not a list"),
    "parents as objects": (
        lambda v: token_of(v).update(parents=[{"slot": 3, "posterior": 1.0, "forward": 0.5}]),
        r"parents\[0\] must be a list, not an object",
    ),
    "four values in a parent": (lambda v: token_of(v).update(parents=[[3, 1.0, 0.5, 0]]), "of 3, not of 4"),
    "parent's slot as a number": (lambda v: token_of(v).update(parents=[[3.0, 1.0, 0.5]]), "not 3.0"),
    "rule without a name": (
        lambda v: v.update(custom={"prune": {"sha256": None}}),
        "lacks custom.prune.name",
    ),
}


def token_of(value: dict[str, Any], index: int = 0) -> dict[str, Any]:
    token: dict[str, Any] = value["steps"][1]["tokens"][index]
    return token


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_one_sentence(name: str) -> None:
    change, message = CONTRADICTIONS[name]
    value = json.loads(sky_run().to_json())
    Run.from_json(json.dumps(value))  # fine so far
    change(value)
    with pytest.raises(RunFileError, match=message):
        Run.from_json(json.dumps(value))


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(constant: str) -> None:
    text = sky_run().to_json()
    assert '"logprob": -3.25' in text
    with pytest.raises(RunFileError):
        Run.from_json(text.replace('"logprob": -3.25', f'"logprob": {constant}'))
    with pytest.raises(RunFileError):
        Run.from_json(text.replace('"temperature": 1.0', f'"temperature": {constant}'))


def test_numbers_that_are_none_are_never_written() -> None:
    for broken in (
        {"timing": {"rate": math.nan}},
        {"config": {"x": [math.inf]}},
        {"tree": {"value": -math.inf}},
    ):
        with pytest.raises(RunFileError, match="finite"):
            sky_run(**broken)
    for why in ("score", "threshold"):
        steps = sky_steps()
        steps[1].tokens[1].removed_why = replace(Removal("posterior", 0.06, 0.1), **{why: math.nan})
        with pytest.raises(RunFileError, match="finite"):
            make_run(steps)
    for name in ("attention", "posterior"):
        steps = sky_steps()
        setattr(steps[0].tokens[0], name, math.inf)
        with pytest.raises(RunFileError, match="finite"):
            make_run(steps)
    for name in ("residual_probability", "threshold"):
        run = sky_run()
        with pytest.raises(RunFileError, match="finite"):
            replace(run, steps=(replace(run.steps[0], **{name: math.nan}), *run.steps[1:]))
    run = sky_run()
    with pytest.raises(RunFileError, match="finite"):
        replace(run, paths=(replace(run.paths[0], logprob=-math.inf),))
    with pytest.raises(RunFileError, match="probability"):
        token = replace(run.steps[3].tokens[0], probability=math.nan)
        replace(run, steps=(*run.steps[:3], replace(run.steps[3], tokens=(token,))))


JUNK = st.sampled_from([None, True, -1, 10**30, 0.5, "x", [], {}, [[]], {"a": []}, "\ud800"])


@pytest.mark.slow
@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damage_of_any_kind_is_a_run_file_error(data: st.DataObject) -> None:
    """Replace or remove any node of the file: what comes out is a run or RunFileError, nothing else."""
    value = json.loads(sky_run().to_json())
    node: Any = value
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        if data.draw(st.booleans()):
            node[key] = copy.deepcopy(data.draw(JUNK))
        else:
            del node[key]
        break
    try:
        run = Run.from_json(json.dumps(value))
    except RunFileError as error:
        assert str(error).endswith(".")
    else:
        assert Run.from_json(run.to_json()) == run


def test_to_dataframe() -> None:
    pytest.importorskip("pandas")
    frame = sky_run().to_dataframe()
    assert len(frame) == 8
    assert list(frame[frame.best_path].id) == [2, 3, 5, 6]
    assert frame[frame.removed_signal == "posterior"].text.tolist() == [" clear"]


def test_html_for_notebooks_shows_phrases_and_escapes_text() -> None:
    steps = [step(0, members({1: 0.5, 2: 0.4}, 3))]
    run = make_run(steps)
    markup = run._repr_html_()
    assert re.search(
        r'\[<span title="56%"[^>]*><bdi>was</bdi></span>/<span title="44%"[^>]*><bdi>is</bdi></span>]', markup
    )
    assert "<ol>" not in markup
    odd = json.loads(run.to_json())
    for token in odd["steps"][0]["tokens"]:
        token["text"] = f"<script>{token['text']}"
    assert "<script>" not in Run.from_json(json.dumps(odd))._repr_html_()


def test_html_for_notebooks_lists_several_texts_once_each() -> None:
    paths = [
        RunPath((1,), "was <b>", -1.0, True),
        RunPath((2,), "is", -2.0, True),
        RunPath((3,), "is", -2.0, True),
    ]
    run = make_run([step(0, members({1: 0.5, 2: 0.4}, 3))], decoder="sample", paths=paths)
    markup = run._repr_html_()
    assert "<ol><li>58% <bdi>was &lt;b&gt;</bdi></li><li>42% <bdi>is</bdi></li></ol>" in markup
    assert "<span title" not in markup


def test_phrases_are_the_final_text_cut_where_readings_differ() -> None:
    run = sky_run()
    assert "".join(phrase.text for phrase in run.phrases) == run.final_text
    assert any(phrase.alternatives for phrase in run.phrases)
    plain = make_run(
        [step(0, members({1: 0.5, 2: 0.4}, 3))], decoder="sample", paths=[RunPath((1,), "was", -1.0, True)]
    )
    assert [(phrase.text, phrase.alternatives) for phrase in plain.phrases] == [("was", ())]
