"""Choosing among texts: by votes, by confidence, by a program."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tempo_mlx
from tempo_mlx.cli.main import main
from tempo_mlx.errors import ConfigError
from tempo_mlx.report.answers import last_number, same_text
from tempo_mlx.report.records import RunPath
from tempo_mlx.report.run import Run
from tempo_mlx.voting import choose, lowest_group, program, token_log_probs, verified, vote_of
from tests.trees import loaded, prompt, teacher
from tests.twins import twin


def voted(*texts: tuple[str, float, int]) -> Run:
    """A run of these texts, log-probabilities and lengths."""
    run = tempo_mlx.generate(loaded(), prompt(1), leaves=2, max_tokens=3)
    paths = [
        RunPath(tuple(range(at, at + length)), text, logprob, True)
        for at, (text, logprob, length) in enumerate(texts)
    ]
    return replace(run, paths=tuple(paths))


def test_votes() -> None:
    run = voted(("It is 4.", -1.0, 9), ("5", -2.0, 1), ("so 5", -2.5, 4), ("5!", -3.0, 2), ("none", -0.5, 1))
    assert choose(run, "majority", last_number) == 1  # three say 5, the most probable of them is chosen
    assert choose(run, "mass", last_number) == 0  # 0.37 against 0.14 + 0.08 + 0.05
    assert choose(run, "mean", last_number) == 0  # -0.11 a token
    assert choose(voted(("a", -1.0, 1), ("b", -1.5, 1)), "majority", same_text) == 0
    assert choose(voted(("x", -1.0, 1)), "majority", last_number) == 0
    with pytest.raises(ConfigError, match="no texts to choose from"):
        choose(replace(run, paths=()), "mean", same_text)
    with pytest.raises(ConfigError, match="choose majority, mass, mean, window"):
        vote_of("best")


def test_a_text_that_was_drawn_twice_has_its_mass_once() -> None:
    run = voted(("1", -1.0, 3), ("2", -1.5, 3), ("two 2", -1.6, 4))
    run = replace(run, paths=(*run.paths, run.paths[0]))
    assert choose(run, "majority", last_number) == 0
    assert choose(run, "mass", last_number) == 1  # 0.22 + 0.20 against 0.37


def test_texts_so_long_that_their_probability_is_no_float_are_told_apart() -> None:
    run = voted(("2", -900.0, 1), ("1", -800.0, 1), ("2", -790.0, 1))
    assert choose(run, "mass", last_number) == 2
    assert choose(run, "majority", last_number) == 2


def test_the_surest_least_sure_stretch() -> None:
    assert lowest_group(np.array([-1.0, -3.0])) == -2.0
    log_probs = np.array([-1.0, -5.0, -3.0, 0.0, 0.0])
    assert lowest_group(log_probs, 2) == -4.0
    run = tempo_mlx.generate(loaded(), prompt(1), leaves=4, max_tokens=8, threshold=0.02)
    for path, found in zip(run.paths, token_log_probs(run), strict=True):
        assert found == pytest.approx(teacher("llama", prompt(1), path.token_ids), abs=1e-3)
    sure = [lowest_group(each) for each in token_log_probs(run)]
    assert choose(run, "window", same_text) == sure.index(max(sure))


def test_a_function_or_a_program_tests_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = voted(("one", -1.0, 1), ("two", -2.0, 1), ("three", -3.0, 1))
    assert verified(run, lambda text: text.startswith("t")) == 1
    assert verified(run, lambda text: False) is None
    monkeypatch.chdir(tmp_path)
    Path("check.py").write_text("import sys; sys.exit(sys.stdin.read() != 'three')")
    assert verified(run, f"{sys.executable} check.py") == 2
    for wrong in ("", "python 'x"):
        with pytest.raises(ConfigError):
            program(wrong)


def test_the_command_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = [
        "ask",
        "Hello",
        "-m",
        str(twin("llama")),
        "-n",
        "5",
        "--leaves",
        "3",
        "--json-output-file",
        "run.json",
    ]
    assert main([*base, "--vote", "mean"]) == 0
    run = Run.load("run.json")
    assert capsys.readouterr().out.strip() == run.paths[choose(run, "mean", same_text)].text.strip()
    Path("run.json").unlink()
    assert main([*base, "--verify-with", f"{sys.executable} -c 'raise SystemExit(1)'"]) == 1
    assert "None of the" in capsys.readouterr().err
    assert Run.load("run.json").paths == run.paths  # of which one may be wanted all the same
    for wrong in (
        ["--vote", "best"],
        ["--vote", "mean", "--verify-with", "true"],
        ["--vote", "mean", "--decoder", "plain"],
        ["--vote", "mean", "--view", "sets"],
        ["--vote", "mean", "--format", "json"],
        ["--verify-with", "true", "--output-json"],
    ):
        assert main([*base[:6], *wrong]) == 2


@pytest.mark.parametrize(
    ("given", "decoder", "texts", "more"),
    [
        ([], "diverse-beam", 8, "more, as with --beam-width 16"),
        (["--leaves", "3"], "enumerate", 3, "more, as with --leaves 6"),
        (["--branches", "2"], "tree", 1, "others, as with --decoder diverse-beam"),
        (["--branches", "2", "--threshold", "0"], "tree", 2, "more, as with --branches 4"),
        (["--decoder", "sample", "--beam-width", "4"], "sample", 4, "more, as with --beam-width 8"),
    ],
)
def test_a_program_tests_the_texts_of_any_decoder(
    given: list[str],
    decoder: str,
    texts: int,
    more: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ask = ["ask", "Hello", "-m", str(twin("llama")), "-n", "5", "--json-output-file", "run.json", *given]
    reads = f"{sys.executable} -c 'import sys; sys.exit(sys.stdin.read() != open(\"right\").read())'"
    Path("right").write_text("what no model says")
    assert main([*ask, "--verify-with", reads]) == 1
    assert f"ask for {more}." in " ".join(capsys.readouterr().err.split())
    assert main([*ask, "--vote", "mean"]) == 0
    capsys.readouterr()
    assert main([*ask, "--verify-with", "true"]) == 0
    run = Run.load("run.json")
    assert run.decoder == decoder and len(run.paths) == texts
    Path("right").write_text(run.paths[-1].text)
    assert main([*ask, "--verify-with", reads]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == run.paths[-1].text.strip()
