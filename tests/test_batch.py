"""Many prompts: in order, resumable to the byte, and one failure stops nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tempo_mlx import batch as library
from tempo_mlx.cli.main import main
from tempo_mlx.report.run import Run
from tests.twins import twin

PROMPTS = ['"Hello there"', '{"prompt": "And you", "seed": 3, "max_tokens": 2}', "", '{"prompt": "x", "threshold": 7}',
           '"Good morning"']  # fmt: skip


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("\n".join(PROMPTS))


def batch(out: str = "runs.jsonl", *more: str) -> int:
    return main(
        ["batch", "prompts.jsonl", "--out", out, "--model", str(twin("llama")), "--max-tokens", "4", *more]
    )


def test_every_line_in_order_and_a_failure_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch() == 1
    lines = Path("runs.jsonl").read_text().splitlines()
    assert [Run.from_json(lines[i]).prompt.text for i in (0, 1, 3)] == [
        "Hello there",
        "And you",
        "Good morning",
    ]
    assert Run.from_json(lines[1]).config["seed"] == 3 and len(Run.from_json(lines[1]).steps) == 2
    failed = json.loads(lines[2])
    assert (failed["format"], failed["index"], failed["prompt"]) == ("tempo-mlx/error", 2, "x")
    assert "threshold" in failed["error"]
    err = capsys.readouterr().err
    assert "Line 3 failed: threshold is 7" in err and "1 of 4 prompts failed" in err


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("half", ["", '{"format": "tempo', "\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_a_killed_batch_goes_on_to_the_same_lines(kept: int, half: str) -> None:
    batch("whole.jsonl")
    whole = Path("whole.jsonl").read_text().splitlines(keepends=True)
    Path("runs.jsonl").write_text("".join(whole[:kept]) + (half if kept < 4 else ""))
    batch()
    assert Path("runs.jsonl").read_text() == "".join(whole)


def test_ctrl_c_leaves_whole_lines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    batch("whole.jsonl")
    started: list[object] = []
    stream = library.stream

    def interrupt_the_second(*arguments: object, **options: object) -> object:
        started.append(arguments)
        if len(started) == 2:
            signal.raise_signal(signal.SIGINT)
        return stream(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(library, "stream", interrupt_the_second)
        assert batch() == 130
    assert len(Path("runs.jsonl").read_text().splitlines()) == 1
    batch()
    assert Path("runs.jsonl").read_text() == Path("whole.jsonl").read_text()


@pytest.mark.parametrize("change", [["--seed", "7"], ["--threshold", "0.5"]])
def test_other_settings_do_not_continue_a_file(change: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    batch()
    before = Path("runs.jsonl").read_bytes()
    capsys.readouterr()
    assert batch("runs.jsonl", *change) == 1
    assert "other prompts or settings" in capsys.readouterr().err
    assert Path("runs.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no prompt"),
        ("\n{}", "line 2 has no prompt"),
        ("nonsense", "line 1 is not JSON"),
        ('{"prompt": 3}', "line 1"),
    ],
)
def test_prompts_that_are_none(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_text(text)
    assert batch() == 2
    assert words in capsys.readouterr().err
    assert not Path("runs.jsonl").exists()


def test_an_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch("no/such/runs.jsonl") == 1
    assert "no/such" in capsys.readouterr().err
