"""Many prompts: in order, resumable to the byte, and one failure stops nothing."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
from pathlib import Path
from typing import Any

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


def test_a_line_can_use_every_spelling_of_a_setting_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [
        {"prompt": "a", "temp": 0.5},
        {"prompt": "b", "treshold": 0.5},
        {"prompt": "c", "model": "another"},
        {"prompt": "d", "self": 1},
    ]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert batch() == 1
    assert Run.from_json(lines_of()[0]).config["temperature"] == 0.5
    err = capsys.readouterr().err
    assert (
        "did you mean threshold?" in err
        and "Line 3 failed: model is" in err
        and "Line 4 failed: self is" in err
    )


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    "half", ["", '{"format": "tempo', '{"format": "tempo-mlx/run", "\N{LATIN SMALL LETTER E WITH ACUTE}']
)
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
    assert "other settings" in capsys.readouterr().err
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


def lines_of(path: str = "runs.jsonl") -> list[str]:
    return Path(path).read_text("utf-8").removesuffix("\n").split("\n")


def test_only_line_feeds_end_a_line_and_a_byte_order_mark_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps({"prompt": "one\u2028two\u0085\x0b"}, ensure_ascii=False)
    Path("prompts.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b'\r\n"second"\n')
    assert batch() == 0
    assert [Run.from_json(line).prompt.text for line in lines_of()] == ["one\u2028two\u0085\x0b", "second"]


def test_a_prompt_that_is_no_unicode_is_an_error_line_and_the_others_run() -> None:
    Path("prompts.jsonl").write_text(
        '"one"\n{"prompt": "a \\ud83d b"}\n{"prompt": "c", "stop": ["\\ud83d"]}\n"two"'
    )
    assert batch() == 1
    one, broken, stop, two = lines_of()
    assert (Run.from_json(one).prompt.text, Run.from_json(two).prompt.text) == ("one", "two")
    assert json.loads(broken)["prompt"] == "a \ud83d b" and "surrogate" in json.loads(broken)["error"]
    assert "Unicode" in json.loads(stop)["error"]
    before = Path("runs.jsonl").read_bytes()
    assert batch() == 1 and Path("runs.jsonl").read_bytes() == before


def test_a_file_that_is_no_text_is_refused_by_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_bytes(b'"one"\n"\xff"\n')
    assert batch() == 2
    assert "line 2 is not UTF-8 text" in capsys.readouterr().err


def test_what_failed_is_tried_again_in_its_place() -> None:
    batch("whole.jsonl")
    Path("good.jsonl").write_text("\n".join([*PROMPTS[:3], '"x"', *PROMPTS[4:]]))
    whole = lines_of("whole.jsonl")
    Path("runs.jsonl").write_text("\n".join([whole[0], error_line(1, "And you"), *whole[2:]]) + "\n")
    assert batch() == 1
    assert lines_of() == whole


def error_line(index: int, prompt: str) -> str:
    return json.dumps({"format": "tempo-mlx/error", "index": index, "prompt": prompt, "error": "no room"})


def test_errors_are_kept_where_asked_and_still_count(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_text('"one"\n"two"')
    assert batch("whole.jsonl") == 0
    kept = [lines_of("whole.jsonl")[0], error_line(1, "two")]
    Path("runs.jsonl").write_text("\n".join(kept) + "\n")
    capsys.readouterr()
    assert batch("runs.jsonl", "--keep-errors") == 1
    assert lines_of() == kept and "1 of 2 prompts failed" in capsys.readouterr().err
    assert batch() == 0
    assert lines_of() == lines_of("whole.jsonl")


@pytest.mark.parametrize("other", ['"Hello there, you"', '"Hello"', '"ello ther"', '"And you"'])
def test_a_prompt_within_another_is_another(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    batch()
    before = Path("runs.jsonl").read_bytes()
    Path("prompts.jsonl").write_text("\n".join([other, *PROMPTS[1:]]))
    assert batch() == 1
    assert "Line 1 of runs.jsonl was made from other prompts" in capsys.readouterr().err
    assert Path("runs.jsonl").read_bytes() == before


@pytest.mark.parametrize("chat", [["--chat"], ["--chat", "--system", "Be brief."]])
def test_a_chat_goes_on_by_its_own_prompts_only(chat: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_text('"one"\n"two"')
    assert batch("runs.jsonl", *chat) == 0
    before = Path("runs.jsonl").read_bytes()
    assert batch("runs.jsonl", *chat) == 0 and Path("runs.jsonl").read_bytes() == before
    Path("prompts.jsonl").write_text('"on"\n"two"')
    assert batch("runs.jsonl", *chat) == 1
    assert "other prompts" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["--model", "--backend=torch", "--dtype=float16"])
def test_another_model_or_precision_does_not_continue_a_file(
    change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch()
    before = Path("runs.jsonl").read_bytes()
    capsys.readouterr()
    assert batch("runs.jsonl", *([change, str(twin("qwen2"))] if change == "--model" else [change])) == 1
    assert "other weights, or computed otherwise" in capsys.readouterr().err
    assert Path("runs.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"kv_bits": 8}, {"device": "gpu"}, {"quantization": "Q4_1"}, {"sha256": "0"}]
)
def test_a_line_of_another_precision_or_device_is_not_continued(change: dict[str, Any]) -> None:
    batch()
    lines = lines_of()
    value = json.loads(lines[1])
    value["model"].update(change)
    Path("runs.jsonl").write_text("\n".join([lines[0], json.dumps(value)]) + "\n")
    before = Path("runs.jsonl").read_bytes()
    assert batch() == 1 and Path("runs.jsonl").read_bytes() == before


def test_a_copy_of_the_model_continues_it(tmp_path: Path) -> None:
    Path("prompts.jsonl").write_text('"one"\n"two"')
    batch("whole.jsonl")
    Path("runs.jsonl").write_text(lines_of("whole.jsonl")[0] + "\n")
    shutil.copytree(twin("llama"), "copy")
    assert batch("runs.jsonl", "--model", "copy") == 0
    assert Run.from_json(lines_of()[1]).steps == Run.from_json(lines_of("whole.jsonl")[1]).steps


def test_a_measured_width_continues_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))
    Path("prompts.jsonl").write_text('"one"')
    assert batch("runs.jsonl", "--max-parallel-tokens", "auto") == 0
    assert batch("runs.jsonl", "--max-parallel-tokens", "auto") == 0


def test_two_at_once_do_not_write_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    batch()
    before = Path("runs.jsonl").read_bytes()
    with Path("runs.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        capsys.readouterr()
        assert batch() == 1
    assert "is being written by another process" in capsys.readouterr().err
    assert Path("runs.jsonl").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_disk_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch("/dev/full") == 1
    err = capsys.readouterr().err
    assert "Cannot write /dev/full: No space left on device" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "line", ["{}", "[]", "3", '{"format": "tempo-mlx/error"}', '{"format": "tempo-mlx/run"}', "\0"]
)
def test_a_file_of_something_else_is_left_alone(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs.jsonl").write_text(line + "\n")
    assert batch() == 1
    assert "other data than a batch's" in capsys.readouterr().err
    assert Path("runs.jsonl").read_text() == line + "\n"


@pytest.mark.parametrize(
    "text", ["my notes", '"Hello there"', '{"format": "mine"', '{"format": "tempo-mlx/other"}']
)
def test_the_end_of_another_file_is_no_half_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it is the prompts' own file."""
    for name in ("runs.jsonl", "prompts.jsonl"):
        Path(name).write_text(text)
        Path("prompts.jsonl").write_text('"Hello there"')
        before = Path(name).read_text()
        assert batch(name) == 1
        assert "other data than a batch's" in capsys.readouterr().err
        assert Path(name).read_text() == before


def test_a_line_that_lost_its_end_is_kept() -> None:
    batch()
    before = Path("runs.jsonl").read_bytes()
    Path("runs.jsonl").write_bytes(before[:-1])
    batch()
    assert Path("runs.jsonl").read_bytes() == before


def test_what_can_never_be_written_has_a_remedy_that_helps(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    for name in ("folder", "no/such/runs.jsonl"):
        assert batch(name) == 1
        assert "choose a place that exists" in capsys.readouterr().err


def test_a_system_message_from_a_file() -> None:
    Path("prompts.jsonl").write_text('"one"\n{"prompt": "two", "system": "Be kind."}')
    Path("brief.txt").write_text("Be brief.\n")
    Path("settings.toml").write_text('chat = true\nsystem_file = "brief.txt"\n')
    assert batch("runs.jsonl", "--config", "settings.toml") == 0
    assert [Run.from_json(line).config["system"] for line in lines_of()] == ["Be brief.", "Be kind."]
