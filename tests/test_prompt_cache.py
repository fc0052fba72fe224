"""The cache of a prompt, kept in a file: the same run, with less computed; what is damaged or another's is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tempo_mlx.api import generate, load
from tempo_mlx.cli.main import main
from tempo_mlx.errors import ModelError
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.verify import verify
from tempo_mlx.sessions.session import Session
from tests.trees import prompt
from tests.twins import twin


class Counting:
    """A model that says how many rows it ran."""

    def __init__(self, model: Any) -> None:
        self.model, self.rows = model, 0
        self.architecture, self.info = model.architecture, model.info
        self.new_cache, self.embeddings = model.new_cache, model.embeddings

    def forward(self, tokens: Any, *rest: Any, **more: Any) -> Any:
        self.rows += len(tokens)
        return self.model.forward(tokens, *rest, **more)


def saved(path: Path, ids: list[int], name: str = "llama", **settings: Any) -> LoadedModel:
    """A model whose last prompt was kept in `path`."""
    model = load(twin(name), **settings)
    session = Session(model)
    session.generate(ids, max_tokens=4, threshold=0.02)
    session.save_cache(path)
    return model


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("wide-mixtral", {"kv_bits": 8}),
        ("llama", {"dtype": "bfloat16"}),
        ("deepseek_v3", {}),
    ],
)
def test_a_prompt_that_begins_alike_is_not_run_again(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    ids, file = prompt(1, 40), tmp_path / "kept"
    model = saved(file, ids, name, **settings)
    again = load(twin(name), prompt_cache=str(file), **settings)
    for longer in (ids, [*ids, 7, 8], [*ids[:30], 9, 9]):  # itself, more, and one that turns away
        counting = Counting(again.model)
        ours = generate(
            replace(again, model=counting), longer, max_tokens=3, decoder="plain", temperature=0.0
        )
        same = next((i for i, (a, b) in enumerate(zip(ids, longer, strict=False)) if a != b), len(ids))
        assert counting.rows == len(longer) - min(same, len(longer) - 1) + 2
        plain = generate(model, longer, max_tokens=3, decoder="plain", temperature=0.0)
        assert [t.id for s in ours.steps for t in s.tokens] == [t.id for s in plain.steps for t in s.tokens]
        assert verify(ours, model).ok


def test_sessions_that_go_back_begin_with_it(tmp_path: Path) -> None:
    from tempo_mlx.config import GenerateConfig
    from tempo_mlx.decode.prefill import never
    from tempo_mlx.report.records import RunPrompt
    from tempo_mlx.sessions.editable import EditableRun
    from tempo_mlx.task import Task

    ids = prompt(2, 20)
    saved(tmp_path / "kept", ids)
    again = load(twin("llama"), prompt_cache=str(tmp_path / "kept"))
    counting = Counting(again.model)
    longer = (*ids, 5, 6)
    kept = replace(again, model=counting)
    run = EditableRun(
        Task(kept, RunPrompt(again.tokenizer.decode(longer), longer), GenerateConfig(threshold=0.02)),
        500,
        never,
    )
    assert counting.rows == 2
    list(run.extend(4, never))
    run.branch(1, 9)
    list(run.extend(2, never))
    assert verify(run.run(), again).ok


def test_what_is_anothers_or_damaged_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "kept"
    saved(file, prompt(3, 12))
    with pytest.raises(ModelError, match="made with another model"):
        load(twin("llama"), prompt_cache=str(file), dtype="bfloat16")
    with pytest.raises(ModelError, match="made with another model"):
        Session(load(twin("qwen3"))).load_cache(file)
    with pytest.raises(ModelError, match="leave out the prompt cache"):
        load(twin("lfm2"), prompt_cache=str(file))
    with safe_open(file, "numpy") as opened:
        about = opened.metadata()
    arrays, whole = load_file(file), file.read_bytes()
    bad = tmp_path / "bad"

    def refused(content: bytes, words: str) -> None:
        bad.write_bytes(content)
        with pytest.raises(ModelError, match=words):
            load(twin("llama"), prompt_cache=str(bad))

    refused(whole[:-8], "not a usable safetensors file")
    refused(b"", "is empty")
    refused(whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:], "is damaged")
    for name, other in (("token_ids", arrays["token_ids"] + 1), ("positions", arrays["positions"] * 2)):
        save_file({**arrays, name: other}, bad, metadata=about)
        refused(bad.read_bytes(), "is damaged")
    save_file(arrays, bad, metadata={"tempo-mlx": json.dumps({"format": "another"})})
    refused(bad.read_bytes(), "is no prompt cache")
    save_file(arrays, bad)
    refused(bad.read_bytes(), "is no prompt cache")


def test_generate_writes_it_and_then_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kept"
    flags = [
        "generate",
        "--model",
        str(twin("llama")),
        "--prompt-cache",
        str(file),
        "--decoder",
        "plain",
        "-n",
        "4",
    ]
    assert main([*flags, "Once upon a time"]) == 0
    first = capsys.readouterr()
    assert "Saved the prompt's cache" in first.err and file.exists()
    written = file.read_bytes()
    assert main([*flags, "Once upon a time"]) == 0
    second = capsys.readouterr()
    assert second.out == first.out and "Saved" not in second.err and file.read_bytes() == written
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_ask_writes_it_too_and_nothing_is_written_of_a_prompt_that_was_not_run(tmp_path: Path) -> None:
    """An empty one would be refused by the next command as damaged."""
    ask = ["ask", "Once upon a time", "-m", str(twin("llama")), "-n", "2", "--leaves", "2", "--prompt-cache"]
    generate_ = ["generate", "Once upon a time", "-m", str(twin("llama")), "--prompt-cache"]
    assert main([*ask, str(tmp_path / "asked")]) == 0 and (tmp_path / "asked").exists()
    written = (tmp_path / "asked").read_bytes()
    assert main([*ask, str(tmp_path / "asked")]) == 0 and (tmp_path / "asked").read_bytes() == written
    for command in (ask, generate_):
        assert main([*command, str(tmp_path / "none"), "--timeout", "1e-9"]) == 0
        assert not (tmp_path / "none").exists()
