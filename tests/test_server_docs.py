"""The examples in the documents work: every shell and Python block that talks to the server is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")
pytest.importorskip("openai")

from tests.serving import ROOT, Served, serving, with_context
from tests.twins import twin

BLOCKS = [
    (f"{path.name}-{number}", language, code)
    for path in (ROOT / "docs" / "server.md",)
    for number, (language, code) in enumerate(
        re.findall(r"```(sh|python)\n(.*?)```", path.read_text("utf-8"), re.S)
    )
    if "localhost:8000" in code
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = with_context(twin("llama"), 4096, tmp_path_factory.mktemp("models"))
    with serving(model, "--model-alias", "smollm2-135m") as served:
        yield served


@pytest.mark.parametrize(
    ("language", "code"), [block[1:] for block in BLOCKS], ids=[block[0] for block in BLOCKS]
)
def test_examples(language: str, code: str, server: Served, tmp_path: Path) -> None:
    code = code.replace("http://localhost:8000", server.url)
    if language == "sh":
        code = "set -euo pipefail\n" + code.replace("curl -s", "curl --fail-with-body -s").replace(
            "python3", sys.executable
        )
        command = ["bash", "-c", code]
    else:
        command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, text=True, capture_output=True, timeout=60, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 7


def test_the_error_codes_are_the_documented_ones() -> None:
    documented = set(
        re.findall(
            r"`([a-z_]+)`", (ROOT / "docs" / "server.md").read_text("utf-8").split("Errors have one")[1]
        )
    )
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "tempo_mlx" / "server").glob("*.py"))
    assert all(f'"{code}"' in source for code in documented)
    assert set(re.findall(r'ApiError\(\s*\d+,\s*"([a-z_]+)"', source)) <= documented
