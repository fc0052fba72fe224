"""The library for products of few rows: right for every shape, and left out where it is not."""

from __future__ import annotations

import ctypes
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from test_blas import run

from tempo_mlx import blas, few_rows
from tempo_mlx.errors import BackendError

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or not blas._installed("mlx-cpu"), reason="for MLX's CPU build on Linux"
    ),
    pytest.mark.slow,  # compiling takes longer than all that is fast
    pytest.mark.skipif(not any(map(shutil.which, few_rows.COMPILERS)), reason="no C compiler here"),
]
REPORT = "from tempo_mlx import blas; i = blas.ensure(); print(i.name, '|', i.few_rows, '|', i.why_not)"


@pytest.fixture(scope="module")
def openblas() -> ctypes.CDLL:
    return ctypes.CDLL(str(blas._renamed_openblas()), ctypes.RTLD_LOCAL)


@pytest.fixture(scope="module")
def made(openblas: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A copy of its own, with two threads."""
    library = ctypes.CDLL(
        str(few_rows.compiled(few_rows.SOURCE, few_rows.COMPILERS, (), tmp_path_factory.mktemp("few"))),
        ctypes.RTLD_LOCAL,
    )
    threads = library.few_rows_start(ctypes.cast(openblas.cblas_sgemm, ctypes.c_void_p), 2)
    assert threads == 2
    return library


@pytest.mark.parametrize("rows", [*range(1, 18), 40])
def test_its_products(made: ctypes.CDLL, rows: int) -> None:
    """Of every number of rows; outputs and lengths that fill no block or vector; small, and shared by threads."""
    rng = np.random.default_rng(rows)
    for outs, size in ((1, 1), (3, 0), (9, 17), (31, 64), (130, 257), (5000, 67)):
        x, w = (rng.standard_normal((n, size), np.float32) for n in (rows, outs))
        exact = x.astype(np.float64) @ w.astype(np.float64).T
        assert few_rows._product(made, x, w) == pytest.approx(exact, abs=1e-5 * max(size, 1))


def test_infinite_and_undefined_numbers_stay_what_they_are(made: ctypes.CDLL) -> None:
    x = np.ones((2, 40), np.float32)
    w = np.ones((3, 40), np.float32)
    w[1, 7], w[2, 39] = np.inf, np.nan
    assert few_rows._product(made, x, w) == pytest.approx(np.array([[40, np.inf, np.nan]] * 2), nan_ok=True)


def test_several_threads_at_once_get_their_own_products(made: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    pairs = [
        (rng.standard_normal((2, 300), np.float32), rng.standard_normal((3000, 300), np.float32))
        for _ in "abcd"
    ]
    wrong = []

    def work(x: np.ndarray, w: np.ndarray) -> None:
        exact = x @ w.T
        wrong.extend(i for i in range(30) if np.abs(few_rows._product(made, x, w) - exact).max() > 1e-3)

    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "change"),
    [
        ("sums[i][j][u] += x * w[j]", "sums[i][j][u] += x * w[0]"),
        ("for (int t = whole; t < p->k; t++)", "for (int t = whole; t + 1 < p->k; t++)"),
        ("p->m - row < 8 ? p->m - row : 8", "1"),
        ("out + step < p->n ? out + step : p->n);\n}", "out + step < p->n ? out + step - 1 : p->n);\n}"),
    ],
)
def test_one_that_computes_wrongly_is_left_out(
    openblas: ctypes.CDLL, line: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what only threads, only ends of rows or only several blocks get wrong."""
    text = few_rows.SOURCE.read_text("utf-8")
    assert text.count(line) == 1
    source = tmp_path / "few_rows.c"
    source.write_text(text.replace(line, change), "utf-8")
    monkeypatch.setattr(few_rows, "SOURCE", source)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    with pytest.raises(BackendError, match="is not the BLAS's"):
        few_rows.load(openblas, tmp_path)


def test_it_stands_in_front_of_the_blas_and_is_made_once(tmp_path: Path) -> None:
    code = """
import ctypes
from tempo_mlx import blas
info = blas.ensure()
address = lambda library: ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value
assert address(ctypes.CDLL(None)) == address(ctypes.CDLL(info.few_rows)) != address(ctypes.CDLL(info.path))
print(info.few_rows)
"""
    path = Path(run(code, XDG_CACHE_HOME=str(tmp_path)))
    when = path.stat().st_mtime_ns
    assert run(code, XDG_CACHE_HOME=str(tmp_path)) == str(path) and path.stat().st_mtime_ns == when
    made = sorted(each.name.partition("-")[0] for each in path.parent.iterdir())
    assert made == ["few", "libopenblas", "packed"]


def test_without_a_compiler_openblas_does_it_all_and_the_reason_is_kept(tmp_path: Path) -> None:
    blas._renamed_openblas()  # its own tools are found in PATH no more
    name, made, why_not = run(REPORT, PATH=str(tmp_path), TEMPO_BLAS="").split(" | ")
    assert (name, made) == ("OpenBLAS", "None") and "install one" in why_not


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: out of ideas' >&2; exit 1\n", "utf-8")
    compiler.chmod(0o755)
    assert "out of ideas" in run(REPORT, PATH=str(tmp_path)).split(" | ")[2]


def test_openblas_alone_where_asked() -> None:
    assert run(REPORT, TEMPO_BLAS="openblas") == "OpenBLAS | None | None"
