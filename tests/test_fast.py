"""`make test-fast` is what it says: no torch, no server, no real model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLLECT = """
import sys, pytest
code = pytest.main(["--fast", "--collect-only", "-q"])
print("HEAVY", [name for name in ("torch", "transformers", "mlx_lm", "uvicorn", "fastapi") if sys.modules.get(name)])
sys.exit(code)
"""


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_nothing_heavy_is_imported_and_much_is_left() -> None:
    out = run("-c", COLLECT)
    assert "HEAVY []" in out
    for module in ("test_lattice", "test_selection", "test_paths", "test_config", "test_cli", "test_run"):
        assert f"tests/{module}.py: " in out, module
    for module in ("test_server", "test_model", "test_verify"):
        assert f"tests/{module}.py: " not in out, module


@pytest.mark.slow
def test_what_needs_a_twin_or_the_real_model_is_left_out() -> None:
    out = run("-m", "pytest", "--fast", "-rs", "tests/test_weights_safetensors.py", "tests/test_speed.py")
    assert "torch" in out and "passed" in out and "deselected" in out
