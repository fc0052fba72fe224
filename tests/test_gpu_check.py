"""The script for a machine with a GPU, rehearsed without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.py"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_says_what_it_would_do() -> None:
    done = check("--plan")
    assert done.returncode == 0
    for part in ("device", "decoders", "parity", "packed", "census", "torch", "doctor"):
        assert f"\n  {part} " in done.stdout


@pytest.mark.slow
def test_a_part_that_fails_hides_no_other(tmp_path: Path) -> None:
    """A packed file that is not there, a part that takes too long, and one that passes."""
    options = ["--rehearse", "--out", str(tmp_path), "--model", str(tmp_path / "none.gguf")]
    done = check(*options, "--parts", "packed,parity,device", "--patience", "5")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("FAIL  packed") and "none.gguf" in lines[0]
    assert lines[1].startswith("PASS  parity") and lines[2].startswith("PASS  device")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failed"] == ["packed"]
    assert report["parts"]["parity"]["found"]["float32"]["tokens"] == 40
    assert "Metal" in report["parts"]["device"]["found"]["kernel"]
    late = check("--rehearse", "--out", str(tmp_path), "--parts", "packed", "--patience", "0.01")
    assert late.returncode == 1 and "stopped after" in late.stdout
